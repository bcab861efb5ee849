"""Frames out of a zip of pictures, a folder of pictures or a video file, behind one protocol.

    with open_clip(clip) as reader:
        frames = reader.read([0, 3, 6])          # uint8 (3, H, W, 3) RGB
        for frame in reader.frames([0, 3, 6]):   # one uint8 (H, W, 3) at a time: half the memory traffic
            ...

Pictures are decoded at full size by Pillow: the same pixels as OpenCV's, as fast as torchvision's decoder, which is
deprecated since 0.29. A reader is opened where it is used, inside the worker process, and closed after the item, since
a video's decoder must not live through a fork (see datasets/video.py).
"""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.clips import Clip, DataError, data_errors
from datasets.video import Video
from utils.text import short_reason

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")

# What a damaged zip or picture raises. SyntaxError is Pillow's, for a broken PNG, as is that for a picture which claims
# to be huge; RuntimeError is zipfile's, for an encrypted member or a version or compression it does not know.
_UNREADABLE = (
    *(OSError, EOFError, KeyError, ValueError, SyntaxError, RuntimeError),
    *(struct.error, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError),
)


class Reader:
    """Frames of one clip by number."""

    def __init__(self, clip: Clip, path: str):
        self.clip, self.path = clip, path

    def frames(self, frame_ids: Sequence[int]) -> Iterator[Tensor]:
        """Yield uint8 (H, W, 3) RGB for each of frame_ids, in their order. Raises DataError naming file and frame."""
        raise NotImplementedError

    def read(self, frame_ids: Sequence[int]) -> Tensor:
        """Return uint8 (len(frame_ids), H, W, 3) RGB. Raises DataError naming file and frame."""
        frames = list(self.frames(frame_ids))
        if len({f.shape for f in frames}) > 1:
            raise DataError(f"{self.path}: frames of different sizes: {sorted({tuple(f.shape[:2]) for f in frames})}")
        return torch.stack(frames)

    def _has(self, frame: int) -> bool:
        """Tell whether the source has a frame of this number."""
        raise NotImplementedError

    def usable_frames(self) -> int:
        """Count the frames of the clip up to the last one in the source: all, or fewer where it ends early."""
        count = self.clip.num_frames
        while count and not self._has(count - 1):
            count -= 1
        return count

    def mismatch(self) -> str:
        """Say how the number of frames in the source differs from the clip's; "" where it does not."""
        expected, usable = self.clip.num_frames, self.usable_frames()
        if not usable:
            return f"{self.path}: holds none of the {expected} frames expected, {self.clip.filename(0)} and on"
        if usable < expected:
            return f"{self.path}: ends after {usable} of {expected} frames; the labels of the others go unused"
        if self._has(expected):
            return f"{self.path}: goes on after the {expected} frames expected; the rest goes unused"
        return ""

    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def _decode(data: bytes) -> Tensor:
    image = Image.open(io.BytesIO(data))
    if image.mode != "RGB":  # convert() would copy even so
        image = image.convert("RGB")
    return torch.from_numpy(np.array(image))


class PictureReader(Reader):
    """Frames that are picture files (JPEG or PNG)."""

    def _bytes(self, name: str) -> bytes:
        raise NotImplementedError

    def file_names(self) -> list[str]:
        """Return the names of the files in the source, in any order."""
        raise NotImplementedError

    def frames(self, frame_ids: Sequence[int], decode: Callable[[bytes], Any] = _decode) -> Iterator[Tensor]:
        """Yield the frames, or whatever `decode` makes of the files; a zip has checked their CRC."""
        previous, picture = None, None
        for i in frame_ids:
            if i != previous:  # a window at a higher rate than the source's repeats frames
                name = self.clip.picture(int(i))
                try:
                    data = self._bytes(name)
                    if not data:
                        raise ValueError("the picture is empty, 0 bytes")
                    picture = decode(data)
                except _UNREADABLE as e:
                    raise DataError(f"{self.path}: frame {name}: {_reason(e)}") from e
                previous = i
            yield picture


class ZipReader(PictureReader):
    """A flat zip of pictures."""

    def __init__(self, clip: Clip, path: str):
        super().__init__(clip, path)
        self._file = open(path, "rb")  # noqa: SIM115 (where this fails, it is no matter of what is in it)
        try:
            self._zip = zipfile.ZipFile(self._file)
        except _UNREADABLE as e:
            with self._file as f:
                f.seek(0)
                reason = "it is a web page" if b"<html" in f.read(1024).lower() else _reason(e)
            raise DataError(f"{path}: not a readable zip ({reason}); copy or download it again") from e

    def _bytes(self, name: str) -> bytes:
        try:
            return self._zip.read(name)  # checks the CRC
        except KeyError as e:
            names = self.file_names()
            raise KeyError(
                f"not in the zip, whose {len(names)} files begin with {names[0]}" if names else "the zip is empty"
            ) from e

    def file_names(self) -> list[str]:
        return self._zip.namelist()

    def _has(self, frame: int) -> bool:
        return self.clip.picture(frame) in self._zip.NameToInfo

    def close(self) -> None:
        self._zip.close()
        self._file.close()


class FolderReader(PictureReader):
    """A folder of pictures."""

    def __init__(self, clip: Clip, path: str):
        super().__init__(clip, path)
        os.scandir(os.path.join(path, ".")).close()  # whether it may be listed and entered

    def _bytes(self, name: str) -> bytes:
        return Path(self.path, name).read_bytes()

    def file_names(self) -> list[str]:
        return os.listdir(self.path)

    def _has(self, frame: int) -> bool:
        return os.path.isfile(os.path.join(self.path, self.clip.picture(frame)))


class VideoReader(Reader):
    """A video file."""

    def __init__(self, clip: Clip, path: str):
        super().__init__(clip, path)
        with open(path, "rb"):  # a decoder does not say why it cannot
            pass
        self._video = Video(path)

    def _has(self, frame: int) -> bool:
        return frame < len(self._video)

    def frames(self, frame_ids: Sequence[int]) -> Iterator[Tensor]:
        yield from self.read(frame_ids)

    def read(self, frame_ids: Sequence[int]) -> Tensor:
        return self._video.read([int(i) for i in frame_ids])


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return error.args[0]
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return f"{type(error).__name__}: {short_reason(error, 160)}"


def find_source(clip: Clip) -> str:
    """Return where the frames of a clip are: "<source>.zip", a folder, or a video file, the first that exists.

    Raises DataError where none does, or where the system does not say.
    """
    packed = f"{clip.source}.zip"
    for path in (packed, clip.source):
        with data_errors(path), suppress(FileNotFoundError, NotADirectoryError):
            os.stat(path)
            return path
    raise DataError(f"clip {clip.name}: no frames: expected {packed}, a folder {clip.source}/ or a video {clip.source}")


def open_clip(clip: Clip) -> Reader:
    """Return the reader of a clip. Raises DataError where there are no frames or the file cannot be opened."""
    path = find_source(clip)
    with data_errors(path):
        if os.path.isdir(path):
            return FolderReader(clip, path)
        return ZipReader(clip, path) if path != clip.source else VideoReader(clip, path)
