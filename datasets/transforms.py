"""From decoded frames to model input: evaluation preprocessing, fine-tuning augmentation, and the part on the device.

Workers hand over uint8; mean, std and random erasing are applied on the device. Every random draw comes from the
generator of the sample, so a clip looks the same whichever worker or rank prepares it.
"""

import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from datasets.clips import DataError
from datasets.masking import tube_mask

DRIVING_OPS = [  # no solarise, posterise or translate: a street scene stays one
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
]
PADDINGS = ("none",) * 5 + ("black",) * 2 + ("colour",) + ("reflect",) * 2 + ("replicate",) * 2  # drawn uniformly
SCALES = (1, 0.875, 0.75, 0.66)  # of VideoMAE's multi-scale crop
ALIGNED_SCALES = (1, 1, 0.975, 0.95, 0.9, 0.875, 0.85)
CROP_PLACES = ((0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3))
INTERPOLATIONS = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}


def resize_exact(frame: Tensor, size: int) -> Tensor:
    """uint8 (H, W, 3) -> uint8 (size, size, 3), bicubic without antialias or regard for the aspect ratio.

    Within one level of cv2.resize(INTER_CUBIC), which the published weights were trained with.
    """
    planes = frame.permute(2, 0, 1)[None].float()
    planes = F.interpolate(planes, size=(size, size), mode="bicubic", antialias=False, align_corners=False)
    return planes[0].round_().clamp_(0, 255).byte().permute(1, 2, 0)


