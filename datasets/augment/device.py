"""The half of the preprocessing that runs on the device."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from datasets.augment.draws import Draws, augmented


class DeviceAugment:
    """Does what workers have drawn for the clips of a batch, on the device where its video is.

    Args:
        size: output height and width in pixels.
        interpolation: of RandAugment's rotations and shears, one of operations.INTERPOLATIONS.
    """

    def __init__(self, size: int, interpolation: str = "bicubic"):
        self.size, self.interpolation = size, interpolation

    def __call__(self, video: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Turn uint8 (B, T, H, W, 3) into (B, 3, T, size, size), by the `Draws` in a batch, which are on the CPU."""
        clips = torch.empty(len(video), 3, video.shape[1], self.size, self.size, dtype=torch.uint8, device=video.device)
        for clip, frames, draws in zip(clips, video, Draws.unstacked(batch), strict=True):
            clip.copy_(augmented(frames, draws, self.size, self.interpolation).permute(3, 0, 1, 2))
        return clips


class DeviceLoader:
    """The batches of a loader with the video augmented on the device, as often as asked.

    To a CUDA device a batch is copied and augmented in streams of their own, beside the step before, which the host has
    put in line by then. Only the copy is waited for, since the loader may use its memory again.
    """

    def __init__(self, loader: Iterable[dict[str, Any]], device: torch.device, augment: DeviceAugment):
        self.loader, self.device, self.augment = loader, device, augment
        # two, since a copy in line behind the augmentation before would wait for the steps that compete with that
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else None

    @property
    def waited(self) -> float:
        """Seconds of waiting for the loader, if it counts them."""
        return getattr(self.loader, "waited", 0.0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            if self._streams is None:
                yield batch | {"video": self.augment(batch["video"].to(self.device), batch)}
                continue
            copying, augmenting = self._streams
            with torch.cuda.stream(copying):
                video = batch["video"].to(self.device, non_blocking=True)
                copied = copying.record_event()
            with torch.cuda.stream(augmenting):
                augmenting.wait_event(copied)
                video.record_stream(augmenting)
                video = self.augment(video, batch)
            present = torch.cuda.current_stream(self.device)
            present.wait_stream(augmenting)
            video.record_stream(present)
            yield batch | {"video": video}
            copied.synchronize()


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
