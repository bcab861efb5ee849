"""The deep check of a video file: one pass from beginning to end, and the same pictures by seeking."""

import random
import zlib
from collections.abc import Iterator

import av
from torch import Tensor

from datasets.clips import DataError
from datasets.video import Video
from utils.text import first_few

PLACES, WINDOW, STEP = 12, 16, 3  # reads by seeking, frames of each, from one to the next


def look_deep(path: str, frames: int) -> Iterator[tuple[str, str]]:
    """Decode a video whole, and compare; yield (kind, message) of what is wrong with its first `frames` frames.

    Kinds: damaged, unreadable, seek. Raises DataError where the file cannot be opened.
    """
    pictures, damage = _sequence(path)
    if damage:
        yield "damaged", f"{path}: {damage}; copy or encode it again"
    video = Video(path)
    marks = video.marks(range(frames))
    video.close()
    if lost := [i for i, mark in enumerate(marks) if mark not in pictures]:
        yield "unreadable", f"{path}: {len(lost)} of {frames} frames cannot be decoded: {first_few(lost)}"
    rng, differ = random.Random(0), set()
    for _ in range(PLACES):
        first = rng.randrange(frames)
        ids = [i for i in range(first, min(first + WINDOW * STEP, frames), STEP) if marks[i] in pictures]
        differ |= {i for i, hashed in _by_seeking(path, ids) if hashed != pictures[marks[i]]}
    if differ:
        message = f"{len(differ)} frames are others by seeking than in sequence: {first_few(sorted(differ))}"
        yield "seek", f"{path}: {message}; encode it anew"


def _hash(picture: Tensor) -> int:
    return zlib.crc32(picture.contiguous().numpy())


def _by_seeking(path: str, ids: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (frame, hash of its picture, -1 where it cannot be had) of frames, from a file opened anew."""
    video = Video(path)
    try:
        yield from zip(ids, map(_hash, video.frames(ids) if ids else ()), strict=True)
    except DataError:
        yield from ((i, -1) for i in ids)
    finally:
        video.close()


def _sequence(path: str) -> tuple[dict[int, int], str]:
    """Return {mark: hash} of the pictures from beginning to end, and what the decoder says of damage."""
    pictures: dict[int, int] = {}
    damaged, skip = 0, 0
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as said:
            video = Video(path)
            codec = video.codec
            for mark, picture, bad in video.pictures():
                skip = skip if pictures else len(said)  # before its first picture, a decoder looks for its bearings
                pictures[mark] = _hash(picture)
                damaged += bad
            video.close()
    finally:
        av.logging.set_level(None)
    complaints = [text.strip() for _, name, text in said[skip:] if name in (codec, f"lib{codec}")]
    if complaints:
        return pictures, f"the decoder reports damage {len(complaints)} times: {complaints[0][:120]}"
    return pictures, f"the decoder calls {damaged} pictures damaged" if damaged else ""
