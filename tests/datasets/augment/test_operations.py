"""RandAugment against Pillow and timm, as published: the same draws, pictures within a level."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.augment import operations
from datasets.augment.randaugment import DRIVING_OPS, NO_OP, RandAugment, timm_policy

POLICY = "rand-m6-n3-mstd0.5-inc1"
LEVELS = {"Rotate": (17.3, -9.0), "ShearX": (0.17, -0.05), "ShearY": (-0.2, 0.11), "Color": (1.6, 0.3)}
LEVELS |= {"Contrast": (0.4, 1.7), "Brightness": (1.5, 0.2), "Sharpness": (1.7, 0.1)}
PILLOW = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}


def road(frames=3, height=96, width=96, seed=0):
    """Smooth shapes, edges and some noise, other ones in each frame and channel."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    clip = []
    for t in range(frames):
        channels = [
            np.sin(x / (9 + k) + t) * 60 + np.cos(y / 7 - k) * 50 + 110 + 40 * (x > 30 + 9 * t) for k in range(3)
        ]
        clip.append(np.stack(channels, -1) + rng.normal(0, 3, (height, width, 3)))
    return torch.from_numpy(np.clip(clip, 0, 255).astype(np.uint8))


def pillow_policy(policy=POLICY, interpolation="bicubic"):
    return timm_policy(policy, img_mean=(128, 128, 128), interpolation=PILLOW[interpolation])


def by_pillow(clip, name, level, interpolation="bicubic"):
    (op,) = [op for op in pillow_policy(interpolation=interpolation).ops if op.name == name]
    arguments = (level,) if name in LEVELS else ()
    return np.stack([np.asarray(op.aug_fn(Image.fromarray(f), *arguments, **op.kwargs)) for f in clip.numpy()])


@pytest.fixture(params=["OpenCV", "PyTorch"])
def way(request, monkeypatch):
    """Both ways of doing an operation; that of a device stands on the CPU here."""
    if request.param == "PyTorch":
        monkeypatch.setattr(operations, "on_cpu", lambda clip: False)


@pytest.mark.parametrize("name", sorted(set(DRIVING_OPS) - set(operations.GEOMETRY)))
def test_point_operations_are_pillow_s(way, name):
    flat = torch.full((1, 8, 8, 3), 77, dtype=torch.uint8)
    for clip in (road(), road(2, 40, 60, seed=1) // 3 + 60, flat):
        for level in LEVELS.get(name, (0.0,)):
            difference = np.abs(
                operations.operate(clip, name, level).numpy().astype(int) - by_pillow(clip, name, level)
            )
            assert difference.max() <= 1 and difference.mean() < 0.01


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("name", sorted(operations.GEOMETRY))
def test_rotations_and_shears_are_pillow_s_within_a_level(way, name, interpolation):
    clip = road()
    for level in LEVELS[name]:
        ours = operations.operate(clip, name, level, interpolation=interpolation).numpy()
        pillow = by_pillow(clip, name, level, interpolation)
        assert np.abs(ours.astype(int) - pillow).mean() < 1
        corners = (pillow == 128).all(-1)
        assert corners.mean() > 0.005 and (ours[corners] == 128).mean() > 0.99


def test_both_ways_agree(monkeypatch):
    clip = road()
    for name in DRIVING_OPS:
        for level in LEVELS.get(name, (0.0,)):
            monkeypatch.undo()
            cpu = operations.operate(clip, name, level).int()
            monkeypatch.setattr(operations, "on_cpu", lambda clip: False)
            difference = (operations.operate(clip, name, level).int() - cpu).abs().float()
            assert difference.mean() < 0.3 and (name in operations.GEOMETRY or difference.max() <= 1), name
    device = operations.crop(clip, (3, 5, 80, 60), 32).int()
    monkeypatch.undo()
    assert (device - operations.crop(clip, (3, 5, 80, 60), 32).int()).abs().max() <= 1


def test_draws_are_timm_s():
    """1,150 times: the operations and levels of timm's policy, seeded alike."""
    ours, theirs = RandAugment(POLICY), pillow_policy()
    done = []
    for op in theirs.ops:
        op.aug_fn = lambda image, *level, name=op.name, **_: done.append((name, *level)) or image
    for seed in range(1150):
        drawn = np.random.default_rng(seed).integers(2**32)
        random.seed(int(drawn))
        np.random.seed(drawn)
        done.clear()
        theirs(None)
        ops, levels = ours.draw(np.random.default_rng(seed))
        kept = [
            (DRIVING_OPS[op], level) for op, level in zip(ops.tolist(), levels.tolist(), strict=True) if op != NO_OP
        ]
        assert [pair if pair[0] in LEVELS else pair[:1] for pair in kept] == done
        assert len(ops) == 3 and ops.dtype == np.int64


def test_statistics_over_2000_clips():
    """The mean and the spread of augmented pictures, and how far they are from Pillow's, clip by clip."""
    clip, ours, theirs = road(1, 32, 32), RandAugment(POLICY), pillow_policy()
    values = []
    for seed in range(2000):
        drawn = int(np.random.default_rng(seed).integers(2**32))
        random.seed(drawn)
        np.random.seed(drawn)
        pillow = np.asarray(theirs(Image.fromarray(clip[0].numpy()))).astype(float)
        result = clip
        for op, level in zip(*(a.tolist() for a in ours.draw(np.random.default_rng(seed))), strict=True):
            if op != NO_OP:
                result = operations.operate(result, DRIVING_OPS[op], level)
        result = result[0].numpy().astype(float)
        values.append((np.abs(result - pillow).mean(), result.mean(), pillow.mean(), result.std(), pillow.std()))
    difference, mean, mean_pillow, spread, spread_pillow = np.array(values).T
    assert difference.mean() < 1 and np.median(difference) < 0.5
    assert mean.mean() == pytest.approx(mean_pillow.mean(), abs=0.3)
    assert spread.mean() == pytest.approx(spread_pillow.mean(), rel=0.01)
