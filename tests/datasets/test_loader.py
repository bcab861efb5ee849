from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import window_of

from datasets import build_clips, loader
from datasets.augment.device import DeviceAugment, DeviceLoader
from datasets.augment.finetune import FinetuneTransform
from datasets.batches import BatchLoader
from datasets.clips import ClipTable, DataError
from datasets.loader import EpochSampler, Source, WindowDataset, grouped_order
from datasets.windows import WindowIndex

# ----------------------------------------------------------------------------------------------------------------------
# Order


def global_batches(world_size, batch_size, accumulate=1, epoch=0, start_step=0, **kwargs):
    """Keys of each step, over ranks and forward passes, in the order of the epoch."""
    steps = []
    for rank in range(world_size):
        sampler = EpochSampler(
            kwargs.get("num_windows", [50]),
            batch_sizes=batch_size if isinstance(batch_size, list) else [batch_size],
            accumulate=accumulate,
            rank=rank,
            world_size=world_size,
            samples_per_epoch=kwargs.get("samples_per_epoch", 0),
            seed=kwargs.get("seed", 0),
        )
        sampler.set_epoch(epoch, start_step)
        passes = list(sampler)
        assert len(passes) == len(sampler)
        steps.append([sum(passes[i : i + accumulate], []) for i in range(0, len(passes), accumulate)])
    return [sorted(sum(parts, []), key=lambda key: key[1:3]) for parts in zip(*steps, strict=True)]


def test_global_batches_do_not_depend_on_how_they_are_split():
    whole = global_batches(1, 4)
    assert len(whole) == 12 and all(len(step) == 4 for step in whole)
    assert whole == global_batches(2, 2) == global_batches(4, 1) == global_batches(2, 1, accumulate=2)


def test_an_epoch_draws_without_replacement_and_differently_each_time():
    windows = [w for step in global_batches(2, 2, samples_per_epoch=20) for *_, w in step]
    assert len(windows) == len(set(windows)) == 20
    other = [w for step in global_batches(2, 2, samples_per_epoch=20, epoch=1) for *_, w in step]
    assert set(other) != set(windows)
    assert [w for step in global_batches(2, 2, samples_per_epoch=20, seed=1) for *_, w in step] != windows
    everything = [w for step in global_batches(1, 5, num_windows=[50], samples_per_epoch=1000) for *_, w in step]
    assert sorted(everything) == list(range(50))


def test_resuming_starts_the_slice_later():
    assert global_batches(2, 2, start_step=5, epoch=3) == global_batches(2, 2, epoch=3)[5:]


def test_drawing_few_of_very_many_windows_is_cheap():
    sampler = EpochSampler([10**9], batch_sizes=[8], samples_per_epoch=1000)
    assert len(set(sampler.order(0).tolist())) == 1000


def test_an_epoch_shorter_than_a_step_is_refused():
    with pytest.raises(DataError, match="7 windows is less than one step of 8"):
        EpochSampler([7], batch_sizes=[4], world_size=2)


def test_each_step_of_a_mix_holds_each_source_s_share():
    mix = {"num_windows": [50, 9], "samples_per_epoch": 40}
    whole = global_batches(1, [3, 2], **mix)
    assert len(whole) == 8
    for step, keys in enumerate(whole):
        assert [(source, position) for _, source, position, _ in keys] == [
            *((0, 3 * step + i) for i in range(3)),
            *((1, 2 * step + i) for i in range(2)),
        ]
    doubled = global_batches(1, [6, 4], **mix)
    assert doubled == global_batches(2, [3, 2], **mix) == global_batches(1, [3, 2], accumulate=2, **mix)
    small = [w for step in whole for _, source, _, w in step if source == 1]
    assert len(small) == 16 and sorted(small[:9]) == list(range(9)) and len(set(small[9:])) == 7
    assert small[:7] != small[9:]  # gone through again, in another order


def test_a_mix_ends_with_its_longest_source():
    assert len(global_batches(1, [3, 2], num_windows=[50, 9])) == 16
    assert len(global_batches(1, [3, 2], num_windows=[9, 50])) == 25
    assert len(global_batches(1, [3, 2], num_windows=[9, 50], samples_per_epoch=10**6)) == 25


# ----------------------------------------------------------------------------------------------------------------------
# Training batches


