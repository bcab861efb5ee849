"""run_finetune.py as a user runs it: torchrun, kills, broken input."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from helpers import ROOT, load_weights, run

import models
import run_finetune
from datasets import build_clips
from datasets.augment.frames import EvalTransform
from datasets.stream import SplitWindows
from datasets.windows import index_clips
from engine.evaluate import Scorer
from models import create_model
from utils.cli import ConfigError
from utils.damage import with_sum, zip_damage
from utils.distributed import Process
from utils.flags import finetune_parser

TINY = ["--data_set", "DoTA", "--model", "vit_tiny_patch16_64", "--device", "cpu", "--num_workers", "0"]
SHORT = ["--nb_samples_per_epoch", "16", "--total_batch_size", "4", "--epochs", "2", "--warmup_epochs", "1"]


def flags(root, output, *more):
    return [*TINY, "--data_path", str(root), "--output_dir", str(output), *map(str, more)]


def in_process(*words):
    run_finetune.main(finetune_parser("").parse_args(list(words)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint whose head is large enough for scores to differ."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(create_model("vit_tiny_patch16_64", init_scale=30.0).state_dict(), path)
    return path


def predictions(folder):
    with (folder / "predictions.csv").open() as f:
        return list(csv.DictReader(f))


def log(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.slow
def test_evaluation_is_the_same_on_any_number_of_processes(dota_root, weights, tmp_path):
    results = []
    for processes in (0, 2, 3):
        folder = tmp_path / str(processes)
        words = ["--eval", *flags(dota_root, folder, "--finetune", weights), "--num_workers", str(processes // 2)]
        done = run("run_finetune.py", *words, processes=processes)
        assert done.returncode == 0, done.stderr
        assert {p.name for p in (folder / "plots").iterdir()} == {"roc.png", "pr.png", "mcc.png", "confusion.png"}
        results.append((predictions(folder), json.loads((folder / "metrics.json").read_text())))
    one, metrics = results[0]
    assert len(one) == len({(r["clip"], r["frame"]) for r in one}) == metrics["n"] > 200
    assert metrics["clips_scored"] == 5 and len({r["score"] for r in one}) > 100
    for rows, other_metrics in results[1:]:
        assert other_metrics == metrics
        for a, b in zip(one, rows, strict=True):
            assert all(a[k] == b[k] for k in ("clip", "filename", "frame", "label", "ttc"))
            assert all(abs(float(a[k]) - float(b[k])) <= 1e-6 for k in ("logits_safe", "logits_risk", "score"))


@pytest.mark.slow
def test_random_weights_are_the_same_on_any_number_of_processes(dota_root, tmp_path):
    metrics = []
    for processes in (0, 2):
        folder = tmp_path / str(processes)
        done = run("run_finetune.py", "--eval", *flags(dota_root, folder), processes=processes)
        assert done.returncode == 0, done.stderr
        metrics.append(json.loads((folder / "metrics.json").read_text()))
    assert metrics[0] == metrics[1]


def test_evaluation_never_overwrites(dota_root, weights, tmp_path):
    (tmp_path / "predictions.csv").write_text("old")
    with pytest.raises(ConfigError, match=r"predictions.csv exists: choose another --output_dir"):
        in_process("--eval", *flags(dota_root, tmp_path, "--finetune", weights))
    assert (tmp_path / "predictions.csv").read_text() == "old"


def test_evaluation_needs_a_trained_head(dota_root, tmp_path):
    state = {k: v for k, v in create_model("vit_tiny_patch16_64").state_dict().items() if not k.startswith("head")}
    torch.save(state, tmp_path / "headless.pth")
    with pytest.raises(run_finetune.CheckpointError, match="no head trained on two classes"):
        in_process("--eval", *flags(dota_root, tmp_path / "out", "--finetune", tmp_path / "headless.pth"))


# ----------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one(dota_root, tmp_path):
    for name, processes in (("one", 0), ("two", 2)):
        done = run(
            "run_finetune.py", *flags(dota_root, tmp_path / name, *SHORT), "--drop_path", "0", processes=processes
        )
        assert done.returncode == 0, done.stderr
    one, two = (load_weights(tmp_path / name / "checkpoint-1.pth") for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-5, rtol=1e-4)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
        assert a["val_auroc"] == pytest.approx(b["val_auroc"], abs=2e-3)


@pytest.mark.slow
def test_a_killed_run_continues_with_its_best_values(dota_root, tmp_path):
    more = ["--nb_samples_per_epoch", "64", "--total_batch_size", "4", "--epochs", "4", "--warmup_epochs", "1"]
    reference = run("run_finetune.py", *flags(dota_root, tmp_path / "whole", *more))
    assert reference.returncode == 0, reference.stderr

    folder = tmp_path / "killed"
    command = [sys.executable, "run_finetune.py", *flags(dota_root, folder, *more)]
    first = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not ((folder / "log.txt").exists() and len(log(folder)) >= 2):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()

    second = run("run_finetune.py", *flags(dota_root, folder, *more))
    assert second.returncode == 0, second.stderr
    assert "resuming at epoch " in second.stdout and "; best so far: auroc " in second.stdout
    whole, resumed = log(tmp_path / "whole"), log(folder)
    assert [r["epoch"] for r in resumed] == [0, 1, 2, 3]
    for record in resumed:
        expected = whole[record["epoch"]]
        assert {k: v for k, v in record.items() if k != "seconds"} == {
            k: v for k, v in expected.items() if k != "seconds"
        }
    for name in ("checkpoint-3.pth", "checkpoint-best_auroc.pth", "checkpoint-best_auc_mcc.pth"):
        a, b = (load_weights(f / name) for f in (tmp_path / "whole", folder))
        assert all(torch.equal(a[k], b[k]) for k in a), name
    last = torch.load(folder / "checkpoint-last" / "state.pth", weights_only=True)
    assert last["best"]["auroc"] == max(r["val_auroc"] for r in whole)


@pytest.fixture(scope="module")
def finished(dota_root, tmp_path_factory):
    """The output folder of a finished run of two epochs."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    in_process(*flags(dota_root, folder, *SHORT))
    return folder


