"""The half of the preprocessing that runs on the device."""

from collections.abc import Callable

import torch
from torch import Tensor


class NormalizeAndErase:
    """Normalises uint8 video by the model, on the device where both are, then erases boxes of it.

    Args:
        normalize: the model's own, uint8 (B, 3, T, H, W) -> float32.
        erase_mode: what fills an erased box, in normalised units: "pixel" standard normal noise for each pixel and
            frame, "rand" one normal colour, "const" zeros.
    """

    def __init__(self, normalize: Callable[[Tensor], Tensor], erase_mode: str = "pixel"):
        self.normalize, self.erase_mode = normalize, erase_mode

    def __call__(self, video: Tensor, boxes: Tensor, seeds: Tensor) -> Tensor:
        """Turn (B, 3, T, H, W) uint8 into normalised float32.

        boxes: int64 (B, count, 4) of `draw_erasing`. seeds: int64 (B,) of the noise. Both are on the CPU.
        """
        video = self.normalize(video)
        for clip, clip_boxes, seed in zip(video, boxes.tolist(), seeds.tolist(), strict=True):
            self._erase(clip, [box for box in clip_boxes if box[2]], seed)
        return video

    def _erase(self, clip: Tensor, boxes: list[list[int]], seed: int) -> None:
        if not boxes:
            return
        generator = torch.Generator(clip.device).manual_seed(seed)
        for top, left, height, width in boxes:
            area = clip[:, :, top : top + height, left : left + width]
            if self.erase_mode == "const":
                area.zero_()
                continue
            shape = area.shape if self.erase_mode == "pixel" else (3, 1, 1, 1)
            area.copy_(torch.randn(shape, generator=generator, device=clip.device))
