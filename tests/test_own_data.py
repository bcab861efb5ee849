"""A user's own csv through the real scripts: training, evaluation, DAPT, and what they refuse."""

import csv
import json

import numpy as np
import pytest
import torch
from helpers import write_video
from PIL import Image

import run_dapt
import run_finetune
from datasets import DataError, VideoScan, build_clips
from datasets.tools.check import check
from datasets.tools.pack import Settings, pack
from models import create_model
from utils.cli import ConfigError
from utils.flags import dapt_parser, finetune_parser

TINY = ["--data_set", "csv", "--device", "cpu", "--num_workers", "0", "--aa", "none"]
SHORT = ["--epochs", "1", "--warmup_epochs", "0", "--nb_samples_per_epoch", "8", "--total_batch_size", "4"]


def finetune(*words):
    words = ["--model", "vit_tiny_patch16_64", *TINY, *words]
    run_finetune.main(finetune_parser("").parse_args([str(w) for w in words]))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """train.csv: a video at 30 fps, a folder at 10; val.csv: a video at 25, labelled by frame, and a broken one."""
    root = tmp_path_factory.mktemp("own")
    write_video(root / "a.mp4", frames=60, fps=30)
    write_video(root / "c.mp4", frames=50, fps=25)
    (root / "broken.mov").write_bytes(b"no video")
    (root / "b").mkdir()
    for i in range(30):
        Image.fromarray(np.full((48, 64, 3), 8 * i, np.uint8)).save(root / "b" / f"{i:04d}.png")
    rows = "clip,path,fps,start_frame,end_frame\nA,a.mp4,,10,25\nA,a.mp4,,40,50\nB,b,10,,\n"
    (root / "train.csv").write_text(rows)
    labels = "".join(f"C,c.mp4,{t},{int(20 <= t < 40)},7,rain\n" for t in range(50))
    (root / "val.csv").write_text("clip,path,frame,label,source,weather\n" + labels + "D,broken.mov,0,0,,\n")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(create_model("vit_tiny_patch16_64", init_scale=30.0).state_dict(), path)
    return path


def test_training_and_evaluation(own, weights, tmp_path):
    finetune(*SHORT, "--data_path", own, "--output_dir", tmp_path / "run", "--allow_missing")
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert (record["train_samples"], record["train_skipped"]) == (8, 0) and 0 <= record["val_auroc"] <= 1
    assert json.loads((tmp_path / "run" / "videos.json").read_text())["videos"].keys() >= {
        str(own / "a.mp4"),
        str(own / "c.mp4"),
    }
    words = ["--eval", "--data_path", own, "--finetune", weights, "--scan_cache", tmp_path / "scan.json"]
    finetune(*words, "--output_dir", tmp_path / "eval", "--allow_missing")
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert (metrics["coverage"], metrics["unreadable"]) == ("1 of 2 clips", ["D"]) and (tmp_path / "scan.json").exists()
    with (tmp_path / "eval" / "predictions.csv").open() as f:
        rows = list(csv.DictReader(f))
    first = round(3 * 25 / 5)  # 4 frames at 5 fps of a video at 25
    assert [int(r["frame"]) for r in rows] == list(range(first, 50)) and {r["clip"] for r in rows} == {"C"}
    assert [int(r["label"]) for r in rows] == [int(20 <= t < 40) for t in range(first, 50)]
    assert float(rows[17 - first]["ttc"]) == pytest.approx(-3 / 25)
    assert {(r["source"], r["is_positive"], r["event_time"], r["weather"]) for r in rows} == {("7", "1", "", "rain")}
    (made,) = json.loads((tmp_path / "eval" / "report.json").read_text())["models"]
    assert made["data"]["sources"] == 1 and made["groups"]["weather"] == {"left_out": "rain for every clip"}
    why = f"one recording: nothing is left to learn a prior from; csv train is not at hand ({tmp_path}/scan.json: "
    assert why in made["baselines"]["of"]["position"]["how"] and "n/a" in made["baselines"]["verdict"]
    assert (tmp_path / "eval" / "report.html").read_text().count("<img") == len(made["false_alarms"])


