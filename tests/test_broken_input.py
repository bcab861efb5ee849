"""A data set with 5 of 40 clips corrupt, through the real scripts; sources with more or fewer frames than annotated."""

import csv
import json
import shutil
import zipfile

import pytest
import torch
from helpers import rewrite_zip, run

import run_finetune
from datasets import DataError, build_clips
from datasets.faults import CountedBatches
from datasets.loader import EpochSampler
from datasets.tools.synthetic import render_dota
from datasets.windows import WindowIndex
from models import create_model
from utils.flags import finetune_parser

SAMPLES, BATCH, EPOCHS, SEED = 160, 16, 2, 42
BAD_FRAME = 30
FLAGS = ["--model", "vit_tiny_patch16_64", "--device", "cpu", "--num_workers", "1", "--aa", "none"]
TRAIN = [*FLAGS, "--nb_samples_per_epoch", SAMPLES, "--total_batch_size", BATCH, "--epochs", EPOCHS]
TRAIN += ["--warmup_epochs", 1, "--disable_eval_during_finetuning"]


def in_process(*words):
    run_finetune.main(finetune_parser("").parse_args([str(w) for w in words]))


def flip_bytes(path, name):
    """Damage the picture `name` in a zip, in place."""
    with zipfile.ZipFile(path) as z:
        info = z.getinfo(name)
    content = bytearray(path.read_bytes())
    middle = info.header_offset + 60 + info.compress_size // 2
    content[middle : middle + 20] = bytes(b ^ 0xFF for b in content[middle : middle + 20])
    path.write_bytes(content)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """(root, {clip: the one frame that cannot be read, or None for all of them}): 40 training clips, 5 corrupt."""
    root = tmp_path_factory.mktemp("broken")
    render_dota(root, train=40, val=1, seed=3, size=(64, 36))
    zips = {i: root / "frames" / f"synthetictr_{i:06d}" / "images.zip" for i in (2, 11, 17, 28, 39)}
    zips[2].write_bytes(zips[2].read_bytes()[:3000])
    zips[11].write_text("<!DOCTYPE html><html>Sign in to download</html>")
    flip_bytes(zips[17], f"{BAD_FRAME:06d}.jpg")
    rewrite_zip(zips[28], drop=[f"{BAD_FRAME:06d}.jpg"])
    zips[39].unlink()
    return root, {f"synthetictr_{i:06d}": BAD_FRAME if i in (17, 28) else None for i in zips}


def windows_that_fail(root, bad, epoch):
    """Clips of the samples of an epoch that touch an unreadable frame, one entry for each sample."""
    clips = build_clips("DoTA", str(root), "train")
    index = WindowIndex(clips.frame_counts, src_fps=clips.fps, num_frames=4, view_fps=5)
    order = EpochSampler([len(index)], batch_sizes=[BATCH], samples_per_epoch=SAMPLES, seed=SEED).order(epoch)
    windows = ((clips[clip].name, frames) for clip, frames in map(index.__getitem__, order))
    return [name for name, frames in windows if name in bad and (bad[name] is None or bad[name] in frames)]


