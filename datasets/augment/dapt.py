"""The augmentation of DAPT, and its masks."""

from dataclasses import replace

import cv2
import numpy as np
import torch
from torch import Tensor

from datasets.augment.draws import Draws, finished
from datasets.augment.frames import Read, draw_crop, draw_padding, fit_of, padded, resize, sized_frames
from datasets.augment.masks import masked_places, tube_mask
from datasets.augment.operations import crop
from datasets.augment.randaugment import RandAugment

SCALES = (1, 0.875, 0.75, 0.66)  # of VideoMAE's multi-scale crop
ALIGNED_SCALES = (1, 1, 0.975, 0.95, 0.9, 0.875, 0.85)
INTERPOLATION = "bicubic"  # of RandAugment


class PretrainTransform:
    """DAPT's augmentation, the same for all frames of a clip, and its mask.

    Aligned with what fine-tuning sees, as in simple-tad (arXiv:2507.09338), it resizes the short side to `short_side`,
    pads wide frames or not and squashes them to a square of it, applies RandAugment in 7 of 10 clips, and crops by
    `draw_crop`. If not, as in VideoMAE (arXiv:2203.12602), it resizes the short side and crops the wide frame.

    Args:
        size: output height and width in pixels.
        grid: (t, h, w) tokens of a clip.
        mask_ratio: share of them that is masked (see `tube_mask`).
        short_side: pixels.
        enlarge: whether smaller frames are enlarged to short_side, or stay.
        aligned: whether clips look as in fine-tuning.
        aa: RandAugment policy of aligned clips, or "none".
        decoding: how JPEGs are decoded, one of names.DECODINGS.
        here: whether RandAugment and crops of aligned clips are done right here, instead of by `DeviceAugment`.

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
        decoding: str = "small",
        here: bool = True,
    ):
        masked_places(grid, mask_ratio)  # refuses a bad ratio now, not in a worker
        self.size, self.grid, self.mask_ratio = size, grid, mask_ratio
        self.short_side, self.enlarge, self.aligned, self.here = short_side, enlarge, aligned, here
        self.decoding = decoding
        self.rand_augment = None if aa == "none" else RandAugment(aa)

    def shape(self, frames: int) -> tuple[int, ...]:
        """Return the shape of "video" of a clip of so many frames, (1, frames, side, side, 3)."""
        side = max(self.size, self.short_side) if self.aligned else self.size
        return 1, frames, side, side, 3

    def __call__(
        self, read: Read, rng: np.random.Generator, out: Tensor, *, aspect: float | None = None
    ) -> dict[str, Tensor]:
        """Fill out, uint8 (1, T, side, side, 3), with the frames of a clip; return what was drawn, an item a view.

        aspect: width / height as filmed of frames that are stored squashed; None where they are as filmed.

        Returns mask bool (1, N), True = masked, and `Draws` as tensors. Raises DataError where frames differ in size.
        """
        draws = None
        view = out[0].numpy()
        for t, (frame, height, width) in enumerate(sized_frames(read, fit_of(self.decoding, self.short_side))):
            filmed = round(height * aspect) if aspect else width
            scale = self._scale(min(height, filmed))
            height, filmed = round(height * scale), int(filmed * scale)
            width = int(width * scale) if self.aligned else filmed
            frame = resize(frame, height, width, cv2.INTER_LINEAR)
            if draws is None and self.aligned:
                padding = draw_padding(height, filmed, rng)
                draws = self._draws(min(height, filmed), rng)
            elif draws is None:
                draws = Draws.of(self.rand_augment, self.size, None)
                box = draw_crop(height, width, self.size, SCALES, rng)
            if self.aligned:
                view[t, : draws.side, : draws.side] = resize(padded(frame, padding), draws.side, draws.side)
            else:
                view[t, : self.size, : self.size] = crop(torch.from_numpy(frame)[None], box, self.size)[0]
        if self.here and self.aligned:
            draws = finished(out[0], draws, self.size, INTERPOLATION)
        mask = torch.from_numpy(tube_mask(self.grid, self.mask_ratio, rng))
        return Draws.stacked([draws]) | {"mask": mask[None]}

    def _draws(self, side: int, rng: np.random.Generator) -> Draws:
        chosen = self.rand_augment is not None and rng.random() < 0.7
        draws = Draws.of(self.rand_augment, side, rng if chosen else None)
        return replace(draws, crop=draw_crop(side, side, self.size, ALIGNED_SCALES, rng))

    def _scale(self, short: int) -> float:
        """Return what frames of a short side are scaled by."""
        return 1.0 if short < self.short_side and not self.enlarge else self.short_side / short