def test_what_a_run_leaves_behind(finished):
    names = {p.name for p in finished.iterdir() if "tfevents" not in p.name}
    assert names >= {"args.json", "log.txt", "checkpoint-last", "checkpoint-1.pth", "checkpoint-best_auroc.pth"}
    assert "checkpoint-0.pth" not in names and not any(n.endswith((".tmp", ".new", ".old")) for n in names)
    record = json.loads((finished / "args.json").read_text())
    assert record["args"]["lr"] == 1e-3 and record["args"]["num_frames"] == 4 and record["args"]["batch_size"] == 4
    assert [r["epoch"] for r in log(finished)] == [0, 1]
    assert {"train_loss", "train_grad_norm", "val_auroc", "val_auc_mcc", "seconds"} <= log(finished)[0].keys()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished)).Reload()
    assert {"train/loss", "train/lr", "perf/clips_per_s", "perf/data_wait_pct", "val/auroc"} <= set(
        events.Tags()["scalars"]
    )
    assert set(events.Tags()["images"]) == {"val/roc", "val/pr", "val/mcc", "val/confusion"}
    assert [e.step for e in events.Scalars("val/auroc")] == [4, 8]


def test_a_finished_run_stays_finished(finished, dota_root):
    before = (finished / "log.txt").read_text()
    in_process(*flags(dota_root, finished, *SHORT))
    assert (finished / "log.txt").read_text() == before


def test_a_used_folder_is_refused_to_other_runs(finished, dota_root, tmp_path):
    record = (finished / "args.json").read_text()
    with pytest.raises(ConfigError, match=r"other arguments \(layer_decay: 0.6 -> 0.9\): use those or another"):
        in_process(*flags(dota_root, finished, *SHORT, "--layer_decay", "0.9"))
    with pytest.raises(ConfigError, match="holds a run: choose another --output_dir"):
        in_process(*flags(dota_root, finished, *SHORT, "--no_auto_resume"))
    assert (finished / "args.json").read_text() == record
    with pytest.raises(ConfigError, match=r"cannot be written"):
        in_process(*flags(dota_root, finished / "log.txt" / "below", *SHORT))
    shutil.copy(finished / "args.json", tmp_path)  # a run that died before its first checkpoint
    with pytest.raises(ConfigError, match=r"seed: 42 -> 1"):
        in_process(*flags(dota_root, tmp_path, *SHORT, "--seed", "1"))


def test_a_command_that_fails_before_it_trains_leaves_the_folder_free(dota_root, tmp_path):
    for wrong in (["--opt", "adamv"], ["--freeze_layers", "9"], ["--data_set", "DOTA"], ["--num_frames", "400"]):
        with pytest.raises((ConfigError, run_finetune.DataError)):
            in_process(*flags(dota_root, tmp_path / "run", *SHORT, *wrong))
    assert not (tmp_path / "run" / "args.json").exists()


