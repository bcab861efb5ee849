"""Runs that go on with other settings: what --override may change, what that means, what is refused, the way on."""

import json
import math
import re
import shutil

import pytest
import torch
from helpers import load_weights

import run_dapt
import run_finetune
from utils.cli import ConfigError
from utils.flags import dapt_parser, finetune_parser

TINY = ["--data_set", "DoTA", "--device", "cpu", "--num_workers", "0", "--aa", "none", "--print_freq", "1"]
TINY += ["--nb_samples_per_epoch", "16", "--total_batch_size", "4", "--epochs", "2", "--warmup_epochs", "1"]
FINETUNE = [*TINY, "--model", "vit_tiny_patch16_64", "--disable_eval_during_finetuning"]
DAPT = [*TINY, "--model", "pretrain_videomae_tiny_patch16_64", "--sampling_rate", "1"]


def finetune(*words):
    run_finetune.main(finetune_parser("").parse_args([*FINETUNE, *map(str, words)]))


def dapt(*words):
    run_dapt.main(dapt_parser("").parse_args([*DAPT, *map(str, words)]))


def state(folder):
    return torch.load(folder / "checkpoint-last" / "state.pth", weights_only=True)


def edited(source, folder, **changes):
    """A copy of a run's checkpoint-last that stands elsewhere, or whose run had other arguments."""
    content = state(source)
    content["args"] |= changes.pop("arguments", {})
    folder.mkdir(parents=True)
    torch.save(content | changes, folder / "state.pth")
    return folder


def arguments(folder):
    return json.loads((folder / "args.json").read_text())["args"]


