"""Pictures of a video that damage has not touched, for prediction: damaged ones are left out, not repaired.

Most pictures of a video are made of others, and a decoder goes on after damage with what it has got: of the pictures
that it makes of damaged ones, it marks few. Here no picture is used from damage on until a key frame comes, in the
order of decoding. The picture before is left out, too: damage that a decoder meets at the beginning of a picture's data
may have begun in the data before. A file is decoded from beginning to end, so that damage costs no time.

Damage is: data that the decoder refuses, complains of, or makes no picture of; a picture or packet that is marked as
corrupt; and, since the decoders of H.264, HEVC and Motion JPEG let much pass, data that no encoder writes.
"""

import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import av
import numpy as np
import simplejpeg
from av.video.frame import PictureType
from torch import Tensor

from datasets.video import Video
from datasets.video_index import STEADY, first_key

REFUSED = "the decoder refuses the data of a picture"
MISSING = "a picture is missing"
MARKED = "the decoder calls a picture damaged"
COMPLAINT = "the decoder complains: {}"
BROKEN = "the data of a picture is damaged"
ENDED = "the file ends before"
HOLE = "no pictures for a while"
_UNTIL_KEY = "; up to the next key frame others are made of it"
_UNNUMBERED = "; pictures after it are counted from the beginning, so that their numbers are unknown"

_LONGEST = 80  # characters of a complaint
_HELD = 64  # pictures at most that wait for one decoded before them
_REORDERED = 16  # pictures at most that are shown before one decoded earlier
_LONG_HOLE = 1.0  # seconds without a picture, in a video of a variable rate, where nothing else tells of damage
_PADDING = 64  # zeros behind the data of a picture that some encoders add
# Emulation prevention (H.264 and HEVC, 7.4.1) keeps these out of the data of a picture. In a byte stream, three bytes
# 0, 0, 1 begin the next unit, and zeros may stand before them.
_NEVER = re.compile(rb"\x00\x00[\x00-\x02]")
_NEVER_IN_STREAM = re.compile(rb"\x00\x00(?:\x02|\x00+[\x02-\xff])")


