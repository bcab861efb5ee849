"""Nexar, CCD, DAD, A3D, MM-AU as shipped, consensus labels: what is read is what was written; faults are named."""

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers import SHARED, write_video
from PIL import Image

from datasets import VideoScan, build_clips
from datasets.clips import ClipTable, DataError
from datasets.formats.consensus import with_consensus
from datasets.readers import open_clip
from datasets.tools.check import check
from datasets.tools.pack import Settings, pack
from datasets.windows import index_clips
from tests.datasets.formats.test_dada import CAP_HEADER, DADA_HEADER, row, write

SAMPLES, CONSENSUS = SHARED / "data" / "samples", SHARED / "data" / "consensus"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the samples beside the checkout")
HEADER = "file_name,time_of_event,time_of_alert,light_conditions,weather,scene,time_to_accident\n"


def runs(labels):
    """[(value, frames)] of the stretches of equal labels."""
    return [(int(part[0]), len(part)) for part in np.split(labels, np.flatnonzero(np.diff(labels)) + 1)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """{frames: a video of so many}, at 10 fps; frame i is grey 4 i."""
    folder = tmp_path_factory.mktemp("videos")
    for frames in (20, 40, 50, 55, 100):
        write_video(folder / f"{frames}.mp4", frames=frames, fps=10)
    return {int(path.stem): path for path in folder.glob("*.mp4")}


@pytest.fixture
def put(videos, tmp_path):
    """put(path, frames or text) makes a file below root, which is put.root."""

    def make(path, content):
        path = tmp_path / "root" / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            shutil.copy(videos[content], path)
        else:
            path.write_text(content)

    make.root = tmp_path / "root"
    return make


@pytest.fixture
def read(put, tmp_path):
    """read(name, split, **options) is the ClipTable of the files put."""
    scan = VideoScan(tmp_path / "scan.json", workers=1)
    return lambda name, split, **options: build_clips(name, str(put.root), split, scan, **options)


def check_and_pack(name, root, out, splits):
    """No fault is found in the data, nor in a pack of it, whose clips are the same."""
    findings, _ = check(name, str(root), splits=splits, num_frames=4)
    assert [f for f in findings if f.is_error] == []
    pack(name, str(root), out, splits=splits, settings=Settings(0, 0, 90))
    assert [f for f in check(name, str(out), splits=splits, num_frames=4)[0] if f.is_error] == []
    scan = VideoScan(out.parent / "pack_scan.json", workers=1)
    for split in splits:
        for a, b in zip(build_clips(name, str(root), split, scan), build_clips(name, str(out), split), strict=True):
            assert a.labels is None or a.labels.tolist() == b.labels.tolist()
            a, b = (replace(c, labels=None, source="", pack_step=None) for c in (a, b))
            assert vars(a) == vars(b)


# ----------------------------------------------------------------------------------------------------------------------
# Nexar


def test_nexar_of_hugging_face(put, read, tmp_path, caplog):
    put("train/positive/metadata.csv", HEADER + "00822.mp4,3.0,2.5,Normal,Cloudy,Urban,\n57.mp4,3.2,,Dark,,Rural,\n"
        "00009.mp4,none,NaN,,,,\n")  # fmt: skip
    put("train/negative/metadata.csv", HEADER + "01924.mp4,,,Twilight,Snow,null,\n")
    put("test-public/positive/metadata.csv", HEADER + "00204.mp4,22.5,21.1,Normal,Rain,Urban,0.5\n30.mp4,9,,,,,1.0\n"
        "00205.mp4,12.0,9.25,,,,1.5\n")  # fmt: skip
    put("test-public/negative/metadata.csv", HEADER + "00146.mp4,,,,,,0.5\n")
    put("time_to_accident_test_map.csv", "0.5,1.0,1.5\n00204,00030,\n00146,,\n,,00205\n")
    for name in ("train/positive/00822", "train/positive/00057", "train/positive/00009", "train/negative/01924"):
        put(f"{name}.mp4", 40)
    for name in ("positive/00204", "positive/00030", "positive/00205", "negative/00146", "negative/00999"):
        put(f"test-public/{name}.mp4", 40)
    train, val = read("Nexar", "train"), read("Nexar", "val")
    clips = {clip.name: clip for clip in [*train, *val]}
    assert {name: runs(clip.labels) for name, clip in clips.items()} == {
        "00822": [(0, 25), (1, 5), (2, 10)],
        "00057": [(0, 17), (1, 15), (2, 8)],
        "00009": [(2, 40)],
        "01924": [(0, 40)],
        "00204": [(0, 31), (1, 9)],  # alert 1.4 s before an event at 4.5 s
        "00030": [(0, 35), (1, 5)],
        "00205": [(0, 28), (1, 12)],  # 2.75 s before one at 5.5 s
        "00146": [(0, 40)],
    }
    assert [clip.is_positive for clip in clips.values()] == [True] * 3 + [False] + [True] * 3 + [False]
    assert clips["00822"].groups == {"light_conditions": "Normal", "weather": "Cloudy", "scene": "Urban"}
    assert (clips["00057"].night, clips["01924"].night, clips["00009"].night) == (True, False, None)
    assert clips["00204"].event_time == 4.5 and clips["00204"].alert_time == pytest.approx(3.1)
    assert clips["00204"].recording == clips["00030"].recording != clips["00205"].recording
    assert "1 positive clips have no time_of_event" in caplog.text
    assert "1 videos are not annotated and go unused" in caplog.text and "00999.mp4" in caplog.text
    check_and_pack("Nexar", put.root, tmp_path / "pack", ["train", "val"])


def test_nexar_of_kaggle(put, read):
    put("train.csv", "id,time_of_event,time_of_alert,target\n1924,,,0\n822,3.0,2.5,1\n00057,3.2,1.9,1\n7,1,0.5,1\n")
    put("test.csv", "id\n204\n00146\n")
    for name in ("train/01924", "train/00822", "train/00057", "test/00204", "test/00146"):
        put(f"{name}.mp4", 40)
    train, test = read("Nexar", "train"), read("Nexar", "test")
    assert [(c.name, runs(c.labels)) for c in train] == [
        ("01924", [(0, 40)]), ("00822", [(0, 25), (1, 5), (2, 10)]), ("00057", [(0, 19), (1, 13), (2, 8)])
    ]  # fmt: skip
    assert list(train.unreadable) == ["00007"] and train.listed == 4
    assert [(c.name, c.labels, c.is_positive) for c in test] == [("00204", None, None), ("00146", None, None)]
    with pytest.raises(
        DataError, match="Nexar as Kaggle has it has no split 'val'; it has train, test; .*prepare split"
    ):
        read("Nexar", "val")
    assert check("Nexar", str(put.root), splits=["train", "test"])[1]["train"]["ignored_frames"] == 18


@needs_samples
def test_nexar_samples(put, read):
    for layout, splits in (("hf", ("train", "val", "test")), ("kaggle", ("train", "test"))):
        shutil.rmtree(put.root, ignore_errors=True)
        shutil.copytree(SAMPLES / f"synthetic_nexar_{layout}", put.root)
        for split in splits:
            table = read("Nexar", split, problems=(problems := {})) if split != "none" else None
            assert not len(table) and not problems.keys() - table.unreadable.keys() - set(problems)
            assert all(type(problem).__name__ == "Unreadable" for problem in problems.values()) and problems
            assert all(len(name) == 5 and name.isdecimal() for name in problems)


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        ("00001.mp4,3,2,,,,\n", "00001.mp4,,,,,,\n", "clip 00001 is in .*positive/metadata.csv: row 2, too"),
        ("00001.mp4,2,3,,,,\n", "", "row 2, column time_of_alert: 3 s, but time_of_event is 2"),
        ("00001.mp4,,3,,,,\n", "", "row 2, column time_of_alert: 3 s, but time_of_event is empty"),
        ("00001.mp4,-1,,,,,\n", "", "row 2, column time_of_event: '-1' is not a time in seconds"),
        ("00001.mp4,0:03,,,,,\n", "", "row 2, column time_of_event: '0:03' is not a time in seconds"),
        ("x.mp4,3,2,,,,\n", "", "row 2, column file_name: 'x.mp4' is not the number of a clip"),
        ("00001.mp4,5,4,,,,\n", "", "row 2, column time_of_event: 5 s, but the video has 4 s"),
        ("00001.mp4,3,2,,,,\n", "00002.mp4,3,,,,,\n", "row 2: a negative clip with a time of event or alert"),
        ("00001.mp4,3,2,,,,,,\n", "", "row 2 has 9 cells, the header 7"),
    ],
)
def test_faults_of_nexar_are_named(put, read, positive, negative, message):
    put("train/positive/metadata.csv", HEADER + positive)
    put("train/negative/metadata.csv", HEADER + negative)
    put("train/positive/00001.mp4", 40)
    with pytest.raises(DataError, match=message):
        read("Nexar", "train")
    put("train/positive/metadata.csv", "file_name\n")
    with pytest.raises(DataError, match="metadata.csv: no column time_of_event, time_of_alert; expected file_name,"):
        read("Nexar", "train")
    (put.root / "train/positive/metadata.csv").unlink()
    with pytest.raises(DataError, match="metadata.csv: not found; it comes with the data set"):
        read("Nexar", "train")


