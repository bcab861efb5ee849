"""DADA-2000 and CAP-DATA: sheets, splits, numbering of frames."""

import csv
import io
import logging
import zipfile

import numpy as np
import pytest
from PIL import Image

from datasets import build_clips, find_data_sets
from datasets.clips import DataError
from datasets.readers import open_clip

# The real header of each sheet; columns are found by name, since the two order them differently.
DADA_HEADER = [
    "video", "weather(sunny,rainy,snowy,foggy)1-4", "light(day,night)1-2",
    "scenes(highway,tunnel,mountain,urban,rural)1-5", "linear(arterials,curve,intersection,T-junction,ramp) 1-5",
    "type", "whether an accident occurred (1/0)",
    "abnormal start frame", "accident frame", "abnormal end frame", "total frames", "[0,tai]", "[tai,tco]", "[tai,tae]",
    "[tco,tae]", "[tae,end]", "texts", "causes", "measures",
]  # fmt: skip
CAP_HEADER = [*DADA_HEADER[:7], "abnormal start frame", "abnormal end frame", "accident frame", *DADA_HEADER[10:]]


def row(header, **values):
    cells = dict.fromkeys(header, "1") | {"texts": "[CLS]a car, crossing[SEP]  "}
    names = {name.split("(")[0].replace(" ", "_"): name for name in header}
    return [str((cells | {names[k]: v for k, v in values.items()})[name]) for name in header]


def write(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8-sig") as f:
        csv.writer(f).writerows([header, *rows])


@pytest.fixture
def dada(tmp_path):
    rows = [
        row(DADA_HEADER, video="001", type=1, abnormal_start_frame=3, abnormal_end_frame=5, total_frames=8),
        row(DADA_HEADER, video="012", type=20, light=2, abnormal_start_frame=-1, abnormal_end_frame=-1, total_frames=6),
        row(DADA_HEADER, video="001", type=61, abnormal_start_frame=6, abnormal_end_frame=6, total_frames=6),
    ]
    write(tmp_path / "annotation" / "full_anno.csv", DADA_HEADER, rows)
    splits = tmp_path / "DADA2K_my_split"
    splits.mkdir()
    (splits / "training.txt").write_text("1/001\n20/012\n")
    (splits / "half_training.txt").write_text("20/012\n")
    (splits / "validation.txt").write_text("61/001\n")
    folder = tmp_path / "frames" / "1" / "001"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "images.zip", "w") as z:
        for number in range(1, 9):
            buffer = io.BytesIO()
            Image.new("RGB", (4, 4), (number, 0, 0)).save(buffer, "PNG")
            z.writestr(f"{number:04d}.png", buffer.getvalue())
    return tmp_path


def test_labels_are_one_based_and_inclusive(dada):
    first, second = build_clips("DADA2K", str(dada), "train")
    assert (first.name, first.num_frames, first.fps, first.ego, first.night) == ("1/001", 8, 30.0, True, False)
    assert first.labels.tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
    assert [first.filename(i) for i in np.flatnonzero(first.labels)] == ["0003.png", "0004.png", "0005.png"]
    assert (second.name, second.ego, second.night, second.category) == ("20/012", False, True, "20")
    assert not second.labels.any()
    (last,) = build_clips("DADA2K", str(dada), "val")
    assert last.ego and last.labels.tolist() == [0] * 5 + [1]


def test_frames_are_read_by_their_numbers(dada):
    with open_clip(build_clips("DADA2K", str(dada), "train")[0]) as reader:
        assert reader.read([0, 2, 7])[:, 0, 0, 0].tolist() == [1, 3, 8]


def test_splits(dada):
    assert [c.name for c in build_clips("DADA2K_half", str(dada), "train")] == ["20/012"]
    assert [c.name for c in build_clips("DADA2K", str(dada), "all")] == ["1/001", "20/012", "61/001"]
    with pytest.raises(DataError, match="DADA2K has no split 'test'; it has train, val, all"):
        build_clips("DADA2K", str(dada), "test")


def test_cap_data(tmp_path):
    rows = [
        row(CAP_HEADER, video="000001", type=10, abnormal_start_frame=18, abnormal_end_frame=34, total_frames=50),
        row(CAP_HEADER, video="000002", type=3, abnormal_start_frame=18, abnormal_end_frame=34, total_frames=150),
    ]
    write(tmp_path / "annotation" / "cap_text_annotations.csv", CAP_HEADER, rows)
    short, long = build_clips("CAP-DATA", str(tmp_path), "all")
    assert (short.name, short.fps, short.filename(0)) == ("10/000001", 10.0, "000001.jpg")  # from CCD
    assert (long.fps, long.labels.sum(), np.flatnonzero(long.labels)[0]) == (30.0, 17, 17)
    assert short.source == str(tmp_path / "frames" / "10" / "000001" / "images")
    with pytest.raises(DataError, match="training.txt: split file not found; it comes with huggingface"):
        build_clips("CAP-DATA", str(tmp_path), "train")


