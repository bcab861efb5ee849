"""What the packets of a video file tell of its pictures, without decoding one; datasets/video.py decodes by it."""

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import av
import numpy as np
from av.stream import Disposition

from datasets.clips import Unreadable
from datasets.parallel import alive
from utils.damage import stand_in
from utils.text import short_reason

_KEPT: dict[tuple[str, int, int], "Index"] = {}  # by path, size and time, the last used last
_KEEP = 2_000_000  # packets of all of them, 8 to 60 bytes each: 1,600 videos of 40 seconds at 30 fps
_RATE = 5e-4  # a rate so close to the container's is the container's; 29.97 and 30 are twice as far apart
STEADY = 0.95  # share of pictures as far apart as usual where the rate was constant before some were lost
_STILL = 0.5  # seconds without a picture, for which a video of a variable rate stands still; less is bridged
_ON_GRID = 0.25  # of a frame, by which pictures of a constant rate may be off
_TAIL = 16  # pictures at the end that may come late, and by how many frames
_MOST_PIXELS = 8192 * 8192  # of a picture, 200 MB as RGB; a damaged or hostile file may claim any size
_GAP = 10.0  # seconds without a picture in a transport stream: another recording begins
# FFmpeg opens text, pictures and playlists as videos, too; of playlists it may never come back.
CONTAINERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,asf,flv,ogg,mxf,ivf,nut,dv,rm,wtv,nsv,gxf,dhav,gif,apng,yuv4mpegpipe,"
    "h261,h263,h264,hevc,vvc,m4v,mjpeg,vc1,vc1test,av1,obu,cavsvideo,dirac"
)
_SAY_THEIR_LENGTH = ("mov", "matroska", "avi", "flv", "asf")
# Codecs in AVI whose frames come in the order they are shown; AVI has no other timestamps than that order.
_IN_ORDER = ("msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "flv1", "wmv1", "wmv2")


def open_stream(path: str) -> tuple[av.container.InputContainer, av.VideoStream]:
    """Open a video file, and choose its video stream as ffmpeg does. Raises Unreadable with the reason."""
    options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
    try:
        container = av.open(f"file:{path}", options=options, metadata_errors="ignore")
    except (av.FFmpegError, OSError, ValueError) as e:
        unknown = getattr(e, "errno", 0) == errno.EINVAL
        reason = getattr(e, "strerror", None) or short_reason(e, 160)
        reason = "no container of videos that is known" if unknown else reason
        raise Unreadable(_no_video(path) or reason) from e
    return container, video_stream_of(container)


def video_stream_of(container: av.container.InputContainer) -> av.VideoStream:
    """Choose the video stream of an open container as ffmpeg does, to be decoded in one thread.

    Raises Unreadable with the reason, and closes the container, where there is none that can be decoded.
    """
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        container.close()
        raise Unreadable("no video in it")
    stream = max(streams, key=_rank)
    if stream.codec_context is None:
        container.close()
        raise Unreadable("FFmpeg has no decoder for its codec")
    context = stream.codec_context
    if context.width * context.height > _MOST_PIXELS:
        container.close()
        raise Unreadable(f"pictures of {context.width} x {context.height} pixels, up to {_MOST_PIXELS} are read")
    context.options = {"max_pixels": str(_MOST_PIXELS)}  # where its size changes on the way
    context.thread_count, context.thread_type = 1, "NONE"
    return stream


def _no_video(path: str) -> str:
    """Say what a file is that is no video at all: empty, or in place of one; "" where it may be one."""
    if not os.path.isfile(path):
        return ""
    with suppress(OSError), open(path, "rb") as f:
        head = f.read(512)
        return stand_in(head) if head else "the file is empty"
    return ""


def _rank(stream: av.VideoStream) -> int:
    """Return ffmpeg's score of a stream; the first of the best is taken."""
    context = stream.codec_context
    size = context.width * context.height if context else -1
    return size + 5_000_000 * bool(stream.disposition & Disposition.default)


def packets_of(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet | None]:
    """Yield the packets of a stream from where the file stands, then one None; where reading fails, the file ends."""
    more = True
    while more:
        more = False
        try:
            for packet in container.demux(stream):
                alive()
                if packet.size and not (packet.is_corrupt and stream.codec_context.codec.intra_only):  # cut short
                    yield packet
        except IndexError:  # PyAV stumbles over streams that begin within the file; asked again, it knows them
            more = True
        except (av.FFmpegError, OSError, ValueError):
            pass
    yield None


@dataclass
class Index:
    """The pictures of a video stream; times are in its time base, ascending int64.

    seconds: the time base.
    rates: those the container states, per second.
    shown: times of the pictures.
    key_times, seek_times, key_sizes: of the key frames that decoding may start at; what to seek to for each; bytes.
    codec: its name.
    packets: how many there are, hidden pictures included.
    stated: (pictures, seconds) by the container, 0 where it does not say.
    note: why pictures are counted by decoding; "" where timestamps tell.
    leading: whether pictures precede the first key frame, or it is not first, so that decoding has to tell.
    suspect: whether the end has to be decoded to know the number of frames.
    may_skip: whether the decoder may leave out pictures that no other refers to.
    count: frames, once known.
    told: whether damage was logged.
    damaged: times of the pictures whose packets are marked as corrupt, as where some before them were lost.

    Derived: fps, constant, and times: of each frame, the time of its picture.
    """

    seconds: float
    rates: list[float]
    shown: np.ndarray
    key_times: np.ndarray
    seek_times: np.ndarray
    key_sizes: list[int]
    codec: str
    packets: int
    stated: tuple[int, float]
    note: str
    leading: bool
    suspect: bool
    may_skip: bool
    count: int | None = None
    told: bool = False
    damaged: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    fps: float = 0.0
    constant: bool = True
    times: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self):
        if self.note:
            self.key_times = self.seek_times = np.zeros(0, np.int64)
            self.fps = self.rates[0] if self.rates else 0.0
        else:
            self.fps, self.constant, self.times = frame_times(self.shown, self.seconds, self.rates)

    @property
    def method(self) -> str:
        """How frames are found."""
        return "sequence" if self.note else "timestamps"

    @property
    def start(self) -> float:
        """Time of the first picture, in seconds; 0 where it is not known."""
        return float(self.shown[0] * self.seconds) if len(self.shown) and not self.note else 0.0

    def start_at(self, time: int) -> None:
        """Leave out the pictures before a time."""
        self.shown, self.leading = self.shown[self.shown >= time], False
        self.__post_init__()


