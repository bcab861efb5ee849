"""One clip of a pack: its pictures shrunk, squashed and encoded, its zip and what the manifest says of it."""

import io
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from datasets.augment.frames import resize
from datasets.clips import Clip, DataError, data_errors
from datasets.formats.packed import VERSION, PackedClip, describe, sha256
from datasets.readers import Reader, find_source, open_clip
from utils.files import replaced

CHUNK = 32  # frames decoded at a time
SAMPLED_FRAMES = 3  # of a clip, for the estimate of space
WHOLE = 1 / 32  # a rate this close to a multiple of --fps counts as one: 16 frames at --fps stay the right ones


@dataclass(frozen=True)
class Settings:
    """How clips are packed."""

    short_side: int  # of the frames in pixels, which are never enlarged; 0: as they are
    fps: float  # frames per second to keep; 0: all
    quality: int  # of the JPEGs, 1 to 100
    squash: int = 0  # width in pixels to squash wider frames to, unless they are higher than wide; 0: none are

    def __str__(self) -> str:
        return " ".join(f"--{k} {v:g}" for k, v in asdict(self).items())

    def step(self, fps: float) -> int:
        """Return n, where every n-th frame is kept of a source at fps."""
        ratio = fps / self.fps if self.fps else 1
        return round(ratio) if ratio > 1 and abs(ratio - round(ratio)) <= WHOLE else 1

    def shrink(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) of a frame once its short side is shrunk."""
        scale = self.short_side / min(width, height)
        return (round(width * scale), round(height * scale)) if 0 < scale < 1 else (width, height)

    def squashes(self, width: int, height: int) -> bool:
        """Tell whether a frame of this size, its short side shrunk, is to be squashed.

        One that is higher than wide is not: DAPT takes its width for the short side, and neither recipe pads it.
        """
        return 0 < self.squash < width and height <= width

    def jpeg(self, frame: Tensor) -> bytes:
        """Encode uint8 (H, W, 3), resized once: with Pillow's bicubic filter, which averages what it leaves out.

        A width is squashed without averaging, as training and evaluation do it: scores move less from the original's.
        """
        pixels = frame.numpy()
        size = self.shrink(*pixels.shape[1::-1])
        if self.squashes(*size):
            size = self.squash, size[1]
            pixels = resize(pixels, len(pixels), self.squash)
        image = Image.fromarray(pixels)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        data = io.BytesIO()
        image.save(data, "JPEG", quality=self.quality)
        return data.getvalue()


@dataclass(frozen=True)
class Job:
    """A clip to pack."""

    clip: Clip  # with the pack_step it will have, and the source of the original
    root: Path  # folder of the pack
    file: str  # path of the zip to write, relative to root
    settings: Settings

    def __str__(self) -> str:
        return self.clip.name

    @contextmanager
    def opened(self) -> Iterator[tuple[Reader, np.ndarray]]:
        """Open the original: its reader, and the frames to keep. Raises DataError if there are none.

        A source that ends before its annotation is packed as it is read, the smaller number of frames counting.
        """
        with open_clip(replace(self.clip, pack_step=None)) as reader:
            frames = self.clip.stored_frames
            frames = frames[frames < reader.usable_frames()]
            if not len(frames):
                raise DataError(reader.mismatch())
            yield reader, frames

    def jpegs(self, reader: Reader, frames: Sequence[int]) -> Iterator[tuple[float | None, bytes]]:
        """Yield the `aspect` a Clip gets and the packed form of some frames. Raises DataError, for two shapes too."""
        shapes: set[tuple[int, int]] = set()
        for first in range(0, len(frames), CHUNK):
            for frame in reader.frames(frames[first : first + CHUNK]):
                height, width = frame.shape[:2]
                shapes.add(self.settings.shrink(width, height))
                squashed = any(self.settings.squashes(*shape) for shape in shapes)
                if squashed and len(shapes) > 1:  # which squashing would hide, and one aspect cannot tell
                    sizes = " and ".join(f"{w} x {h}" for w, h in sorted(shapes))
                    raise DataError(f"{reader.path}: frames of {sizes} once shrunk; to squash them, resize them alike")
                yield (width / height if squashed else None), self.settings.jpeg(frame)


def pack_clip(job: Job) -> PackedClip | DataError:
    """Write the zip of a clip. The same source and settings give the same bytes, which appear whole or not at all."""
    path = job.root / job.file
    path.parent.mkdir(parents=True, exist_ok=True)
    aspects = []
    try:
        original = stamp(job.clip)
        with job.opened() as (reader, frames), replaced(path) as temporary:
            with zipfile.ZipFile(temporary, "w") as z:
                for frame, (aspect, data) in zip(frames.tolist(), job.jpegs(reader, frames), strict=True):
                    z.writestr(zipfile.ZipInfo(job.clip.picture(frame)), data)  # of 1980: no time of writing
                    aspects.append(aspect)
            digest = sha256(temporary)
    except DataError as e:
        return e
    size = path.stat().st_size
    return PackedClip(
        **describe(replace(job.clip, aspect=aspects[0])),
        original=original,
        settings=asdict(job.settings),
        file=job.file,
        bytes=size,
        sha256=digest,
        frames=len(frames),
        version=VERSION,
    )


def stamp(clip: Clip) -> dict[str, Any]:
    """Return what changes with the source of a clip: path, bytes and the latest mtime in ns. Raises DataError."""
    path = Path(os.path.abspath(find_source(clip)))
    with data_errors(path):
        files = [p.stat() for p in (path.iterdir() if path.is_dir() else [path])]
        newest = max(s.st_mtime_ns for s in (path.stat(), *files))
    return {"path": str(path), "size": sum(s.st_size for s in files), "mtime_ns": newest}


def sample_bytes(job: Job) -> float | None:
    """Return the mean bytes of a few frames of the clip in its packed form; None where it cannot be read."""
    try:
        with job.opened() as (reader, frames):
            few = frames[np.unique(np.linspace(0, len(frames) - 1, SAMPLED_FRAMES).astype(int))]
            return float(np.mean([len(data) for _, data in job.jpegs(reader, few)]))
    except DataError:
        return None