def test_absent_lists_follow_from_the_authors_own(dada, caplog):
    lists = dada / "DADA2K_my_split"
    (lists / "training.txt").unlink()
    with pytest.raises(DataError, match="training.txt: split file not found; .*; or put orig_training.txt there"):
        build_clips("DADA2K", str(dada), "train")
    text = "61/001 1 30 63 44,[CLS]a, b[SEP]\n1/001 0 1 2 3,x\n61/001 1 2 3 4,y\n"
    (lists / "orig_training.txt").write_text(text)
    (lists / "validation.txt").unlink()
    with caplog.at_level(logging.INFO, "tad"):
        assert [c.name for c in build_clips("DADA2K", str(dada), "train")] == ["1/001", "61/001"]
    assert "training.txt is absent: 2 clips, from orig_training.txt and full_anno.csv" in caplog.text
    assert [c.name for c in build_clips("DADA2K", str(dada), "val")] == ["20/012"]
    assert [c.name for c in build_clips("DADA2K_half", str(dada), "val")] == ["20/012"]
    (lists / "half_training.txt").unlink()
    with pytest.raises(
        DataError, match="half_training.txt: split file not found; .* python -m datasets.tools.prepare half"
    ):
        build_clips("DADA2K_half", str(dada), "train")
    (lists / "orig_training.txt").write_text(text + "20/012 0 0 0 0,z\n")
    with pytest.raises(DataError, match="orig_training.txt: lists every clip of .*full_anno.csv; none is left for val"):
        build_clips("DADA2K", str(dada), "val")
    (lists / "orig_training.txt").write_text("5/777 0 0 0 0,z\n")
    with pytest.raises(DataError, match="orig_training.txt: clip 5/777 is not in"):
        build_clips("DADA2K", str(dada), "train")
    (lists / "orig_training.txt").write_text(",z\n")
    with pytest.raises(DataError, match="orig_training.txt: ',z' is not <type>/<video>"):
        build_clips("DADA2K", str(dada), "train")


def test_cap_data_s_authors_list_is_that_of_the_validation(tmp_path):
    rows = [
        row(CAP_HEADER, video=video, type=10, abnormal_start_frame=18, abnormal_end_frame=34, total_frames=90.0)
        for video in ("000001", "000002", "000003")
    ]
    write(tmp_path / "annotation" / "cap_annotation_file.csv", CAP_HEADER, rows)  # its other name
    (tmp_path / "CAPDATA_my_split").mkdir()
    (tmp_path / "CAPDATA_my_split" / "orig_full_testing-text.txt").write_text("10/000002 1 18 34 20,[CLS]x[SEP]\n")
    assert [c.name for c in build_clips("CAP-DATA", str(tmp_path), "val")] == ["10/000002"]
    assert [c.name for c in build_clips("CAP-DATA", str(tmp_path), "train")] == ["10/000001", "10/000003"]


def test_the_assumed_rate_is_that_of_clips_without_one(tmp_path, dada):
    rows = [row(CAP_HEADER, video=v, type=1, total_frames=n) for v, n in (("000001", 50), ("000002", 51))]
    write(tmp_path / "cap" / "annotation" / "cap_annotation_file.csv", CAP_HEADER, rows)
    assert [c.fps for c in build_clips("CAP-DATA", str(tmp_path / "cap"), "all", assume_fps=25)] == [10, 25]
    assert {c.fps for c in build_clips("DADA2K", str(dada), "all", assume_fps=25)} == {25}
    with pytest.raises(DataError, match="of DoTA and BDD100K is known; --assume_fps is for DADA2K, DADA2K_half, CAP-"):
        find_data_sets(["DoTA", "BDD100K"], 25)
    assert len(find_data_sets(["BDD100K", "CAP-DATA"], 25)) == 2


def test_what_is_wrong_is_named(dada):
    sheet, split = dada / "annotation" / "full_anno.csv", dada / "DADA2K_my_split" / "training.txt"

    def refused(match, name="DADA2K"):
        with pytest.raises(DataError, match=match):
            build_clips(name, str(dada), "train")

    split.write_text("1/001\n5/777\n")
    refused("full_anno.csv: no row of clip 5/777, which a split file lists")
    split.write_text("001\n")
    refused("training.txt: '001' is not <type>/<video>, e.g. 1/001")
    split.write_text("1/001\n1/1\n")
    refused("training.txt: type 1, video 1 is listed twice")
    split.write_text("1/001\n")
    good = row(DADA_HEADER, video="001", type=1, abnormal_start_frame=3, abnormal_end_frame=5, total_frames=8)
    beyond = row(DADA_HEADER, video="001", type=1, abnormal_start_frame=3, abnormal_end_frame=9, total_frames=8)
    for rows, match in (
        ([good, good], "line 3: type 1, video 1 is listed twice"),
        ([beyond], "1/001: frames 3 to 9 are anomalous, of 8"),
        ([good, good[:5]], "line 3: 'type' is not a whole number: list index"),
        ([["x"] * len(good)], "line 2: 'video' is not a whole number"),
        ([[*good[:10], "-3", *good[11:]]], "1/001 has -3 frames; correct the row"),
        ([], "no rows"),
    ):
        write(sheet, DADA_HEADER, rows)
        refused(match)
    write(sheet, DADA_HEADER[:10], [good[:10]])
    refused("0 columns begin with 'total frames', 1 is needed")
    write(sheet, DADA_HEADER, [good])
    sheet.write_text(sheet.read_text() + '"' + sheet.read_text())
    refused("full_anno.csv: in the row that begins in line 3: .*; check its quotes")
    sheet.unlink()
    refused("full_anno.csv: annotation sheet not found; python -m datasets.tools.prepare sheet makes it")