def epochs(folder):
    return [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def halfway(dota_root, tmp_path_factory):
    """The output folder of a run of two epochs that was stopped after the first."""
    folder = tmp_path_factory.mktemp("halfway") / "run"
    finetune("--data_path", dota_root, "--output_dir", folder, "--stop_epoch", 1)
    return folder


@pytest.fixture(scope="module")
def finished(dota_root, halfway, tmp_path_factory):
    """The output folder of that run when it is over."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(halfway, folder)
    finetune("--data_path", dota_root, "--output_dir", folder)
    return folder


@pytest.fixture
def go_on(dota_root, tmp_path):
    """Continue a run in tmp_path / "on"; returns that folder."""

    def go_on(source, *words, script=finetune):
        source = source if source.name == "checkpoint-last" else source / "checkpoint-last"
        script("--data_path", dota_root, "--output_dir", tmp_path / "on", "--resume", source, *words)
        return tmp_path / "on"

    return go_on


def cosine(step, steps, base, final):
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * step / steps))


def test_more_epochs_of_a_finished_run(finished, go_on):
    """The schedule is laid out anew over all epochs, and goes on where the run stands."""
    folder = go_on(finished, "--override", "epochs", "--epochs", 4, "--stop_epoch", 3)
    assert epochs(folder) == [2] and arguments(folder)["overridden"] == {"epochs": [2, 4]}
    scale = 4 / 256  # of the batch; the last step of 3 epochs of 4 steps, one epoch of them warm-up
    expected = cosine(11 - 4, 16 - 4, 1e-3 * scale, 1e-6 * scale)
    group = state(folder)["optimizer"]["param_groups"][-1]
    assert group["lr"] / group["lr_scale"] == pytest.approx(expected)
    assert not torch.equal(
        load_weights(folder / "checkpoint-2.pth")["head.weight"], state(finished)["model"]["head.weight"]
    )
    finetune_again = ["--override", "epochs", "--epochs", 4]
    go_on(finished, *finetune_again)  # the same command goes on from its own state
    assert epochs(folder) == [2, 3] and arguments(folder)["overridden"] == {"epochs": [2, 4]}


SETTINGS = {
    "lr": (["--lr", "0.01", "--min_lr", "1e-5"], ["lr", "min_lr"]),
    "decay": (["--weight_decay", "0.2", "--layer_decay", "0.8"], ["weight_decay", "layer_decay"]),
    "adam": (
        ["--opt_betas", "0.8", "0.9", "--opt_eps", "1e-6", "--clip_grad", "1"],
        ["opt_betas", "opt_eps", "clip_grad"],
    ),
    "batch": (["--total_batch_size", "8"], ["total_batch_size"]),
    "samples": (["--nb_samples_per_epoch", "8", "--seed", "7"], ["nb_samples_per_epoch", "seed"]),
    "augmentation": (["--aa", "rand-m6-n3", "--reprob", "1", "--num_sample", "2"], ["aa", "reprob", "num_sample"]),
    "dropout": (["--drop", "0.1", "--drop_path", "0.1", "--loss", "focal"], ["drop", "drop_path", "loss"]),
    "data": (["--sampling_rate", "2"], ["sampling_rate"]),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_that_can_change(what, halfway, go_on):
    words, names = SETTINGS[what]
    folder = go_on(halfway, *words, "--override", *names)
    record, content = arguments(folder), state(folder)
    assert set(record["overridden"]) == {*names, *(["weight_decay_end"] if what == "decay" else [])}
    assert epochs(folder) == [1] and content["epoch"] == 2
    groups, steps = content["optimizer"]["param_groups"], {"batch": 2, "samples": 2}.get(what, 4)
    assert (content["num_windows"] == state(halfway)["num_windows"]) == (what != "data")
    assert content["steps_per_epoch"] == steps and content["optimizer"]["state"][0]["step"] == 4 + steps
    expected = {"adam": ((0.8, 0.9), 1e-6)}.get(what, ((0.9, 0.999), 1e-8))
    assert all((tuple(g["betas"]), g["eps"]) == expected for g in groups)
    assert {g["weight_decay"] for g in groups} == {0.0, 0.2 if what == "decay" else 0.05}
    assert max(g["lr_scale"] for g in groups) == 1
    assert sorted(g["lr_scale"] for g in groups)[-3] == pytest.approx(0.8 if what == "decay" else 0.6)
    base, final = (0.01, 1e-5) if what == "lr" else (1e-3, 1e-6)
    scale = (8 if what == "batch" else 4) / 256
    assert max(g["lr"] for g in groups) == pytest.approx(cosine(steps - 1, steps, base, final) * scale)


def test_an_average_starts_from_the_weights_there_are_and_goes(halfway, go_on, dota_root, tmp_path):
    on = go_on(halfway, "--model_ema", "--model_ema_decay", 0.999999, "--override", "model_ema", "model_ema_decay")
    before, after = state(halfway)["model"], state(on)
    torch.testing.assert_close(after["model_ema"], before, atol=1e-7, rtol=1e-4)
    assert any(not torch.equal(after["model"][k], before[k]) for k in before)
    source = edited(halfway, tmp_path / "average", model_ema=before, arguments={"model_ema": True})
    finetune("--data_path", dota_root, "--output_dir", tmp_path / "off", "--resume", source, "--override", "model_ema")
    assert state(tmp_path / "off")["model_ema"] is None and epochs(tmp_path / "off") == [1]


def test_a_scaler_comes_and_goes_with_the_precision(halfway, go_on, dota_root, tmp_path):
    on = go_on(halfway, "--precision", "fp16", "--override", "precision", "epochs", "--epochs", 3, "--stop_epoch", 2)
    assert state(on)["scaler"]["scale"] > 1 and arguments(on)["overridden"]["precision"] == ["fp32", "fp16"]
    words = ["--data_path", dota_root, "--output_dir", tmp_path / "off", "--resume", on / "checkpoint-last"]
    finetune(*words, "--override", "precision", "--epochs", 3, "--precision", "bf16")
    assert state(tmp_path / "off")["scaler"] is None and epochs(tmp_path / "off") == [2]
    changed = arguments(tmp_path / "off")["overridden"]  # the changes before stay known
    assert changed == {"precision": ["fp16", "bf16"], "epochs": [2, 3]}


def test_a_number_format_follows_the_device_and_no_other_change(halfway, go_on, tmp_path, capsys):
    moved = edited(halfway, tmp_path / "cuda" / "checkpoint-last", arguments={"device": "cuda", "precision": "bf16"})
    assert epochs(go_on(moved)) == [1] and "overridden" not in arguments(tmp_path / "on")
    assert "the run goes on in fp32 on cpu, after bf16 on cuda" in capsys.readouterr().out
    same = edited(halfway, tmp_path / "cpu" / "checkpoint-last", arguments={"precision": "bf16"})
    shutil.rmtree(tmp_path / "on")
    with pytest.raises(ConfigError, match="precision: bf16 -> fp32.*--override precision"):
        go_on(same)


def test_windows_come_in_another_order_only_at_the_start_of_an_epoch(halfway, go_on, tmp_path):
    within = edited(halfway, tmp_path / "within" / "checkpoint-last", step=3)
    match = "total_batch_size: windows come in .* epoch 1, 3 of 4 steps: let that run end the epoch first, .*_epoch 2"
    with pytest.raises(ConfigError, match=match):
        go_on(within, "--total_batch_size", 8, "--override", "total_batch_size")
    trained = edited(halfway, tmp_path / "trained" / "checkpoint-last", epoch=0, step=4, means={"loss": 7.0})
    folder = go_on(trained, "--total_batch_size", 2, "--override", "total_batch_size")
    records = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [0, 1] and records[0]["train_loss"] == 7.0 != records[1]["train_loss"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "0.1"], r"of a run with other arguments \(lr: 0.001 -> 0.1\): use those; or go on .* --override lr$"),
        (["--lr", "0.1", "--epochs", "9", "--override", "lr"], r"\(epochs: 2 -> 9\): .* --override epochs lr$"),
        (["--epochs", "1", "--warmup_epochs", "0"], r"of 2 epochs after 1, --epochs 2 --stop_epoch 1; or go on"),
        (["--gelu", "tanh", "--lr", ".1"], "no run is continued with another gelu: start one from the weights of this"),
        (["--view_fps", "2"], r"from the weights of .* its checkpoint-<epoch>.pth with --override_spec$"),
        (["--tubelet_size", "1"], "tubelet_size, nor are its weights of that: start one from others, in another"),
        (
            ["--override", "gelu"],
            "--override gelu: not among what it can change, which is aa, assume_fps, .* --finetune",
        ),
        (["--override", "learning_rate"], "--override learning_rate: not among what it can change"),
        (["--override", "num_workers"], "--num_workers may change without it"),
        (["--override", "lr"], "--override lr: it is 0.001 in .*, too; give --lr another value"),
        (["--layer_decay", "1", "--override", "layer_decay"], "--layer_decay changes from below 1 to below 1 alone"),
        (["--sampling_rate", "2"], "sampling_rate: 1 -> 2"),
    ],
    ids=lambda v: "_".join(v) if isinstance(v, list) else "",
)
def test_what_cannot_change_is_refused_and_the_way_on_named(halfway, go_on, words, message):
    with pytest.raises(ConfigError, match=message):
        go_on(halfway, *words)


def test_a_run_is_changed_in_another_folder(halfway, dota_root):
    words = ["--data_path", dota_root, "--output_dir", halfway, "--lr", 0.1]
    last = halfway / "checkpoint-last"
    match = f"use those or .*; or go on with the new ones in another --output_dir: --resume {last} --override lr$"
    with pytest.raises(ConfigError, match=match):
        finetune(*words)
    with pytest.raises(ConfigError, match="--override needs --resume DIR, .* and another --output_dir"):
        finetune(*words, "--override", "lr")
    with pytest.raises(ConfigError, match="belongs to a run with other arguments"):
        finetune(*words, "--override", "lr", "--resume", last)


def test_nothing_left_to_do_is_an_error(finished, halfway, go_on):
    with pytest.raises(
        ConfigError, match="2 epochs are done, .* ends after 2: for more, --override epochs with larger"
    ):
        go_on(finished)
    with pytest.raises(ConfigError, match="1 epochs are done, .* ends after 1: for more, --stop_epoch up to 2"):
        go_on(halfway, "--stop_epoch", 1)
    with pytest.raises(ConfigError, match="2 epochs are done, and this command ends after 1"):
        go_on(finished, "--epochs", 1, "--warmup_epochs", 0, "--override", "epochs", "warmup_epochs")


def test_pre_training_goes_on_with_other_settings_too(dota_root, go_on, tmp_path):
    run = tmp_path / "run"
    dapt("--data_path", dota_root, "--output_dir", run)
    with pytest.raises(ConfigError, match="2 epochs are done, .* for more, --override epochs with larger --epochs"):
        go_on(run, script=dapt)
    with pytest.raises(
        ConfigError, match="no run is continued with another normalize_target: .* --from_ckpt its check"
    ):
        go_on(run, "--no_normalize_target", script=dapt)
    words = ["--epochs", 3, "--mask_ratio", 0.5, "--total_batch_size", 8, "--precision", "bf16"]
    names = ["epochs", "mask_ratio", "total_batch_size", "precision"]
    folder = go_on(run, *words, "--override", *names, script=dapt)
    assert epochs(folder) == [2] and state(folder)["steps_per_epoch"] == 2
    assert arguments(folder)["overridden"]["total_batch_size"] == [[4], [8]]


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (finetune, ["--input_size", 60], "input_size 60 must be a multiple of the patch size 16"),
        (finetune, ["--num_frames", 6, "--tubelet_size", 4], "num_frames 6 of tubelet_size 4"),
        (finetune, ["--freeze_layers", 5], "cannot freeze 5 of 4 blocks"),
        (finetune, ["--min_lr", 0.1, "--lr", 0.01], "--min_lr 0.1, the final rate, must not be above --lr 0.01"),
        (finetune, ["--warmup_epochs", 2], "--warmup_epochs 2 must be below --epochs 2"),
        (finetune, ["--stop_epoch", 3], "--stop_epoch 3 <= --epochs 2 must hold"),
        (finetune, ["--start_epoch", 2], "--start_epoch 2 < --stop_epoch 2"),
        (finetune, ["--eval", "--input_size", 60], "input_size 60 must be a multiple of the patch size 16"),
        (dapt, ["--mask_ratio", 0.05], "mask_ratio 0.05 of the 16 tokens of a frame: some must be masked and some not"),
        (dapt, ["--input_size", 60], "input_size 60 must be a multiple of the patch size 16"),
        (
            dapt,
            ["--output_dir", "a\udcff"],
            "--output_dir a\\udcff: its name is not in UTF-8, and PyTorch opens no other",
        ),
        (finetune, ["--freeze_encoder", "--cache_features", "\udcff"], "--cache_features \\udcff: its name is not in"),
        (dapt, ["--min_lr", 0.1], "--min_lr 0.1, the final rate, must not be above --lr 0.0003"),
        (dapt, ["--warmup_epochs", 3], "--warmup_epochs 3 must be below --epochs 2"),
    ],
    ids=lambda v: "_".join(map(str, v)) if isinstance(v, list) else "",
)
def test_flags_that_do_not_go_together_are_refused_before_data_is_read(script, words, message, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(message)):
        script("--data_path", tmp_path / "nowhere", "--output_dir", tmp_path / "run", *words)
