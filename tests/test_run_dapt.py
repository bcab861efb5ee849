"""run_dapt.py as a user runs it: mixes of real video files and zips, torchrun, what it leaves and what it refuses."""

import csv
import json
import shutil

import av
import numpy as np
import pytest
import torch
from helpers import SHARED, cut_dota, golden, load_weights, published_file, run, write_video
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import models
import run_dapt
import run_finetune
from datasets.clips import DataError
from datasets.tools.synthetic import Scene, render_clip
from models import create_model
from models.weights import CheckpointError
from utils.cli import ConfigError
from utils.flags import dapt_parser, finetune_parser

TINY = ["--model", "pretrain_videomae_tiny_patch16_64", "--device", "cpu", "--num_workers", "0"]
SHORT = ["--nb_samples_per_epoch", "12", "--epochs", "2", "--warmup_epochs", "1", "--aa", "none"]
SHARES = ["--total_batch_size", "4", "2"]


def in_process(*words):
    run_dapt.main(dapt_parser("").parse_args([str(w) for w in words]))


def render_cap_data(root, *, clips, size):
    """CAP-DATA's layout: zips of JPEG numbered from 1, the annotation sheet and the training split."""
    (root / "annotation").mkdir(parents=True)
    (root / "CAPDATA_my_split").mkdir()
    rows, names = [], []
    for i in range(1, clips + 1):
        scene = Scene(np.random.default_rng([9, i]), size)
        folder = root / "frames" / "10" / f"{i:06d}"
        render_clip(folder, scene, packed=False, name="{:06d}.jpg", first=1)
        rows.append(
            [f"{i:06d}", 10, 1, scene.start + 1, scene.end, scene.start + 6, scene.num_frames, "[CLS] a, b [SEP]"]
        )
        names.append(f"10/{i:06d}\n")
    header = ["video", "type", "light(day,night)1-2", "abnormal start frame", "abnormal end frame", "accident frame"]
    with (root / "annotation" / "cap_text_annotations.csv").open("w", newline="") as f:
        csv.writer(f).writerows([[*header, "total frames", "texts"], *rows])
    (root / "CAPDATA_my_split" / "training.txt").write_text("".join(names))


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A folder of videos, two of them broken, one too short, and a small CAP-DATA."""
    root = tmp_path_factory.mktemp("dapt")
    for i, fps in enumerate((30, 25, 10)):
        write_video(root / "videos" / f"{i}.mp4", frames=40, fps=fps)
    write_video(root / "videos" / "short.mp4", frames=3, fps=30)
    (root / "videos" / "empty.mov").touch()
    (root / "videos" / "corrupt.mov").write_bytes((root / "videos" / "0.mp4").read_bytes()[:900])
    render_cap_data(root / "cap", clips=3, size=(96, 54))
    return root


def mix(roots, output, *more):
    sets = ["--data_set", "videos", "CAP-DATA", "--data_path", roots / "videos", roots / "cap", "--sampling_rate", 2, 1]
    return [*TINY, *SHORT, *sets, "--output_dir", output, *more]


def log(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(roots, tmp_path_factory):
    """The output folder of a finished run of two epochs over the mix."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    in_process(*mix(roots, folder, *SHARES))
    return folder


def test_what_a_run_leaves_behind(finished):
    assert {p.name for p in finished.iterdir() if "tfevents" not in p.name} == {
        *("args.json", "log.txt", "videos.json", "pictures", "checkpoint-last", "checkpoint-0.pth", "checkpoint-1.pth"),
    }
    records = log(finished)
    assert [r["epoch"] for r in records] == [0, 1]
    assert {"train_loss", "train_trivial_loss", "train_grad_norm", "seconds"} <= records[0].keys()
    assert 0.5 < records[0]["train_trivial_loss"] < 1
    for epoch in (0, 1):  # 4 clips x 3 rows of 4 frames of 64 x 64, two captions and four names
        size = Image.open(finished / "pictures" / f"epoch-{epoch:03d}.png").size
        assert size[0] >= 4 * 64 and size[1] == 4 * 3 * 64 + 6 * 20
    tags = EventAccumulator(str(finished)).Reload().Tags()
    assert {"train/loss", "train/trivial_loss", "train/lr"} <= set(tags["scalars"]) and tags["images"] == [
        "reconstruction"
    ]
    args = json.loads((finished / "args.json").read_text())["args"]
    assert args["data_split"] == ["all", "train"] and args["batch_size"] == [4, 2] and args["short_side"] == 91