def test_a_broken_video_in_the_evaluated_split_is_refused_at_once(own, weights, tmp_path):
    for words in (["--eval", "--finetune", weights], SHORT):
        with pytest.raises(DataError, match=r"(?s)csv val: 1 of 2 clips cannot be read; repair.*\n  D: broken.mov: "):
            finetune(*words, "--data_path", own, "--output_dir", tmp_path)


def test_labels_and_frame_rates_are_asked_for(own, tmp_path):
    (own / "bare.csv").write_text("path\na.mp4\n")
    with pytest.raises(DataError, match="csv: clip a.mp4 has no labels to train on or to evaluate with"):
        finetune("--eval", "--data_path", own / "bare.csv", "--eval_split", "all", "--output_dir", tmp_path)
    with pytest.raises(DataError, match="the frame rate of DoTA is known; --assume_fps is for DADA2K, DADA2K_half"):
        finetune("--data_set", "DoTA", "--data_path", own, "--output_dir", tmp_path, "--assume_fps", "25")
    with pytest.raises(ConfigError, match="BDD100K has no labels to fine-tune on; it is for run_dapt.py"):
        finetune("--data_set", "BDD100K", "--data_path", own, "--output_dir", tmp_path)


def test_dapt(own, tmp_path, monkeypatch):
    (own / "unlabelled.csv").write_text("path\na.mp4\nb\nc.mp4\n")
    words = ["--model", "pretrain_videomae_tiny_patch16_64", *TINY, *SHORT, "--data_path", own / "unlabelled.csv"]
    words += ["--data_split", "all", "--output_dir", tmp_path, "--assume_fps", "20"]
    seen = []
    original = run_dapt.build_clips
    monkeypatch.setattr(run_dapt, "build_clips", lambda *a, **k: seen.append(original(*a, **k)) or seen[-1])
    run_dapt.main(dapt_parser("").parse_args([str(w) for w in words]))
    assert [(c.name, c.fps, c.num_frames) for c in seen[0]] == [("a.mp4", 30, 60), ("b", 20, 30), ("c.mp4", 25, 50)]
    record = json.loads((tmp_path / "log.txt").read_text())
    assert record["train_samples"] == 8 and 0 < record["train_loss"] < 2


def test_checking_and_packing(own, tmp_path):
    findings, numbers = check("csv", str(own))
    assert [(f.split, f.clip, f.kind) for f in findings if f.is_error] == [("val", "D", "unreadable")]
    assert (numbers["train"]["clips"], numbers["train"]["frames"]) == (2, 90)

    scan = VideoScan(tmp_path / "videos.json", workers=1)
    for root, split, fps, settings in (
        (own, "train", None, Settings(0, 0, 95)),
        (own, "train", 20, Settings(24, 10, 95)),
    ):
        out = tmp_path / f"{fps}"
        pack("csv", str(root), out, splits=[split], settings=settings, assume_fps=fps)
        original, packed = build_clips("csv", str(root), split, scan, fps), build_clips("csv", str(out), split, scan)
        for a, b in zip(original, packed, strict=True):
            assert (a.name, a.num_frames, a.fps, a.category) == (b.name, b.num_frames, b.fps, b.category)
            assert np.array_equal(a.labels, b.labels) and np.array_equal(a.ttc, b.ttc, equal_nan=True)

    (own / "bare_b.csv").write_text("path\nb\n")
    with pytest.raises(DataError, match="column fps: empty; pictures do not know their frame rate"):
        build_clips("csv", str(own / "bare_b.csv"), "all", scan)
    pack("csv", str(own / "bare_b.csv"), tmp_path / "b", splits=["all"], settings=Settings(0, 0, 95), assume_fps=20)
    assert build_clips("csv", str(tmp_path / "b"), "all", scan)[0].fps == 20
    findings, numbers = check("csv", str(own / "bare_b.csv"), splits=["all"], assume_fps=20, num_frames=8)
    assert not findings and numbers["all"]["clips"] == 1
    with pytest.raises(DataError, match="the frame rate of DoTA is known"):
        check("DoTA", str(own), assume_fps=20)
