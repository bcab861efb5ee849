"""The operations of RandAugment on a clip: by OpenCV on the CPU, by PyTorch on another device.

Both do what Pillow does to each frame, alike on all frames of a clip; rotations and shears differ from its pictures by
half a level on average, since their bicubic kernel is another (a = -0.75, not -0.5).

A clip is uint8 (T, H, W, 3), in memory in any order of dimensions. To add an operation, write a function
(clip, level) -> clip, enter it in OPERATIONS, and name it in DRIVING_OPS (randaugment.py).
"""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

FILL = 128  # of the corners that a rotation or shear leaves
INTERPOLATIONS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


def on_cpu(clip: Tensor) -> bool:
    """Tell whether a clip is where OpenCV, and PyTorch's kernels for uint8, can be used."""
    return clip.device.type == "cpu"


# ----------------------------------------------------------------------------------------------------------------------
# Lookup tables: (T, 3, 256) float, rounded down, of each frame and channel


def _histograms(clip: Tensor) -> Tensor:
    """Count the values of each frame and channel: int64 (T, 3, 256)."""
    if on_cpu(clip):
        frames = clip.numpy()
        counts = [cv2.calcHist([frame], [c], None, [256], [0, 256]) for frame in frames for c in range(3)]
        return torch.from_numpy(np.stack(counts)).long().view(len(frames), 3, 256)
    values = clip.permute(0, 3, 1, 2).flatten(2).long()
    return torch.zeros(len(clip), 3, 256, dtype=torch.int64, device=clip.device).scatter_add_(
        2, values, torch.ones_like(values)
    )


def _look_up(clip: Tensor, tables: Tensor) -> Tensor:
    """Replace each value by that in the table of its frame and channel; tables are broadcast to (T, 3, 256)."""
    tables = tables.clamp(0, 255).to(torch.uint8).expand(len(clip), 3, 256)
    if on_cpu(clip):
        lookups = tables.permute(0, 2, 1)[:, None].contiguous().numpy()
        return torch.from_numpy(np.stack([cv2.LUT(f, t) for f, t in zip(clip.numpy(), lookups, strict=True)]))
    planes = clip.permute(0, 3, 1, 2)
    return tables.gather(2, planes.flatten(2).long()).view(planes.shape).permute(0, 2, 3, 1)


def _levels(clip: Tensor) -> Tensor:
    return torch.arange(256, device=clip.device, dtype=torch.float64)


def auto_contrast(clip: Tensor, _: float) -> Tensor:
    """Stretch the values of each channel of a frame to 0..255."""
    low, high = (x.double()[..., None] for x in _extremes(clip))
    scale = 255 / (high - low).clamp(min=1)
    levels = _levels(clip)
    return _look_up(clip, torch.where(high > low, levels * scale - low * scale, levels))