def test_the_encoder_goes_into_fine_tuning(finished, dota_root, tmp_path, capsys):
    words = ["--model", "vit_tiny_patch16_64", "--data_path", dota_root, "--output_dir", tmp_path, "--device", "cpu"]
    words += ["--finetune", finished / "checkpoint-1.pth", "--nb_samples_per_epoch", "8", "--total_batch_size", "4"]
    words += ["--epochs", "1", "--warmup_epochs", "0", "--num_workers", "0"]
    run_finetune.main(finetune_parser("").parse_args([str(w) for w in words]))
    out = capsys.readouterr().out
    decoder = {k for k in create_model(TINY[1]).state_dict() if not k.startswith("encoder.")}
    assert f"ignored  {len(decoder):4d}" in out and "missing     2  head.weight, head.bias (newly initialised)" in out


def test_the_same_command_finishes_nothing_twice_and_continues(finished, roots, tmp_path):
    before = (finished / "log.txt").read_text()
    in_process(*mix(roots, finished, *SHARES))
    assert (finished / "log.txt").read_text() == before
    for stop in (1, 2):
        in_process(*mix(roots, tmp_path / "run", *SHARES, "--stop_epoch", stop))
        assert [r["epoch"] for r in log(tmp_path / "run")] == list(range(stop))
    a, b = (load_weights(f / "checkpoint-1.pth") for f in (finished, tmp_path / "run"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_resumed_run_draws_what_an_uninterrupted_one_draws(roots, tmp_path):
    """With stochastic depth, whose draws come from the random state in the checkpoint, and with workers."""
    more = [*SHARES, "--drop_path", ".5", "--num_workers", 1]
    in_process(*mix(roots, tmp_path / "whole", *more))
    for stop in (1, 2):
        in_process(*mix(roots, tmp_path / "parts", *more, "--stop_epoch", stop))
    a, b = (load_weights(tmp_path / f / "checkpoint-1.pth") for f in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_learned_position_table_is_trained_and_resumed(roots, tmp_path):
    for stop in (1, 2):
        in_process(*mix(roots, tmp_path / "run", *SHARES, "--pos_embed", "learned", "--stop_epoch", stop))
    first, last = (load_weights(tmp_path / "run" / f"checkpoint-{i}.pth") for i in (0, 1))
    assert not torch.equal(first["encoder.pos_embed"], last["encoder.pos_embed"])


def test_a_run_is_not_continued_on_other_data(roots, tmp_path):
    folder = tmp_path / "videos"
    shutil.copytree(roots / "videos", folder)
    words = [*TINY, *SHORT, "--data_set", "videos", "--data_path", folder, "--output_dir", tmp_path / "run"]
    words += ["--total_batch_size", 4, "--sampling_rate", 1]  # the steps of an epoch stay the same
    in_process(*words, "--stop_epoch", 1)
    (folder / "0.mp4").unlink()
    with pytest.raises(ConfigError, match=r"had \[\d+\] windows to draw from, now there are \[\d+\]: the data has"):
        in_process(*words)


def test_unreadable_and_short_videos_are_counted_and_the_run_goes_on(roots, tmp_path, capsys):
    in_process(*mix(roots, tmp_path / "run", *SHARES))
    out = capsys.readouterr().out
    assert out.count("videos all: 2 of 6 clips cannot be read: corrupt.mov (") == 1 and "empty.mov (" in out
    assert "videos all: 1 clips are shorter than a window and go unused: short.mp4" in out
    assert "clips per step: 4 of videos + 2 of CAP-DATA" in out
    assert len(json.loads((tmp_path / "run" / "videos.json").read_text())["videos"]) == 6


def test_a_video_that_breaks_off_is_skipped(roots, tmp_path, capsys):
    folder = tmp_path / "videos"
    shutil.copytree(roots / "videos", folder)
    path = folder / "0.mp4"
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        damaged = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][20:26]
    for start, size in damaged:  # whole pictures: a decoder may guess what is missing of one
        content[start : start + size] = bytes(size)
    path.write_bytes(content)
    in_process(*TINY, *SHORT, "--data_set", "videos", "--data_path", folder, "--sampling_rate", 1, "--output_dir",
               tmp_path / "run", "--total_batch_size", 6)  # fmt: skip
    out = capsys.readouterr().out
    assert [r["epoch"] for r in log(tmp_path / "run")] == [0, 1]
    assert "2 of 6 clips cannot be read" in out
    assert out.count("skipped a sample") == 1 and f"skipped a sample of 0.mp4: {path}: frame " in out


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one(roots, finished, tmp_path):
    done = run("run_dapt.py", *mix(roots, tmp_path / "two", *SHARES), processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (load_weights(f / "checkpoint-1.pth") for f in (finished, tmp_path / "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-5, rtol=1e-4)
    for a, b in zip(log(finished), log(tmp_path / "two"), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
        assert a["train_trivial_loss"] == pytest.approx(b["train_trivial_loss"], abs=1e-5)


def test_global_batches_and_masks_do_not_depend_on_processes(roots, tmp_path):
    """Each step holds 4 samples of the first set and 2 of the second, the same in 1 process and in 2."""

    def batches(total, world_size, rank):
        args = dapt_parser("").parse_args([str(w) for w in mix(roots, tmp_path, "--total_batch_size", *total)])
        run_dapt.resolve_runtime(args, cuda=False)
        run_dapt.resolve(args, world_size)
        dataset = run_dapt.build_dataset(args, create_model(args.model))
        sampler = run_dapt.build_sampler(args, dataset, rank, world_size)
        return list(run_dapt.build_loader(args, dataset, sampler, torch.device("cpu")))

    def rows(batch):
        keys = zip(batch["source"].tolist(), batch["window"].tolist(), strict=True)
        return {k: (v, m) for k, v, m in zip(keys, batch["video"], batch["mask"], strict=True)}

    whole = batches([4, 2], 1, 0)
    parts = list(zip(*(batches([4, 2], 2, rank) for rank in (0, 1)), strict=True))
    assert len(whole) == len(parts) == 2
    for batch, (first, second) in zip(whole, parts, strict=True):
        assert batch["source"].tolist() == [0] * 4 + [1] * 2
        assert first["source"].tolist() == second["source"].tolist() == [0, 0, 1]
        expected, found = rows(batch), rows(first) | rows(second)
        assert expected.keys() == found.keys() and len(found) == 6
        for key, (video, mask) in expected.items():
            assert torch.equal(video, found[key][0]) and torch.equal(mask, found[key][1])
        assert len({tuple(m.tolist()) for m in batch["mask"]}) > 1


def test_stop_epoch_ends_a_run_on_a_longer_schedule(roots, tmp_path):
    in_process(*mix(roots, tmp_path, *SHARES, "--nb_samples_per_epoch", 6, "--epochs", 20, "--print_freq", 1))
    assert [r["epoch"] for r in log(tmp_path)] == list(range(12))
    rates = [e.value for e in EventAccumulator(str(tmp_path)).Reload().Scalars("train/lr")]
    half_way = 1 + np.cos(np.pi * 9 / 19)  # the cosine of 20 epochs, not of 12
    assert rates[10] == pytest.approx((3e-5 + (3e-4 - 3e-5) / 2 * half_way) * 6 / 256, rel=1e-6)


def test_the_published_cosine():
    args = dapt_parser("").parse_args(["--data_path", "x", "--output_dir", "y", "--batch_size", "800"])
    run_dapt.resolve_runtime(args, cuda=False)
    run_dapt.resolve(args, 1)
    assert (args.epochs, args.stop_epoch, args.total_batch_size, args.sampling_rate) == (20, 12, [800], [16])
    case = golden("schedules")["schedules"]["dapt_bdd_cap_800"]
    steps = case["args"]["niter_per_ep"]
    assert args.nb_samples_per_epoch // 800 == steps
    optimization = run_dapt.optimization_of(args, create_model(TINY[1]), steps)
    starts = next(v for k, v in case.items() if k.startswith("epoch_starts"))
    for epoch, lr in starts.items():
        assert optimization.lr(int(epoch) * steps) == pytest.approx(lr, abs=1e-9)
    assert optimization.lr(12 * steps - 1) == pytest.approx(case["last_step_of_epoch_11"], abs=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        ["--update_freq", "2", "--clip_grad", "1", "--precision", "bf16", "--decoder_depth", "2"],
        ["--no_transforms_finetune_align", "--mask_ratio", "0.9", "--no_normalize_target", "--use_checkpoint"],
        ["--view_fps", "10", "--num_frames", "8", "--tubelet_size", "4", "--input_size", "48", "--short_side", "60"],
        ["--drop_path", "0.2", "--opt", "sgd", "--weight_decay_end", "0.1", "--no_flash_attn", "--aa", "rand-m3-n1"],
        ["--model", "pretrain_mvd_vit_tiny_patch16_64"],
        ["--model", "pretrain_umt_vit_tiny_patch16_64", "--num_frames", "8"],
        ["--model", "pretrain_internvideo2_tiny_patch14_56", "--gelu", "erf"],
        ["--no_save_ckpt", "--start_epoch", "1", "--num_workers", "1", "--save_ckpt_freq", "0"],
    ],
    ids=lambda o: o[1] if o[0] == "--model" else o[0],
)  # fmt: skip
def test_options_train(roots, tmp_path, options):
    in_process(*mix(roots, tmp_path / "run", *SHARES, *options))
    records = log(tmp_path / "run")
    assert records[-1]["epoch"] == 1 and 0 < records[-1]["train_loss"] < 2
    assert (tmp_path / "run" / "checkpoint-last").exists() == ("--no_save_ckpt" not in options)
    if "--no_normalize_target" in options:
        assert records[-1]["train_trivial_loss"] < 0.3


def test_options_reach_what_they_are_for(roots, tmp_path, monkeypatch):
    seen = {}

    def spy(model, batches, set_epoch, objective, session, reporting, **kwargs):
        (seen["batch"], *_) = batches
        seen.update(model=model, optimization=session.state.optimization, dataset=batches.loader.loader.dataset)
        session.progress.epoch = 1

    monkeypatch.setattr(run_dapt, "train_epochs", spy)
    options = ["--drop_path", ".3", "--use_checkpoint", "--mask_ratio", ".5", "--opt", "sgd", "--clip_grad", "2"]
    options += ["--update_freq", "2", "--decoder_depth", "3", "--aa", "rand-m3-n1", "--short_side", "70"]
    options += ["--no_normalize_target", "--tubelet_size", "4", "--weight_decay", ".2", "--view_fps", "7"]
    options += ["--gelu", "tanh", "--pos_embed", "learned"]
    in_process(*mix(roots, tmp_path, *SHARES, *options))
    model, optimization = seen["model"], seen["optimization"]
    assert model.encoder.blocks[-1].drop_path1.drop_prob == model.decoder.blocks[-1].drop_path1.drop_prob > 0.29
    assert model.encoder.grad_checkpointing and model.decoder.grad_checkpointing and not model.normalize_target
    assert len(model.decoder.blocks) == 3 and model.grid == (1, 4, 4)
    assert model.encoder.blocks[0].mlp.act.approximate == "tanh"
    assert isinstance(model.encoder.pos_embed, torch.nn.Parameter)
    assert seen["batch"]["mask"].shape == (3, 16) and (seen["batch"]["mask"].sum(dim=1) == 8).all()
    assert type(optimization.optimizer).__name__ == "SGD" and (optimization.clip_grad, optimization.accumulate) == (
        2,
        2,
    )
    assert max(g["weight_decay"] for g in optimization.optimizer.param_groups) == 0.2
    for source, enlarge in zip(seen["dataset"].sources, (True, False), strict=True):
        assert source.transform.rand_augment and source.transform.short_side == 70 and source.index.view_fps == 7
        assert source.transform.enlarge == enlarge and source.transform.aligned


def test_dapt_goes_on_from_a_weights_file_without_naming_its_model(roots, tmp_path):
    odd = [
        "--decoder_depth",
        "2",
        "--num_frames",
        "8",
        "--tubelet_size",
        "4",
        "--gelu",
        "tanh",
        "--no_normalize_target",
    ]
    in_process(*mix(roots, tmp_path / "a", *SHARES, *odd, "--stop_epoch", "1"))
    unnamed = [word for word in mix(roots, tmp_path / "b", *SHARES, "--stop_epoch", "1") if word not in TINY[:2]]
    with pytest.raises(ConfigError, match="--gelu erf contradicts .*checkpoint-0.pth, which was made with tanh"):
        in_process(*unnamed, "--from_ckpt", tmp_path / "a" / "checkpoint-0.pth", "--gelu", "erf")
    in_process(*unnamed, "--from_ckpt", tmp_path / "a" / "checkpoint-0.pth")
    specs = [torch.load(tmp_path / f / "checkpoint-0.pth", weights_only=True)["spec"] for f in "ab"]
    assert specs[0] == specs[1] and (specs[0]["decoder_depth"], specs[0]["num_frames"]) == (2, 8)
    assert (specs[0]["data_set"], specs[0]["epoch"]) == (["videos", "CAP-DATA"], 0)
    model, spec = models.load(str(tmp_path / "b" / "checkpoint-0.pth"))
    assert spec == specs[1] and model.spec == {key: spec[key] for key in model.spec}
    assert not model.normalize_target


def test_kinetics_and_labelled_sets_mix(roots, dota_root, tmp_path):
    root = tmp_path / "kinetics"
    write_video(root / "train" / "driving car" / "abcdefghijk_000003_000013.mp4", frames=40, fps=30)
    write_video(root / "train" / "driving car" / "bbcdefghijk_000003_000013.mp4", frames=40, fps=30)
    (root / "annotations").mkdir()
    rows = "".join(f"driving car,{name},3,13,train\n" for name in ("abcdefghijk", "bbcdefghijk"))
    (root / "annotations" / "train.csv").write_text("label,youtube_id,time_start,time_end,split\n" + rows)
    in_process(*TINY, *SHORT, "--data_set", "Kinetics", "DoTA", "--data_path", root, dota_root, "--output_dir",
               tmp_path / "run", "--batch_size", 2, 4)  # fmt: skip
    args = json.loads((tmp_path / "run" / "args.json").read_text())["args"]
    assert args["sampling_rate"] == [4, 1] and args["total_batch_size"] == [2, 4] and len(log(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "a mix needs the share of each data set: --batch_size or --total_batch_size"),
        (["--batch_size", "4"], "--batch_size has 1 values for 2 data sets"),
        (["--batch_size", "4", "2", *SHARES], "give --batch_size (per process) or --total_batch_size, not both"),
        ([*SHARES, "--sampling_rate", "1"], "--sampling_rate has 1 values for 2 data sets"),
        ([*SHARES, "--data_set", "videos", "CAPDATA"], "unknown data set 'CAPDATA'; known: A3D, BDD100K"),
        ([*SHARES, "--model", "vit_tiny_patch16_64"], "is a classifier; DAPT takes a pretrain_ model"),
        ([*SHARES, "--model", "pretrain_tiny"], "unknown model 'pretrain_tiny'"),
        ([*SHARES, "--model", "pretrain_internvideo2_tiny_patch14_56", "--pos_embed", "sincos"], "table alone"),
        ([*SHARES, "--mask_ratio", ".05"], "mask_ratio 0.05 of the 16 tokens of a frame: some must be masked"),
        ([*SHARES, "--from_ckpt", "absent.pth"], "absent.pth: no such checkpoint file"),
        ([*SHARES, "--data_split", "all", "nights"], "CAP-DATA has no split 'nights'"),
        ([*SHARES, "--epochs", "1"], "--warmup_epochs 1 must be below --epochs 1"),
        ([*SHARES, "--warmup_steps", "4"], "the warm-up (4 steps) must be shorter than --epochs 2 (4 steps)"),
        ([*SHARES, "--lr", "1e-6"], "--min_lr 3e-05, the final rate, must not be above --lr 1e-06"),
        ([*SHARES, "--num_frames", "400"], "no clip is long enough for a window of 400 frames"),
    ],
    ids=lambda v: "_".join(v[-2:]) if isinstance(v, list) else "",
)  # fmt: skip
def test_mistaken_arguments_are_explained(roots, tmp_path, options, message):
    with pytest.raises((ConfigError, DataError, CheckpointError)) as caught:
        in_process(*mix(roots, tmp_path / "run", *options))
    assert message in str(caught.value)


@pytest.mark.slow
def test_an_error_of_the_data_ends_every_process(roots, tmp_path):
    done = run("run_dapt.py", *TINY, "--data_set", "videos", "--data_path", tmp_path, "--output_dir", tmp_path / "run",
               processes=2)  # fmt: skip
    assert done.returncode != 0 and f"error: {tmp_path}: no video below it" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Full size


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data" / "driving").exists(), reason="needs ../shared/data/driving")
def test_real_video_and_cap_data_from_published_weights(tmp_path, capsys):
    """The published settings at full size, 20 steps; the loss falls, and the result goes into fine-tuning."""
    render_cap_data(tmp_path / "cap", clips=4, size=(320, 180))
    fixture = next(f for f in golden("models_videomae")["fixtures"] if f["name"] == "videomae_pretrain_small")
    done = run(
        "run_dapt.py", "--model", "pretrain_videomae_small_patch16_224", "--device", "cpu", "--num_workers", "1",
        "--from_ckpt", published_file(tmp_path / "published.pth", fixture), "--output_dir", tmp_path / "run",
        "--data_set", "videos", "CAP-DATA", "--data_path", SHARED / "data" / "driving", tmp_path / "cap",
        "--sampling_rate", 4, 1, "--total_batch_size", 4, 2, "--nb_samples_per_epoch", 24, "--epochs", 2,
        "--lr", 1.3e-2, "--print_freq", 5, timeout=900, env={"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "loaded    218  (0 of them renamed)" in done.stdout and "ignored     0" in done.stdout
    first, last = log(tmp_path / "run")
    assert last["train_loss"] < first["train_loss"] < 1.2
    cut_dota(tmp_path / "dota", clips=4, frames=20)
    done = run(
        "run_finetune.py", "--model", "vit_small_patch16_224", "--device", "cpu", "--num_workers", "0",
        "--finetune", tmp_path / "run" / "checkpoint-1.pth", "--data_path", tmp_path / "dota", "--epochs", 1,
        "--warmup_epochs", 0, "--total_batch_size", 2, "--nb_samples_per_epoch", 2, "--output_dir", tmp_path / "fine",
        "--disable_eval_during_finetuning", timeout=900, env={"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ignored    58  56 decoder.*, 1 mask_token, 1 encoder_to_decoder.*" in done.stdout
    assert "missing     2  head.weight, head.bias (newly initialised)" in done.stdout