# ----------------------------------------------------------------------------------------------------------------------
# CCD, DAD, A3D


def line(name, labels, rest="000285,7,Night,Rainy,No"):
    return f"{name},[{', '.join(map(str, labels))}],{rest}\n"


def test_ccd(put, read, tmp_path):
    put("videos/Crash-1500.txt", line("000001", [0] * 38 + [1] * 12) + line("000004", [0] * 35 + [1] * 12 + [0] * 3))
    for name in ("Crash-1500/000001", "Crash-1500/000004", "Normal/000001"):
        put(f"videos/{name}.mp4", 50)
    put("vgg16_features/train.txt", "positive/000001.npz 1\nnegative/000001.npz 0\n")
    put("vgg16_features/test.txt", "positive/000004.npz 1\n")
    crash, normal = read("CCD", "train")
    assert (crash.name, runs(crash.labels), normal.name) == ("Crash-1500/000001", [(0, 38), (1, 12)], "Normal/000001")
    assert (crash.ego, crash.night, crash.groups, crash.event_time) == (False, True, {"weather": "Rainy"}, 3.8)
    assert crash.recording == read("CCD", "val")[0].recording == "YouTube 7"
    assert [clip.is_positive for clip in read("CCD", "all")] == [True, True, False]
    assert runs(normal.labels) == [(0, 50)] and normal.night is None
    check_and_pack("CCD", put.root, tmp_path / "pack", ["train", "val"])