class SoundVideo(Video):
    """A Video that can tell which of its frames are sound; `sound_frames` and the other ways to read do not mix."""

    _flow: Iterator[tuple[int, av.VideoFrame | str]] | None = None
    _place: tuple[int, Tensor | str] | None = None  # mark of the picture that came last, and what became of it
    _every: frozenset[int] | None = None  # marks of all pictures that will be asked for

    def sound_frames(self, frame_ids: Sequence[int], every: Sequence[int] | None = None) -> Iterator[Tensor | str]:
        """Yield uint8 (H, W, 3) RGB for each of the ascending frame_ids, or why it cannot be used.

        Each call goes on where the last one ended. Raises DataError where the file is gone.

        every: the frames that this call and all others ask for; others need not be decoded unless these are made of
        them. None: that is not known.
        """
        ids = self._within(frame_ids)
        if self._every is None and every is not None:
            self._every = frozenset(self.marks(self._within(every)))
        if len(ids):
            for mark, hole in zip(self.marks(ids), self._in_hole(ids), strict=True):
                yield HOLE if hole else self._sound(mark)
        yield from [ENDED] * (len(frame_ids) - len(ids))

    def close(self) -> None:
        self._flow = self._place = None
        super().close()

    def _within(self, frame_ids: Sequence[int]) -> np.ndarray:
        """Return those of ascending frames that the file has, as far as its packets tell."""
        ids = np.asarray(frame_ids, np.int64)
        return ids if self._index.method == "sequence" else ids[ids < len(self._index.times)]

    def _sound(self, mark: int) -> Tensor | str:
        if self._place and self._place[0] == mark:
            return self._place[1]
        if self._flow is None:
            self._flow = self._from_near(mark)
        for found, picture in self._flow:
            if found >= mark:
                usable = found == mark and not isinstance(picture, str)
                self._place = (mark, self._rgb(picture) if usable else picture if found == mark else MISSING)
                return self._place[1]
        return ENDED

    def _in_hole(self, frame_ids: np.ndarray) -> np.ndarray:
        """Tell of frames, (n,) bool, whether their picture, of a variable rate, is of another time: a stretch is lost.

        Between pictures further apart than usual a stretch was lost where damage is next to it, where nearly all others
        are evenly spaced, or where it is long.
        """
        index = self._index
        if index.constant or index.method == "sequence" or len(index.shown) < 3:
            return np.zeros(len(frame_ids), bool)
        apart = np.diff(index.shown)
        usual, ends = np.median(apart), index.shown[1:]
        steady = np.mean(np.abs(apart - usual) < usual / 4) > STEADY
        lost = (apart > 1.5 * usual) & (np.isin(ends, index.damaged) | np.isin(index.shown[:-1], index.damaged))
        lost |= (apart > 2.5 * usual) & (steady | (apart * index.seconds > _LONG_HOLE))
        times = index.shown[0] + frame_ids / (index.fps * index.seconds)
        within = np.searchsorted(index.shown, times, side="right").clip(1, len(ends)) - 1
        away = np.abs(index.times[frame_ids] - times) * (index.seconds * index.fps)
        return lost[within] & (away > 0.75)

    # ------------------------------------------------------------------------------------------------------------------
    # From packets to pictures

    def _from_near(self, mark: int) -> Iterator[tuple[int, av.VideoFrame | str]]:
        """Yield the pictures from the key frame before a mark, or from the beginning where that one is not sound."""
        if self._index.method == "sequence":
            return self._counted()
        key = first_key(self._index.key_times, mark)
        if key > 0:
            flow = self._judged(key)
            for found, picture in flow:
                if found >= self._index.key_times[key]:
                    if found == self._index.key_times[key] and not isinstance(picture, str):
                        return _with_first((found, picture), flow)
                    break
        return self._judged(-1)

    def _judged(self, key: int) -> Iterator[tuple[int, av.VideoFrame | str]]:
        """Yield (mark, picture or why it is not sound) of the pictures to show, in order, from a key frame on.

        key: -1 stands for the beginning.
        """
        shown = self._index.shown.tolist()
        first = 0 if key < 0 else int(np.searchsorted(self._index.shown, self._index.key_times[key]))
        judge = _Judge(set(shown[first:]), from_key=key >= 0)
        place = first
        for packet, skipped, fault, pictures in self._decoded_packets(key):
            if packet is not None:
                judge.fed(packet, fault, skipped=skipped)
            for picture in pictures:
                judge.came(picture)
            judge.decide(ended=packet is None)
            while place < len(shown) and (packet is None or shown[place] in judge.verdicts):
                yield shown[place], judge.verdicts.pop(shown[place], MISSING)
                place += 1

    def _counted(self) -> Iterator[tuple[int, av.VideoFrame | str]]:
        """Yield (number, picture or why it is not sound) where pictures are counted.

        None is sound after damage, as some may be lost; but where recordings were joined, none is lost.
        """
        held: deque[av.VideoFrame | str] = deque()
        count, reason, since, lost, unsure, time = 0, "", 0, False, False, None  # since: packets decoded since damage
        for packet, _, fault, pictures in self._decoded_packets(-1):
            since += 1
            if packet is not None:
                joined = None not in (packet.dts, time) and packet.dts < time
                unsure, time = unsure and not joined, packet.dts
            lost = lost or (unsure and since > _REORDERED)
            marked = packet is not None and packet.is_corrupt and fault == MARKED  # as where a recording breaks off
            unsure = unsure or (marked and not joined)
            for picture in pictures:
                fault = fault or (MARKED if picture.is_corrupt else "")
                if since > _REORDERED and picture.key_frame and not (lost or fault):
                    reason = ""
                held.append(reason or picture)
            if fault:  # it may be of what came before, since pictures are shown in another order
                lost, since, reason = lost or not marked, 0, fault + _UNTIL_KEY
                held = deque(reason for _ in held)
            if lost and not reason.endswith(_UNNUMBERED):
                reason = reason.removesuffix(_UNTIL_KEY) + _UNNUMBERED
            while held and (packet is None or len(held) > _REORDERED):
                yield count, held.popleft()
                count += 1

    def _decoded_packets(self, key: int) -> Iterator[tuple[av.Packet | None, bool, str, list[av.VideoFrame]]]:
        """Yield (packet, whether it was not to be decoded, what is wrong with it, pictures that came) from a key frame.

        The last packet is None.
        """
        check, came = None, False
        for packet in self._packets(key):
            context = self._stream.codec_context
            if check is None:
                check = _check_of(context, packet)
            skipped = bool(self._index.may_skip and self._every and packet and packet.pts not in self._every)
            context.skip_frame = "NONREF" if skipped else "DEFAULT"
            fault = "" if packet is None else MARKED if packet.is_corrupt else check(packet)
            try:
                with _listening() as said:
                    pictures = context.decode(packet)
            except (av.FFmpegError, ValueError):
                fault, pictures = REFUSED, []
            if came and said:  # before its first picture, a decoder looks for its bearings
                fault = fault or COMPLAINT.format(said[0][2].strip()[:_LONGEST])
            came = came or bool(pictures)
            yield packet, skipped, fault, pictures
            if packet is None:
                return


@dataclass(eq=False)
class _Fed:
    """A packet that was decoded.

    wanted: whether its picture has to come. known: whether it is known what became of it. fault: what is wrong with it.
    """

    mark: int | None
    key: bool
    wanted: bool
    known: bool
    fault: str
    picture: av.VideoFrame | None = None


