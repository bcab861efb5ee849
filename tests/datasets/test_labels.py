"""Frames that are neither safe nor anomalous: from times in seconds to windows, packs and reports."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import AsRead, window_of
from PIL import Image

from datasets.augment.frames import EvalTransform
from datasets.clips import Clip, ClipTable, DataError
from datasets.formats.packed import PackedClip, describe
from datasets.labels import IGNORED, frame_at, labels_of_times, smooth_labels, time_to_anomaly
from datasets.loader import Source, WindowDataset
from datasets.readers import open_clip
from datasets.stream import SplitWindows
from datasets.windows import WindowIndex, index_clips


def runs(labels):
    """[(value, frames)] of the stretches of equal labels."""
    edges = np.flatnonzero(np.diff(labels)) + 1
    return [(int(part[0]), len(part)) for part in np.split(labels, edges)]


def test_the_first_rule_that_applies_makes_labels_of_times():
    assert runs(labels_of_times(30, 10)) == [(0, 30)]
    assert runs(labels_of_times(30, 10, intervals=[(0.5, 1.0), (2.95, 9)])) == [(0, 5), (1, 5), (0, 20)]
    both = labels_of_times(30, 10, intervals=[(0.5, 1.0)], event=0.7, alert=0.1)
    assert runs(both) == [(0, 5), (1, 5), (0, 20)]  # an interval says what comes after the event
    assert runs(labels_of_times(30, 10, event=2.0, alert=1.2)) == [(0, 12), (1, 8), (2, 10)]
    assert runs(labels_of_times(30, 10, event=2.0)) == [(0, 5), (1, 15), (2, 10)]
    assert runs(labels_of_times(30, 10, event=2.0, before=0.5)) == [(0, 15), (1, 5), (2, 10)]
    assert runs(labels_of_times(30, 10, event=0.4)) == [(1, 4), (2, 26)]
    assert runs(labels_of_times(30, 10, event=3.5)) == [(0, 20), (1, 10)]  # cut before the event
    assert runs(labels_of_times(30, 10, event=8.0, alert=7.0)) == [(0, 30)]
    assert runs(labels_of_times(30, 10, event=0.0, alert=0.0)) == [(2, 30)]


@pytest.mark.parametrize("fps", [10, 23.6, 25, 30000 / 1001, 30])
def test_a_frame_is_before_an_event_if_it_is_shown_before_it(fps):
    shown = np.arange(200) / fps
    for event in (0.0, 0.1, 1.5, 3.1, 17 / fps, 2.9999):
        labels = labels_of_times(200, fps, event=event, before=100)
        np.testing.assert_array_equal(labels == 1, shown < event - 1e-9)
    assert frame_at(1.1, 30) == 33 and frame_at(0.57, 100) == 57  # 33.00000000000001, 56.99999999999999


@pytest.mark.parametrize(
    "times", [{"alert": 1.0}, {"alert": 2.0, "event": 1.0}, {"event": -1.0}, {"event": float("nan")},
              {"event": float("inf")}, {"alert": -0.1, "event": 1.0}, {"intervals": [(2.0, 1.0)]}]
)  # fmt: skip
def test_times_that_contradict_each_other_are_refused(times):
    with pytest.raises(ValueError, match="s"):
        labels_of_times(30, 10, **times)


def test_ignored_frames_are_no_anomaly():
    labels = np.array([0, 0, 1, 2, 2, 0, 2], dtype=np.uint8)
    np.testing.assert_allclose(time_to_anomaly(labels, 10), [-0.2, -0.1, 0, 0.1, 0.2, 0.3, 0.4])
    assert np.isnan(time_to_anomaly(np.array([2, 2, 0]), 10)).all()
    soft = smooth_labels(np.array([0, 2, 1]), np.array([-50.0, -50.0, 0.0]))
    assert soft[0] == 0 and np.isnan(soft[1]) and soft[2] == 1
    clip = Clip("a", "a", 7, 10.0, labels=labels)
    assert clip.is_positive and not replace(clip, labels=np.full(7, IGNORED)).is_positive
    assert replace(clip, labels=np.full(7, IGNORED), positive=True).is_positive
    assert replace(clip, labels=None).is_positive is None
    with pytest.raises(ValueError, match="a label 3; 0, 1 and 2 are known"):
        replace(clip, labels=labels + 1)


@pytest.mark.parametrize("direction", [{}, {"forward": True}, {"warm_up": True}])
def test_windows_that_end_on_other_frames_are_left_out(direction):
    rng, counts = np.random.default_rng(0), [40, 7, 23, 31, 50]
    keep = {0: rng.random(40) < 0.5, 3: np.zeros(31, dtype=bool), 4: np.arange(50) < 30}
    window = {"src_fps": [10, 10, 20, 10, 20], "num_frames": 4, "view_fps": 5, "stride": 3, **direction}
    every, some = WindowIndex(counts, **window), WindowIndex(counts, **window, keep=keep)
    expected = [i for i, (c, last) in enumerate(zip(*every.locations(), strict=True)) if c not in keep or keep[c][last]]
    assert 0 < len(expected) == len(some) == len(every) - some.left_out
    for place, i in enumerate(expected):
        clip, frames = some[place]
        assert clip == every[i][0] and frames.tolist() == every[i][1].tolist()
    for column, of_every in zip(some.locations(), every.locations(), strict=True):
        assert column.tolist() == of_every[expected].tolist()
    for clip in range(5):
        mine = [last for c, last in zip(*some.locations(), strict=True) if c == clip]
        assert some.last_frames(clip).tolist() == mine and some.counts[clip] == len(mine)
        ids = sorted({f for i in range(len(some)) if some[i][0] == clip for f in some[i][1].tolist()})
        assert some.needed_frames(clip).tolist() == ids
    assert some.short_clips.tolist() == every.short_clips.tolist()  # clip 3 is not short


def labelled(tmp_path, *labels):
    """A table of a folder of pictures for each row of labels."""
    clips = []
    for number, of_clip in enumerate(labels):
        folder = tmp_path / f"f{number}"
        folder.mkdir()
        for i in range(len(of_clip)):
            Image.new("RGB", (8, 8), (i,) * 3).save(folder / f"{i:06d}.png")
        of_clip = np.array(of_clip, dtype=np.uint8)
        clips.append(Clip(f"f{number}", str(folder), len(of_clip), 10.0, frame_name="{:06d}.png", labels=of_clip))
    return ClipTable("mine", "train", clips)


def test_training_windows_end_on_no_ignored_frame(tmp_path, caplog):
    table = labelled(tmp_path, [0] * 6 + [1] * 3 + [2] * 5, [0] * 9)
    window = {"num_frames": 4, "view_fps": 10, "stride": 1}
    with caplog.at_level(logging.INFO, "tad"):
        index = index_clips(table, **window)
    assert "mine train: 5 more windows end on ignored frames, neither trained on nor scored" in caplog.text
    assert len(index) == 6 + 6 and len(index_clips(table, **window, unlabelled=True)) == 11 + 6
    dataset = WindowDataset([Source(table, index, AsRead(8, 8))], seed=0, targets=True)
    samples = [window_of(dataset, (0, 0, i, i)) for i in range(len(index))]
    assert [int(sample["label"]) for sample in samples] == [0] * 3 + [1] * 3 + [0] * 6
    assert all(torch.isfinite(sample["soft_label"]).all() for sample in samples)
    with pytest.raises(DataError, match="every window ends on an ignored frame"):
        index_clips(ClipTable("mine", "train", [replace(table[0], labels=np.full(14, 2))]), **window)


@pytest.mark.parametrize("options", [{}, {"num_workers": 2, "world_size": 2}], ids=str)
def test_evaluation_scores_no_window_that_ends_on_an_ignored_frame(tmp_path, options):
    labels = [0] * 6 + [2] * 9 + [1] * 6 + [2], [2] * 12, [0] * 9, [2] * 5 + [0] * 40
    table = labelled(tmp_path, *labels)
    index, world = index_clips(table, num_frames=4, view_fps=10, stride=1), options.pop("world_size", 1)
    seen = {}
    for rank in range(world):
        part = SplitWindows(table, index, EvalTransform(16), batch_size=5, rank=rank, world_size=world, **options)
        for item in part.batches(lambda frames: frames):
            for clip, last, video in zip(item.clip.tolist(), item.last.tolist(), item.video, strict=False):
                assert (clip, last) not in seen
                seen[clip, last] = video.clone()
    expected = [(c, t) for c, of_clip in enumerate(labels) for t in range(3, len(of_clip)) if of_clip[t] != 2]
    assert sorted(seen) == expected == list(zip(*(a.tolist() for a in index.locations()), strict=True))
    for (clip, last), video in seen.items():
        with open_clip(table[clip]) as reader:
            assert torch.equal(video, EvalTransform(16)(reader.frames(range(last - 3, last + 1))).transpose(0, 1))


def test_a_pack_knows_ignored_frames(tmp_path):
    clip = Clip(
        "c", "c", 9, 10.0, labels=np.array([0, 2, 2, 1, 1, 2, 0, 0, 2], np.uint8), pack_step=1, groups={"k": "v"}
    )
    entry = PackedClip(
        **describe(clip), original={"path": ""}, settings={}, file="frames/c.zip", bytes=1, sha256="", frames=9
    )
    back = PackedClip(**json.loads(json.dumps(entry.__dict__))).to_clip(tmp_path)
    assert back.labels.tolist() == clip.labels.tolist() and back.groups == {"k": "v"}
