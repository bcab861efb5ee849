"""Resizing, padding and cropping of frames, and the preprocessing of evaluation."""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from datasets.clips import DataError

cv2.setNumThreads(1)  # a reading process works in one thread, and one made before a fork would be missing after it
PADDINGS = ("none",) * 5 + ("black",) * 2 + ("colour",) + ("reflect",) * 2 + ("replicate",) * 2  # drawn uniformly
CROP_PLACES = ((0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3))


def resize(frames: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Resize uint8 (T, H, W, 3) to (T, height, width, 3), bicubic without antialias or regard for the aspect ratio.

    PyTorch's uint8 kernel rounds and clamps between its two passes: it is within one level of `EvalTransform` on most
    pixels, ten on some.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    planes = frames.permute(0, 3, 1, 2)
    planes = F.interpolate(planes, size=(height, width), mode=mode, antialias=False, align_corners=False)
    return planes.permute(0, 2, 3, 1)


def stack(frames: Sequence[Tensor]) -> Tensor:
    """Stack T frames (H, W, 3) to (T, H, W, 3). Raises DataError where they differ in size."""
    if len(sizes := {tuple(frame.shape[:2]) for frame in frames}) > 1:
        raise DataError(f"frames of different sizes in one clip: {sorted(sizes)}")
    return torch.stack(frames)


class EvalTransform:
    """Turns frames uint8 (H, W, 3), one at a time, into uint8 (n, 3, size, size): squashes them, and nothing else.

    The resizing is OpenCV's INTER_CUBIC, which the published weights were trained with: without antialias.
    """

    def __init__(self, size: int):
        self.size = size

    def __call__(self, frames: Iterable[Tensor]) -> Tensor:
        side = self.size, self.size
        small = [cv2.resize(frame.numpy(), side, interpolation=cv2.INTER_CUBIC) for frame in frames]
        video = np.empty((len(small), 3, *side), np.uint8)
        for frame, planes in zip(small, video, strict=True):
            cv2.split(frame, list(planes))
        return torch.from_numpy(video)


def pad_wide(frames: Tensor, width: int, rng: np.random.Generator) -> Tensor:
    """Pad frames that are wider than high above and below, by one draw for the clip.

    Frames are uint8 (T, H, W, 3) and were `width` wide before squashing; they become (T, H + top + bottom, W, 3). One
    of PADDINGS is drawn; top and bottom are drawn apart, each up to half of width - H. Reflected borders are darkened
    by 30 % or more. The rule is simple-tad's (arXiv:2507.09338).
    """
    height = frames.shape[1]
    padding = PADDINGS[rng.integers(len(PADDINGS))]
    if padding == "none" or width <= height:
        return frames
    top, bottom = (round(rng.random() * 0.5 * (width - height)) for _ in range(2))
    if padding in ("black", "colour"):
        colour = rng.integers(256, size=3) if padding == "colour" else np.zeros(3)
        shape = len(frames), height + top + bottom, frames.shape[2], 3
        padded = torch.from_numpy(colour.astype(np.uint8)).expand(shape).contiguous()
        padded[:, top : top + height] = frames
        return padded
    rows = np.pad(np.arange(height), (top, bottom), mode="reflect" if padding == "reflect" else "edge")
    padded = frames[:, torch.from_numpy(rows)]
    if padding == "reflect":
        brightness = 0.7 * rng.random()
        for border in (padded[:, :top], padded[:, top + height :]):
            border.copy_((border * brightness).round())
    return padded


def crop_sizes(side: int, size: int, scales: Sequence[float]) -> list[tuple[int, int]]:
    """Return the (width, height) candidates of VideoMAE's multi-scale crop of frames whose short side is `side` pixels.

    Every scale of the side goes with itself and its neighbours in `scales`; what is within 2 pixels of the output size
    is that size, so that it need not be resized.
    """
    sides = [size if abs(int(side * s) - size) < 3 else int(side * s) for s in scales]
    return [(w, h) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]


def crop_offsets(spare_width: int, spare_height: int) -> list[tuple[int, int]]:
    """Return (left, top) of the 13 places of a crop on a grid of quarters of what is spare: corners, edges, centres."""
    dx, dy = spare_width // 4, spare_height // 4
    return [(x * dx, y * dy) for x, y in CROP_PLACES]


def multi_scale_crop(clip: Tensor, size: int, scales: Sequence[float], rng: np.random.Generator) -> Tensor:
    """Turn uint8 (T, H, W, 3) into (T, size, size, 3): draw one of `crop_sizes` at one of `crop_offsets`, uniformly."""
    height, width = clip.shape[1:3]
    sizes = crop_sizes(min(height, width), size, scales)
    w, h = sizes[rng.integers(len(sizes))]
    w, h = min(w, width), min(h, height)  # a side that was taken for the output size may be 2 pixels short of it
    offsets = crop_offsets(width - w, height - h)
    left, top = offsets[rng.integers(len(offsets))]
    crop = clip[:, top : top + h, left : left + w]
    if (h, w) == (size, size):
        return crop
    planes = F.interpolate(crop.permute(0, 3, 1, 2), size=(size, size), mode="bilinear", antialias=True)  # as Pillow
    return planes.permute(0, 2, 3, 1)
