"""The decoder of video files, decord: this file alone knows it.

decord must not live through a fork (dmlc/decord#294): a video is opened in the process that reads it, and in worker
processes where there are any.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from datasets.clips import DataError


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video file: frames and fps, or why it cannot be read ("" where it can)."""

    frames: int
    fps: float
    problem: str = ""


@contextmanager
def _decord() -> Iterator[ModuleType]:
    """The decoder, whose errors become DataErrors with its own message."""
    import decord

    try:
        yield decord
    except (RuntimeError, decord.DECORDError) as e:
        raise DataError(" ".join(str(e).split())[:160] or type(e).__name__) from e


class Video:
    """A video file, opened with one decoding thread. Raises DataError where it cannot be."""

    def __init__(self, path: str):
        self.path = path
        try:
            with _decord() as decord:
                self._video = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        except DataError as e:
            raise DataError(f"{path}: not a readable video ({e})") from e

    def __len__(self) -> int:
        return len(self._video)

    def read(self, frame_ids: Sequence[int]) -> Tensor:
        """uint8 (len(frame_ids), H, W, 3) RGB. Raises DataError naming the file and the frames."""
        if max(frame_ids) >= len(self):
            raise DataError(f"{self.path}: frame {max(frame_ids)} asked for, the video has {len(self)}")
        try:
            with _decord():
                return torch.from_numpy(self._video.get_batch(list(frame_ids)).asnumpy())
        except DataError as e:
            raise DataError(f"{self.path}: frames {frame_ids[0]} to {frame_ids[-1]}: {e}") from e


def probe(path: str) -> VideoInfo:
    """Open a video and decode its first frame. decord counts the packets, whatever the container claims."""
    try:
        with _decord() as decord:
            video = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
            frames, fps = len(video), float(video.get_avg_fps())
            if frames:
                video[0]  # some open and cannot be decoded
    except DataError as e:
        return VideoInfo(0, 0.0, str(e))
    if frames == 0 or not 0 < fps < 1000:
        return VideoInfo(0, 0.0, f"{frames} frames at {fps:g} fps")
    return VideoInfo(frames, fps)