def training(root, *, workers=0, batch_size=4, rank=0, world_size=1, views=1, epoch=0, start_step=0, here=True):
    """The batches of an epoch; if not here, augmented on the device, for which the CPU stands."""
    clips = build_clips("DoTA", str(root), "train")
    index = WindowIndex(clips.frame_counts, src_fps=clips.fps, num_frames=4, view_fps=5)
    sampler = EpochSampler(
        [len(index)], batch_sizes=[batch_size], rank=rank, world_size=world_size, samples_per_epoch=24, seed=7
    )
    source = Source(clips, index, FinetuneTransform(32, views=views, here=here))
    dataset = WindowDataset([source], seed=7, targets=True)
    sampler.set_epoch(epoch, start_step)
    loader = BatchLoader(dataset, sampler, num_workers=workers)
    augmented = loader if here else DeviceLoader(loader, torch.device("cpu"), DeviceAugment(32))
    batches = [batch | {"video": batch["video"].clone()} for batch in augmented]
    loader.close()
    return batches


NOTES = {"samples", "skipped", "notes", "weight"}  # say what became of the samples


def same(a, b):
    assert a["skipped"] == b["skipped"] == a["notes"] == b["notes"] == [] and a["weight"] == b["weight"] == 1
    tensors = a.keys() - NOTES
    alike = a.keys() == b.keys() and a["samples"] == b["samples"]
    return alike and all(torch.equal(torch.nan_to_num(a[k]), torch.nan_to_num(b[k])) for k in tensors)


def test_batches_do_not_depend_on_workers(dota_root):
    single = training(dota_root)
    assert len(single) == 6
    for workers in (1, 3):
        assert all(same(a, b) for a, b in zip(single, training(dota_root, workers=workers), strict=True))


def test_batches_do_not_depend_on_ranks(dota_root):
    whole = training(dota_root)
    parts = zip(*(training(dota_root, batch_size=2, rank=r, world_size=2) for r in (0, 1)), strict=True)
    for a, (first, second) in zip(whole, parts, strict=True):
        joined = {k: torch.cat([first[k], second[k]]) for k in first if k not in NOTES}
        joined |= {"skipped": [], "notes": [], "weight": 1.0, "samples": first["samples"] + second["samples"]}
        assert same(a, joined) and a["samples"] == joined["samples"] and len(a["samples"]) == 4


def test_augmentation_on_the_device_is_the_same_whoever_prepares_the_batch(dota_root):
    """In 0, 1, 3 workers, on 1, 2 ranks, after a resume; and it is what the worker would have done."""
    whole = training(dota_root, here=False)
    for workers in (1, 3):
        assert all(same(a, b) for a, b in zip(whole, training(dota_root, workers=workers, here=False), strict=True))
    later = training(dota_root, workers=1, start_step=2, here=False)
    assert len(later) == 4 and all(same(a, b) for a, b in zip(whole[2:], later, strict=True))
    parts = [training(dota_root, batch_size=2, rank=rank, world_size=2, here=False) for rank in (0, 1)]
    for a, *halves in zip(whole, *parts, strict=True):
        assert torch.equal(a["video"], torch.cat([half["video"] for half in halves]))
    for a, b in zip(whole, training(dota_root), strict=True):
        assert torch.equal(a["video"], b["video"].permute(0, 4, 1, 2, 3)) and a["ops"].shape == (4, 3)


def test_the_same_window_looks_different_in_another_epoch(dota_root):
    assert not same(training(dota_root)[0], training(dota_root, epoch=1)[0])


def test_augmentation_depends_on_epoch_source_and_position(dota_root):
    clips = build_clips("DoTA", str(dota_root), "train")
    index = WindowIndex(clips.frame_counts, src_fps=clips.fps, num_frames=4, view_fps=5)
    source = Source(clips, index, FinetuneTransform(32))
    dataset = WindowDataset([source, source], seed=7, targets=True)
    first, *others = [
        window_of(dataset, key) for key in ((0, 0, 5, 9), (0, 0, 5, 9), (1, 0, 5, 9), (0, 1, 5, 9), (0, 0, 6, 9))
    ]
    assert torch.equal(first["video"], others[0]["video"])
    assert len({int(s["seed"]) for s in (first, *others[1:])}) == 4
    sampler = EpochSampler([50, 50], batch_sizes=[2, 2], seed=7)
    assert not np.array_equal(sampler.order(0, 0), sampler.order(0, 1))


def test_content_of_a_batch(dota_root):
    (batch, *_) = training(dota_root)
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items() if k not in NOTES} == {
        "video": ((4, 4, 32, 32, 3), torch.uint8),
        "side": ((4,), torch.int64),
        "ops": ((4, 3), torch.int64),
        "levels": ((4, 3), torch.float64),
        "crop": ((4, 4), torch.int64),
        "boxes": ((4, 1, 4), torch.int64),
        "seed": ((4,), torch.int64),
        "label": ((4,), torch.int64),
        "ttc": ((4,), torch.float32),
        "soft_label": ((4,), torch.float32),
        "source": ((4,), torch.int64),
        "window": ((4,), torch.int64),
    }
    clips = build_clips("DoTA", str(dota_root), "train")
    index = WindowIndex(clips.frame_counts, src_fps=clips.fps, num_frames=4, view_fps=5)
    for window, label, ttc, sample in zip(*(batch[k] for k in ("window", "label", "ttc", "samples")), strict=True):
        clip, frames = index[int(window)]
        assert sample == f"DoTA {clips[clip].name}, frames {frames[0]} to {frames[-1]}"
        assert label == clips[clip].labels[frames[-1]] and (ttc == 0) == bool(label)


