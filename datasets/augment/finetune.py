"""The augmentation of fine-tuning, as published by simple-tad (arXiv:2507.09338)."""

import numpy as np
import torch
from torch import Tensor

from datasets.augment.draws import Draws, finished
from datasets.augment.erasing import draw_erasing
from datasets.augment.frames import Padding, Read, draw_padding, fit_of, padded, resize, sized_frames
from datasets.augment.randaugment import RandAugment


class FinetuneTransform:
    """Pads wide frames or not and squashes them to a square; draws RandAugment and erasing, the same for all frames.

    Args:
        size: output height and width in pixels.
        views: augmented views of each clip.
        aa: RandAugment policy "rand-m<magnitude 0..10>-n<ops>-mstd<std of the magnitude>", or "none".
        interpolation: of RandAugment's rotations and shears, one of operations.INTERPOLATIONS.
        short_side: resize frames to this short side first; 0 keeps them. Padding is the same share either way.
        erase_prob: prob of `draw_erasing`, whose boxes are filled on the device.
        erase_count: count of `draw_erasing`.
        erase_max_area: max_area of `draw_erasing`.
        decoding: how JPEGs are decoded, one of names.DECODINGS.
        here: whether RandAugment is done right here, instead of by `DeviceAugment`.
        pad: whether frames are padded at random.

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
        decoding: str = "small",
        here: bool = True,
        pad: bool = True,
    ):
        self.size, self.views, self.short_side, self.interpolation = size, views, short_side, interpolation
        self.erase_prob, self.erase_count, self.erase_max_area = erase_prob, erase_count, erase_max_area
        self.decoding, self.here, self.pad = decoding, here, pad
        self.rand_augment = None if aa == "none" else RandAugment(aa)

    @classmethod
    def plain(cls, size: int) -> "FinetuneTransform":
        """Return what leaves nothing to chance: windows as an EvalTransform makes them, to the bit."""
        return cls(size, aa="none", erase_prob=0, decoding="exact", pad=False)

    def shape(self, frames: int) -> tuple[int, ...]:
        """Return the shape of "video" of a clip of so many frames: (V, frames, size, size, 3)."""
        return self.views, frames, self.size, self.size, 3

    def __call__(
        self, read: Read, rng: np.random.Generator, out: Tensor, *, aspect: float | None = None
    ) -> dict[str, Tensor]:
        """Fill out, uint8 (V, T, size, size, 3), with the frames of a clip; return what was drawn, an item a view.

        aspect: width / height as filmed of frames that are stored squashed; None where they are as filmed.

        Returns boxes int64 (V, erase_count, 4) and seed int64 (V,) for `NormalizeAndErase`, and `Draws` as tensors.
        Raises DataError where frames differ in size.
        """
        paddings, drawn, boxes = [], [], []
        least = max(self.size, self.short_side)
        for t, (frame, height, width) in enumerate(sized_frames(read, fit_of(self.decoding, least))):
            filmed = round(height * aspect) if aspect else width
            if self.short_side:
                scale = self.short_side / min(height, filmed)
                height, width, filmed = (round(n * scale) for n in (height, width, filmed))
                frame = resize(frame, height, width)
            if t == 0:
                for _ in range(self.views):
                    paddings.append(draw_padding(height, filmed, rng) if self.pad else Padding())
                    drawn.append(Draws.of(self.rand_augment, self.size, rng))
                    boxes.append(draw_erasing(self.size, rng, prob=self.erase_prob, count=self.erase_count,
                                              max_area=self.erase_max_area))  # fmt: skip
            for padding, view in zip(paddings, out.numpy(), strict=True):
                view[t] = resize(padded(frame, padding), self.size, self.size)
        if self.here:
            drawn = [finished(*pair, self.size, self.interpolation) for pair in zip(out, drawn, strict=True)]
        seeds = torch.from_numpy(rng.integers(2**63, size=self.views))
        return Draws.stacked(drawn) | {"boxes": torch.stack(boxes), "seed": seeds}