def first_key(key_times: np.ndarray, time: int) -> int:
    """Return the number of the last key frame shown at or before a time; -1 where there is none."""
    return int(np.searchsorted(key_times, time, side="right")) - 1


def forget() -> None:
    """Drop the indexes of the files read so far in this process."""
    _KEPT.clear()


def index_of(path: str, container: av.container.InputContainer, stream: av.VideoStream) -> tuple[Index, bool]:
    """Return the index of a file just opened, and whether the container still stands at its beginning.

    It is read once per process and version of the file. Raises Unreadable where there is no picture.
    """
    status = os.stat(path)
    key = (path, status.st_size, status.st_mtime_ns)
    known = _KEPT.pop(key, None)
    index = known or _read(container, stream)
    _KEPT[key] = index
    if known is None:
        spare = _KEEP - sum(i.packets for i in _KEPT.values())
        while spare < 0 and len(_KEPT) > 1:
            spare += _KEPT.pop(next(iter(_KEPT))).packets
    return index, known is not None


def _read(container: av.container.InputContainer, stream: av.VideoStream) -> Index:
    codec, seconds = stream.codec_context.codec.canonical_name, float(stream.time_base)
    rows, damaged, corrupt = [], [], False  # time shown, time decoded, key frame, shown, bytes
    for packet in packets_of(container, stream):
        if packet is not None:
            corrupt = packet.is_corrupt
            damaged += [packet.pts] if corrupt and packet.pts is not None else []
            rows.append((packet.pts, packet.dts, packet.is_keyframe, _is_shown(packet, codec), packet.size))
    if corrupt:  # the file ends within it
        rows.pop()
    shown = [row for row in rows if row[3]]
    if not shown:
        raise Unreadable("it holds no pictures" if rows else "its video stream is empty")
    rates = [float(r) for r in (stream.average_rate, stream.guessed_rate, stream.base_rate) if r]
    chunks = _chunks(container, rows)
    note = _unsound(container, stream, rows, shown)
    if container.format.name == "avi" and chunks < stream.frames and not note:
        note = "AVI that lost pictures which its index counts"
    if note:
        rates = _counted_rate(container, stream, rows, rates)
    keys = [row for row in shown if row[2]] if not note else []
    times = np.sort(np.array([row[0] for row in shown], np.int64)) if not note else np.zeros(0, np.int64)
    stated = _stated(container, stream)
    progressive = getattr(stream.codec_context, "field_order", None) in (0, 1)  # PyAV before 18 does not say
    index = Index(
        seconds=seconds,
        rates=rates,
        shown=times,
        key_times=np.array([row[0] for row in keys], np.int64),
        seek_times=np.array([row[0] if row[1] is None else row[1] for row in keys], np.int64),
        key_sizes=[row[4] for row in keys],
        codec=codec,
        packets=chunks,
        stated=stated or (0, 0.0),
        note=note,
        leading=not note and (not rows[0][2] or times[0] < min(row[0] for row in rows if row[2])),
        suspect=corrupt or stated is None,
        may_skip=not note and codec == "h264" and progressive,
        damaged=np.array(damaged, np.int64),
    )
    index.suspect |= bool(ends_early(index))
    return index


