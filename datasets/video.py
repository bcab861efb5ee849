"""The decoder of video files, PyAV: which pictures a file shows, and each of them by its number.

Others use Video (len, counted, fps, codec, frames, read, close; for checking marks and pictures), probe, VideoInfo and
VIDEO_SUFFIXES. Where another decoder counts frames in another way, VERSION in scan.py is raised.

A player shows the pictures of a video by their timestamps. Frame i of a constant rate is the i-th picture shown; of a
variable rate, the picture nearest to i / fps on a regular grid, or the one before while the video stands still.
Pictures that an edit list hides are none (a clip cut without encoding holds them), and so are those that do not decode
at either end.

The packets of a file tell all that without decoding it. Where their timestamps cannot be trusted (B frames in AVI, raw
streams, a recording that starts over) pictures are counted by decoding from the beginning: right, and slow.
"""

import gc
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import av
import numpy as np
import torch
from av.video.frame import PictureType
from torch import Tensor

from datasets.clips import DataError, Unreadable
from datasets.video_index import ends_early, first_key, index_of, open_stream, packets_of
from datasets.video_rgb import ToRGB
from utils.text import short_reason

logger = logging.getLogger("tad")

# What a search in a folder takes for a video; a list may name any file.
VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".mts", ".ogv", ".ts", ".webm", ".wmv"),
)

