"""Resizing, padding and cropping of frames, and the preprocessing of evaluation."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from datasets.clips import DataError

cv2.setNumThreads(1)  # a reading process works in one thread, and one made before a fork would be missing after it
PADDINGS = ("none",) * 5 + ("black",) * 2 + ("colour",) + ("reflect",) * 2 + ("replicate",) * 2  # drawn uniformly
_canvas = np.empty(0, np.uint8)
CROP_PLACES = ((0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3))


class Fit:
    """Tells a reader that a picture may be decoded in a hurry and how small, and keeps how large the last of them was.

    A reader calls it with the height and width of each picture it decodes, upright, and may hand over the picture in
    any size from that down to what is returned: the whole size, or with `least` what `halved` leaves.
    """

    def __init__(self, least: int | None = None):
        self.least = least
        self.size: tuple[int, int] | None = None

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        self.size = height, width
        return (height, width) if self.least is None else halved(height, width, self.least)


def fit_of(decoding: str, least: int) -> Fit | None:
    """Return the Fit of one of names.DECODINGS, for sides of at least so many pixels; None stands for exact pictures.

    JPEGs are decoded "small", at a half or less where that is enough, or at "full" size, both without interpolating
    their colours, or "exact".
    """
    return {"small": Fit(least), "full": Fit(), "exact": None}[decoding]


Read = Callable[[Fit | None], Iterable[Tensor]]  # the frames of a clip, uint8 (H, W, 3), as Fit allows


def sized_frames(read: Read, fit: Fit | None) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yield uint8 (H', W', 3) of each frame, as small as it was read, with its original height and width.

    Raises DataError where they differ.
    """
    sizes = set()
    for frame in read(fit):
        size = fit.size if fit and fit.size else tuple(frame.shape[:2])
        sizes.add(size)
        if len(sizes) > 1:
            raise DataError(f"frames of different sizes in one clip: {sorted(sizes)}")
        yield frame.numpy(), *size


def halved(height: int, width: int, least: int) -> tuple[int, int]:
    """Return a half, a quarter or an eighth of a size, the smallest whose sides are `least` pixels or more; else it.

    These are the sizes that a JPEG can be decoded at in less time.
    """
    factor = next((f for f in (8, 4, 2) if min(height, width) >= f * least), 1)
    return -(-height // factor), -(-width // factor)


def resize(frame: np.ndarray, height: int, width: int, interpolation: int = cv2.INTER_CUBIC) -> np.ndarray:
    """Resize uint8 (H, W, 3) to (height, width, 3) without antialias, as the published recipes do."""
    if frame.shape[:2] == (height, width):
        return frame
    return cv2.resize(frame, (width, height), interpolation=interpolation)


@dataclass(frozen=True)
class Padding:
    """What is put above and below the frames of a clip.

    kind: one of PADDINGS.
    top, bottom: rows, as shares of the height of the frame.
    colour: (r, g, b) of "black" and "colour".
    brightness: of a reflected border, up to 0.7.
    """

    kind: str = "none"
    top: float = 0.0
    bottom: float = 0.0
    colour: tuple[int, int, int] = (0, 0, 0)
    brightness: float = 1.0


def draw_padding(height: int, width: int, rng: np.random.Generator) -> Padding:
    """Draw the padding of a clip of frames height x width; frames that are not wider than high get none.

    One of PADDINGS is drawn; top and bottom are drawn apart, each up to half of width - height. The rule is
    simple-tad's (arXiv:2507.09338).
    """
    kind = PADDINGS[rng.integers(len(PADDINGS))]
    if kind == "none" or width <= height:
        return Padding()
    top, bottom = (round(rng.random() * 0.5 * (width - height)) / height for _ in range(2))
    if kind == "colour":
        return Padding(kind, top, bottom, colour=tuple(rng.integers(256, size=3).tolist()))
    return Padding(kind, top, bottom, brightness=0.7 * rng.random() if kind == "reflect" else 1.0)


def padded(frame: np.ndarray, padding: Padding) -> np.ndarray:
    """Pad uint8 (H, W, 3) to (top + H + bottom, W, 3). A reflected border begins with the edge row again.

    The result is valid until the next call, which uses its memory again: to get fresh memory takes as long as padding.
    """
    global _canvas
    height, width = frame.shape[:2]
    top, bottom = round(padding.top * height), round(padding.bottom * height)
    if not top + bottom:
        return frame
    border = {"reflect": cv2.BORDER_REFLECT, "replicate": cv2.BORDER_REPLICATE}.get(padding.kind, cv2.BORDER_CONSTANT)
    shape = top + height + bottom, width, 3
    if len(_canvas) < math.prod(shape):
        _canvas = np.empty(math.prod(shape), np.uint8)
    canvas = _canvas[: math.prod(shape)].reshape(shape)
    frame = cv2.copyMakeBorder(frame, top, bottom, 0, 0, border, dst=canvas, value=padding.colour)
    if padding.kind == "reflect":
        for rows in (frame[:top], frame[top + height :]):
            if len(rows):
                cv2.convertScaleAbs(rows, dst=rows, alpha=padding.brightness)
    return frame


class EvalTransform:
    """Turns frames uint8 (H, W, 3), one at a time, into uint8 (n, 3, size, size): squashes them, and nothing else.

    The resizing is OpenCV's INTER_CUBIC, which the published weights were trained with: without antialias.
    """

    def __init__(self, size: int):
        self.size = size

    def shape(self, frames: int) -> tuple[int, ...]:
        """Return the shape of what becomes of so many frames: (frames, 3, size, size)."""
        return frames, 3, self.size, self.size

    def __call__(self, frames: Iterable[Tensor], out: Tensor | None = None) -> Tensor:
        """Return the frames, uint8 (n, 3, size, size). out: memory for that many, or more, to put them into."""
        small = [resize(frame.numpy(), self.size, self.size) for frame in frames]
        video = torch.empty(self.shape(len(small)), dtype=torch.uint8) if out is None else out[: len(small)]
        for frame, planes in zip(small, video.numpy(), strict=True):
            cv2.split(frame, list(planes))
        return video


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


def draw_crop(
    height: int, width: int, size: int, scales: Sequence[float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width): one of `crop_sizes` at one of `crop_offsets`, each uniformly."""
    sizes = crop_sizes(min(height, width), size, scales)
    w, h = sizes[rng.integers(len(sizes))]
    w, h = min(w, width), min(h, height)  # a side that was taken for the output size may be 2 pixels short of it
    offsets = crop_offsets(width - w, height - h)
    left, top = offsets[rng.integers(len(offsets))]
    return top, left, h, w