def test_learning_rate_order_and_average_of_a_run(dota_root, tmp_path):
    """The logged rate is lr x batch / 256; epochs differ in their order; what is kept is the average."""
    ema = ["--model_ema", "--model_ema_decay", "0.9", "--warmup_epochs", "0", "--lr", "6.4", "--min_lr", "6.4"]
    in_process(*flags(dota_root, tmp_path, *SHORT, *ema, "--print_freq", "1", "--opt", "sgd"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rates = [e.value for e in EventAccumulator(str(tmp_path)).Reload().Scalars("train/lr")]
    assert rates == pytest.approx([0.1] * 8)
    state = torch.load(tmp_path / "checkpoint-last" / "state.pth", weights_only=True)
    kept = load_weights(tmp_path / "checkpoint-1.pth")
    assert all(torch.equal(kept[k], state["model_ema"][k]) for k in kept)
    assert any(not torch.equal(kept[k], state["model"][k]) for k in kept)


def test_epochs_draw_other_windows(dota_root, tmp_path, monkeypatch):
    seen = []
    original = run_finetune.FinetuneObjective.__call__

    def recording(self, model, batch):
        seen.append(batch["window"].tolist())
        return original(self, model, batch)

    monkeypatch.setattr(run_finetune.FinetuneObjective, "__call__", recording)
    in_process(*flags(dota_root, tmp_path, *SHORT))
    assert len(seen) == 8 and set(sum(seen[:4], [])) != set(sum(seen[4:], []))


def test_unreadable_samples_are_skipped_up_to_a_limit(dota_root, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(dota_root, root)
    broken = root / "frames" / "synthetictr_000003" / "images.zip"
    broken.write_bytes(broken.read_bytes()[:1000])
    in_process(*flags(root, tmp_path / "run", *SHORT, "--nb_samples_per_epoch", "64"))
    out = capsys.readouterr().out
    assert out.count(f"skipped a sample of synthetictr_000003: {broken}: not a readable zip") == 1
    assert [r["epoch"] for r in log(tmp_path / "run")] == [0, 1]
    with pytest.raises(
        run_finetune.DataError, match="more than --max_bad_samples 2 samples skipped in an epoch, the last of synth"
    ):
        in_process(*flags(root, tmp_path / "b", *SHORT, "--nb_samples_per_epoch", "64", "--max_bad_samples", "2"))


def test_resume_from_another_folder(finished, dota_root, tmp_path):
    for stop in (1, 2):
        words = flags(dota_root, tmp_path / str(stop), *SHORT, "--stop_epoch", stop)
        in_process(*words, *(["--resume", str(tmp_path / "1" / "checkpoint-last")] if stop == 2 else []))
    a, b = (load_weights(f / "checkpoint-1.pth") for f in (tmp_path / "2", finished))
    assert all(torch.equal(a[k], b[k]) for k in a) and [r["epoch"] for r in log(tmp_path / "2")] == [1]
    for wrong in (tmp_path / "nowhere", finished):
        with pytest.raises(ConfigError, match="no state.pth in it; it takes a checkpoint-last folder"):
            in_process(*flags(dota_root, tmp_path / "c", *SHORT, "--resume", wrong))


def test_a_damaged_checkpoint_is_named(finished, dota_root, tmp_path):
    whole = (finished / "checkpoint-last" / "state.pth").read_bytes()
    (tmp_path / "checkpoint-last").mkdir()
    (tmp_path / "checkpoint-last" / "state.pth").write_bytes(whole[:5000])
    with pytest.raises(ConfigError, match="state.pth is damaged .*; copy it again where it is a copy, or remove its"):
        in_process(*flags(dota_root, tmp_path, *SHORT))


def test_stop_epoch_keeps_the_schedule_and_can_be_raised_later(dota_root, finished, tmp_path):
    for stop in (1, 2):
        in_process(*flags(dota_root, tmp_path, *SHORT, "--stop_epoch", stop))
        assert [r["epoch"] for r in log(tmp_path)] == list(range(stop))
    a, b = (load_weights(f / "checkpoint-1.pth") for f in (tmp_path, finished))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_learned_position_table_is_trained_resumed_and_evaluated(dota_root, tmp_path):
    source = create_model("vit_tiny_patch16_64")
    source.learn_pos_embed()
    with torch.no_grad():
        source.pos_embed.mul_(2)
    torch.save(source.state_dict(), tmp_path / "learned.pth")
    words = [*SHORT, "--finetune", tmp_path / "learned.pth", "--disable_eval_during_finetuning"]
    in_process(*flags(dota_root, tmp_path / "whole", *words))
    for stop in (1, 2):
        in_process(*flags(dota_root, tmp_path / "parts", *words, "--stop_epoch", stop))
    whole, parts = (load_weights(tmp_path / f / "checkpoint-1.pth") for f in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    assert not torch.equal(whole["pos_embed"], source.pos_embed)
    evaluation = ["--eval", "--finetune", tmp_path / "whole" / "checkpoint-1.pth"]
    in_process(*flags(dota_root, tmp_path / "eval", *evaluation))
    with pytest.raises(ConfigError, match="--pos_embed sincos contradicts .*, which was made with learned"):
        in_process(*flags(dota_root, tmp_path / "fixed", *evaluation, "--pos_embed", "sincos"))
    in_process(*flags(dota_root, tmp_path / "fixed", *evaluation, "--pos_embed", "sincos", "--override_spec"))
    learned, fixed = ((tmp_path / f / "predictions.csv").read_text() for f in ("eval", "fixed"))
    assert learned != fixed


def test_a_position_table_is_learned_from_the_model_s_own(dota_root, tmp_path):
    torch.save(create_model("vit_tiny_patch16_64").state_dict(), tmp_path / "fixed.pth")
    words = ["--finetune", tmp_path / "fixed.pth", "--pos_embed", "learned", "--disable_eval_during_finetuning"]
    in_process(*flags(dota_root, tmp_path / "run", *SHORT, *words))
    trained = load_weights(tmp_path / "run" / "checkpoint-1.pth")["pos_embed"]
    fixed = create_model("vit_tiny_patch16_64").pos_embed
    assert not torch.equal(trained, fixed) and torch.allclose(trained, fixed, atol=0.1)
    with pytest.raises(ConfigError, match="internvideo2_tiny_patch14_56 has a learned position table alone"):
        model = ["--model", "internvideo2_tiny_patch14_56", "--pos_embed", "sincos"]
        in_process(*flags(dota_root, tmp_path / "none", *SHORT, *model))


@pytest.fixture(scope="module")
def odd(dota_root, tmp_path_factory):
    """A finished run of a model fed in another way than its name's defaults, and its weights file."""
    folder = tmp_path_factory.mktemp("odd") / "run"
    options = [
        "--num_frames",
        "8",
        "--view_fps",
        "2.5",
        "--gelu",
        "tanh",
        "--final_reduction",
        "cls",
        "--init_scale",
        9,
    ]
    in_process(*flags(dota_root, folder, *SHORT, *options, "--epochs", "1", "--warmup_epochs", "0"))
    return folder / "checkpoint-0.pth"


EVAL = ["--eval", "--data_set", "DoTA", "--device", "cpu", "--num_workers", "0"]


def evaluate(root, output, weights, *more):
    in_process(*EVAL, "--data_path", str(root), "--output_dir", str(output), "--finetune", str(weights), *more)
    return predictions(output)


def test_a_weights_file_says_how_it_is_evaluated(odd, dota_root, tmp_path):
    """No flag of the model is needed; a file without a spec takes them, and must be given them all."""
    rows = evaluate(dota_root, tmp_path / "spec", odd)
    torch.save(load_weights(odd), tmp_path / "flat.pth")
    how = ["--num_frames", "8", "--view_fps", "2.5", "--gelu", "tanh", "--final_reduction", "cls"]
    flat = evaluate(dota_root, tmp_path / "flat", tmp_path / "flat.pth", "--model", "vit_tiny_patch16_64", *how)
    assert rows == flat and len({row["score"] for row in rows}) > 20


@pytest.mark.parametrize(
    ("flag", "value", "trained"),
    [
        ("--num_frames", "4", "8"),
        ("--view_fps", "10", "2.5"),
        ("--gelu", "erf", "tanh"),
        ("--input_size", "32", "64"),
        ("--tubelet_size", "4", "2"),
        ("--final_reduction", "fc_norm", "cls"),
        ("--pos_embed", "learned", "sincos"),
    ],
)
def test_a_flag_that_contradicts_the_weights_file_is_an_error(odd, dota_root, tmp_path, flag, value, trained):
    with pytest.raises(
        ConfigError, match=rf"{flag} {value}\S* contradicts .*checkpoint-0.pth, .* with {trained}: leave"
    ):
        evaluate(dota_root, tmp_path, odd, flag, value)
    assert not list(tmp_path.iterdir())


def test_a_contradiction_may_be_meant(odd, dota_root, tmp_path, capsys):
    rows = evaluate(dota_root, tmp_path / "meant", odd, "--view_fps", "5", "--gelu", "erf", "--override_spec")
    assert rows != evaluate(dota_root, tmp_path / "spec", odd)
    assert "--gelu erf contradicts" in capsys.readouterr().out
    arguments = json.loads((tmp_path / "meant" / "eval_args.json").read_text())["args"]
    assert (arguments["view_fps"], arguments["gelu"], arguments["num_frames"]) == (5, "erf", 8)


def test_a_weights_file_alone_is_scored_as_by_the_command(odd, dota_root, tmp_path):
    rows = evaluate(dota_root, tmp_path, odd)
    model, spec = models.load(str(odd))
    clips = build_clips("DoTA", str(dota_root), "val")
    index = index_clips(clips, num_frames=spec["num_frames"], view_fps=spec["view_fps"], stride=1)
    windows = SplitWindows(clips, index, EvalTransform(spec["input_size"]))
    scored = Scorer(windows).score(model)
    assert [f"{score:.9g}" for score in scored.score] == [row["score"] for row in rows]


def test_training_goes_on_from_a_weights_file_without_naming_its_model(odd, dota_root, tmp_path):
    words = ["--data_set", "DoTA", "--data_path", dota_root, "--device", "cpu", "--num_workers", "0", *SHORT]
    words = [str(word) for word in (*words, "--output_dir", tmp_path / "run", "--finetune", tmp_path / "odd.pth")]
    respecified(odd, tmp_path / "odd.pth", operating_point={"threshold": 0.5})  # which the next weights do not inherit
    with pytest.raises(ConfigError, match="--num_frames 4 contradicts"):
        in_process(*words, "--num_frames", "4")
    in_process(*words, "--stop_epoch", "1")
    (tmp_path / "odd.pth").unlink()  # the run itself knows what it is, from now on
    in_process(*words)
    arguments = json.loads((tmp_path / "run" / "args.json").read_text())["args"]
    assert (arguments["model"], arguments["num_frames"], arguments["gelu"]) == ("vit_tiny_patch16_64", 8, "tanh")
    spec = torch.load(tmp_path / "run" / "checkpoint-1.pth", weights_only=True)["spec"]
    before = {
        key: value for key, value in torch.load(odd, weights_only=True)["spec"].items() if key != "operating_point"
    }
    assert spec == before | {"epoch": 1} and spec["data_set"] == "DoTA" and len(log(tmp_path / "run")) == 2


def respecified(odd, path, **about):
    """The file of `odd` whose spec says something else."""
    content = torch.load(odd, weights_only=True)
    torch.save(content | {"spec": content["spec"] | about}, path)
    return path


def test_pixels_are_normalised_as_the_weights_file_says(odd, dota_root, tmp_path):
    other = respecified(odd, tmp_path / "half.pth", mean=[0.5] * 3, std=[0.5] * 3)
    rows = evaluate(dota_root, tmp_path / "half", other)
    assert rows != evaluate(dota_root, tmp_path / "imagenet", odd)
    model, _ = models.load(str(other))
    assert (
        model.mean.tolist() == [0.5] * 3
        and json.loads((tmp_path / "half" / "eval_args.json").read_text())["args"]["std"] == [0.5] * 3
    )


def point_of(path):
    return torch.load(path, weights_only=True)["spec"].get("operating_point")


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture
def fresh(odd, tmp_path):
    """A copy of `odd` that no evaluation has written an operating point into, with more in the file."""
    content = torch.load(odd, weights_only=True)
    content["spec"].pop("operating_point", None)
    torch.save(content | {"more": {"kept": [1, 2.5, None]}}, tmp_path / "fresh.pth")
    os.chmod(tmp_path / "fresh.pth", 0o640)
    return tmp_path / "fresh.pth"


@pytest.fixture
def no_scoring(monkeypatch):
    """Lets what scores fail."""

    def score(*_):
        raise AssertionError("scored again")

    return lambda: monkeypatch.setattr(run_finetune.Scorer, "score", score)


def test_an_evaluation_finds_the_operating_point_and_the_weights_file_has_it(fresh, dota_root, tmp_path):
    before = torch.load(fresh, weights_only=True)
    rows = evaluate(dota_root, tmp_path / "mcc", fresh)
    point = point_of(fresh)
    assert point == metrics_of(tmp_path / "mcc")["operating_point"] and point["criterion"] == "mcc"
    assert point["source"] == "best MCC on DoTA val (5 clips)"
    labels, scores = (np.array([float(row[name]) for row in rows]) for name in ("label", "score"))
    best = max(np.corrcoef(labels, scores >= t)[0, 1] for t in sorted(set(scores.tolist()))[1:])
    at = np.float32(scores) >= np.float32(point["threshold"])
    assert point["measured"]["mcc"] == pytest.approx(best) == np.corrcoef(labels, at)[0, 1]
    assert point["measured"]["recall"] == (labels * at).sum() / labels.sum()
    after = torch.load(fresh, weights_only=True)
    assert list(after) == list(before) and after["more"] == before["more"]
    assert after["spec"] == before["spec"] | {"operating_point": point}
    assert all(torch.equal(after["model"][key], before["model"][key]) for key in before["model"] | after["model"])
    assert oct(fresh.stat().st_mode)[-3:] == "640" and not zip_damage(fresh)
    with zipfile.ZipFile(fresh) as z:
        assert all(info.CRC for info in z.infolist() if info.file_size)
    model, spec = models.load(str(fresh))
    assert spec["operating_point"] == point and "operating_point" not in model.spec
    assert not list(tmp_path.glob(".*.tmp"))


def test_an_operating_point_is_replaced_if_that_is_meant(fresh, dota_root, tmp_path, capsys):
    evaluate(dota_root, tmp_path / "none", fresh, "--operating_point", "none")
    assert point_of(fresh) is None is metrics_of(tmp_path / "none")["operating_point"]
    rule = ["--alert_after", "0.1", "--event_gap", "0.2", "--event_min_duration", "0.3"]
    evaluate(dota_root, tmp_path / "f1", fresh, "--operating_point", "f1", *rule)
    f1 = point_of(fresh)
    assert (f1["criterion"], f1["alert_after"], f1["gap"], f1["min_duration"]) == ("f1", 0.1, 0.2, 0.3)
    content = fresh.read_bytes()
    evaluate(dota_root, tmp_path / "left", fresh, *rule)
    assert "keeps the operating point that it has; --operating_point replaces it" in capsys.readouterr().out
    assert fresh.read_bytes() == content and metrics_of(tmp_path / "left")["operating_point"]["criterion"] == "mcc"
    os.symlink(fresh, tmp_path / "link.pth")
    evaluate(dota_root, tmp_path / "again", tmp_path / "link.pth", "--operating_point", "mcc")
    assert point_of(fresh) == metrics_of(tmp_path / "again")["operating_point"] != f1
    assert (tmp_path / "link.pth").is_symlink()
    with pytest.raises(ConfigError, match="--false_alarms_per_hour is for --operating_point false_alarms: give both"):
        evaluate(dota_root, tmp_path / "both", fresh, "--false_alarms_per_hour", "2")


def test_a_wanted_rate_of_false_alarms(fresh, dota_root, tmp_path):
    words = ["--operating_point", "false_alarms", "--false_alarms_per_hour", "1500", "--event_gap", "0"]
    evaluate(dota_root, tmp_path / "out", fresh, *words)
    point = point_of(fresh)
    assert point == metrics_of(tmp_path / "out")["operating_point"] and point["criterion"] == "false_alarms"
    assert point["measured"]["false_alarms_per_hour"] <= 1500


@pytest.mark.parametrize(
    ("change", "more", "why"),
    [
        (lambda path: os.chmod(path, 0o444), [], "fresh.pth is read-only"),
        (lambda path: None, ["--override_spec"], r"evaluated in another way than it was trained \(--override_spec\)"),
        (lambda path: torch.save(load_weights(path), path), ["--num_frames", "8", "--view_fps", "2.5"], "has no spec"),
        (lambda path: torch.save(torch.load(path, weights_only=True) | {"optimizer": {}}, path), [], "state of a run"),
    ],
)
def test_a_weights_file_that_cannot_have_it_is_left(fresh, dota_root, tmp_path, capsys, change, more, why):
    change(fresh)
    content = fresh.read_bytes()
    model = ["--model", "vit_tiny_patch16_64", "--final_reduction", "cls"]
    evaluate(dota_root, tmp_path / "out", fresh, *model, *more)
    out = capsys.readouterr().out
    assert re.search(rf"{why}: the operating point is in {tmp_path}/out/metrics.json alone", out), out
    assert fresh.read_bytes() == content and metrics_of(tmp_path / "out")["operating_point"]["criterion"] == "mcc"


def test_weights_that_a_run_has_replaced_meanwhile_stay_the_new_ones(fresh, dota_root, tmp_path, capsys, monkeypatch):
    keep = run_finetune.outputs.keep_scores
    other = torch.load(fresh, weights_only=True)

    def replaced_meanwhile(*values):
        other["model"]["head.bias"] += 1
        torch.save(other, fresh)
        return keep(*values)

    monkeypatch.setattr(run_finetune.outputs, "keep_scores", replaced_meanwhile)
    evaluate(dota_root, tmp_path / "out", fresh)
    assert "fresh.pth has changed since it was scored: the operating point is in" in capsys.readouterr().out
    assert point_of(fresh) is None and torch.equal(load_weights(fresh)["head.bias"], other["model"]["head.bias"])


@pytest.mark.parametrize("moment", ["before the weights", "before metrics.json", "before the plots"])
def test_an_evaluation_that_is_killed_goes_on_and_the_weights_file_has_it(
    fresh, dota_root, tmp_path, monkeypatch, no_scoring, moment
):
    """The weights file it has changed itself is still the one it scored."""
    names = {"before the weights": "fresh.pth", "before metrics.json": "metrics.json", "before the plots": "roc.png"}
    rename = os.replace

    def killed(source, target):
        if str(target).endswith(names[moment]):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", killed)
        evaluate(dota_root, tmp_path / "out", fresh)
    assert (point_of(fresh) is None) == (moment == "before the weights")
    no_scoring()
    evaluate(dota_root, tmp_path / "out", fresh)
    point = point_of(fresh)
    assert point and metrics_of(tmp_path / "out")["operating_point"] == point
    for criterion in ("f1", "mcc") if moment == "before the plots" else ():  # made again, in another way
        (tmp_path / "out" / "metrics.json").unlink()
        evaluate(dota_root, tmp_path / "out", fresh, "--operating_point", criterion)
        assert point_of(fresh)["criterion"] == criterion
    assert point_of(fresh) == point
    with pytest.raises(ConfigError, match="predictions.csv exists: choose another --output_dir or remove it$"):
        evaluate(dota_root, tmp_path / "out", fresh)


def test_a_model_that_contradicts_the_weights_file_is_refused_even_if_meant(odd, dota_root, tmp_path):
    for more in ([], ["--override_spec"]):
        with pytest.raises(ConfigError, match="--model mvd_vit_tiny_patch16_64 contradicts .* with vit_tiny_patch"):
            evaluate(dota_root, tmp_path, odd, "--model", "mvd_vit_tiny_patch16_64", *more)
    with pytest.raises(ConfigError, match="--tubelet_size 4 contradicts .* made with 2: leave the flag out, or give a"):
        evaluate(dota_root, tmp_path, odd, "--tubelet_size", "4", "--override_spec")
    with pytest.raises(ConfigError, match="--finetune is empty: give a path or URL, or leave it out"):
        evaluate(dota_root, tmp_path, "")
    with pytest.raises(run_finetune.CheckpointError, match="its spec is for another version of this code: unknown mod"):
        evaluate(dota_root, tmp_path, respecified(odd, tmp_path / "new.pth", model="vit_unheard_of"))


def test_the_state_of_a_run_that_averages_does_not_say_which_weights(dota_root, tmp_path):
    words = flags(dota_root, tmp_path / "run", *SHORT, "--epochs", "1", "--warmup_epochs", "0", "--init_scale", 30)
    in_process(*words, "--model_ema", "--model_ema_decay", "0.5")
    state = tmp_path / "run" / "checkpoint-last" / "state.pth"
    with pytest.raises(run_finetune.CheckpointError, match="averages its weights: use its checkpoint-<epoch>.pth, or"):
        evaluate(dota_root, tmp_path / "which", state)
    average = evaluate(dota_root, tmp_path / "average", state, "--model_key", "model_ema")
    assert average == evaluate(dota_root, tmp_path / "kept", tmp_path / "run" / "checkpoint-0.pth")
    assert average != evaluate(dota_root, tmp_path / "raw", state, "--model_key", "model")
    weights = f"its weights: {tmp_path}/run/checkpoint-0.pth, {tmp_path}/run/checkpoint-best_auc_mcc.pth, "
    for folder in (state.parent, state.parent.parent):
        with pytest.raises(run_finetune.CheckpointError, match=f"{folder}: the .* of a run.*; {weights}"):
            evaluate(dota_root, tmp_path / "folder", folder)


def test_a_run_continued_elsewhere_keeps_what_was_left_open(odd, dota_root, tmp_path):
    """A copy of checkpoint-last has no args.json beside it; a folder that holds another run is not taken over."""
    shutil.copytree(odd.parent / "checkpoint-last", tmp_path / "copy" / "checkpoint-last")
    words = ["--data_set", "DoTA", "--data_path", dota_root, "--device", "cpu", "--num_workers", "0", *SHORT]
    words += ["--override", "epochs", "--warmup_epochs", "0", "--init_scale", 9]
    words = [str(word) for word in (*words, "--resume", tmp_path / "copy" / "checkpoint-last", "--output_dir")]
    in_process(*words, str(tmp_path / "b"))
    assert json.loads((tmp_path / "b" / "args.json").read_text())["args"]["gelu"] == "tanh"
    (tmp_path / "c").mkdir()
    record = json.loads((tmp_path / "b" / "args.json").read_text())
    record["args"]["lr"] = 7.0
    del record["crc32"]
    (tmp_path / "c" / "args.json").write_text(json.dumps(with_sum(record)))
    with pytest.raises(ConfigError, match=r"c belongs to a run with other arguments \(lr: 7.0 -> 0.001\)"):
        in_process(*words, str(tmp_path / "c"))
    (tmp_path / "c" / "args.json").write_text('{"args": null}')
    with pytest.raises(ConfigError, match="args.json is damaged"):
        in_process(*words, str(tmp_path / "c"))


def test_unlabelled_video_is_not_evaluated(dota_root, tmp_path, odd):
    with pytest.raises(ConfigError, match="videos has no labels to evaluate against; run_predict.py scores it"):
        in_process("--eval", "--data_set", "videos", "--data_path", str(dota_root / "clip.mp4"), "--output_dir",
                   str(tmp_path), "--finetune", str(odd))  # fmt: skip


def test_options_reach_the_model(dota_root, tmp_path):
    words = flags(dota_root, tmp_path, *SHORT, "--gelu", "tanh", "--final_reduction", "cls", "--init_scale", "0")
    args = finetune_parser("").parse_args([str(w) for w in words])
    run_finetune.resolve_runtime(args, cuda=False)
    run_finetune.resolve(args, 1)
    model = run_finetune.build_model(args, Process(0, 0, 1, torch.device("cpu")))
    assert model.blocks[0].mlp.act.approximate == "tanh" and model.final_reduction == "cls"
    assert not model.head.weight.any() and args.num_frames == 4


@pytest.mark.parametrize(
    "options",
    [
        ["--num_sample", "2", "--num_workers", "1"],
        ["--update_freq", "2", "--clip_grad", "1.0"],
        ["--model_ema", "--model_ema_decay", "0.9", "--model_ema_force_cpu", "--save_ckpt_freq", "1"],
        ["--use_checkpoint", "--no_flash_attn", "--freeze_layers", "2"],
        ["--final_reduction", "cls", "--opt", "sgd", "--weight_decay_end", "0.1", "--loss", "2bce"],
        ["--num_frames", "8", "--view_fps", "10", "--tubelet_size", "4", "--input_size", "48", "--sampling_rate", "2"],
        ["--aa", "none", "--reprob", "1", "--recount", "3", "--remode", "rand", "--erase_max_area", "0.5"],
        ["--short_side", "48", "--train_interpolation", "bilinear", "--eval_split", "train"],
        ["--warmup_steps", "2", "--layer_decay", "1", "--drop", ".1", "--attn_drop_rate", ".1", "--fc_drop_rate", ".1"],
        ["--data_set", "DoTA_half", "--batch_size", "2", "--sampling_rate_val", "3", "--no_pin_mem"],
        ["--precision", "bf16", "--no_save_ckpt", "--start_epoch", "1"],
        ["--model", "mvd_vit_tiny_patch16_64"],
        ["--model", "umt_vit_tiny_patch16_64", "--num_frames", "8"],
        ["--model", "internvideo2_tiny_patch14_56", "--gelu", "erf", "--freeze_layers", "1", "--drop", "0.1"],
    ],
    ids=lambda o: o[1] if o[0] == "--model" else o[0],
)  # fmt: skip
def test_options_train_and_evaluate(dota_root, tmp_path, options):
    short = SHORT if "--batch_size" not in options else [w for w in SHORT if w not in ("--total_batch_size", "4")]
    in_process(*flags(dota_root, tmp_path, *short, *options))
    records = log(tmp_path)
    assert records[-1]["epoch"] == 1 and 0 < records[-1]["train_loss"] < 10 and 0 <= records[-1]["val_auroc"] <= 1
    assert (tmp_path / "checkpoint-last").exists() == ("--no_save_ckpt" not in options)
    assert (tmp_path / "checkpoint-0.pth").exists() == ("--save_ckpt_freq" in options)
    assert len(records) == (1 if "--start_epoch" in options else 2)


def test_evaluation_during_training_can_be_left_out(dota_root, tmp_path):
    in_process(
        *flags(dota_root, tmp_path, *SHORT, "--disable_eval_during_finetuning", "--log_dir", tmp_path / "events")
    )
    assert not any(k.startswith("val_") for r in log(tmp_path) for k in r)
    assert list((tmp_path / "events").glob("*tfevents*")) and not list(tmp_path.glob("*tfevents*"))


@pytest.mark.slow
def test_compiled_model_trains_and_saves_the_same_keys(dota_root, tmp_path):
    in_process(*flags(dota_root, tmp_path, *SHORT, "--compile", "--model_ema"))
    state = load_weights(tmp_path / "checkpoint-1.pth")
    assert state.keys() == create_model("vit_tiny_patch16_64").state_dict().keys()


def test_the_average_that_is_evaluated_is_compiled_as_the_model_is(dota_root, tmp_path, monkeypatch):
    compiled, scored, score = [], [], run_finetune.Scorer.score
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))

    def noted(self, model, session=None):
        scored.append(model)
        return score(self, model, session)

    monkeypatch.setattr(run_finetune.Scorer, "score", noted)
    in_process(*flags(dota_root, tmp_path, *SHORT, "--compile", "--model_ema"))
    assert len(compiled) == 2 and scored == [compiled[1]] * 2


# ----------------------------------------------------------------------------------------------------------------------
# What bad input gets


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_errors_name_the_file_and_exit_without_a_traceback(dota_root, tmp_path, processes):
    root = tmp_path / "data"
    shutil.copytree(dota_root, root)
    broken = root / "frames" / "syntheticva_000003" / "images.zip"
    broken.write_bytes(broken.read_bytes()[:1000])
    done = run("run_finetune.py", "--eval", *flags(root, tmp_path / "out"), "--num_workers", "1", processes=processes)
    assert done.returncode != 0 and "Traceback" not in done.stdout
    assert (
        f"\n  syntheticva_000003: {broken}: not a readable zip" in done.stderr
        and "error: DoTA val: 1 of 5" in done.stderr
    )
    assert processes or "Traceback" not in done.stderr  # torchrun adds its own
    assert not (tmp_path / "out" / "predictions.csv").exists()


@pytest.mark.slow
def test_bad_checkpoints_end_the_run(dota_root, weights, tmp_path):
    """A ViT-B for a ViT-S, a truncated file, a web page, a tensor too few, a key too many."""
    state = torch.load(weights, weights_only=True)
    base = create_model("vit_base_patch16_224").state_dict()
    torch.save({"model": {k: torch.zeros(1).expand(v.shape) for k, v in base.items()}}, tmp_path / "base.pth")
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:9999])
    (tmp_path / "page.pth").write_text("<!doctype html><title>Sign in</title>")
    torch.save({k: v for k, v in state.items() if k != "blocks.2.norm1.bias"}, tmp_path / "few.pth")
    torch.save(state | {"blocks.2.norm3.bias": torch.zeros(2)}, tmp_path / "many.pth")
    for name, message in (
        ("base", "this is vit_base_patch16_224, but the model is vit_tiny_patch16_64"),
        ("cut", "truncated, or not a PyTorch checkpoint"),
        ("page", "HTML or XML page"),
        ("few", "lacks 1 tensors the model needs: blocks.2.norm1.bias"),
        ("many", "has 1 keys that no rule of 'Video ViT' accounts for: blocks.2.norm3.bias"),
    ):
        checkpoint = tmp_path / f"{name}.pth"
        done = run("run_finetune.py", *flags(dota_root, tmp_path / "out", *SHORT), "--finetune", checkpoint)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert f"error: {checkpoint}: " in done.stderr and message in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "vit_tini"], "unknown model 'vit_tini'"),
        (["--data_set", "DOTA"], "DoTA_half, Kinetics, Nexar, csv, videos, did you mean DoTA?"),
        (["--aa", "rand-q3"], "--aa 'rand-q3'"),
        (["--input_size", "60"], "input_size 60 must be a multiple of the patch size 16"),
        (["--freeze_layers", "9"], "cannot freeze 9 of 4 blocks"),
        (["--num_frames", "400"], "no clip is long enough for a window"),
        (["--total_batch_size", "4000"], "use a smaller batch"),
        (["--opt", "adamv"], "adamv"),
        (["--finetune", "absent.pth"], "absent.pth: no such checkpoint file"),
        (["--eval_split", "test"], "DoTA has no split 'test'"),
        (["--data_set", "BDD100K"], "BDD100K has no labels to fine-tune on; it is for run_dapt.py"),
        (
            ["--model", "pretrain_videomae_tiny_patch16_64"],
            "is for run_dapt.py; fine-tuning takes a classifier",
        ),
        (["--weight_decay", "0", "--weight_decay_end", "0.1"], "--weight_decay_end needs a --weight_decay above 0"),
        (["--epochs", "5"], "--warmup_epochs 5 must be below --epochs 5"),
        (["--min_lr", "0.1"], "--min_lr 0.1, the final rate, must not be above --lr 0.001"),
        (["--num_frames", "5"], "and num_frames 5 of tubelet_size 2"),
        (["--stop_epoch", "60"], "--start_epoch 0 < --stop_epoch 60 <= --epochs 50 must hold"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_mistaken_arguments_are_explained(dota_root, tmp_path, options, message):
    with pytest.raises((ConfigError, run_finetune.DataError, run_finetune.CheckpointError)) as caught:
        in_process(*flags(dota_root, tmp_path, "--num_frames", "4", *options))
    assert message in str(caught.value)


def test_a_run_on_the_cpu_sees_no_gpu(dota_root, tmp_path):
    """As the optimizer would: the script itself is run, since torch must not be imported before."""
    code = """import os, runpy
runpy.run_path("run_finetune.py", run_name="__main__")
import torch
print("seen:", torch.cuda.device_count(), repr(os.environ["CUDA_VISIBLE_DEVICES"]))"""
    done = run("-c", code, *flags(dota_root, tmp_path, *SHORT, "--stop_epoch", 1), env={"CUDA_VISIBLE_DEVICES": "0"})
    assert "seen: 0 ''" in done.stdout, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_explained(dota_root, tmp_path):
    with pytest.raises(ConfigError, match="use --device cpu"):
        in_process(*flags(dota_root, tmp_path), "--device", "cuda")