@needs_samples
def test_ccd_samples(put, read):
    shutil.copytree(SAMPLES / "synthetic_ccd", put.root)
    for name in ("Crash-1500/000001", "Crash-1500/000002", "Crash-1500/000003", "Crash-1500/000004", "Normal/000001"):
        put(f"videos/{name}.mp4", 50)
    written = [text.split("[")[1].split("]")[0] for text in (put.root / "videos/Crash-1500.txt").open()]
    clips = read("CCD", "all")
    assert [", ".join(map(str, clip.labels)) for clip in clips][:4] == written and len(clips) == 5
    assert [c.name for c in read("CCD", "train")] == ["Crash-1500/000001", "Crash-1500/000002", "Normal/000001"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line("000001", [0] * 48 + [1]), "clip 000001: 49 labels, but .*000001.mp4 has 50 frames"),
        (line("000001", [0] * 50), "clip 000001: no label is 1, in a clip of a crash"),
        (line("000001", [0] * 49 + [2]), "line 1 is not of the form 000001"),
        (line("000001", [0] * 49 + [1], "000285,7,Dusk,Rainy,No"), "'Dusk' is not Day or Night"),
        (line("000001", [0] * 49 + [1]) * 2, "line 2: clip 000001 is listed twice"),
        (line("000002", [0] * 49 + [1]), "Crash-1500.txt: no line of clip 000001, which a list names"),
        ("<html>quota\n", "a web page, not the file itself"),
    ],
)
def test_faults_of_ccd_are_named(put, read, text, message):
    put("videos/Crash-1500.txt", text)
    put("videos/Crash-1500/000001.mp4", 50)
    put("vgg16_features/train.txt", "positive/000001.npz 1\n")
    with pytest.raises(DataError, match=message):
        read("CCD", "train")
    put("vgg16_features/train.txt", "positive/000001.npz 0\n")
    put("videos/Crash-1500.txt", line("000001", [0] * 49 + [1]))
    with pytest.raises(DataError, match="'positive/000001.npz 0' is not as"):
        read("CCD", "train")


