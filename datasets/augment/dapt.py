"""The augmentation of DAPT, and its masks."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from datasets.augment.frames import multi_scale_crop, pad_wide, resize, stack
from datasets.augment.masks import tube_mask
from datasets.augment.randaugment import RandAugment

SCALES = (1, 0.875, 0.75, 0.66)  # of VideoMAE's multi-scale crop
ALIGNED_SCALES = (1, 1, 0.975, 0.95, 0.9, 0.875, 0.85)


class PretrainTransform:
    """DAPT's augmentation, the same for all frames of a clip, and its mask.

    Aligned with what fine-tuning sees, as in simple-tad (arXiv:2507.09338), it resizes the short side to `short_side`,
    pads wide frames or not and squashes them to a square of it, applies RandAugment in 7 of 10 clips, and crops by
    `multi_scale_crop`. If not, as in VideoMAE (arXiv:2203.12602), it resizes the short side and crops the wide frame.

    Args:
        size: output height and width in pixels.
        grid: (t, h, w) tokens of a clip.
        mask_ratio: share of them that is masked (see `tube_mask`).
        short_side: pixels.
        enlarge: whether smaller frames are enlarged to short_side, or stay.
        aligned: whether clips look as in fine-tuning.
        aa: RandAugment policy of aligned clips, or "none".

    Raises ValueError for a policy that does not parse or a mask that hides nothing or everything.
    """

    def __init__(
        self,
        size: int,
        *,
        grid: tuple[int, int, int],
        mask_ratio: float,
        short_side: int,
        enlarge: bool = True,
        aligned: bool = True,
        aa: str = "rand-m3-n3-mstd0.5-inc1",
    ):
        tube_mask(grid, mask_ratio, np.random.default_rng(0))  # refuses a bad ratio now, not in a worker
        self.size, self.grid, self.mask_ratio = size, grid, mask_ratio
        self.short_side, self.enlarge, self.aligned = short_side, enlarge, aligned
        self.rand_augment = RandAugment(aa, "bicubic") if aligned and aa != "none" else None

    def __call__(self, frames: Iterable[Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
        """Turn frames uint8 (H, W, 3) into video uint8 (1, 3, T, size, size) and mask bool (1, N), True = masked.

        Raises DataError where frames differ in size.
        """
        clip = stack([self._shrink(frame) for frame in frames])
        if self.aligned:
            side = min(clip.shape[1:3])
            clip = resize(pad_wide(clip, clip.shape[2], rng), side, side)
            if self.rand_augment is not None and rng.random() < 0.7:
                clip = self.rand_augment(clip, rng)
        clip = multi_scale_crop(clip, self.size, ALIGNED_SCALES if self.aligned else SCALES, rng)
        mask = torch.from_numpy(tube_mask(self.grid, self.mask_ratio, rng))
        return {"video": clip.permute(3, 0, 1, 2).contiguous()[None], "mask": mask[None]}

    def _shrink(self, frame: Tensor) -> Tensor:
        height, width = frame.shape[:2]
        short = min(height, width)
        if short == self.short_side or (short < self.short_side and not self.enlarge):
            return frame
        scale = self.short_side / short
        return resize(frame[None], round(height * scale), int(width * scale), mode="bilinear")[0]