def resize(frames: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """uint8 (T, H, W, 3) -> uint8 (T, height, width, 3): `resize_exact`, except at hard edges, in a fifth of the time.

    PyTorch's uint8 kernel rounds and clamps between its two passes: within one level on most pixels, ten on some.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    planes = F.interpolate(
        frames.permute(0, 3, 1, 2), size=(height, width), mode=mode, antialias=False, align_corners=False
    )
    return planes.permute(0, 2, 3, 1)


def stack(frames: Sequence[Tensor]) -> Tensor:
    """T frames (H, W, 3) -> (T, H, W, 3). Raises DataError where they differ in size."""
    if len(sizes := {tuple(frame.shape[:2]) for frame in frames}) > 1:
        raise DataError(f"frames of different sizes in one clip: {sorted(sizes)}")
    return torch.stack(list(frames))


class EvalTransform:
    """Frames uint8 (H, W, 3), one at a time -> uint8 (n, 3, size, size): squashed to a square, nothing else."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, frames: Iterable[Tensor]) -> Tensor:
        return torch.stack([resize_exact(frame, self.size).permute(2, 0, 1) for frame in frames])


class FinetuneTransform:
    """The published fine-tuning augmentation: pad wide frames or not, squash, RandAugment; the same for all frames.

    Args:
        size: output height and width in pixels.
        views: augmented views of each clip.
        aa: RandAugment policy "rand-m<magnitude 0..10>-n<ops>-mstd<std of the magnitude>", or "none".
        interpolation: of RandAugment's rotations and shears, one of INTERPOLATIONS.
        short_side: resize frames to this short side first; 0 keeps them. Padding is the same share either way.
        erase_prob, erase_count, erase_max_area: random erasing (see `draw_erasing`); its boxes are drawn here and
            filled on the device.

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
        """Frames uint8 (H, W, 3), one at a time -> tensors with a leading axis of V views.

        video uint8 (V, 3, T, size, size); boxes int64 (V, erase_count, 4) and seed int64 (V,) for `ToModelInput`.
        """
        shrunk, width = self.shrink(frames)
        videos, boxes = zip(*(self.augment(shrunk, width, rng) for _ in range(self.views)), strict=True)
        seeds = torch.from_numpy(rng.integers(2**63, size=self.views))
        return {"video": torch.stack(videos), "boxes": torch.stack(boxes), "seed": seeds}

    def shrink(self, frames: Iterable[Tensor]) -> tuple[Tensor, int]:
        """Frames uint8 (H, W, 3) -> (uint8 (T, H', size, 3), W'): H' x W' is the size after `short_side`.

        The width is squashed at once: padding goes above and below, so the order does not matter, and what is
        padded and stacked afterwards is six times smaller than the frames of a 1280 x 720 video.
        Raises DataError where the heights differ.
        """
        shrunk = []
        for frame in frames:
            height, width = frame.shape[:2]
            frame = frame[None]
            if self.short_side:
                scale = self.short_side / min(height, width)
                height, width = round(height * scale), round(width * scale)
                frame = resize(frame, height, width)
            shrunk.append(resize(frame, height, self.size))
        return stack([frame[0] for frame in shrunk]), width

    def augment(self, frames: Tensor, width: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """The output of `shrink` -> (uint8 (3, T, size, size), int64 (erase_count, 4) boxes of `draw_erasing`)."""
        frames = resize(pad_wide(frames, width, rng), self.size, self.size)
        if self.rand_augment is not None:
            frames = self.rand_augment(frames, rng)
        boxes = draw_erasing(self.size, rng, prob=self.erase_prob, count=self.erase_count, max_area=self.erase_max_area)
        return frames.permute(3, 0, 1, 2).contiguous(), boxes


class PretrainTransform:
    """DAPT's augmentation, the same for all frames of a clip, and its mask.

    aligned (as fine-tuning sees clips): short side to `short_side`, pad wide frames or not and squash to a square of
    it, RandAugment in 7 of 10 clips, multi-scale crop. Else VideoMAE's: short side, multi-scale crop of the wide frame.

    Args:
        size: output height and width in pixels.
        grid: (t, h, w) tokens of a clip. mask_ratio: share of them that is masked (see `tube_mask`).
        short_side: pixels; smaller frames are enlarged, or stay where enlarge is False.
        aa: RandAugment policy, or "none". Sources: simple-tad (arXiv:2507.09338), VideoMAE (arXiv:2203.12602).

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
        """Frames uint8 (H, W, 3) -> video uint8 (1, 3, T, size, size), mask bool (1, N), True = masked.

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


class RandAugment:
    """timm's RandAugment over DRIVING_OPS by a policy such as "rand-m6-n3-mstd0.5-inc1", alike on all frames of a clip.

    `inc` is accepted because published commands carry it; as in the reference it changes nothing, since the list of
    operations is given. Raises ValueError where the policy does not parse.
    """

    def __init__(self, policy: str, interpolation: str):
        self.augment = timm_policy(policy, interpolation)

    def __call__(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        """uint8 (T, H, W, 3) -> uint8 (T, H, W, 3)."""
        seed, augmented = int(rng.integers(2**32)), []
        with _global_rng_restored():
            for frame in clip.numpy():
                random.seed(seed)  # timm draws from the global generators: replay them for each frame
                np.random.seed(seed)
                augmented.append(np.asarray(self.augment(Image.fromarray(frame))))
        return torch.from_numpy(np.stack(augmented))


def timm_policy(policy: str, interpolation: str) -> Callable[[Image.Image], Image.Image]:
    """The PIL image -> PIL image of `RandAugment`, which draws from Python's and NumPy's global generators."""
    from timm.data import auto_augment

    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, not {interpolation!r}")
    head, *parts = policy.split("-")
    pairs = [re.fullmatch(r"(m|n|mstd|inc)(\d+(?:\.\d+)?)", part) for part in parts]
    if head != "rand" or not all(pairs):
        raise ValueError(f"--aa {policy!r}: expected none or rand-m<0..10>-n<ops>-mstd<std>, e.g. rand-m6-n3-mstd0.5")
    values = {pair.group(1): float(pair.group(2)) for pair in pairs}
    magnitude, layers = values.get("m", 10.0), int(values.get("n", 2))
    if magnitude > 10 or layers < 1:
        raise ValueError(f"--aa {policy!r}: the magnitude goes from 0 to 10 and at least one operation is drawn")
    hparams = {
        "img_mean": (128, 128, 128),  # fills the corners of rotations and shears
        "interpolation": INTERPOLATIONS[interpolation],
        "magnitude_std": values.get("mstd", 0.0),
    }
    ops = auto_augment.rand_augment_ops(magnitude=magnitude, hparams=hparams, transforms=DRIVING_OPS)
    return auto_augment.RandAugment(ops, layers)


@contextmanager
def _global_rng_restored() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def pad_wide(frames: Tensor, width: int, rng: np.random.Generator) -> Tensor:
    """Pad frames that are wider than high above and below, by one draw for the clip.

    uint8 (T, H, W, 3), whose width was `width` before squashing -> uint8 (T, H + top + bottom, W, 3). One of PADDINGS
    is drawn; top and bottom are drawn apart, each up to half of width - H. Reflected borders are darkened by 30 % or
    more. Source: simple-tad (arXiv:2507.09338).
    """
    height = frames.shape[1]
    padding = PADDINGS[rng.integers(len(PADDINGS))]
    if padding == "none" or width <= height:
        return frames
    top, bottom = (round(rng.random() * 0.5 * (width - height)) for _ in range(2))
    if padding in ("black", "colour"):
        colour = rng.integers(256, size=3) if padding == "colour" else np.zeros(3)
        padded = torch.from_numpy(colour.astype(np.uint8)).repeat(
            len(frames), height + top + bottom, frames.shape[2], 1
        )
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
    """(width, height) candidates of VideoMAE's multi-scale crop of frames whose short side is `side` pixels.

    Every scale of the side with itself and its neighbours in `scales`; what is within 2 pixels of the output size is
    that size, so that it need not be resized.
    """
    sides = [size if abs(int(side * s) - size) < 3 else int(side * s) for s in scales]
    return [(w, h) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]


def crop_offsets(spare_width: int, spare_height: int) -> list[tuple[int, int]]:
    """(left, top) of the 13 places of a crop: on a grid of quarters of what is spare, corners, edges and centres."""
    dx, dy = spare_width // 4, spare_height // 4
    return [(x * dx, y * dy) for x, y in CROP_PLACES]


def multi_scale_crop(clip: Tensor, size: int, scales: Sequence[float], rng: np.random.Generator) -> Tensor:
    """uint8 (T, H, W, 3) -> uint8 (T, size, size, 3): one of `crop_sizes` at one of `crop_offsets`, drawn uniformly."""
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


def draw_erasing(
    size: int,
    rng: np.random.Generator,
    *,
    prob: float,
    count: int,
    max_area: float,
    min_area: float = 0.02,
    max_aspect: float = 100.0,
) -> Tensor:
    """Boxes of random erasing (arXiv:1708.04896): int64 (count, 4), each top, left, height, width in pixels.

    With probability prob between 1 and count boxes are drawn, else none; a box of height 0 is none. Their areas,
    shared among them, are uniform in [min_area, max_area] of the picture, their aspect ratio log-uniform up to
    max_aspect either way.
    """
    boxes = torch.zeros(count, 4, dtype=torch.int64)
    if rng.random() >= prob:
        return boxes
    drawn = int(rng.integers(1, count + 1))
    for i in range(drawn):
        for _ in range(100):
            area = rng.uniform(min_area, max_area) * size * size / drawn
            aspect = math.exp(rng.uniform(-math.log(max_aspect), math.log(max_aspect)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < height < size and 0 < width < size:
                top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
                boxes[i] = torch.tensor([top, left, height, width])
                break
    return boxes


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