def test_targets_need_labels(dota_root):
    clips = build_clips("DoTA", str(dota_root), "train")
    bare = ClipTable("bare", "train", [replace(c, labels=None) for c in clips])
    index = WindowIndex(clips.frame_counts, src_fps=clips.fps, num_frames=4, view_fps=5)
    source = Source(bare, index, FinetuneTransform(32))
    with pytest.raises(DataError, match="bare: clip synthetictr_000000 has no labels to train on"):
        WindowDataset([source], seed=0, targets=True)
    assert "label" not in window_of(WindowDataset([source], seed=0, targets=False), (0, 0, 0, 5))


def test_views_share_the_decoding_but_not_the_augmentation(dota_root):
    (batch, *_) = training(dota_root, batch_size=2, views=2)
    assert batch["video"].shape[0] == 4 and batch["seed"].unique().numel() == 4
    assert batch["window"].tolist() == [w for w in batch["window"][::2].tolist() for _ in range(2)]
    assert not torch.equal(batch["video"][0], batch["video"][1]) or not torch.equal(
        batch["video"][2], batch["video"][3]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_of_which_nothing_can_be_read_is_black_and_without_weight(dota_root, tmp_path, workers):
    (tmp_path / "dataset").symlink_to(dota_root / "dataset")
    whole, broken = training(dota_root, workers=workers), training(tmp_path, workers=workers)
    assert len(whole) == len(broken) == 6
    for a, b in zip(whole, broken, strict=True):
        assert b["weight"] == 0 and b["samples"] == [] and a.keys() == b.keys()
        names = [sample.removeprefix("DoTA ").partition(",")[0] for sample in a["samples"]]
        assert [fault.name for fault in b["skipped"]] == names and len(names) == 4
        assert all("no frames: expected" in str(fault) for fault in b["skipped"])
        for key in a.keys() - NOTES:
            assert a[key].shape[1:] == b[key].shape[1:] and a[key].dtype == b[key].dtype and len(b[key]) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Windows read together


@pytest.mark.parametrize(("number", "together", "apart"), [(50, 4, 3), (7, 4, 3), (1000, 2, 1), (5, 8, 8)])
def test_a_grouped_order_holds_every_window_once_and_groups_together(number, together, apart):
    orders = [grouped_order(number, together, apart, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert all(sorted(order.tolist()) == list(range(number)) for order in orders)
    assert np.array_equal(orders[0], orders[1]) and (number < 8 or not np.array_equal(orders[0], orders[2]))
    if number == 1000:  # pairs begin with an even number or with an odd one: that is drawn
        pairs = [grouped_order(number, 2, 1, np.random.default_rng(seed)) for seed in range(9)]
        assert {bool((order[np.flatnonzero(np.diff(order) == 1)] % 2).mean() < 0.5) for order in pairs} == {True, False}
    if number >= 50:
        followed = np.mean(np.diff(orders[0]) == apart)
        assert followed > 0.8 * (together - 1) / together


def test_windows_read_together_are_those_read_alone(dota_root, monkeypatch):
    clips = build_clips("DoTA", str(dota_root), "train")
    index = WindowIndex(clips.frame_counts, src_fps=clips.fps, num_frames=4, view_fps=5)
    dataset = WindowDataset([Source(clips, index, FinetuneTransform(16))], seed=7, targets=True)  # reads at a half
    sampler = EpochSampler([len(index)], batch_sizes=[6], samples_per_epoch=24, together=3, apart=[index.windows_apart])
    assert index.windows_apart == 4
    found, opened = [], []
    original = loader.open_clip
    monkeypatch.setattr(loader, "open_clip", lambda clip: opened.append(clip.name) or original(clip))
    for together, workers in ((False, 0), (True, 0), (True, 2)):
        batches = BatchLoader(dataset, sampler, num_workers=workers, together=together)
        found.append([batch | {"video": batch["video"].clone()} for batch in batches])
        found[-1].append(len(opened))
        batches.close()
    alone, at_once, in_workers = (batches.pop() for batches in found)
    assert alone == 24 and 24 + 8 <= at_once <= 24 + 14 and in_workers == at_once
    assert all(same(a, b) and same(a, c) for a, b, c in zip(*found, strict=True))
