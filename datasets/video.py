"""The one home of decord, which decodes video files.

decord must not live through a fork (dmlc/decord#294): a video is opened in the process that reads it, and in worker
processes where there are any.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from datasets.clips import DataError, Unreadable
from utils.text import short_reason

# Containers in which decord finds the frame it is asked for; in .mpg and .ts it lands tens of frames beside it.
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video file."""

    frames: int
    fps: float
    problem: str = ""  # why the file cannot be read


@contextmanager
def _decord() -> Iterator[ModuleType]:
    """Import the decoder, and turn its errors into Unreadable. Raises DataError where it is not installed."""
    try:
        import decord
    except ImportError as e:
        raise DataError(f"video files need decord ({e}): pip install -r requirements.txt") from e
    try:
        yield decord
    except (RuntimeError, decord.DECORDError) as e:
        raise Unreadable(short_reason(e, 160)) from e


def _open(path: str) -> Any:
    with _decord() as decord:
        return decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)


class Video:
    """A video file, opened with one decoding thread. Raises DataError where it cannot be."""

    def __init__(self, path: str):
        self.path = path
        try:
            self._video = _open(path)
        except Unreadable as e:
            raise DataError(f"{path}: not a readable video ({e})") from e

    def __len__(self) -> int:
        return len(self._video)

    def read(self, frame_ids: Sequence[int]) -> Tensor:
        """Return uint8 (len(frame_ids), H, W, 3) RGB. Raises DataError naming the file and the frames."""
        if max(frame_ids) >= len(self):
            raise DataError(f"{self.path}: frame {max(frame_ids)} asked for, the video has {len(self)}")
        try:
            with _decord():
                return torch.from_numpy(self._video.get_batch(list(frame_ids)).asnumpy())
        except Unreadable as e:
            raise DataError(f"{self.path}: frames {frame_ids[0]} to {frame_ids[-1]}: {e}") from e


def probe(path: str) -> VideoInfo:
    """Open a video and decode its first frame. decord counts the packets, whatever the container says.

    Raises DataError where decord is not installed.
    """
    try:
        video = _open(path)
        with _decord():
            frames, fps = len(video), float(video.get_avg_fps())
            if frames:
                video[0]  # some open and cannot be decoded
    except Unreadable as e:
        return VideoInfo(0, 0.0, str(e))
    if frames == 0 or not 0 < fps < 1000:
        return VideoInfo(0, 0.0, f"{frames} frames at {fps:g} fps")
    return VideoInfo(frames, fps)
