"""python -m datasets.tools.prepare: half splits, frame-level annotation, video lists, sheets."""

import csv
import json
import shutil
import sys
import zipfile

import openpyxl
import pytest
import torch
import xlwt
from helpers import SHARED, run, write_video

from datasets import VideoScan, build_clips
from datasets.clips import DataError
from datasets.formats.dota import CATEGORIES, CODES
from datasets.tools import prepare
from datasets.windows import WindowIndex

HEADER = ["video", "light(day,night)1-2", "type", "abnormal start frame", "abnormal end frame", "total frames", "texts"]


def read(path):
    with open(path, newline="") as f:
        return list(csv.reader(f))


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, words)])
    prepare.main()


def dada(root, counts):
    """DADA2K with counts[type] clips of each type, 60 frames, the anomaly from 50 to 55; all in training.txt."""
    names = [(kind, video) for kind, count in counts.items() for video in range(1, count + 1)]
    (root / "annotation").mkdir(parents=True)
    (root / "DADA2K_my_split").mkdir()
    rows = [HEADER, *([f"{video:03d}", 2, kind, 50, 55, 60, "a, b"] for kind, video in names)]
    with (root / "annotation" / "full_anno.csv").open("w", newline="") as f:
        csv.writer(f).writerows(rows)
    (root / "DADA2K_my_split" / "training.txt").write_text("".join(f"{k}/{v:03d}\n" for k, v in names))
    return root


def test_half_of_each_category(tmp_path, monkeypatch, capsys):
    root, out = dada(tmp_path / "d", {1: 7, 20: 1, 61: 4}), tmp_path / "d" / "DADA2K_my_split" / "half_training.txt"
    with pytest.raises(
        DataError, match="half_training.txt: split file not found; .* python -m datasets.tools.prepare half"
    ):
        build_clips("DADA2K_half", str(root), "train")
    command(monkeypatch, "half", "DADA2K", root)
    assert f"6 of 12 training clips, in {out}" in capsys.readouterr().out
    kept = [c.name for c in build_clips("DADA2K_half", str(root), "train")]
    assert [sum(name.startswith(f"{k}/") for name in kept) for k in (1, 20, 61)] == [3, 1, 2]
    assert kept == [c.name for c in build_clips("DADA2K", str(root), "train") if c.name in kept]
    first = out.read_text()
    with pytest.raises(SystemExit, match="half_training.txt exists; remove it, or write to another file"):
        command(monkeypatch, "half", "DADA2K", root)
    drawn = set()
    for seed in (0, 0, 1, 2, 3):
        command(monkeypatch, "half", "DADA2K", root, "--seed", seed, "--out", tmp_path / f"{seed}{len(drawn)}.txt")
        drawn.add((tmp_path / f"{seed}{len(drawn)}.txt").read_text())
    assert first in drawn and 1 < len(drawn) < 5


@pytest.mark.skipif(not (SHARED / "data" / "dota").exists(), reason="needs ../shared/data/dota")
def test_half_of_the_real_dota_has_the_published_size():
    metadata = json.loads((SHARED / "data" / "dota" / "metadata_train.json").read_text())
    categories = {name: entry["anomaly_class"].split(": ")[1] for name, entry in metadata.items()}
    assert len(categories) == 3275 and len(prepare.half(categories, seed=0)) == 1634


def test_half_of_dota_from_its_metadata_alone(dota_root, tmp_path, monkeypatch):
    shutil.copytree(dota_root / "dataset", tmp_path / "dataset")
    (tmp_path / "dataset" / "half_train_split.txt").unlink()
    command(monkeypatch, "half", "DoTA", tmp_path)
    assert 1 <= len(build_clips("DoTA_half", str(tmp_path), "train")) < 8
    (tmp_path / "dataset" / "annotations").rename(tmp_path / "away")
    command(monkeypatch, "half", "DoTA", tmp_path, "--out", tmp_path / "of_metadata.txt")
    half = (tmp_path / "dataset" / "half_train_split.txt").read_text()
    assert (tmp_path / "of_metadata.txt").read_text() == half
    (tmp_path / "away").rename(tmp_path / "dataset" / "annotations")
    (tmp_path / "dataset" / "metadata_train.json").unlink()
    command(monkeypatch, "half", "DoTA", tmp_path, "--out", tmp_path / "of_annotations.txt")
    assert (tmp_path / "of_annotations.txt").read_text() == half


