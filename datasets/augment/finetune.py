"""The augmentation of fine-tuning, as published by simple-tad (arXiv:2507.09338)."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from datasets.augment.erasing import draw_erasing
from datasets.augment.frames import pad_wide, resize, stack
from datasets.augment.randaugment import RandAugment


class FinetuneTransform:
    """Pads wide frames or not, squashes them and applies RandAugment, the same for all frames.

    Args:
        size: output height and width in pixels.
        views: augmented views of each clip.
        aa: RandAugment policy "rand-m<magnitude 0..10>-n<ops>-mstd<std of the magnitude>", or "none".
        interpolation: of RandAugment's rotations and shears, one of randaugment.INTERPOLATIONS.
        short_side: resize frames to this short side first; 0 keeps them. Padding is the same share either way.
        erase_prob: prob of `draw_erasing`, whose boxes are drawn here and filled on the device.
        erase_count: count of `draw_erasing`.
        erase_max_area: max_area of `draw_erasing`.

    Raises ValueError for a policy that does not parse.
    """

    def __init__(
        self,
        size: int,
        *,
        views: int = 1,
        aa: str = "rand-m6-n3-mstd0.5-inc1",
        interpolation: str = "bicubic",
        short_side: int = 0,
        erase_prob: float = 0.25,
        erase_count: int = 1,
        erase_max_area: float = 0.1,
    ):
        self.size, self.views, self.short_side = size, views, short_side
        self.erase_prob, self.erase_count, self.erase_max_area = erase_prob, erase_count, erase_max_area
        self.rand_augment = None if aa == "none" else RandAugment(aa, interpolation)

    def __call__(self, frames: Iterable[Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
        """Turn frames uint8 (H, W, 3), one at a time, into tensors with a leading axis of V views.

        These are video uint8 (V, 3, T, size, size), and boxes int64 (V, erase_count, 4) and seed int64 (V,) for
        `NormalizeAndErase`. Raises DataError where the heights of frames differ.
        """
        shrunk, width = self.shrink(frames)
        videos, boxes = zip(*(self.augment(shrunk, width, rng) for _ in range(self.views)), strict=True)
        seeds = torch.from_numpy(rng.integers(2**63, size=self.views))
        return {"video": torch.stack(videos), "boxes": torch.stack(boxes), "seed": seeds}

    def shrink(self, frames: Iterable[Tensor]) -> tuple[Tensor, int]:
        """Turn frames uint8 (H, W, 3) into uint8 (T, H', size, 3), and W': H' x W' is the size after `short_side`.

        The width is squashed at once: padding goes above and below, so the order does not matter, and what is
        padded and stacked afterwards is six times smaller than the frames of a 1280 x 720 video.
        Raises DataError where the heights differ.
        """
        shrunk = []
        for frame in frames:
            height, width = frame.shape[:2]
            if self.short_side:
                scale = self.short_side / min(height, width)
                height, width = round(height * scale), round(width * scale)
            shrunk.append(resize(resize(frame[None], height, width), height, self.size)[0])
        return stack(shrunk), width

    def augment(self, frames: Tensor, width: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Turn the output of `shrink` into uint8 (3, T, size, size), and int64 (erase_count, 4) of `draw_erasing`."""
        frames = resize(pad_wide(frames, width, rng), self.size, self.size)
        if self.rand_augment is not None:
            frames = self.rand_augment(frames, rng)
        boxes = draw_erasing(self.size, rng, prob=self.erase_prob, count=self.erase_count, max_area=self.erase_max_area)
        return frames.permute(3, 0, 1, 2).contiguous(), boxes