def _chunks(container, rows: list[tuple]) -> int:
    """Count the packets; in AVI also the empty ones, which hold a place and are not delivered."""
    places = [row[1] for row in rows if row[1] is not None]
    if container.format.name != "avi" or len(places) < 2:
        return len(rows)
    return places[-1] + max(int(np.median(np.diff(places))), 1)


def _counted_rate(container, stream, rows: list[tuple], rates: list[float]) -> list[float]:
    """Return the rate of pictures that are counted: in AVI that of their places, else what FFmpeg guesses it is.

    Raises Unreadable where they are not evenly spaced.
    """
    places = [row[1] for row in rows if row[1] is not None]
    if container.format.name != "avi" or len(places) < 2:
        return [float(stream.guessed_rate)] if stream.guessed_rate else rates
    step = float(np.median(np.diff(places)))
    if (places[-1] - places[0]) / step > len(places) + 2:
        raise Unreadable("AVI with pictures left out in places, whose order it does not say; encode it anew")
    return [1 / (step * float(stream.time_base))]


def _is_shown(packet: av.Packet, codec: str) -> bool:
    """Tell whether a packet holds a picture to show; VP8 has packets with one that others refer to alone."""
    return not packet.is_discard and not (codec == "vp8" and not memoryview(packet)[0] & 0x10)


def _unsound(container, stream, rows: list[tuple], shown: list[tuple]) -> str:
    """Say why the timestamps of packets do not tell the pictures; "" where they do."""
    context, container_name = stream.codec_context, container.format.name
    if container.format.flags & av.format.Flags.no_timestamps.value:
        return "a raw stream has no timestamps"
    if container_name == "avi" and not context.codec.intra_only and context.codec.canonical_name not in _IN_ORDER:
        return f"AVI does not say in which order {context.codec.canonical_name} is shown"
    times = [row[0] for row in shown]
    if None in times:
        return "pictures without timestamps"
    if len(set(times)) < len(times):
        return "pictures with the same timestamp"
    decoded = [row[1] for row in rows if row[1] is not None]
    keys = [row[0] for row in shown if row[2]]
    if any(b < a for part in (decoded, keys) for a, b in zip(part, part[1:], strict=False)):
        return "its time runs backwards, as where recordings were joined"
    longest = np.diff(np.sort(times)).max(initial=0) * float(stream.time_base)
    if container_name in ("mpegts", "mpeg") and longest > _GAP:
        return f"{longest:.0f} seconds without a picture, as where recordings were joined"
    return ""