def test_dad(put, read, tmp_path):
    for name in ("training/positive/000001", "training/negative/000001", "testing/positive/000456",
                 "testing/positive/000457", "testing/negative/000830"):  # fmt: skip
        put(f"videos/{name}.mp4", 100)
    positive, negative = read("DAD", "train")
    assert (positive.name, runs(positive.labels)) == ("training/positive/000001", [(0, 75), (1, 15), (2, 10)])
    assert runs(negative.labels) == [(0, 100)] and negative.is_positive is False and positive.event_time == 9.0
    check_and_pack("DAD", put.root, tmp_path / "pack", ["train", "val"])
    header = (
        "id,batch,Event-type,Nexar-vehicle-involved,min_support,Time-of-alert,Time-of-collision,Diff,article_category\n"
    )
    put("consensus/dad_test_concensus.csv", header + "000456.mp4,,Collision,no,9,2.12,2.92,0.8,pos-not-ego\n"
        "000457.mp4,,Near-collision,yes,9,4.6,5.0,0.4,pos-ego\n")  # fmt: skip
    every, ego = (read("DAD", "val", labels=labels) for labels in ("consensus", "consensus_ego"))
    assert [(c.name.split("/")[-1], runs(c.labels)) for c in every] == [
        ("000456", [(0, 22), (1, 8), (2, 70)]), ("000457", [(0, 46), (1, 4), (2, 50)]), ("000457_first4s", [(0, 40)]),
        ("000830", [(0, 100)]),
    ]  # fmt: skip
    assert [c.name.split("/")[-1] for c in ego] == ["000457", "000457_first4s", "000830"]
    assert every[1].groups == {"event": "near collision", "support": "9", "article_category": "pos-ego"}
    with open_clip(every[2]) as reader:
        assert reader.mismatch() == ""
    findings, numbers = check("DAD", str(put.root), splits=["val"], num_frames=4, labels="consensus")
    assert findings == [] and numbers["val"]["clips"] == 4 and numbers["val"]["ignored_frames"] == 70 + 50
    with pytest.raises(DataError, match="no row is of a clip of DAD train; the labels are of the test split"):
        (put.root / "videos/training/negative/000001.mp4").unlink()
        put("videos/training/negative/000002.mp4", 100)
        with_consensus(
            ClipTable("DAD", "train", [c for c in read("DAD", "train") if c.is_positive]), str(put.root), "consensus"
        )
    put("videos/training/positive/000001.mp4", 50)
    with pytest.raises(DataError, match="000001.mp4: 50 frames; the accident is in frame 90 of 100"):
        read("DAD", "train")
    shutil.rmtree(put.root / "videos" / "training" / "positive")
    with pytest.raises(DataError, match="training/positive: no .mp4 in it"):
        read("DAD", "train")


def a3d_pictures(root, name, frames):
    folder = root / "frames" / name / "images"
    folder.mkdir(parents=True)
    for i in range(frames):
        Image.new("RGB", (8, 8), (i + 1,) * 3).save(folder / f"{i + 1:06d}.jpg", quality=95)


def test_a3d(put, read, tmp_path):
    put.root.mkdir()
    targets = {"aNT8NB2Dv-E_000001": [0] * 20 + [1] * 11, "b_b_000002": [0] * 25}
    entries = {
        name: {"video_name": name[:-7], "idx": name[-6:], "clip_start": "000021", "clip_end": f"{20 + len(t):06d}",
               "ego_envolve": True, "ego_only": False, "target": np.array(t)} for name, t in targets.items()
    }  # fmt: skip
    for name, target in targets.items():
        a3d_pictures(put.root, name, len(target))
    (put.root / "A3D_labels.pkl").write_bytes(pickle.dumps(entries, protocol=2))
    table = read("A3D", "all")
    assert {c.name: c.labels.tolist() for c in table} == targets and table[0].recording == "aNT8NB2Dv-E"
    assert (table[0].ego, table[0].fps, table[0].groups, table[1].event_time) == (True, 10.0, {"ego_only": "0"}, None)
    with open_clip(table[0]) as reader:
        assert abs(int(reader.read([20])[0, 0, 0, 0]) - 21) < 3 and reader.mismatch() == ""
    check_and_pack("A3D", put.root, tmp_path / "pack", ["all"])
    for change, message in (
        ({"target": [0] * 30}, "30 labels, but clip_start to clip_end are 31 frames"),
        ({"target": [0] * 30 + [2]}, "a label that is neither 0 nor 1"),
        ({"clip_end": "x"}, "clip aNT8NB2Dv-E_000001: ValueError"),
    ):
        bad = {"aNT8NB2Dv-E_000001": entries["aNT8NB2Dv-E_000001"] | change}
        (put.root / "A3D_labels.pkl").write_bytes(pickle.dumps(bad))
        with pytest.raises(DataError, match=message):
            read("A3D", "all")
    (put.root / "A3D_labels.pkl").write_bytes(pickle.dumps({"x": print}))
    with pytest.raises(DataError, match="not A3D's labels .*it names builtins.print, which may run code"):
        read("A3D", "all")
    with pytest.raises(DataError, match="A3D has no split 'train'; it has all; python -m datasets.tools.prepare split"):
        read("A3D", "train")