def log(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.mark.slow
def test_training_goes_on_counts_exactly_and_names_the_five(broken, tmp_path):
    root, bad = broken
    words = [*TRAIN, "--data_path", root, "--output_dir", tmp_path / "run", "--update_freq", "8"]  # one at a time
    done = run("run_finetune.py", *words, processes=2)
    assert done.returncode == 0, done.stderr
    so_far = []
    for epoch, record in enumerate(log(tmp_path / "run")):
        failing = windows_that_fail(root, bad, epoch)
        so_far += failing
        assert record["train_skipped"] == len(failing) > 0
        assert record["train_samples"] + record["train_skipped"] == SAMPLES
        assert record["train_bad_clips"] == {name: so_far.count(name) for name in sorted(set(so_far))}
    assert set(so_far) == set(bad)
    named = ", ".join(f"{name} ({so_far.count(name)})" for name in sorted(bad))
    assert f"{len(so_far)} samples of the run were skipped, of 5 clips: {named}\n" in done.stdout
    assert done.stdout.count("skipped a sample of") <= 2 * 5  # each clip once on each rank


def test_over_the_limit_training_stops(broken, tmp_path):
    root, _ = broken
    done = run("run_finetune.py", *TRAIN, "--data_path", root, "--output_dir", tmp_path / "run", "--max_bad_samples", 2)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: more than --max_bad_samples 2 samples skipped in an epoch, the last of synthetictr_" in done.stderr
    assert (
        "so far of " in done.stderr
        and "; python -m datasets.tools.check finds all such clips for --bad_" in done.stderr
    )


def test_nothing_readable_at_all_is_an_error(dota_root, tmp_path):
    (tmp_path / "dataset").symlink_to(dota_root / "dataset")
    words = [*TRAIN, "--data_path", tmp_path, "--output_dir", tmp_path / "run"]
    with pytest.raises(DataError, match="more than --max_bad_samples 100 .* no frames: expected .*so far of 8 clips: "):
        in_process(*words)
    with pytest.raises(DataError, match="no sample of the epoch could be read, of 8 clips: synthetictr_000000"):
        in_process(*words, "--max_bad_samples", 1000)


def test_the_limit_is_of_one_epoch(broken, tmp_path):
    root, bad = broken
    counts = [len(windows_that_fail(root, bad, epoch)) for epoch in range(EPOCHS)]
    in_process(
        *TRAIN, "--data_path", root, "--output_dir", tmp_path / "run", "--max_bad_samples", max(counts),
    )  # fmt: skip
    assert [r["train_skipped"] for r in log(tmp_path / "run")] == counts and sum(counts) > max(counts)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(create_model("vit_tiny_patch16_64", init_scale=30.0).state_dict(), path)
    return path


@pytest.mark.slow
def test_evaluation_refuses_and_names_all(broken, weights, tmp_path):
    root, bad = broken
    words = [*FLAGS, "--eval", "--eval_split", "train", "--finetune", weights, "--data_path", root]
    done = run("run_finetune.py", *words, "--output_dir", tmp_path, processes=2)
    assert done.returncode != 0 and not (tmp_path / "metrics.json").exists()
    assert "error: DoTA train: 5 of 40 clips cannot be read; repair them, or evaluate the others with" in done.stderr
    for name, frame in bad.items():
        reason = f"images.zip: frame {frame:06d}.jpg: " if frame else ": "
        assert f"\n  {name}: " in done.stderr and reason in done.stderr.split(f"\n  {name}: ")[1].splitlines()[0]


@pytest.mark.slow
def test_allowed_to_it_evaluates_the_others_and_says_how_many(broken, weights, tmp_path):
    root, bad = broken
    words = [*FLAGS, "--eval", "--eval_split", "train", "--finetune", weights, "--data_path", root, "--allow_missing"]
    results = []
    for processes in (0, 2):
        folder = tmp_path / str(processes)
        done = run("run_finetune.py", *words, "--output_dir", folder, processes=processes)
        assert done.returncode == 0, done.stderr
        assert "5 of 40 clips cannot be read and go unscored: synthetictr_000002: " in done.stdout
        assert "  35 of 40 clips\n" in done.stdout
        results.append(json.loads((folder / "metrics.json").read_text()))
    metrics = results[0]
    assert metrics == results[1]
    assert (metrics["coverage"], metrics["clips"], metrics["clips_scored"]) == ("35 of 40 clips", 40, 35)
    assert metrics["unreadable"] == sorted(bad)
    clips = build_clips("DoTA", str(root), "train")
    index = WindowIndex(clips.frame_counts, src_fps=clips.fps, num_frames=4, view_fps=5)
    whole = {c.name: n for c, n in zip(clips, index.counts.tolist(), strict=True) if c.name not in bad}
    with (tmp_path / "0" / "predictions.csv").open() as f:
        scored = [row["clip"] for row in csv.DictReader(f)]
    assert {name: scored.count(name) for name in set(scored)} == whole and metrics["n"] == sum(whole.values())


# ----------------------------------------------------------------------------------------------------------------------
# More or fewer frames than annotated


@pytest.fixture
def mismatched(dota_root, tmp_path):
    """A validation split whose first clip lacks its last two frames and whose second has one more."""
    root = tmp_path / "mismatched"
    shutil.copytree(dota_root, root)
    clips = build_clips("DoTA", str(root), "val")
    paths = [root / "frames" / clip.name / "images.zip" for clip in clips]
    rewrite_zip(paths[0], drop=[clips[0].filename(clips[0].num_frames - 1 - k) for k in (0, 1)])
    rewrite_zip(paths[1], add={clips[1].filename(clips[1].num_frames): "000000.jpg"})
    return root, clips


def test_the_smaller_number_of_frames_counts_in_evaluation(mismatched, weights, tmp_path, capsys):
    root, clips = mismatched
    words = [*FLAGS, "--eval", "--finetune", weights, "--data_path", root, "--output_dir", tmp_path / "eval"]
    in_process(*words)
    out = capsys.readouterr().out
    total = [c.num_frames for c in clips]
    assert f"ends after {total[0] - 2} of {total[0]} frames" in out and f"goes on after the {total[1]} frames" in out
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    index = WindowIndex(clips.frame_counts, src_fps=clips.fps, num_frames=4, view_fps=5)
    assert metrics["n"] == len(index) - 2 and metrics["coverage"] == "5 of 5 clips"
    assert metrics["frame_mismatch"] == [clips[0].name, clips[1].name]


def test_windows_beyond_the_end_are_skipped_in_training(mismatched, tmp_path, capsys):
    root, clips = mismatched
    split = root / "dataset" / "val_split.txt"
    split.write_text(f"{clips[0].name}\n{clips[1].name}\n")
    (root / "dataset" / "train_split.txt").write_text(split.read_text())
    words = [*TRAIN, "--nb_samples_per_epoch", 0, "--total_batch_size", 4, "--data_path", root]
    in_process(*words, "--output_dir", tmp_path / "run")
    out = capsys.readouterr().out
    (first, second) = log(tmp_path / "run")
    for record in (first, second):
        assert record["train_skipped"] in (1, 2)  # one may be among the windows left over
    assert f"skipped a sample of {clips[0].name}: " in out and out.count(f"{clips[1].name}: ") == 1


def test_counts_go_on_where_an_interrupted_run_left_off():
    def batches(n):
        return [{"samples": ["a", "b", "c"], "skipped": [], "notes": []} for _ in range(n)]

    first, second = CountedBatches(batches(4), limit=0), CountedBatches(batches(2), limit=0)
    for _ in first:
        pass
    second.load_state_dicts([first.counts()])
    for _ in second:
        pass
    assert second.end_epoch() == {"train_samples": 18, "train_skipped": 0}
    assert second.end_epoch() == {"train_samples": 0, "train_skipped": 0}
    second.load_state_dicts([first.state_dict(), first.state_dict()])  # of two ranks
    assert second.counts()["samples"] == 24


def test_clips_that_end_before_their_first_window_leave_nothing_to_score(dota_root, weights, tmp_path):
    root = tmp_path / "cut"
    shutil.copytree(dota_root, root)
    for clip in build_clips("DoTA", str(root), "val"):
        rewrite_zip(root / "frames" / clip.name / "images.zip", drop=[clip.filename(t) for t in range(3, 70)])
    words = [*FLAGS, "--eval", "--finetune", weights, "--data_path", root, "--output_dir", tmp_path / "eval"]
    with pytest.raises(run_finetune.EvaluationError, match="no window can be scored: the frames of every clip end"):
        in_process(*words)
