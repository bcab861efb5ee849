"""Live sources: pictures from a camera, a URL, a pipe or a file, as they come, on one ascending clock."""

import gc
import logging
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple
from urllib.parse import parse_qsl

import av
import numpy as np

from datasets.clips import DataError, Unreadable
from datasets.live_clock import Clock
from datasets.live_pipe import Pipe, Stopped, is_pipe
from datasets.parallel import available_cores
from datasets.video_index import CONTAINERS, index_of, open_stream, video_stream_of
from datasets.video_rgb import ToRGB
from utils.text import short_reason

logger = logging.getLogger("tad")

_LONGEST_PAUSE = 30.0  # seconds between two attempts to open a source again
_HIGHEST_RATE = 240.0  # of what containers of streams state; some state the rate of their clock
_RECOVERY = 5.0  # seconds of pictures after damage that a key frame is waited for; some encoders send none
_AT_ONCE = 5e-3  # seconds within which a packet comes that FFmpeg has read already, to see what it opens
_CATCH_UP = 5.0  # seconds that these may take to decode
_THREADS = 4  # that decode, at most
_ERRORS = (Unreadable, av.FFmpegError, OSError, ValueError)  # of a source that cannot be opened, or breaks
_REMEDY = {
    "camera": "; is it plugged in, free, and may you read it?",
    "url": "; are the address and its server right, and does `ffplay ADDRESS` show it?",
    "pipe": "; it must carry a video that is read from front to back, such as MPEG-TS, Matroska or fragmented MP4",
    "file": "",
}


class Picture(NamedTuple):
    """A picture of a live source.

    pixels: uint8 (H, W, 3) RGB, upright.
    time: seconds since the first picture of the source, ascending.
    arrived: when the bytes it took had come, on time.monotonic().
    """

    pixels: np.ndarray
    time: float
    arrived: float


@dataclass
class LiveCounts:
    """What happened to a source so far.

    reconnects: how often it was opened again.
    corrupt: pictures and packets that are damaged, cannot be decoded, come out of order or may refer to such; they are
        not handed on.
    early: pictures that came while a live source was opened, whose times nobody knows: it has neither timestamps nor a
        rate; they are not handed on.
    """

    reconnects: int = 0
    corrupt: int = 0
    early: int = 0