@needs_samples
def test_a3d_samples(put, read):
    put.root.mkdir()
    content = json.loads((SAMPLES / "a3d_labels_first2.json").read_text())
    entries = {name: entry | {"target": np.array(entry["target"])} for name, entry in content.items()}
    (put.root / "A3D_labels.pkl").write_bytes(pickle.dumps(entries))
    assert {c.name: c.labels.tolist() for c in read("A3D", "all")} == {n: e["target"] for n, e in content.items()}
    (put.root / "A3D_labels.pkl").unlink()
    text = (SAMPLES / "synthetic_a3d_frame_labels.txt").read_text()
    put("frame_labels/LNT8NB2Dv-E_000001_0.txt", text)
    (clip,) = read("A3D", "all")
    assert clip.labels.tolist() == [int(row.split()[1]) for row in text.splitlines()] and clip.fps == 20
    assert clip.recording == "LNT8NB2Dv-E" and clip.event_time == 2.0
    put("frame_labels/LNT8NB2Dv-E_000001_0.txt", text.replace("7 0\n", "", 1))
    with pytest.raises(DataError, match="the labelled frames are not 0 to"):
        read("A3D", "all")


# ----------------------------------------------------------------------------------------------------------------------
# MM-AU as shipped, and consensus labels


@pytest.mark.parametrize("above", ["", "CAP-DATA/"])
def test_groups_of_cap_data_are_read_as_they_are(put, read, above):
    places = {(1, 1537): "1-10/1/001537", (10, 17): "1-10/10/000017", (11, 3): "11/11/000003", (43, 8): "43/000008",
              (12, 12): "12-42/12/000012", (62, 5): "44-62/62/000005"}  # fmt: skip
    rows = [row(CAP_HEADER, video=f"{video:06d}", type=kind, abnormal_start_frame=2, abnormal_end_frame=4,
                accident_frame=3, total_frames=6) for kind, video in places]  # fmt: skip
    write(put.root / "cap_text_annotations.csv", CAP_HEADER, rows)
    for place in places.values():
        put(f"{above}{place}/images/000001.jpg", "")
    table = read("CAP-DATA", "all")
    assert [c.source for c in table] == [str(put.root / f"{above}{place}" / "images") for place in places.values()]
    assert (table[0].event_time, table[0].alert_time) == (2 / 30, 1 / 30)
    put("CAPDATA_my_split/training.txt", "1/1537 1 1 4 3,a car, crossing\n1/1537 0 0 1 3,x\n10/000017 1 0 5 3,y\n")
    assert [c.name for c in read("CAP-DATA", "train")] == ["1/001537", "10/000017"]


@needs_samples
def test_lists_of_lotvs_cap(put, read):
    keys = [(1, 2), (10, 17)]
    rows = [row(CAP_HEADER, video=video, type=kind, abnormal_start_frame=2, abnormal_end_frame=4, total_frames=9)
            for kind, video in keys]  # fmt: skip
    write(put.root / "annotation" / "cap_text_annotations.csv", CAP_HEADER, rows)
    put("CAPDATA_my_split/training.txt", (SAMPLES / "synthetic_lotvs_cap" / "training.txt").read_text())
    assert [c.name for c in read("CAP-DATA", "train")] == ["1/000002", "10/000017"]


