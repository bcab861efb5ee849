"""The published way of loading, to measure ours against: every window on its own, every frame at full size.

Frames are decoded 16 at a time, resized by OpenCV, augmented one Pillow image after the other, and normalised in
float32, all in the worker. It costs what the published dataset classes cost (simple-tad, arXiv:2507.09338), within the
noise of a machine; it gives no training: labels and masks are left out.
"""

import importlib.util
import random
import zipfile
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from datasets.augment.dapt import ALIGNED_SCALES
from datasets.augment.frames import draw_crop
from datasets.video import Video

HAS_DECORD = importlib.util.find_spec("decord") is not None
SIZE = 224
SHORT_SIDE = 320
_MEAN, _STD = (torch.tensor(v).view(3, 1, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
_HPARAMS = {"translate_const": 100, "img_mean": (124, 116, 104)}


class Yardstick:
    """Loads windows of 16 frames as published; each method returns float32 (3, T, 224, 224). seed: of what is drawn."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.finetune_policy, self.dapt_policy = (
            rand_augment_transform(f"rand-m{m}-n3-mstd0.5-inc1", dict(_HPARAMS)) for m in (6, 3)
        )

    def finetune(self, path: str, names: Sequence[str]) -> Tensor:
        """Load a training window from a zip of pictures."""
        frames = [_rgb(frame) for frame in _pictures(path, names)]
        return _normalized(self._augmented([_squash(_padded(frame), SIZE) for frame in frames], self.finetune_policy))

    def evaluation(self, path: str, names: Sequence[str]) -> Tensor:
        """Load an evaluation window from a zip of pictures."""
        return _normalized([_rgb(_squash(frame, SIZE)) for frame in _pictures(path, names)])

    def dapt(self, path: str, ids: Sequence[int]) -> Tensor:
        """Load a clip from a video, by decord where it is installed, else by PyAV.

        To be called in a process of its own: decord's FFmpeg gets into the way of PyAV's, which then decodes otherwise.
        """
        if HAS_DECORD:
            import decord

            reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
            frames = reader.get_batch(list(ids)).asnumpy()
        else:
            reader = Video(path)
            frames = reader.read(ids).numpy()
        squashed = []
        for frame in frames:
            scale = SHORT_SIDE / min(frame.shape[:2])
            frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
            squashed.append(_squash(_padded(frame), SHORT_SIDE))
        if self.rng.random() < 0.7:
            squashed = self._augmented(squashed, self.dapt_policy)
        top, left, height, width = draw_crop(SHORT_SIDE, SHORT_SIDE, SIZE, ALIGNED_SCALES, self.rng)
        box = (left, top, left + width, top + height)
        images = [
            Image.fromarray(frame).crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR) for frame in squashed
        ]
        return _normalized([np.asarray(image) for image in images])

    def _augmented(self, frames: Sequence[np.ndarray], policy) -> list[np.ndarray]:
        """Do the same RandAugment to each frame."""
        seed = int(self.rng.integers(2**32))
        augmented = []
        for frame in frames:
            random.seed(seed)
            np.random.seed(seed)
            augmented.append(np.asarray(policy(Image.fromarray(frame))))
        return augmented


def _pictures(path: str, names: Sequence[str]) -> list[np.ndarray]:
    with zipfile.ZipFile(path) as z:
        return [cv2.imdecode(np.frombuffer(z.read(name), np.uint8), cv2.IMREAD_COLOR) for name in names]


def _rgb(frame: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


def _padded(frame: np.ndarray) -> np.ndarray:
    """Pad a wide frame by a quarter of what it is wider, above and below: as much as padded clips are on average."""
    rows = max(0, frame.shape[1] - frame.shape[0]) // 4
    return np.pad(frame, ((rows, rows), (0, 0), (0, 0)))


def _squash(frame: np.ndarray, size: int) -> np.ndarray:
    return cv2.resize(frame, (size, size), interpolation=cv2.INTER_CUBIC)


def _normalized(frames: Sequence[np.ndarray]) -> Tensor:
    video = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float().div_(255)
    return video.sub_(_MEAN).div_(_STD)