def _stated(container, stream) -> tuple[int, float] | None:
    """Return (pictures, last second) that the container promises, 0 where not that; None where it promises nothing."""
    if not container.format.name.startswith(_SAY_THEIR_LENGTH):
        return None
    seconds = 0.0
    if container.format.name.startswith(("mov", "avi")):
        return (stream.frames, seconds) if stream.frames else None
    if container.duration:
        seconds = container.duration / av.time_base
    return (stream.frames, seconds) if stream.frames or seconds else None


def ends_early(index: Index) -> str:
    """Say how a file is shorter than its container states; "" where it is not. Hidden pictures count."""
    stated, seconds = index.stated
    lost = 0 if index.note or index.count is None else len(index.times) - index.count
    have = index.packets - lost
    if 0 < have < stated:
        return f"holds {have} of the {stated} pictures that its container states"
    end = 0.0 if index.note else float(index.shown[-1] * index.seconds) + 1 / max(index.fps, 1)
    if seconds and end and seconds - end > max(1.0, 2 / max(index.fps, 0.01)):
        return f"its pictures end at {end:.1f} s, its container states {seconds:.1f} s"
    return ""


def frame_times(shown: np.ndarray, seconds: float, rates: list[float]) -> tuple[float, bool, np.ndarray]:
    """Return (fps, whether the rate is constant, (frames,) int64 times of the pictures of frames).

    Args:
        shown: (n,) int64, ascending times of pictures.
        seconds: their unit.
        rates: those that the container states; one that is close enough to the average is taken for it.

    A rate is constant where each picture is within half a frame of its place. The last few may come late: a cut without
    encoding leaves out pictures between them. Where some of a stated rate were lost on the way, frames go on at that
    rate. Of a variable rate, frame i is the picture nearest to i / fps, of two the earlier. In a hole of over _STILL
    it is the one before, which a player shows there, but for the hole's last frame.
    """
    count, span = len(shown), float(shown[-1] - shown[0]) * seconds
    if count < 2:
        return (rates[0] if rates else 0.0), True, shown
    average = (count - 1) / span
    close = [r for r in rates if abs(r / average - 1) <= _RATE + seconds / span] + [average]
    for fps, tail in [*((r, 0) for r in close), *((r, min(_TAIL, count // 4)) for r in rates)]:
        late = (shown - shown[0]) * (seconds * fps) - np.arange(count)
        on_time = count if (np.abs(late) < 0.5).all() else int(np.argmax(np.abs(late) >= 0.5))
        if on_time >= count - tail and late.min() > -0.5 and late.max() < _TAIL:
            return fps, True, shown
    fps = next((rate for rate in rates if _has_holes(shown, seconds * rate)), close[0])
    grid = shown[0] + np.arange(round(span * fps) + 1) / (fps * seconds)
    right = np.searchsorted(shown, grid).clip(1, count - 1)
    behind, ahead = grid - shown[right - 1], shown[right] - grid
    still = (ahead + behind > _STILL / seconds) & (ahead > 1 / (fps * seconds) + 1e-6)
    earlier = (behind <= ahead + 1e-6) | still
    return fps, False, np.where(earlier, shown[right - 1], shown[right])


def _has_holes(shown: np.ndarray, rate: float) -> bool:
    """Tell whether pictures were taken at a constant rate, in their unit of time, and some, under a half, were lost."""
    place = (shown - shown[0]) * rate
    if place[-1] > 2 * len(place):
        return False
    on_grid = np.abs(place - place.round()).max() < _ON_GRID
    return on_grid and np.mean(np.abs(np.diff(place) - 1) < _ON_GRID) > STEADY
