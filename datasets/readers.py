"""Frames out of a zip of pictures, a folder of pictures or a video file, behind one protocol.

    with open_clip(clip) as reader:
        frames = reader.read([0, 3, 6])          # uint8 (3, H, W, 3) RGB; reader.frames yields one at a time

JPEGs are decoded by libjpeg-turbo itself and all else by Pillow: the same pixels as OpenCV's, at full size unless less
is asked for. Of 16 bit, grey or colour, the upper 8 count (65535 becomes 255); 32-bit integer and float pictures are
refused: nothing says which value is white. Palettes, grey and alpha become RGB, and a picture is turned as its EXIF
orientation asks, as players turn videos. Hidden files (see `is_hidden`) are no part of a folder or zip.

A reader is opened and closed where it is used, in the worker: a decoder must not live through a fork (see video.py).
"""

import io
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image
from torch import Tensor

from datasets.clips import Clip, DataError, data_errors, is_there
from datasets.parallel import alive
from datasets.video_sound import SoundVideo, jpeg_damage
from datasets.zips import read_stored, stored_members
from utils.text import first_few, short_reason

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
OTHER_PICTURE_SUFFIXES = (  # which are not read, so that a message can say so
    *(".avif", ".bmp", ".exr", ".gif", ".heic", ".jfif", ".jp2", ".jxl"),
    *(".pgm", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)

LARGEST_FILE = 1 << 28  # bytes of a picture, unpacked: more than any camera's; a zip's member may claim gigabytes
# What a damaged zip or picture raises. SyntaxError is Pillow's, for a broken PNG, as are those for a picture which
# claims to be huge; RuntimeError is zipfile's, for an encrypted member or a version or compression it does not know.
UNREADABLE = (
    *(OSError, EOFError, LookupError, ValueError, SyntaxError, RuntimeError, TypeError, AttributeError, AssertionError),
    *(MemoryError, OverflowError, struct.error, zlib.error, zipfile.BadZipFile),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)

Fit = Callable[[int, int], tuple[int, int]]  # (height, width) -> (height, width)

_JPEG, _SCAN = b"\xff\xd8", b"\xff\xda"  # what a JPEG begins with, and its compressed pixels
_MAY_TURN = (b"Exif\0", b"adobe.com/xap/")  # in the head of a JPEG: EXIF, XMP
_SPACES = ("YCbCr", "Gray", "RGB")  # of JPEGs that libjpeg makes RGB of
_scratch = bytearray()

_FLIP = Image.Transpose
_SIDEWAYS = (_FLIP.TRANSPOSE, _FLIP.ROTATE_270, _FLIP.TRANSVERSE, _FLIP.ROTATE_90)
_TURNS = dict(  # {EXIF orientation: what sets the picture upright}
    enumerate((_FLIP.FLIP_LEFT_RIGHT, _FLIP.ROTATE_180, _FLIP.FLIP_TOP_BOTTOM, *_SIDEWAYS), start=2)
)


class Reader:
    """Frames of one clip by number. is_video: whether they come from a video file, which may have sound."""

    is_video = False

    def __init__(self, clip: Clip, path: str):
        self.clip, self.path = clip, path

    def frames(self, frame_ids: Sequence[int], fit: Fit | None = None) -> Iterator[Tensor]:
        """Yield uint8 (H, W, 3) RGB for each of frame_ids, in their order. Raises DataError naming file and frame.

        fit: is called with (height, width) of each picture that is decoded, upright, and returns a size down to which
        the picture may be scaled where that saves time; colours of a JPEG are not interpolated then (PSNR 59 dB), and a
        frame is valid until the next one is asked for. None: all come at full size, as they are.
        """
        raise NotImplementedError

    def read(self, frame_ids: Sequence[int]) -> Tensor:
        """Return uint8 (len(frame_ids), H, W, 3) RGB. Raises DataError naming file and frame."""
        frames = list(self.frames(frame_ids))
        sizes = {f.shape[:2]: self.clip.picture(int(i)) for i, f in zip(frame_ids, frames, strict=True)}
        if len(sizes) > 1:
            named = first_few(f"{height} x {width} of {name}" for (height, width), name in sizes.items())
            raise DataError(f"{self.path}: frames of different sizes: {named}")
        return torch.stack(frames)

    def sound_frames(self, frame_ids: Sequence[int], every: Sequence[int]) -> Iterator[Tensor | str]:
        """Yield uint8 (H, W, 3) RGB for each of the ascending frame_ids, or why that one cannot be used.

        Each call goes on where the last one ended, of all calls together asking for the frames `every`.
        """
        raise NotImplementedError

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
        if self.clip.offset is None and self._has(expected):
            return f"{self.path}: goes on after the {expected} frames expected; the rest goes unused"
        return ""

    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def is_hidden(name: str) -> bool:
    """Tell whether a part of a path begins with "." or "__MACOSX", as of files a desktop leaves beside pictures."""
    return any(part.startswith((".", "__MACOSX")) and part not in (".", "..") for part in name.split("/"))


def _open_picture(data: bytes) -> Image.Image:
    """Read the header of a picture. Raises ValueError for one of 32 bits a value, and what Pillow raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data))
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # as an older Pillow has 16-bit PNGs
        kind = "float" if image.mode == "F" else "32-bit integer"
        raise ValueError(f"a {kind} picture, whose range is unknown: convert it to 8 or 16 bit")
    return image


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return what sets a picture upright by its EXIF orientation; None where there is none, or it is damaged."""
    known = image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
    if not known or image.format == "TIFF":  # getexif() decodes a PNG to look behind its pixels; a TIFF turns itself
        return None
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except UNREADABLE:
        return None


def picture_size(data: bytes, _: Fit | None = None) -> tuple[int, int]:
    """Return (height, width) in pixels of a picture, upright, from its header. Raises what Pillow raises."""
    image = _open_picture(data)
    width, height = image.size
    return (width, height) if _turn(image) in _SIDEWAYS else (height, width)


def _decode_jpeg(data: bytes, fit: Fit | None) -> Tensor:
    """Decode a JPEG, with fit into memory that the next one is decoded into too. Raises ValueError where that fails."""
    global _scratch
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    if space not in _SPACES or height * width > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"a JPEG of colour space {space}, {height} x {width}")
    if fit is None:
        return torch.from_numpy(simplejpeg.decode_jpeg(data))
    least = fit(height, width)
    sizes = ((-(-height // factor), -(-width // factor)) for factor in (8, 4, 2, 1))
    height, width = next(size for size in sizes if size[0] >= least[0] and size[1] >= least[1])
    if len(_scratch) < height * width * 3:
        _scratch = bytearray(height * width * 3)
    size = {"min_height": height, "min_width": width}
    return torch.from_numpy(simplejpeg.decode_jpeg(data, **size, fastupsample=True, buffer=_scratch))


def _is_plain(data: bytes) -> bool:
    """Tell whether nothing in the head of a JPEG may say that it is to be turned."""
    return not any(word in data[: data.find(_SCAN)] for word in _MAY_TURN)


def _decode(data: bytes, fit: Fit | None) -> Tensor:
    """Return uint8 (H, W, 3) of a picture, as small as fit allows if that saves time. Raises what Pillow raises."""
    if data.startswith(_JPEG) and _is_plain(data):
        with suppress(ValueError):  # damaged, perhaps, or of an unusual kind: Pillow takes more, or says what it is
            return _decode_jpeg(data, fit)
    image = _open_picture(data)
    image.load()  # and what stands behind the pixels, of a PNG
    turn = _turn(image)
    if fit:
        fit(*(image.size if turn in _SIDEWAYS else image.size[::-1]))
    if turn is not None:  # 0 is a mirror
        image = image.transpose(turn)
    if image.mode.startswith("I"):  # 16 bit: convert() would clip at 255
        upper = (np.asarray(image) >> 8).astype(np.uint8)
        return torch.from_numpy(upper[..., None].repeat(3, axis=-1))
    if image.mode != "RGB":  # convert() would copy even so
        image = image.convert("RGB")
    return torch.from_numpy(np.array(image))


def _decode_sound(data: bytes, fit: Fit | None) -> Tensor:
    """Decode a picture as `_decode` does, but refuse a JPEG that Pillow would repair. Raises what Pillow raises."""
    if data.startswith(_JPEG) and simplejpeg.decode_jpeg_header(data)[2] in _SPACES:
        if _is_plain(data):
            return _decode_jpeg(data, fit)
        if reason := jpeg_damage(data):
            raise ValueError(reason)
    return _decode(data, fit)


class PictureReader(Reader):
    """Frames that are picture files (JPEG or PNG)."""

    def _bytes(self, name: str) -> bytes:
        raise NotImplementedError

    def file_names(self) -> list[str]:
        """Return the names of the files in the source but for hidden ones, in any order."""
        raise NotImplementedError

    def sound_frames(self, frame_ids: Sequence[int], every: Sequence[int]) -> Iterator[Tensor | str]:
        for i in frame_ids:
            try:
                (picture,) = self.frames([i], decode=_decode_sound)
            except DataError as e:
                picture = str(e)
            yield picture

    def _instead(self) -> str:
        """Say what the source holds, where it lacks a picture."""
        names = sorted(self.file_names())
        suffix = os.path.splitext(names[0])[1] if names else ""
        note = f"; {suffix} pictures are not read, convert them" if suffix.lower() in OTHER_PICTURE_SUFFIXES else ""
        return f"holds {first_few(names, 3) or 'nothing'}{note}"

    def frames(
        self, frame_ids: Sequence[int], fit: Fit | None = None, decode: Callable[[bytes, Fit | None], Any] = _decode
    ) -> Iterator[Tensor]:
        """Yield the frames, or whatever `decode` makes of the files; a zip has checked their CRC."""
        previous, picture = None, None
        for i in frame_ids:
            if i != previous:  # a window at a higher rate than the source's repeats frames
                name = self.clip.picture(int(i))
                try:
                    data = self._bytes(name)
                    if not data:
                        raise ValueError("the picture is empty, 0 bytes")
                    picture = decode(data, fit)
                except UNREADABLE as e:
                    raise DataError(f"{self.path}: frame {name}: {_reason(e)}") from e
                previous = i
                alive()
            yield picture


def _check_size(size: int) -> None:
    if size > LARGEST_FILE:
        raise ValueError(f"{size} bytes, unpacked, are no picture; up to {LARGEST_FILE} are read")


def _unpacked(z: zipfile.ZipFile, name: str) -> bytes:
    """Return the bytes of a member, checked by its CRC, in as much memory as it claims to need, whatever it holds."""
    info = z.getinfo(name)
    _check_size(info.file_size)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile sets no limit to others
        raise ValueError("a member that is neither stored nor deflated; pictures are packed with zip -0")
    with z.open(info) as f:
        return f.read(info.file_size) + f.read(1)  # which looks for the end, and checks the CRC


class ZipReader(PictureReader):
    """A flat zip of pictures."""

    def __init__(self, clip: Clip, path: str):
        super().__init__(clip, path)
        self._file = open(path, "rb")  # noqa: SIM115 (where this fails, it is no matter of what is in it)
        self._members = stored_members(self._file.fileno())
        self._zip = self._opened() if self._members is None else None

    def _opened(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self._file)
        except UNREADABLE as e:
            with self._file as f:
                f.seek(0)
                reason = "it is a web page" if b"<html" in f.read(1024).lower() else _reason(e)
            raise DataError(f"{self.path}: not a readable zip ({reason}); copy or download it again") from e

    def _names(self) -> Collection[str]:
        return self._zip.NameToInfo if self._members is None else self._members

    def _bytes(self, name: str) -> bytes:
        if name not in self._names():
            raise KeyError(f"not in the zip, which {self._instead()}")
        if self._members:
            _check_size(self._members[name].size)
        data = read_stored(self._file.fileno(), name, self._members[name]) if self._members else None
        if data is None:
            self._zip = self._zip or self._opened()
            data = _unpacked(self._zip, name)
        return data

    def file_names(self) -> list[str]:
        return [name for name in self._names() if not name.endswith("/") and not is_hidden(name)]

    def _has(self, frame: int) -> bool:
        return self.clip.picture(frame) in self._names()

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()
        self._file.close()


class FolderReader(PictureReader):
    """A folder of pictures."""

    def __init__(self, clip: Clip, path: str):
        super().__init__(clip, path)
        os.scandir(os.path.join(path, ".")).close()  # whether it may be listed and entered

    def _bytes(self, name: str) -> bytes:
        try:
            with Path(self.path, name).open("rb") as f:
                _check_size(os.fstat(f.fileno()).st_size)
                return f.read()
        except FileNotFoundError as e:
            raise KeyError(f"no such file; the folder {self._instead()}") from e

    def file_names(self) -> list[str]:
        return [name for name in os.listdir(self.path) if not is_hidden(name)]

    def _has(self, frame: int) -> bool:
        return os.path.isfile(os.path.join(self.path, self.clip.picture(frame)))


class VideoReader(Reader):
    """A video file."""

    is_video = True

    def __init__(self, clip: Clip, path: str):
        super().__init__(clip, path)
        with open(path, "rb"):  # a decoder does not say why it cannot
            pass
        self._video = SoundVideo(path)

    def _has(self, frame: int) -> bool:
        # where only decoding tells, the scan has: a file that was changed since ends with an error of the read
        return frame < (len(self._video) - self.clip.in_source(0) if self._video.counted else self.clip.num_frames)

    def frames(self, frame_ids: Sequence[int], fit: Fit | None = None) -> Iterator[Tensor]:
        return self._video.frames(self.clip.in_source(np.asarray(frame_ids, np.int64)))

    def sound_frames(self, frame_ids: Sequence[int], every: Sequence[int]) -> Iterator[Tensor | str]:
        return self._video.sound_frames(*(self.clip.in_source(np.asarray(ids, np.int64)) for ids in (frame_ids, every)))

    def read(self, frame_ids: Sequence[int]) -> Tensor:
        return self._video.read(self.clip.in_source(np.asarray(frame_ids, np.int64)))

    def close(self) -> None:
        self._video.close()


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return str(error.args[0]) if error.args else "KeyError"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return f"{type(error).__name__}: {short_reason(error, 160).partition(' <_io.')[0]}"  # Pillow says an address


def find_source(clip: Clip) -> str:
    """Return where the frames of a clip are: "<source>.zip", a folder, or a video file, the first that exists.

    Raises DataError where none does, or where the system does not say.
    """
    packed = f"{clip.source}.zip"
    for path in (packed, clip.source):
        if is_there(path):
            return path
    if os.path.exists(f"{clip.source}.ZIP"):
        raise DataError(f"clip {clip.name}: no frames: {clip.source}.ZIP is not read: rename it to {packed}")
    raise DataError(f"clip {clip.name}: no frames: expected {packed}, a folder {clip.source}/ or a video {clip.source}")


def open_clip(clip: Clip) -> Reader:
    """Return the reader of a clip. Raises DataError where there are no frames or the file cannot be opened."""
    path = find_source(clip)
    with data_errors(path):
        if os.path.isdir(path):
            return FolderReader(clip, path)
        return ZipReader(clip, path) if path != clip.source else VideoReader(clip, path)