class LiveSource:
    """Pictures of a source as they come; iterate over it once.

    A source is a camera ("/dev/video0", or "device:PATH", with options of FFmpeg's v4l2 as in
    "device:/dev/video0?framerate=30&video_size=1280x720"), a URL (rtsp, http with or without HLS, and what else FFmpeg
    opens), "-" for standard input, a named pipe, or a file.

    A camera, a URL or a named pipe that ends or breaks is opened again. A file, standard input, and a recording on a
    web server, which states its length, end. Damaged pictures are left out, and those after them up to a key frame,
    which may refer to them; where none comes within 5 seconds of pictures, the rest is handed on.

    Times are those of the source. The first picture after a break, or after the source's clock was set, comes as much
    later than the one before as it does by our clock. Where there are no timestamps, as in raw H.264, so does
    every picture of a camera or URL, and those of a pipe or file are 1 / fps apart.

    Args:
        url: the source.
        fps: frames per second, in place of what the source states; None: that.
        timeout: seconds in which a source must open, and in which something must come from a camera or URL.
        reconnect: seconds before it is opened again, doubled after each failure up to 30; 0: never, it ends or fails.
        outage: seconds without a picture, or of a pipe without a byte, after which the source is given up.
        paced: whether a file is handed out at its own pace, as a camera would.

    Attributes:
        name: the source, without a password.
        kind: "camera", "url", "pipe" or "file".
        live: whether pictures come at a pace of their own, a camera's; else at that of whoever takes them.
        fps: frames per second, None where they are unknown; of a file, as in `datasets.video`.
        counts: what happened so far.

    Raises DataError where the source cannot be opened.
    """

    def __init__(
        self,
        url: str,
        *,
        fps: float | None = None,
        timeout: float = 10.0,
        reconnect: float = 1.0,
        outage: float = 600.0,
        paced: bool = False,
    ):
        self.url, self.timeout, self.reconnect, self.outage, self.paced = url, timeout, reconnect, outage, paced
        self.name, self.kind, self.counts = _without_password(url), _kind(url), LiveCounts()
        if paced and self.kind != "file":
            raise DataError(f"{self.name}: a {self.kind} has a pace of its own; only files can be paced")
        self._to_rgb, self._stopped, self._sign = ToRGB(), threading.Event(), time.monotonic()
        self._container: av.container.InputContainer | None = None
        self._pipe: Pipe | None = None
        known, timed = None, True
        try:
            if self.kind == "file":
                known, timed = _known_of_file(url)
            self._pipe = Pipe(url, limit=timeout, on_wait=self._look) if self.kind == "pipe" else None
            self._open()
        except _ERRORS as e:
            self.close()
            reason = _reason(e, timeout)
            raise DataError(f"{self.name}: this {self.kind} cannot be opened ({reason}){_REMEDY[self.kind]}") from e
        if self._pipe:
            self._pipe.limit = outage  # a writer may pause; to close the pipe would end it
        recording = url.startswith(("http:", "https:")) and bool(self._container.duration)
        self.live = paced or self.kind == "camera" or (self.kind == "url" and not recording)
        self._opens_again = reconnect > 0 and not recording and self.kind != "file" and url != "-"
        form = self._container.format  # such as jpeg_pipe is one JPEG after another
        raw = bool(form.flags & av.format.Flags.no_timestamps.value) or form.name.endswith("_pipe")
        self._untimed = raw or not timed  # FFmpeg makes times up, often 1 / 25 s apart
        self.fps = fps or known or _stated_rate(self._stream, raw=raw)
        if raw and not (self.fps or self.live):
            self.fps = float(self._stream.guessed_rate)
            logger.warning(f"{self.name}: says neither times nor a frame rate, so {self.fps:g} pictures per second are "
                           "assumed; give the right rate (--stream_fps)")  # fmt: skip
        self._clock = Clock(self.fps, live=self.live and not paced)
        self._seen = time.monotonic()  # when the last picture came
        self._broke: float | None = None  # when the last picture before a break came
        self._pause = reconnect

    def __iter__(self) -> Iterator[Picture]:
        """Yield the pictures. Raises DataError where the source breaks for good."""
        try:
            while True:
                reason = ""
                try:
                    self._open()
                    for picture in self._pictures():
                        self._is_back()
                        yield picture
                        self._seen = time.monotonic()
                except _ERRORS as e:
                    reason = _reason(e, self.timeout)
                self._close_container()
                if not self._opens_again:
                    if reason:
                        raise DataError(f"{self.name}: it broke off ({reason})")
                    return
                self._wait_to_open(reason or "it ended")
        except Stopped:
            return
        finally:
            self.close()

    def stop(self) -> None:
        """End the iteration, from any thread; it takes up to `timeout`."""
        self._stopped.set()

    def close(self) -> None:
        """Release the source; the thread that iterates calls it at the end."""
        self._close_container()
        if self._pipe:
            self._pipe.close()
            self._pipe = None

    def about(self) -> dict[str, int]:
        """Return the counts by name."""
        return asdict(self.counts)

    def check(self) -> None:
        """Raise DataError where the thread that iterates hangs beyond all limits, as in the driver of a device."""
        silent, limit = time.monotonic() - self._sign, 2 * self.timeout + 30
        if silent > limit:
            raise DataError(f"{self.name}: reading it has hung for {silent:.0f} s")

    # ------------------------------------------------------------------------------------------------------------------
    # Connections

    def _open(self) -> None:
        """Open the source unless it is open. Raises one of _ERRORS."""
        if self._container is not None:
            return
        self._look()
        if self.kind == "file":
            container, self._stream = open_stream(self.url)
        else:
            if self._pipe:
                self._pipe.begin()
            where, options = _ffmpeg_words(self.url, self.kind, self.timeout)
            container = av.open(self._pipe or where, **options, metadata_errors="ignore")
            self._stream = video_stream_of(container)
        context = self._stream.codec_context  # threads of slices delay no picture, as those of frames would
        context.thread_type, context.thread_count = "SLICE", min(available_cores(), _THREADS)
        self._container = container

    def _close_container(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = self._stream = None
            gc.collect()  # PyAV's containers and streams refer to each other, and have lived long

    def _wait_to_open(self, reason: str) -> None:
        """Wait before the source is opened again. Raises DataError where the outage is too long."""
        now = time.monotonic()
        if self._broke is None:
            self._broke = self._seen
            logger.warning(f"{self.name}: {reason}; it will be opened again, for up to {self.outage:g} s")
        if now - self._broke >= self.outage:
            raise DataError(f"{self.name}: no picture for {now - self._broke:.0f} s ({reason})")
        end = now + min(self._pause, self._broke + self.outage - now)
        while (left := end - time.monotonic()) > 0:
            self._look()
            self._stopped.wait(min(left, 1.0))
        self._pause = min(2 * self._pause, max(_LONGEST_PAUSE, self.reconnect))
        self.counts.reconnects += 1
        self._clock.broke()

    def _is_back(self) -> None:
        """Note that there is a picture again."""
        if self._broke is not None:
            logger.info(f"{self.name}: pictures come again, after {time.monotonic() - self._broke:.1f} s")
            self._broke, self._pause = None, self.reconnect

    def _look(self) -> None:
        """Give a sign of life. Raises Stopped where the iteration shall end."""
        self._sign = time.monotonic()
        if self._stopped.is_set():
            raise Stopped

    # ------------------------------------------------------------------------------------------------------------------
    # Pictures

    def _pictures(self) -> Iterator[Picture]:
        """Yield the pictures of a connection."""
        self._unsound_for = 0.0  # how many pictures more
        self._intra_only = self._stream.codec_context.codec.intra_only
        early = self.live and self._untimed and not self.fps
        opened = asked = time.monotonic()
        for packet in self._packets():
            arrived = time.monotonic()
            early = early and arrived - asked < _AT_ONCE and arrived - opened < _CATCH_UP
            for frame in self._decoded(packet):
                if early:
                    self.counts.early += 1
                    continue
                try:
                    pixels = self._to_rgb(frame).numpy()
                except (av.FFmpegError, OSError, ValueError):
                    self.counts.corrupt += 1
                    continue
                at = self._clock.time(self._stamp(frame), arrived)
                if at is None:
                    self._damaged()
                    continue
                if self.paced:
                    arrived = self._pace(at)
                yield Picture(pixels, at, arrived)
                self._look()
            asked = time.monotonic()

    def _packets(self) -> Iterator[av.Packet | None]:
        """Yield the packets of a connection, then one None."""
        while True:
            try:
                for packet in self._container.demux(self._stream):
                    self._look()
                    if packet.is_corrupt:
                        self._damaged()
                    if packet.size and not (packet.is_corrupt and self._intra_only):
                        yield packet
            except IndexError:  # PyAV stumbles over streams that begin on the way; asked again, it knows them
                continue
            break
        yield None

    def _decoded(self, packet: av.Packet | None) -> Iterator[av.VideoFrame]:
        """Yield the sound pictures that a packet completes."""
        try:
            frames = self._stream.codec_context.decode(packet)
        except (av.FFmpegError, ValueError):
            self._damaged()
            return
        for frame in frames:
            if frame.is_corrupt:
                self._damaged()
            elif self._is_sound(frame):
                yield frame
            else:
                self.counts.corrupt += 1

    def _damaged(self) -> None:
        """Count damage: pictures that refer to it are unsound, until a key frame comes, if one does before long."""
        self.counts.corrupt += 1
        self._unsound_for = 0 if self._intra_only else _RECOVERY * (self.fps or 30)

    def _is_sound(self, frame: av.VideoFrame) -> bool:
        if frame.key_frame:
            self._unsound_for = 0
        self._unsound_for = max(self._unsound_for - 1, 0)
        return not self._unsound_for

    def _stamp(self, frame: av.VideoFrame) -> float | None:
        """Return the timestamp of a picture in seconds, None where it has none that can be trusted."""
        return None if frame.pts is None or self._untimed else float(frame.pts * self._stream.time_base)

    def _pace(self, at: float) -> float:
        """Wait until a picture is due; return when that is, on time.monotonic()."""
        due = self._clock.began + at
        while (left := due - time.monotonic()) > 0:
            self._look()
            self._stopped.wait(min(left, 1.0))
        return time.monotonic()


def _kind(url: str) -> str:
    """Return "pipe", "camera", "url" or "file"."""
    if is_pipe(url):
        return "pipe"
    if url.startswith(("device:", "/dev/video")):
        return "camera"
    return "url" if "://" in url else "file"


def _without_password(url: str) -> str:
    """Return a URL with *** in place of its password, for the log and for alerts."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", url)


def _ffmpeg_words(url: str, kind: str, timeout: float) -> tuple[str, dict]:
    """Return what PyAV opens for a camera, URL or pipe, and its arguments."""
    if kind == "pipe":
        return url, {"options": {"format_whitelist": CONTAINERS}}
    limits = {"timeout": (timeout, timeout)}
    if kind == "camera":
        path, _, query = url.removeprefix("device:").partition("?")
        return path, limits | {"format": "v4l2", "options": dict(parse_qsl(query))}
    microseconds = str(round(1e6 * timeout))
    options = {"rw_timeout": microseconds, "timeout": microseconds}
    return url, limits | {"options": options | ({"rtsp_transport": "tcp"} if url.startswith("rtsp") else {})}


def _known_of_file(path: str) -> tuple[float, bool]:
    """Return the frames per second of a video file, and whether its timestamps are right, as in `datasets.video`."""
    container, stream = open_stream(path)
    index, _ = index_of(path, container, stream)
    container.close()
    return index.fps, index.method == "timestamps"


def _stated_rate(stream: av.VideoStream, *, raw: bool) -> float | None:
    """Return the pictures per second that a container states, the codec of a raw stream; None where neither does."""
    if raw:  # of which FFmpeg guesses 25 where the codec does not say
        stated = (stream.guessed_rate,) if stream.codec_context.framerate else ()
    else:
        stated = (stream.average_rate, stream.guessed_rate, stream.base_rate)
    rates = [float(r) for r in stated if r]
    return next((r for r in rates if 0 < r <= _HIGHEST_RATE), None)


def _reason(error: BaseException, timeout: float) -> str:
    """Say why FFmpeg gave up."""
    if isinstance(error, av.error.ExitError):
        return f"nothing came for {timeout:g} s"
    if isinstance(error, av.error.InvalidDataError):
        return "it is no video that FFmpeg knows"
    return getattr(error, "strerror", None) or short_reason(error)
