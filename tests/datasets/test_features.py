"""Windows whose features are at hand: their batches, what they are known by, and how training windows equal them."""

import shutil

import numpy as np
import pytest
import torch
from helpers import window_of

from datasets import VideoScan, build_clips
from datasets.augment.finetune import FinetuneTransform
from datasets.augment.frames import EvalTransform
from datasets.features import FeatureBatches
from datasets.loader import EpochSampler, Source, WindowDataset
from datasets.stream import SplitWindows
from datasets.windows import index_clips


def windows_of(root, **options):
    clips = build_clips("DoTA", str(root), "train", VideoScan(root.parent / "scan.json", workers=0))
    index = index_clips(clips, **{"num_frames": 4, "view_fps": 5, "stride": 3} | options)
    return SplitWindows(clips, index, EvalTransform(64))


@pytest.fixture(scope="module")
def windows(dota_root):
    return windows_of(dota_root)


@pytest.fixture(scope="module")
def dataset(windows):
    source = Source(windows.clips, windows.index, FinetuneTransform.plain(64))
    return WindowDataset([source], seed=0, targets=True)


def batches(windows, missing=()):
    sampler = EpochSampler([len(windows.index)], batch_sizes=[4])
    read = lambda numbers: torch.from_numpy(numbers)[:, None].float()  # noqa: E731
    return FeatureBatches(windows.clips, windows.index, sampler, read, dict.fromkeys(missing, "torn"), "cpu")


def test_a_batch_has_the_features_and_targets_of_its_windows(windows, dataset):
    loader = batches(windows)
    for keys, batch in zip(list(loader.sampler)[::9], list(loader)[::9], strict=True):
        samples = [window_of(dataset, key) for key in keys]
        assert batch["features"][:, 0].tolist() == [key[3] for key in keys]
        assert batch["samples"] == [sample["sample"] for sample in samples] and batch["weight"] == 1
        for name in ("label", "soft_label", "ttc"):
            expected = torch.cat([sample[name] for sample in samples])
            assert batch[name].dtype == (torch.int64 if name == "label" else torch.float32)
            torch.testing.assert_close(batch[name], expected.to(batch[name].dtype), equal_nan=True)


def test_windows_without_features_are_skipped_and_a_batch_of_them_weighs_nothing(windows):
    first, second = list(EpochSampler([len(windows.index)], batch_sizes=[4]))[:2]
    missing = [first[1][3], *(key[3] for key in second)]
    some, none = list(batches(windows, missing))[:2]
    assert some["features"][:, 0].tolist() == [key[3] for i, key in enumerate(first) if i != 1]
    assert len(some["label"]) == len(some["samples"]) == 3 and [fault.reason for fault in some["skipped"]] == ["torn"]
    assert some["skipped"][0].name == windows.clips[windows.index[first[1][3]][0]].name
    assert none["weight"] == 0 and none["samples"] == [] and len(none["skipped"]) == 4
    assert none["features"].tolist() == [[0]] and len(none["label"]) == 1


def test_training_windows_that_are_not_augmented_are_those_of_evaluation_to_the_bit(windows, dataset):
    batch = next(item for item in windows.batches(lambda video: video.float()) if hasattr(item, "video"))
    clip, last = windows.locations()
    for row in (0, 3):
        number = int(np.flatnonzero((clip == batch.clip[row]) & (last == batch.last[row]))[0])
        video = window_of(dataset, (0, 0, 0, number))["video"][0]
        assert torch.equal(video.permute(3, 0, 1, 2).float(), batch.video[row])


def test_some_clips_alone_keep_their_numbers(windows):
    some = windows.only([1, 6])
    found = [(c, f) for b in some.batches(lambda v: v) for c, f in zip(b.clip.tolist(), b.last.tolist(), strict=True)]
    clip, last = (column[np.isin(windows.locations()[0], [1, 6])].tolist() for column in windows.locations())
    assert sorted(found) == list(zip(clip, last, strict=True))
    assert len(windows.index) > len(found), "the others are as they were"


def test_a_clip_is_known_by_its_content_not_by_its_place_or_labels(windows, dota_root, tmp_path):
    known = [windows.identity(i) for i in range(len(windows.clips))]
    assert len(set(known)) == len(known)
    moved = shutil.copytree(dota_root, tmp_path / "moved")
    assert [windows_of(moved).identity(i) for i in range(len(known))] == known
    assert windows_of(dota_root, stride=2).identity(0) == known[0], "which windows there are is not in it"
    assert windows_of(dota_root, view_fps=10).identity(0) != known[0]
    path = moved / "frames" / windows.clips[2].name / "images.zip"
    path.write_bytes(path.read_bytes() + b"more")
    changed = windows_of(moved)
    assert [changed.identity(i) != k for i, k in enumerate(known)] == [i == 2 for i in range(len(known))]