def test_dada_as_shipped_and_its_consensus_labels(put, read):
    if not CONSENSUS.is_dir():
        pytest.skip("needs the consensus labels beside the checkout")
    rows = [row(DADA_HEADER, video=68, type=10, abnormal_start_frame=150, abnormal_end_frame=300, total_frames=330)]
    write(put.root / "dada_text_annotations.csv", DADA_HEADER, rows)
    put("DADA-DATA/10/068/images/0001.png", "")
    (clip,) = read("DADA2K", "all")
    assert clip.source == str(put.root / "DADA-DATA/10/068/images")
    put("consensus/dada2000_small_test_concensus.csv", (CONSENSUS / "dada2000_small_test_concensus.csv").read_text())
    event, negative = read("DADA2K", "all", labels="consensus_ego")  # seen at 5.117 s, happens at 7.233 s
    assert runs(event.labels) == [(0, 154), (1, 63), (2, 113)] and event.ego
    assert (negative.name, runs(negative.labels), negative.offset) == ("10/068_first4s", [(0, 120)], 0)
    assert event.recording == negative.recording == "10/068"


def test_consensus_of_dota_counts_as_the_paper_does(put):
    if not CONSENSUS.is_dir():
        pytest.skip("needs the consensus labels beside the checkout")
    names = (SHARED / "data" / "dota" / "val_split.txt").read_text().split()
    known = json.loads((SHARED / "data" / "dota" / "metadata_val.json").read_text())
    shutil.copytree(CONSENSUS, put.root / "consensus")
    from datasets.clips import Clip

    clips = [Clip(n, n, known[n]["num_frames"], 10.0, labels=np.zeros(known[n]["num_frames"], np.uint8), positive=True)
             for n in names]  # fmt: skip
    table = ClipTable("DoTA", "val", clips)
    for labels, positives, negatives in (("consensus", 327 + 255, 65), ("consensus_ego", 327, 43)):
        found = with_consensus(table, str(put.root), labels)
        assert [sum(c.is_positive is value for c in found) for value in (True, False)] == [positives, negatives]
    assert len(index_clips(found, num_frames=16, view_fps=10, stride=1)) > 5000
    path = put.root / "consensus" / "dota_test_concensus.csv"
    path.write_text(path.read_text().replace(",2.3,5.7,", ",2.3,99,", 1))
    with pytest.raises(DataError, match="row 2: a collision at 99 s, but clip 0RJPQ_97dcs_003475 has"):
        with_consensus(table, str(put.root), "consensus")
    for name, message in (("DoTA_half", "DoTA_half has no consensus labels; DoTA, DADA2K, DAD have"),
                          ("DAD", "dad_test_concensus.csv: no row is of a clip of DAD val")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            with_consensus(ClipTable(name, "val", clips), str(put.root), "consensus")


# ----------------------------------------------------------------------------------------------------------------------
# Folders as people have them


@pytest.fixture
def nexar(put):
    """Nexar's train of a positive and a negative clip."""
    put("train/positive/metadata.csv", HEADER + "00001.mp4,3.0,2.0,Normal,Clear,Urban,\n")
    put("train/negative/metadata.csv", HEADER + "00002.mp4,,,,,,\n")
    put("train/positive/00001.mp4", 40)
    put("train/negative/00002.mp4", 40)
    return put


def test_the_folder_above_or_below_is_named(nexar, tmp_path):
    nexar("ccd/videos/Crash-1500.txt", "")
    nexar("dad/videos/training/positive/000001.mp4", 20)
    scan = VideoScan(tmp_path / "scan.json", workers=1)
    for name, given, right in (
        ("Nexar", "train", "."),
        ("Nexar", "train/positive", "."),
        ("Nexar", "..", "."),
        ("CCD", ".", "ccd"),
        ("CCD", "ccd/videos", "ccd"),
        ("DAD", "dad/videos/training", "dad/videos"),
    ):
        expected = f"give the folder of {name} that holds .*, which is {(nexar.root / right).resolve()}$"
        with pytest.raises(DataError, match=expected):
            build_clips(name, str((nexar.root / given).resolve()), "train", scan)
    with pytest.raises(
        DataError, match="root/test-public: not there, and the split is in it: download it, or hold out"
    ):
        build_clips("Nexar", str(nexar.root), "val", scan)


def test_what_stands_in_for_a_file_is_said(nexar, read, tmp_path, caplog):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    nexar("train/positive/00001.mp4", pointer)
    assert "a pointer of Git LFS, not the file itself" in read("Nexar", "train").unreadable["00001"]
    nexar("train/negative/00002.mp4", "<!DOCTYPE html><html><title>Quota exceeded")
    with pytest.raises(DataError, match="00002.mp4: a web page, not the file itself"):
        read("Nexar", "train")
    nexar("train/positive/metadata.csv", pointer)
    with pytest.raises(DataError, match="metadata.csv: a pointer of Git LFS, not the file itself; git lfs pull"):
        read("Nexar", "train")


def test_nexar_beside_kaggle_s_table_and_in_a_spreadsheet_s_words(nexar, read):
    nexar("train.csv", "id,time_of_event,time_of_alert,target\n1,1.0,0.5,1\n")
    nexar("train/positive/metadata.csv", HEADER.replace(",", ";") + "00001.mp4;3,0;2,0;Night;;;0,7\n")
    positive, negative = read("Nexar", "train")
    assert (runs(positive.labels), positive.night) == ([(0, 20), (1, 10), (2, 10)], True)  # times of train are its own
    with pytest.raises(DataError, match="no clip is long enough for a window of 41 frames"):
        index_clips(read("Nexar", "train"), num_frames=41, view_fps=10, stride=1)
    for label in ("positive", "negative"):
        nexar(f"train/{label}/metadata.csv", HEADER)
    with pytest.raises(DataError, match="Nexar train: no clips; its annotation lists none that can be used"):
        index_clips(read("Nexar", "train"), num_frames=4, view_fps=10, stride=1)


def test_only_what_no_annotation_knows_is_called_so(nexar, read, caplog):
    read("Nexar", "train", leave_out={"00002"})
    nexar("videos/Crash-1500.txt", line("000001", [0] * 38 + [1] * 12) + line("000002", [0] * 38 + [1] * 12))
    for name in ("Crash-1500/000001", "Crash-1500/000002", "Normal/000001", "Normal/000002"):
        nexar(f"videos/{name}.mp4", 50)
    nexar("vgg16_features/train.txt", "positive/000001.npz 1\nnegative/000001.npz 0\n")
    read("CCD", "train")
    assert "not annotated" not in caplog.text
    nexar("videos/Crash-1500/000003.mp4", 50)
    read("CCD", "train")
    assert "1 videos are not annotated and go unused" in caplog.text and "000003.mp4" in caplog.text
    shutil.rmtree(nexar.root / "videos" / "Normal")
    assert len(read("CCD", "all")) == 2 and "Normal: no .mp4 in it, so all clips are of crashes" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("456,,Collision,no,9,2.12,2.92,0.8,pos-not-ego", None),
        (
            "000456,,Collision,no,9,2.92,2.12,0.8,pos-not-ego",
            "row 2: an alert at 2.92 s, after the collision at 2.12 s",
        ),
        ("000456,,Collision,no,9,,2.12,0.8,pos-not-ego", "row 2, column time-of-alert: empty"),
        ("000456,,Collision,no,9,2,3,1,pos_ego", "column article_category: 'pos_ego' is not pos-ego, pos-not-ego"),
        ("000456,,Crash,no,9,2,3,1,pos-ego", "column event-type: 'Crash' is not Collision or Near-collision"),
        ("000456,,Collision,no,9,2,22,1,pos-ego", "a collision at 22 s, but clip testing/positive/000456 has 10 s"),
        ("000457,,Collision,no,9,2,3,1,pos-ego", "no row is of a clip of DAD val; the labels are of the test split"),
    ],
)
def test_faults_of_consensus_labels_are_named(put, read, row, message):
    for label in ("positive", "negative"):
        put(f"testing/{label}/000456.mp4", 100)
    header = (
        "id,batch,event-type,nexar-vehicle-involved,min_support,time-of-alert,time-of-collision,diff,article_category"
    )
    put("consensus/dad_test_concensus.csv", f"{header}\n{row}\n")
    if message:
        with pytest.raises(DataError, match=message):
            read("DAD", "val", labels="consensus")
    else:
        assert runs(read("DAD", "val", labels="consensus")[0].labels) == [(0, 22), (1, 8), (2, 70)]


def test_labels_by_the_number_of_a_picture_need_a_constant_rate(put, tmp_path):
    put("videos/Crash-1500.txt", line("000001", [0] * 38 + [1] * 12))
    put("videos/Crash-1500/000001.mp4", 50)
    for label in ("positive", "negative"):
        put(f"training/{label}/000001.mp4", 100)
    scan = VideoScan(tmp_path / "scan.json", workers=1)
    for name, split in (("CCD", "all"), ("DAD", "train")):
        with pytest.raises(DataError, match="000001.mp4: its frame rate is variable, and its label is by the number"):
            build_clips(name, str(put.root), split, lambda paths: [replace(i, constant=False) for i in scan(paths)])
