"""What is drawn for a clip in a worker and done to it there or on the device."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from datasets.augment.operations import crop, operate
from datasets.augment.randaugment import DRIVING_OPS, NO_OP, RandAugment


@dataclass(frozen=True)
class Draws:
    """What is still to be done to a clip, uint8 (T, H, W, 3).

    side: the upper left side x side pixels are the clip.
    ops: (n,) of RandAugment, places in DRIVING_OPS or NO_OP, in order.
    levels: (n,) of them.
    crop: (top, left, height, width) of what is cut out after that, and resized.
    """

    side: int
    ops: np.ndarray
    levels: np.ndarray
    crop: tuple[int, int, int, int]

    @classmethod
    def of(cls, rand_augment: RandAugment | None, side: int, rng: np.random.Generator | None) -> "Draws":
        """Draw the operations for a square clip that is used whole; without rng as many places, but none in them."""
        layers = rand_augment.layers if rand_augment else 1
        ops, levels = np.full(layers, NO_OP), np.zeros(layers)
        if rand_augment and rng:
            ops, levels = rand_augment.draw(rng)
        return cls(side, ops, levels, (0, 0, side, side))

    @staticmethod
    def stacked(views: Sequence["Draws"]) -> dict[str, Tensor]:
        """Return tensors of several: side int64 (V,), ops int64 (V, n), levels float64 (V, n), crop int64 (V, 4)."""
        return {
            f.name: torch.from_numpy(np.stack([np.asarray(getattr(v, f.name)) for v in views])) for f in fields(Draws)
        }

    @staticmethod
    def unstacked(batch: dict[str, Tensor]) -> list["Draws"]:
        """Return the Draws of each view of a batch."""
        columns = (batch[f.name].tolist() for f in fields(Draws))
        return [Draws(side, np.array(o), np.array(v), tuple(c)) for side, o, v, c in zip(*columns, strict=True)]


def augmented(clip: Tensor, draws: Draws, size: int, interpolation: str) -> Tensor:
    """Do what was drawn to uint8 (T, H, W, 3); returns (T, size, size, 3)."""
    clip = clip[:, : draws.side, : draws.side]
    for op, level in zip(draws.ops.tolist(), draws.levels.tolist(), strict=True):
        if op != NO_OP:
            clip = operate(clip, DRIVING_OPS[op], level, interpolation=interpolation)
    return crop(clip, draws.crop, size)


def finished(clip: Tensor, draws: Draws, size: int, interpolation: str) -> Draws:
    """Do what was drawn in place; returns Draws that leave nothing to be done to the upper left size x size pixels."""
    clip[:, :size, :size] = augmented(clip, draws, size, interpolation)
    return Draws(size, np.full_like(draws.ops, NO_OP), np.zeros_like(draws.levels), (0, 0, size, size))