class _Judge:
    """Decides which pictures are sound, in the order of decoding.

    verdicts: {mark: picture, or why it is not sound}; who takes one removes it.
    """

    def __init__(self, shown: set[int], *, from_key: bool):
        self.verdicts: dict[int, av.VideoFrame | str] = {}
        self._shown = shown
        self._fed: deque[_Fed] = deque()
        self._by_mark: dict[int, _Fed] = {}
        self._reason = MISSING if from_key else ""  # what is wrong with all pictures now
        self._before, self._key = "", None  # the same before the last key frame, and the mark of that
        self._latest: int | None = None  # mark of the last picture that came
        self._held = 0

    def fed(self, packet: av.Packet, fault: str, *, skipped: bool) -> None:
        """Take note of a packet that was decoded."""
        wanted = packet.pts in self._shown and not skipped
        entry = _Fed(packet.pts, packet.is_keyframe, wanted, bool(fault) or packet.pts is None, fault)
        self._fed.append(entry)
        if packet.pts is not None:
            self._by_mark[packet.pts] = entry

    def came(self, picture: av.VideoFrame) -> None:
        """Take note of a picture that came."""
        entry = self._by_mark.get(picture.pts)
        if entry is None:
            return
        if picture.is_corrupt:
            entry.fault = entry.fault or MARKED
        entry.known, entry.picture = True, picture
        self._held += 1
        self._latest = picture.pts if self._latest is None else max(self._latest, picture.pts)

    def decide(self, *, ended: bool) -> None:
        """Decide on the packets of which, and of the next of which, it is known what became of them."""
        while self._fed:
            entry, after = self._fed[0], self._fed[1] if len(self._fed) > 1 else None
            if not (self._settle(entry, ended=ended) and (self._settle(after, ended=ended) if after else ended)):
                return
            self._fed.popleft()
            self._by_mark.pop(entry.mark, None)
            self._held -= entry.picture is not None
            self._follow(entry)
            reason = self._reason or (self._before if entry.mark is not None and self._leads(entry) else "")
            reason = reason or (after.fault + _UNTIL_KEY if after and after.fault else "")
            if entry.mark in self._shown:
                self.verdicts[entry.mark] = reason or entry.picture or MISSING

    def _settle(self, entry: _Fed, *, ended: bool) -> bool:
        """Tell whether it is known what became of a packet; its picture is missing where later ones have come."""
        overdue = self._latest is not None and entry.mark is not None and self._latest > entry.mark
        if not entry.known and (ended or overdue or self._held > _HELD):
            entry.known = True
            if entry.wanted:
                entry.fault = MISSING
        return entry.known

    def _follow(self, entry: _Fed) -> None:
        """Keep in mind what a picture means for those that are decoded after it."""
        if entry.fault:
            self._reason = entry.fault + _UNTIL_KEY
        elif entry.key and entry.picture is not None and _is_intra(entry.picture):
            self._before, self._key, self._reason = self._reason, entry.mark, ""

    def _leads(self, entry: _Fed) -> bool:
        """Tell whether a picture is shown before the key frame that it is decoded after, of which it needs others."""
        return self._key is not None and entry.mark < self._key


@contextmanager
def _listening() -> Iterator[list[tuple]]:
    """Yield a list of what FFmpeg complains of in this thread meanwhile: (level, name, text)."""
    level, skip = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # else what it said of another video goes unsaid of this one
    try:
        with av.logging.Capture() as said:
            yield said
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip)


def _is_intra(picture: av.VideoFrame) -> bool:
    return picture.key_frame or picture.pict_type == PictureType.I


def _with_first(first, rest: Iterator) -> Iterator:
    yield first
    yield from rest


# ----------------------------------------------------------------------------------------------------------------------
# Data that no encoder writes


def _check_of(context: av.VideoCodecContext, first: av.Packet | None):
    """Return a function of a packet that says what is wrong with its data, "" where nothing is to be seen."""
    codec, extra = context.codec.canonical_name, context.extradata or b""
    if codec == "mjpeg" and first is not None and not jpeg_damage(bytes(first)):  # else of a kind that it does not know
        return lambda packet: BROKEN if jpeg_damage(bytes(packet)) else ""
    if codec not in ("h264", "hevc"):
        return lambda packet: ""
    if extra[:1] != b"\1":
        return lambda packet: BROKEN if _NEVER_IN_STREAM.search(bytes(packet)) else ""
    at = 4 if codec == "h264" else 21
    size = (extra[at] & 3) + 1 if len(extra) > at else 4
    return lambda packet: BROKEN if _units_damaged(bytes(packet), size, hevc=codec == "hevc") else ""


def _units_damaged(data: bytes, size: int, *, hevc: bool) -> bool:
    """Tell whether the units of a packet, a length of `size` bytes before each, cannot be what an encoder wrote."""
    place = 0
    while place + size < len(data):
        length = int.from_bytes(data[place : place + size], "big")
        unit = data[place + size : place + size + length]
        place += size + length
        if not length or len(unit) < length:
            return True
        if unit[0] >> 1 & 63 < 32 if hevc else 1 <= unit[0] & 31 <= 5:  # of a picture
            content = unit.rstrip(b"\0")
            if len(unit) - len(content) >= _PADDING or _NEVER.search(content):
                return True
    return False


def jpeg_damage(data: bytes) -> str:
    """Say what libjpeg finds wrong with a JPEG, of which it looks at everything; "" where nothing is."""
    try:
        simplejpeg.decode_jpeg(data, min_height=1, min_width=1, min_factor=1)
    except ValueError as e:
        return str(e)
    return ""