def test_splits_share_no_source(tmp_path, monkeypatch, capsys):
    sources = {f"drive-{i}": 1 + i % 4 for i in range(20)}
    rows = [[f"f/{s}-{i}", 10, s, ("sun", "rain")[i % 2], i % 2] for s, n in sources.items() for i in range(n)]
    (tmp_path / "d").mkdir()
    for path, *_ in rows:
        (tmp_path / "d" / path).mkdir(parents=True)
        (tmp_path / "d" / path / "0.png").write_bytes(b"")
    with (tmp_path / "d" / "mine.csv").open("w", newline="") as f:
        csv.writer(f).writerows([["path", "fps", "source", "weather", "label"], *rows])
    table = str(tmp_path / "d" / "mine.csv")
    command(monkeypatch, "split", "csv", table, "--val", 0.2, "--seed", 3)
    said = capsys.readouterr().out
    scan = VideoScan(tmp_path / "scan.json", workers=1)
    train, val = (build_clips("csv", table, split, scan) for split in ("train", "val"))
    assert len(train) + len(val) == len(rows) == 50 and 8 <= len(val) <= 10
    assert not {c.recording for c in train} & {c.recording for c in val}
    assert f"val: {len(val)} clips ({sum(c.is_positive for c in val)} with an accident)" in said
    first = (tmp_path / "d" / "mine_val.txt").read_text()
    assert first.startswith("# clips of split all; by source, val 0.2, seed 3\n")
    with pytest.raises(SystemExit, match="mine_train.txt exists; remove it, or choose other --names"):
        command(monkeypatch, "split", "csv", table, "--seed", 3)
    command(monkeypatch, "split", "csv", table, "--seed", 3, "--names", "a", "b")
    assert (tmp_path / "d" / "mine_b.txt").read_text().splitlines()[1:] == first.splitlines()[1:]
    command(monkeypatch, "split", "csv", table, "--by", "weather", "--names", "c", "d", "--val", 0.5)
    assert len({c.groups["weather"] for c in build_clips("csv", table, "d", scan)}) == 1
    with pytest.raises(
        SystemExit, match="has no city, by which the split is to be made; known of it: source, clip, we"
    ):
        command(monkeypatch, "split", "csv", table, "--by", "city", "--names", "e", "f")
    for text, message in (
        ("f/drive-0-0\n", "first line does not say of which split"),
        ("# clips of split all; x\nf/drive-0-0\nf/drive-0-0\n", "clip f/drive-0-0 is listed twice"),
        ("# clips of split all; x\ngone\n", "not of csv all: gone; write the list anew"),
        ("# clips of split all; x\n", "lists no clips"),
    ):
        (tmp_path / "d" / "mine_b.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            build_clips("csv", table, "b", scan)


def test_a_selection_split_within_train(dota_root, tmp_path, monkeypatch):
    shutil.copytree(dota_root / "dataset", tmp_path / "dataset")
    with pytest.raises(SystemExit, match="DoTA has a split val already, which a list would hide; choose other --names"):
        command(monkeypatch, "split", "DoTA", tmp_path, "--split", "train")
    command(monkeypatch, "split", "DoTA", tmp_path, "--split", "train", "--names", "fit", "select", "--by", "clip")
    train, fit, select = (build_clips("DoTA", str(tmp_path), split) for split in ("train", "fit", "select"))
    assert sorted(c.name for c in [*fit, *select]) == sorted(c.name for c in train) and len(select) == len(train) // 5


def test_frame_level_annotation_has_a_row_for_each_scored_frame(dota_root, tmp_path, monkeypatch, capsys):
    command(monkeypatch, "frames", "DoTA", dota_root, tmp_path / "frames.csv", "--num_frames", 8)
    header, *rows = read(tmp_path / "frames.csv")
    assert header == ["", "clip", "filename", "cat", "ego", "night", "clip_lvl_cat", "clip_lvl_ego"]
    clips = build_clips("DoTA", str(dota_root), "val")
    assert len(rows) == len(WindowIndex(clips.frame_counts, src_fps=10, num_frames=8, view_fps=10))
    ids, expected = {"lateral": 3, "oncoming": 4, "leave_to_right": 8}, []
    codes = {"lateral": "LA", "oncoming": "OC", "leave_to_right": "OO"}
    for clip in clips:
        for t in range(7, clip.num_frames):
            label = int(clip.labels[t])
            ego = str(clip.category == "oncoming")
            expected.append([str(len(expected)), clip.name, f"{t:06d}.jpg", str(label * ids[clip.category]),
                             str(label * (ego == "True")), str(clip.night), codes[clip.category], ego])  # fmt: skip
    assert rows == expected
    assert f"{len(rows)} frames of 5 clips, each the last of a window of 8 frames at 10 fps" in capsys.readouterr().out
    torch.save({"model": {}, "spec": {"num_frames": 4, "view_fps": 5.0}}, tmp_path / "w.pth")
    command(monkeypatch, "frames", "DoTA", dota_root, tmp_path / "of_model.csv", "--model", tmp_path / "w.pth")
    assert "each the last of a window of 4 frames at 5 fps" in capsys.readouterr().out
    assert len(read(tmp_path / "of_model.csv")) == 1 + len(
        WindowIndex(clips.frame_counts, src_fps=10, num_frames=4, view_fps=5)
    )
    (tmp_path / "w.pth").write_bytes(b"no weights")
    with pytest.raises(SystemExit, match="w.pth: no weights file that says its window .*; give --num_frames"):
        command(monkeypatch, "frames", "DoTA", dota_root, tmp_path / "x.csv", "--model", tmp_path / "w.pth")


def test_every_category_of_dota_has_its_code():
    assert list(CODES.values()) == ["ST", "AH", "LA", "OC", "TC", "VP", "VO", "OO", "OO", "UK"]
    assert list(CODES) == list(CATEGORIES.values())


def test_frame_level_annotation_of_dada(tmp_path, monkeypatch):
    root = dada(tmp_path / "d", {1: 1, 20: 1})
    command(monkeypatch, "frames", "DADA2K", root, tmp_path / "frames.csv", "--split", "train")
    rows = read(tmp_path / "frames.csv")
    assert rows[0] == ["", "clip", "filename", "cat", "ego", "night"] and len(rows) == 1 + 2 * (60 - 45)
    assert rows[1] == ["0", "1/001", "0046.png", "0", "0", "True"]
    assert rows[5] == ["4", "1/001", "0050.png", "1", "1", "True"]
    with pytest.raises(SystemExit, match="the frame rate of DoTA is known; --assume_fps is for DADA2K"):
        command(monkeypatch, "frames", "DoTA", root, tmp_path / "other.csv", "--assume_fps", 20)
    assert rows[16 + 4] == ["19", "20/001", "0050.png", "20", "0", "True"]  # without the recording car


def test_bdd100k_list_holds_what_opens(tmp_path, monkeypatch, capsys):
    for name in ("train/a.mov", "val/b.mov"):
        write_video(tmp_path / "videos" / name, frames=8, fps=30)
    (tmp_path / "videos" / "val" / "c4742900-81aa45ae.mov").touch()
    root, out = tmp_path / "videos", tmp_path / "videos" / "all.txt"
    command(monkeypatch, "bdd100k", root, out, "--workers", 1)
    assert out.read_text() == "train/a.mov\nval/b.mov\n"
    said = capsys.readouterr().out
    assert "2 videos, in" in said and "1 do not open" in said and "c4742900-81aa45ae.mov (" in said
    scan = VideoScan(root / "all.json", workers=1)
    assert [c.name for c in build_clips("BDD100K", str(out), "train", scan)] == ["train/a.mov"]
    with pytest.raises(DataError, match=r"videos: no video below test; .*; split all has .* \(--split all\)"):
        build_clips("BDD100K", str(root), "test", scan)
    command(monkeypatch, "bdd100k", root, tmp_path / "elsewhere.txt", "--workers", 1)
    assert [c.num_frames for c in build_clips("BDD100K", str(tmp_path / "elsewhere.txt"), "all", scan)] == [8, 8]
    with pytest.raises(DataError, match=r"elsewhere.txt: no line names a video below train; .* \(--split all\)"):
        build_clips("BDD100K", str(tmp_path / "elsewhere.txt"), "train", scan)


@pytest.fixture
def sheets(tmp_path):
    """The same table as .xlsx and as .xls, on the second of two sheets."""
    rows = [HEADER, ["001", 1, 10, 18, 34, 50, "a, b"], [2, 1, 10, 18.0, 34, 150, None], [None] * len(HEADER)]
    book = openpyxl.Workbook()
    book.active.title = "notes"
    own = book.create_sheet("annotation file")
    for row in rows:
        own.append(row)
    book.save(tmp_path / "cap.xlsx")
    book = xlwt.Workbook()
    book.add_sheet("notes")
    own = book.add_sheet("annotation file")
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            own.write(i, j, cell)
    book.save(str(tmp_path / "cap.xls"))
    return tmp_path


@pytest.mark.parametrize("suffix", [".xlsx", ".xls"])
def test_a_sheet_becomes_a_csv_that_is_read(sheets, monkeypatch, suffix):
    out = sheets / "annotation" / "cap_text_annotations.csv"
    command(monkeypatch, "sheet", sheets / f"cap{suffix}", out)
    first, second = ["001", "1", "10", "18", "34", "50", "a, b"], ["2", "1", "10", "18", "34", "150", ""]
    assert read(out) == [HEADER, first, second]
    clips = build_clips("CAP-DATA", str(sheets), "all")
    assert [(c.name, c.fps, c.num_frames) for c in clips] == [("10/000001", 10, 50), ("10/000002", 30, 150)]
    with pytest.raises(SystemExit, match="no sheet 'x'; it has notes, annotation file"):
        command(monkeypatch, "sheet", sheets / f"cap{suffix}", sheets / "b.csv", "--name", "x")


@pytest.mark.parametrize(("suffix", "module"), [(".xlsx", "openpyxl"), (".xls", "xlrd")])
def test_what_is_wrong_with_a_sheet_is_said(sheets, monkeypatch, suffix, module):
    (sheets / f"broken{suffix}").write_bytes(b"PK not a workbook")
    with pytest.raises(SystemExit, match=f"broken{suffix}: not a readable workbook"):
        command(monkeypatch, "sheet", sheets / f"broken{suffix}", sheets / "b.csv")
    with zipfile.ZipFile(sheets / "cap.xlsx") as z, zipfile.ZipFile(sheets / "torn.xlsx", "w") as torn:
        for name in z.namelist():
            torn.writestr(name, z.read(name)[: -40 if "worksheets/sheet" in name else None])
    with pytest.raises(SystemExit, match="torn.xlsx: not a readable workbook"):
        command(monkeypatch, "sheet", sheets / "torn.xlsx", sheets / "b.csv")
    with pytest.raises(SystemExit, match="absent.xlsx: no such file"):
        command(monkeypatch, "sheet", sheets / "absent.xlsx", sheets / "b.csv")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=rf"cap{suffix}: {suffix} files need {module}: pip install {module}"):
        command(monkeypatch, "sheet", sheets / f"cap{suffix}", sheets / "b.csv")


def test_as_a_module():
    done = run("-m", "datasets.tools.prepare", "half", "DoTA", "/nowhere")
    assert done.returncode == 1 and done.stderr.startswith("error: /nowhere/dataset/train_split.txt: split file not")