_HEAD = 5  # pictures that a probe decodes
_REORDERED = 16  # pictures at most that are shown before one decoded earlier
_BACK = (0, 1, 8)  # key frames to go back where decoding does not deliver, before the beginning of the file


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video file.

    frames: how many there are.
    fps: their rate, per second.
    problem: why the file cannot be used; "" where it can.
    constant: whether frame i is the i-th picture, at a constant rate; else the one nearest to i / fps.
    start: time of the first picture, in seconds.
    codec: its name in FFmpeg.
    method: how frames are found, by "timestamps" or in "sequence", from the beginning.
    note: why in sequence; "" otherwise.
    short: how the file is shorter than its container says; "" where it is not.
    """

    frames: int
    fps: float
    problem: str = ""
    constant: bool = True
    start: float = 0.0
    codec: str = ""
    method: str = "timestamps"
    note: str = ""
    short: str = ""


class Video:
    """A video file, decoded in one thread. Raises DataError where it cannot be."""

    def __init__(self, path: str):
        self.path = path
        self._container = None
        try:
            self._container, self._stream = open_stream(path)
            self._index, self._untouched = index_of(path, self._container, self._stream)
        except Unreadable as e:
            self.close()
            raise DataError(f"{path}: not a readable video ({e})") from e
        self._to_rgb = ToRGB()
        self._decoder: Iterator[av.VideoFrame] = iter(())
        self._last: tuple[int, av.VideoFrame] | None = None  # mark and picture that the decoder gave last
        self._wanted: set[int] = set()  # marks of the pictures that are asked for
        self._skipped: set[int] = set()  # marks of those that the decoder was told not to decode
        if self._index.leading:
            self._drop_leading()

    def __len__(self) -> int:
        """Count the frames, those alone that decode where the file ends early; may decode for that, once."""
        if self._index.count is None:
            if self._index.method == "sequence":
                self._index.count = self._count()
            else:
                self._index.count = self._decodable() if self._index.suspect else len(self._index.times)
        return self._index.count

    @property
    def counted(self) -> bool:
        """Whether the number of frames is at hand, without decoding for it."""
        return self._index.count is not None or not (self._index.note or self._index.suspect)

    @property
    def fps(self) -> float:
        """Frames per second."""
        return self._index.fps

    @property
    def codec(self) -> str:
        """Its name in FFmpeg."""
        return self._index.codec

    @property
    def info(self) -> VideoInfo:
        """What is known of the file; counts the frames."""
        index, frames = self._index, len(self)
        short = ends_early(index) if index.suspect else ""
        return VideoInfo(
            frames, index.fps, "", index.constant, index.start, index.codec, index.method, index.note, short
        )

    def first_problem(self) -> str:
        """Decode the first pictures and say why the file cannot be used; "" where it can."""
        if not 0 < self.fps < 1000:
            return f"{self.fps:g} frames per second"
        self._begin(-1)
        marks = []
        while len(marks) < _HEAD and self._advance():
            marks.append(self._last[0])
        if not marks:
            return "none of its pictures can be decoded"
        if not self._index.note and marks != self._index.shown[: len(marks)].tolist():
            return "its pictures do not come out at the timestamps of its packets; encode it anew"
        return "" if len(self) else "none of its last pictures can be decoded"

    def close(self) -> None:
        """Release the file, and the decoder's pictures, some 20 to 60 MB."""
        self._decoder, self._last = iter(()), None
        if self._container is not None:
            self._container.close()
            self._container = self._stream = None
            # PyAV's containers and streams refer to each other; the young objects alone, as all would take 100 ms
            gc.collect(1)

    def marks(self, frame_ids: Sequence[int]) -> list[int]:
        """Return what the pictures of frames are told apart by: timestamps, or numbers where they are counted.

        It announces a read of them. Raises DataError where there are no such frames.
        """
        ids = [int(i) for i in frame_ids]
        if self._index.method == "sequence":
            marks = ids
        elif max(ids) >= len(self._index.times):
            raise DataError(f"{self.path}: frame {max(ids)} asked for, the video has {len(self)}")
        else:
            marks = [int(self._index.times[i]) for i in ids]
        self._wanted = set(marks)
        return marks

    def read(self, frame_ids: Sequence[int]) -> Tensor:
        """Return uint8 (len(frame_ids), H, W, 3) RGB, in any order. Raises DataError naming the file and the frame."""
        marks = self.marks(frame_ids)
        places: dict[int, list[int]] = {}
        for place, mark in enumerate(marks):
            places.setdefault(mark, []).append(place)
        result = None
        for mark in sorted(places):
            picture = self._rgb(self._find(mark))
            if result is None:
                result = torch.empty((len(marks), *picture.shape), dtype=torch.uint8)
            if picture.shape != result.shape[1:]:
                sizes = sorted({tuple(result.shape[1:3]), tuple(picture.shape[:2])})
                raise DataError(f"{self.path}: pictures of different sizes: {sizes}; encode it anew in one size")
            for place in places[mark]:
                result[place] = picture
        return result

    def frames(self, frame_ids: Sequence[int]) -> Iterator[Tensor]:
        """Yield uint8 (H, W, 3) RGB for each of frame_ids; one at a time where they ascend. Raises as read."""
        marks = self.marks(frame_ids)
        if any(b < a for a, b in zip(marks, marks[1:], strict=False)):
            yield from self.read(frame_ids)
            return
        previous, picture = None, None
        for mark in marks:
            if mark != previous:
                previous, picture = mark, self._rgb(self._find(mark))
            yield picture

    def pictures(self) -> Iterator[tuple[int, Tensor, bool]]:
        """Yield (mark, uint8 (H, W, 3), whether it is damaged) of all pictures, decoded from the beginning."""
        self._begin(-1)
        while self._advance():
            mark, frame = self._last
            yield mark, self._rgb(frame), frame.is_corrupt

    # ------------------------------------------------------------------------------------------------------------------
    # Counting

    def _count(self) -> int:
        self._begin(-1)
        count = 0
        while self._advance():
            count += 1
        return count

    def _decodable(self) -> int:
        """Count the frames up to the last picture that decodes without damage, or to one missing shortly before it."""
        times = self._index.times
        key = first_key(self._index.key_times, times[-1])
        for back in (*_BACK, key + 1):
            came = self._damaged_from(max(key - back, -1))
            if good := [mark for mark, damaged in came.items() if not damaged]:
                count = int(np.searchsorted(times, max(good), side="right"))
                first = max(0, count - _REORDERED, int(np.searchsorted(times, next(iter(came)))))
                return next((i for i in range(first, count) if times[i] not in came), count)
        return 0

    def _damaged_from(self, key: int) -> dict[int, bool]:
        """Return {mark: whether it is damaged} of the pictures from a key frame on, in order."""
        came, there = {}, self._begin(key) and (self._last is not None or self._advance())
        while there:
            mark, frame = self._last
            came[mark] = frame.is_corrupt
            there = self._advance()
        return came

    def _drop_leading(self) -> None:
        """Leave out pictures that precede the first key frame and are not delivered."""
        self._begin(-1)
        if self._last is None and not self._advance():
            raise DataError(f"{self.path}: not a readable video (none of its pictures can be decoded)")
        while self._last[1].is_corrupt and self._advance():
            pass
        first = self._last[0] if self._last else 0
        self._index.start_at(first)

    # ------------------------------------------------------------------------------------------------------------------
    # Reading

    def _rgb(self, frame: av.VideoFrame) -> Tensor:
        try:
            return self._to_rgb(frame)
        except (av.FFmpegError, OSError, ValueError) as e:
            raise DataError(f"{self.path}: its pictures cannot be made RGB ({short_reason(e)}); encode it anew") from e

    def _find(self, mark: int) -> av.VideoFrame:
        """Return the picture of a mark, from where the decoder stands, else from a key frame before it."""
        key = first_key(self._index.key_times, mark)
        ahead = self._last is not None and self._last[0] <= mark and mark not in self._skipped
        if ahead and self._near(key) and (frame := self._forward(mark)):
            return frame
        for back in (*_BACK, key + 1):
            start = max(key - back, -1)
            if self._begin(start, skip=back == 0) and (frame := self._forward(mark, damaged=start == -1)):
                return frame
            if start == -1:
                break
        frame = mark if self._index.note else int(np.searchsorted(self._index.times, mark))
        if self._index.note or frame >= len(self):
            raise DataError(f"{self.path}: frame {frame} asked for, the video has {len(self)}")
        raise DataError(f"{self.path}: frame {frame} cannot be decoded; the file is damaged there, encode it anew")

    def _near(self, key: int) -> bool:
        """Tell whether decoding on to a key frame takes no longer than a seek."""
        if key <= first_key(self._index.key_times, self._last[0]):
            return True
        last, first = np.searchsorted(self._index.shown, (self._last[0], self._index.key_times[key]))
        return first - last <= _REORDERED

    def _forward(self, mark: int, *, damaged: bool = False) -> av.VideoFrame | None:
        """Decode on to the picture of a mark; None where it does not come, or is damaged and may not be."""
        while self._last is None or self._last[0] < mark:
            if not self._advance():
                return None
        found, frame = self._last
        if found != mark or (frame.is_corrupt and not damaged):
            return None
        if frame.is_corrupt and not self._index.told:
            self._index.told = True
            logger.warning(f"{self.path}: the decoder says that pictures are damaged, and uses them as it can")
        return frame

    def _advance(self) -> bool:
        """Decode one picture more; False at the end, and where time runs backwards."""
        frame = next(self._decoder, None)
        if frame is None:
            self._last = None
            return False
        if self._index.method == "sequence":
            self._last = (self._last[0] + 1 if self._last else 0, frame)
            return True
        if frame.pts is None or (self._last and frame.pts <= self._last[0]):
            self._decoder, self._last = iter(()), None
            return False
        self._last = (frame.pts, frame)
        return True

    def _begin(self, key: int, *, skip: bool = False) -> bool:
        """Make the decoder start at a key frame, or at the beginning (-1); whether that key frame comes out first.

        skip: leave out pictures that nobody asks for and no other refers to.
        """
        self._last, self._skipped = None, set()
        self._decoder = self._decoded(key, skip=skip and self._index.may_skip)
        if key < 0:
            return True
        if not self._advance():
            return False
        mark, frame = self._last
        intra = frame.key_frame or frame.pict_type == PictureType.I
        return intra and mark == self._index.key_times[key]

    def _decoded(self, key: int, *, skip: bool) -> Iterator[av.VideoFrame]:
        """Yield the pictures as the decoder delivers them."""
        context = None
        for packet in self._packets(key):
            if context is None:  # not before: rewinding opens the file anew
                context = self._stream.codec_context
                context.skip_frame = "DEFAULT"
            if skip:
                needed = packet is None or packet.pts in self._wanted
                context.skip_frame = "DEFAULT" if needed else "NONREF"
                self._skipped |= set() if needed else {packet.pts}
            try:
                pictures = context.decode(packet)
            except (av.FFmpegError, ValueError):  # a damaged packet; others follow
                continue
            yield from pictures

    def _packets(self, key: int) -> Iterator[av.Packet | None]:
        """Yield the packets from that of a key frame on; from the beginning if it is -1."""
        if key < 0:
            self._rewind()
            yield from packets_of(self._container, self._stream)
            return
        time = self._index.key_times[key]
        for back in (*_BACK, 64):
            if back > key:
                break
            packets = self._seek(self._index.seek_times[key - back], time, self._index.key_sizes[key])
            if packets is not None:
                yield from packets
                return
        self._rewind()
        yield from _from_key(packets_of(self._container, self._stream), time)

    def _seek(self, to: int, time: int, size: int) -> Iterator[av.Packet | None] | None:
        """Return the packets from the key frame of a time and size on, after a seek; None where it is not met.

        The size tells it from another one: of a program stream, times count from a wrong place after a seek.
        """
        self._untouched = False
        try:
            self._container.seek(int(to), stream=self._stream)
        except (av.FFmpegError, OSError, ValueError):
            return None
        packets = _from_key(packets_of(self._container, self._stream), time)
        first = next(packets, None)
        return None if first is None or first.size != size else chain([first], packets)

    def _rewind(self) -> None:
        """Go to the beginning, by opening the file anew: not every container can seek there."""
        if not self._untouched:
            self._container.close()
            try:
                self._container, self._stream = open_stream(self.path)
            except Unreadable as e:
                raise DataError(f"{self.path}: not a readable video any more ({e})") from e
        self._untouched = False


def _from_key(packets: Iterator[av.Packet | None], time: int) -> Iterator[av.Packet | None]:
    """Yield packets from the key frame of a time on; none where a later key frame comes first."""
    for packet in packets:
        if packet is None or (packet.is_keyframe and packet.pts is not None and packet.pts > time):
            return
        if packet.is_keyframe and packet.pts == time:
            yield packet
            break
    yield from packets


def probe(path: str) -> VideoInfo:
    """Find out what a video file shows, decoding its first pictures, and its last where it may end early."""
    try:
        video = Video(path)
    except DataError as e:
        reason = str(e).removeprefix(f"{path}: not a readable video (").removesuffix(")")
        return VideoInfo(0, 0.0, reason)
    try:
        problem = video.first_problem()
        return VideoInfo(0, 0.0, problem) if problem else video.info
    except (DataError, av.FFmpegError, OSError) as e:
        return VideoInfo(0, 0.0, short_reason(e, 160))
    finally:
        video.close()
