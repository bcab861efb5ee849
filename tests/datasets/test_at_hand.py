import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers import write_video

from datasets import ClipTable, build_clips
from datasets.at_hand import DataAtHand, read_pictures
from datasets.clips import Clip
from datasets.labels import IGNORED
from datasets.scan import VideoScan
from datasets.windows import index_clips, window_labels

WINDOWS = {"num_frames": 4, "view_fps": 5, "stride": 1}


def at_hand(root, name="DoTA", cache="absent.json", labels="own"):
    return DataAtHand(name, str(root), str(cache), None, labels)


def test_labels_of_windows_are_those_of_the_frames_they_end_on():
    rng = np.random.default_rng(0)
    kinds = [rng.integers(0, IGNORED + 1, n).astype(np.uint8) for n in (30, 3, 41)]
    fps = (10.0, 10.0, 25.0)
    clips = [Clip(f"c{i}", "", len(k), f, labels=k) for i, (k, f) in enumerate(zip(kinds, fps, strict=True))]
    table = ClipTable("DoTA", "train", clips)
    clip, frame, label = window_labels(table, num_frames=4, view_fps=5, stride=2)
    expected = index_clips(table, num_frames=4, view_fps=5, stride=2).locations()
    assert np.array_equal(clip, expected[0]) and np.array_equal(frame, expected[1])
    assert label.tolist() == [int(kinds[c][f]) for c, f in zip(clip, frame, strict=True)]
    assert set(label.tolist()) == {0, 1} and set(clip.tolist()) == {0, 2}
    assert [len(a) for a in window_labels(ClipTable("DoTA", "train", []), **WINDOWS)] == [0, 0, 0]


def test_labels_of_the_train_split_are_there_or_it_is_said_why_not(dota_root, tmp_path):
    train = at_hand(dota_root).train_labels(["syntheticva_000000"], **WINDOWS)
    table = build_clips("DoTA", str(dota_root), "train")
    assert train.words == f"the labels of DoTA train, {len(table)} clips"
    assert all(np.array_equal(a, b) for a, b in zip(train.columns, window_labels(table, **WINDOWS), strict=True))
    cases = [
        (at_hand(dota_root), [table[0].name, table[2].name, "x"], "2 of the clips are in DoTA train, too"),
        (at_hand(tmp_path), [], r"DoTA train is not at hand (" + f"{tmp_path}/dataset/train_split.txt"),
        (at_hand(dota_root, labels="consensus"), [], "DoTA train is not at hand ("),
        (at_hand(tmp_path, "A3D"), [], "A3D train is not at hand ("),
    ]
    for data, scored, why in cases:
        found = data.train_labels(scored, **WINDOWS)
        assert found.columns is None and found.words.startswith(why) and "\n" not in found.words
    assert (
        "no clip of DoTA train is long enough"
        in at_hand(dota_root).train_labels([], **WINDOWS | {"num_frames": 99}).words
    )


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """csv: a.mp4 labelled in train, b.mp4 in val; the scan knows b alone."""
    root = tmp_path_factory.mktemp("videos")
    for name, split in (("a", "train"), ("b", "val")):
        write_video(root / f"{name}.mp4", frames=40, fps=10)
        (root / f"{split}.csv").write_text(f"path,start_frame,end_frame\n{name}.mp4,10,20\n")
    build_clips("csv", str(root), "val", VideoScan(root / "scan.json", workers=1))
    return root


def test_no_video_is_opened_to_count_its_frames(videos, caplog, monkeypatch):
    before = (videos / "scan.json").read_bytes()
    monkeypatch.setattr("datasets.scan.probe", lambda path: pytest.fail(f"{path} was opened"))
    data = at_hand(videos, "csv", videos / "scan.json")
    assert [c.name for c in data.clips("val")] == ["b.mp4"]
    found = data.train_labels([], **WINDOWS)
    why = f"{videos}/scan.json: the frames of 1 of 1 videos are not counted in it"
    assert (found.columns, found.words) == (None, f"csv train is not at hand ({why})")
    assert data.clips("train") is None and "no pictures in the report, since csv train is not at hand" in caplog.text
    assert (videos / "scan.json").read_bytes() == before


def test_pictures_that_cannot_be_read_are_left_out(dota_root, videos, tmp_path, caplog, monkeypatch):
    """A zip that is gone, a frame that is not there, a process that dies, another that hangs."""
    table = load_dota_copy(dota_root, tmp_path)
    (video,) = at_hand(videos, "csv", videos / "scan.json").clips("val")
    squashed = replace(table[1], name="squashed", aspect=2.5)
    shutil.rmtree(tmp_path / "frames" / table[0].name)
    clips = [*table, video, squashed]
    wanted = {clip.name: [3, 7] for clip in clips} | {table[2].name: [3, 4000], "of another": [1]}
    found = read_pictures(clips, wanted, workers=2, read_timeout=60)
    good = [clip for clip in clips if clip not in (table[0], table[2])]
    assert found.keys() == {(clip.name, frame) for clip in good for frame in (3, 7)}
    assert all(p.dtype == np.uint8 and p.ndim == 3 and p.shape[2] == 3 for p in found.values())
    plain, wide = found[table[1].name, 3], found["squashed", 3]
    assert wide.shape == (len(plain), round(2.5 * len(plain)), 3) != plain.shape
    text = caplog.text
    assert f"pictures of 2 of {len(clips)} clips are not in the report: " in text
    assert f"{table[0].name} (" in text and f"{table[2].name} (" in text

    monkeypatch.setattr("datasets.at_hand.open_clip", lambda clip: os._exit(3))
    assert read_pictures(table, {table[1].name: [3]}, workers=1, read_timeout=60) == {}
    assert "ended with code 3" in caplog.text
    monkeypatch.setattr("datasets.at_hand.open_clip", lambda clip: os.read(os.pipe()[0], 1))
    assert read_pictures(table, {table[1].name: [3]}, workers=1, read_timeout=0.2) == {}
    assert "nothing could be read of it for 0.2 seconds" in caplog.text
    assert read_pictures(table, {}, workers=1, read_timeout=60) == {}


def load_dota_copy(root, folder):
    """The val split of a copy."""
    shutil.copytree(root, folder, dirs_exist_ok=True)
    return build_clips("DoTA", str(folder), "val")