def _extremes(clip: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest value of each frame and channel: (T, 3), (T, 3)."""
    present = _histograms(clip) > 0
    return present.int().argmax(-1), 255 - present.flip(-1).int().argmax(-1)


def equalize(clip: Tensor, _: float) -> Tensor:
    """Spread the values of each channel of a frame evenly over 0..255."""
    counts = _histograms(clip)
    top = counts.gather(-1, _extremes(clip)[1][..., None])
    step = (counts.sum(-1, keepdim=True) - top) // 255
    before = counts.cumsum(-1) - counts
    spread = (step // 2 + before) // step.clamp(min=1)
    return _look_up(clip, torch.where(step > 0, spread, _levels(clip).long()))


def invert(clip: Tensor, _: float) -> Tensor:
    """Turn each value x into 255 - x."""
    return 255 - clip


def brightness(clip: Tensor, factor: float) -> Tensor:
    """Multiply by a factor."""
    return _look_up(clip, (_levels(clip).float() * factor).trunc())


def contrast(clip: Tensor, factor: float) -> Tensor:
    """Multiply each frame's distance from its mean grey by a factor."""
    mean = (_grey(clip).flatten(1).double().mean(1) + 0.5).floor().float()[:, None, None]
    return _look_up(clip, _blend(mean, _levels(clip).float(), factor))


# ----------------------------------------------------------------------------------------------------------------------
# Mixtures with another picture


def _blend(other: Tensor, values: Tensor, factor: float) -> Tensor:
    """Return other + factor (values - other), rounded down, as Pillow's Image.blend."""
    return (other + factor * (values - other)).trunc()


def _grey(clip: Tensor) -> Tensor:
    """Return the luma of ITU-R 601, with Pillow's integers and rounding: float32 (T, H, W)."""
    values = clip.float()  # all sums are below 2^24: exact
    if on_cpu(clip):
        luma = values @ torch.tensor([19595.0, 38470.0, 7471.0])
    else:  # where a product of matrices may be rounded
        luma = values[..., 0] * 19595 + values[..., 1] * 38470 + values[..., 2] * 7471
    return ((luma + 0x8000) / 0x10000).floor()


def colour(clip: Tensor, factor: float) -> Tensor:
    """Multiply the distance from grey by a factor."""
    return _framewise(lambda part: _blend(_grey(part)[..., None].repeat(1, 1, 1, 3), part.float(), factor), clip)


def sharpness(clip: Tensor, factor: float) -> Tensor:
    """Multiply the distance from a smoothed picture by a factor; a border of one pixel stays."""
    return _framewise(lambda part: _blend(_smooth(part), part.float(), factor), clip)


def _smooth(clip: Tensor) -> Tensor:
    """Average 3 x 3 pixels, the middle one counted five times; float32 whole numbers."""
    values = clip.float()
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    smooth = values.clone()
    smooth[:, 1:-1, 1:-1] = ((box + 4 * values[:, 1:-1, 1:-1]) / 13 + 0.5).floor()
    return smooth


def _framewise(function: Callable[[Tensor], Tensor], clip: Tensor) -> Tensor:
    """Return function(clip) as uint8, on the CPU frame by frame, which its caches hold."""
    parts = clip.split(1) if on_cpu(clip) else (clip,)
    return torch.cat([function(part).clamp_(0, 255).to(torch.uint8) for part in parts])


# ----------------------------------------------------------------------------------------------------------------------
# Geometry


def affine(clip: Tensor, matrix: tuple[float, ...], interpolation: str) -> Tensor:
    """Sample each frame at (a x + b y + c, d x + e y + f), for matrix (a, b, c, d, e, f) in pixels, as Pillow has it.

    The middle of the first pixel is at 0.5. What lies outside becomes FILL.
    """
    height, width = clip.shape[1:3]
    y, x = torch.meshgrid(*(torch.arange(n, device=clip.device) + 0.5 for n in (height, width)), indexing="ij")
    a, b, c, d, e, f = matrix
    sample_x, sample_y = a * x + b * y + c, d * x + e * y + f
    outside = (sample_x < 0) | (sample_x >= width) | (sample_y < 0) | (sample_y >= height)
    if on_cpu(clip):
        shift = np.array([[a, b, c + 0.5 * (a + b) - 0.5], [d, e, f + 0.5 * (d + e) - 0.5]])  # first pixel at 0
        flags = INTERPOLATIONS[interpolation] | cv2.WARP_INVERSE_MAP
        warped = np.empty(clip.shape, dtype=np.uint8)
        for frame, out in zip(clip.numpy(), warped, strict=True):
            cv2.warpAffine(frame, shift, (width, height), dst=out, flags=flags, borderMode=cv2.BORDER_REPLICATE)
        warped[:, outside.numpy()] = FILL
        return torch.from_numpy(warped)
    planes = clip.permute(0, 3, 1, 2).flatten(0, 1)[None].float()
    grid = torch.stack([2 * sample_x / width - 1, 2 * sample_y / height - 1], dim=-1)[None]
    planes = F.grid_sample(planes, grid, mode=interpolation, padding_mode="border", align_corners=False)
    planes = planes.round_().clamp_(0, 255).masked_fill_(outside, FILL).to(torch.uint8)
    return planes.view(len(clip), 3, height, width).permute(0, 2, 3, 1)


def _rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


# Matrices of `affine` for an operation of a level, for frames of height x width.
GEOMETRY: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    "Rotate": _rotation,  # degrees, counter-clockwise
    "ShearX": lambda factor, height, width: (1, factor, 0, 0, 1, 0),
    "ShearY": lambda factor, height, width: (1, 0, 0, factor, 1, 0),
}

OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Color": colour,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
}


def crop(clip: Tensor, box: Sequence[int], size: int) -> Tensor:
    """Turn uint8 (T, H, W, 3) into (T, size, size, 3): what is in box (top, left, height, width), resized as by Pillow.

    On a device other than the CPU the result is within a level of that.
    """
    top, left, height, width = box
    clip = clip[:, top : top + height, left : left + width]
    if (height, width) == (size, size):
        return clip
    planes = clip.permute(0, 3, 1, 2)
    if on_cpu(clip):
        planes = F.interpolate(planes, size=(size, size), mode="bilinear", antialias=True)
    else:  # there is no kernel for integers
        planes = F.interpolate(planes.float(), size=(size, size), mode="bilinear", antialias=True)
        planes = planes.round_().clamp_(0, 255).to(torch.uint8)
    return planes.permute(0, 2, 3, 1)


def operate(clip: Tensor, name: str, level: float, *, interpolation: str = "bicubic") -> Tensor:
    """Return a clip after an operation of OPERATIONS or GEOMETRY. level: in its units (see there)."""
    if name in GEOMETRY:
        return affine(clip, GEOMETRY[name](level, *clip.shape[1:3]), interpolation)
    return OPERATIONS[name](clip, level)
