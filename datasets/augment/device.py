"""The half of the preprocessing that runs on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


class ToModelInput:
    """uint8 video on any device -> normalised float32 there: (x / 255 - mean) / std, then random erasing.

    Args:
        mean, std: of each RGB channel, in [0, 1].
        erase_mode: what fills an erased box, in normalised units: "pixel" standard normal noise for each pixel and
            frame, "rand" one normal colour, "const" zeros.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], erase_mode: str = "pixel"):
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1, 1) * 255 for v in (mean, std))
        self.erase_mode = erase_mode

    def __call__(self, video: Tensor, boxes: Tensor | None = None, seeds: Tensor | None = None) -> Tensor:
        """(B, 3, T, H, W) uint8 -> (B, 3, T, H, W) float32.

        boxes: int64 (B, count, 4) of `draw_erasing`, seeds: int64 (B,) of the noise, both on the CPU, or None.
        """
        if self.mean.device != video.device:
            self.mean, self.std = self.mean.to(video.device), self.std.to(video.device)
        video = video.float().sub_(self.mean).div_(self.std)
        if boxes is not None:
            for clip, own, seed in zip(video, boxes.tolist(), seeds.tolist(), strict=True):
                self._erase(clip, own, seed)
        return video

    def _erase(self, clip: Tensor, boxes: list[list[int]], seed: int) -> None:
        boxes = [b for b in boxes if b[2]]
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
