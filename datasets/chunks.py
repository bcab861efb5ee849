"""Frames of clips for evaluation, each read once, by processes into memory that they share with this one.

Ranks and their reading processes take whole clips, a chunk of frames at a time: however long a clip is, a process is
two chunks ahead at most. One that hangs or dies is replaced, and its clip given up (see parallel.py).
"""

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from datasets.augment.frames import EvalTransform
from datasets.clips import ClipTable, DataError
from datasets.faults import ClipEnd, Fault, FrameGap
from datasets.parallel import READ_TIMEOUT, Child, ReadFailure
from datasets.readers import Reader, open_clip
from datasets.slots import Slots
from datasets.windows import WindowIndex

_AHEAD = 2  # chunks that each reading process has to do
_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class FrameChunk:
    """Some frames of a clip, preprocessed. They hold until the next chunk is asked for.

    clip: number of the clip.
    frame_ids: (n,) source frames, ascending.
    frames: uint8 (n, 3, S, S).
    """

    clip: int
    frame_ids: np.ndarray
    frames: Tensor


def balance(costs: Sequence[int] | np.ndarray, parts: int) -> list[list[int]]:
    """Split items over parts so that the sums of their costs are close (largest first); ascending within a part."""
    heap = [(0, part) for part in range(parts)]
    shares: list[list[int]] = [[] for _ in range(parts)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, part = heapq.heappop(heap)
        shares[part].append(item)
        heapq.heappush(heap, (load + int(costs[item]), part))
    return [sorted(share) for share in shares]


@dataclass(frozen=True)
class _Task:
    """A chunk to read: which of a clip's, whether it is the last, and the slot that it goes into."""

    clip: int
    number: int
    is_last: bool
    slot: int


@dataclass(frozen=True)
class _OpenClip:
    """A clip whose chunks are being read: its reader, and the frames that windows need, as far as there are any."""

    number: int
    reader: Reader
    needed: np.ndarray
    fault: Fault | None


@dataclass(frozen=True)
class _Part:
    """What came of a chunk.

    ids: (n,) frames in the slot, ascending.
    fault: what is wrong with the clip, where this ends it.
    unusable: {frame: why it is not in the slot}, ascending.
    """

    ids: np.ndarray = field(default_factory=lambda: _NONE)
    fault: Fault | None = None
    unusable: dict[int, str] = field(default_factory=dict)


class _Ends:
    """Collects the frames of clips in progress that cannot be used, until these end."""

    def __init__(self, index: WindowIndex, chunk_frames: int):
        self._index, self._chunk_frames = index, chunk_frames
        self._gaps: dict[int, list[FrameGap]] = {}
        self._needed: dict[int, np.ndarray] = {}  # of clips with gaps
        self._ended: set[int] = set()

    def after(self, task: _Task, part: _Part) -> Iterator[ClipEnd]:
        """Yield the end of the clip where a chunk is its last, or what is wrong with it makes it so."""
        clip, fault = task.clip, part.fault
        if clip in self._ended:
            return
        for frame, reason in part.unusable.items():
            self._add(FrameGap(clip, frame, frame + 1, reason))
        given_up = fault is not None and not fault.frames
        if fault:
            first = int(self._needed_of(clip)[task.number * self._chunk_frames]) if given_up else fault.frames
            if first < self._index.frame_counts[clip]:  # else it holds more frames than it should
                self._add(FrameGap(clip, first, int(self._index.frame_counts[clip]), fault.reason))
        if given_up or task.is_last:
            self._ended.add(clip)
            self._needed.pop(clip, None)
            yield ClipEnd(clip, tuple(self._gaps.pop(clip, ())), fault)

    def _needed_of(self, clip: int) -> np.ndarray:
        if clip not in self._needed:
            self._needed[clip] = self._index.needed_frames(clip)
        return self._needed[clip]

    def _add(self, gap: FrameGap) -> None:
        """Add a gap to those of its clip; one with the last of them where no needed frame lies between."""
        gaps, needed = self._gaps.setdefault(gap.clip, []), self._needed_of(gap.clip)
        if gaps and not np.diff(np.searchsorted(needed, (gaps[-1].end, gap.first)))[0]:
            gap = replace(gaps.pop(), end=gap.end)
        gaps.append(gap)


class ClipStream:
    """FrameChunks of this rank's clips, each needed frame once, the chunks of a clip in order, as often as asked.

    A clip that cannot be read, or holds more or fewer frames than it should, ends with a Fault. With `gaps`, frames
    that cannot be used are left out, and those that damage may have touched (see datasets/video_sound.py); reading goes
    on after them, and each clip ends with a ClipEnd, which names them and has the Fault. Reading processes take turns,
    so that the same number of them yields the same order.

    Args:
        chunk_frames: frames of a chunk.
        num_workers: reading processes at most; 0: this one reads.
        pin_memory: whether the memory of chunks is page-locked for copies to a CUDA device.
        read_timeout: seconds without a picture read after which a reading process gives a clip up as unreadable.
        gaps: whether frames that cannot be used are left out.
    """

    def __init__(
        self,
        clips: ClipTable,
        index: WindowIndex,
        transform: EvalTransform,
        *,
        chunk_frames: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        read_timeout: float = READ_TIMEOUT,
        gaps: bool = False,
    ):
        self.clips, self.index, self.transform, self.chunk_frames = clips, index, transform, chunk_frames
        self.pin_memory, self.read_timeout, self.gaps = pin_memory, read_timeout, gaps
        costs = np.where(index.counts > 0, index.frame_counts, 0)
        self.share = [c for c in balance(costs, world_size)[rank] if costs[c]]
        self.num_workers = min(num_workers, len(self.share))
        self._open: _OpenClip | None = None  # in the process that reads
        self._broken: int | None = None  # the clip that could not be read last, there too

    @property
    def num_chunks(self) -> int:
        """Chunks this rank will see."""
        return sum(map(self._chunks_of, self.share))

    @cached_property
    def slots(self) -> Slots:
        """Where the chunks are made."""
        count = _AHEAD * self.num_workers or 1
        remedy = "use a smaller --eval_batch_size, or fewer --num_workers"
        what = f"{self.chunk_frames} frames in evaluation have"
        return Slots(count, self.transform.shape(self.chunk_frames), pin=self.pin_memory, what=what, remedy=remedy)

    def __iter__(self) -> Iterator[FrameChunk | Fault | ClipEnd]:
        self.slots.make()  # before a process is forked
        ends = _Ends(self.index, self.chunk_frames) if self.gaps else None
        for task, part in self._from_processes() if self.num_workers else self._from_here():
            if len(part.ids):
                yield FrameChunk(task.clip, part.ids, self.slots[task.slot][: len(part.ids)])
            if ends:
                yield from ends.after(task, part)
            elif part.fault:
                yield part.fault

    def _from_here(self) -> Iterator[tuple[_Task, _Part]]:
        try:
            for clip in self.share:
                for number, is_last in self._numbered(clip):
                    task = _Task(clip, number, is_last, slot=0)
                    for part in self._read(task):
                        yield task, part
        finally:
            self._close()

    def _from_processes(self) -> Iterator[tuple[_Task, _Part]]:
        parts = balance(self.index.frame_counts[self.share], self.num_workers)
        lines = deque(_Line(self, [self.share[i] for i in part]) for part in parts)
        every = list(lines)
        try:
            for slot in range(self.slots.count):
                every[slot % len(every)].go_on(slot)
            while lines:
                line = lines.popleft()
                if line.tasks:
                    task, part = line.receive()
                    yield task, part
                    line.go_on(task.slot)
                    lines.append(line)
        finally:
            for line in every:
                line.child.kill()

    def _chunks_of(self, clip: int) -> int:
        return -(-len(self.index.needed_frames(clip)) // self.chunk_frames)

    def _numbered(self, clip: int) -> Iterator[tuple[int, bool]]:
        """Yield the number of each chunk of a clip, and whether it is the last."""
        count = self._chunks_of(clip)
        return ((number, number == count - 1) for number in range(count))

    def _read(self, task: _Task) -> Iterator[_Part]:
        """Read a chunk into its slot; yield what came of it.

        Runs where reading is done, which keeps the clip open for its next chunk. Nothing follows what cannot be read.
        """
        part = _Part()
        if task.number == 0:
            self._broken = None
        try:
            if task.clip != self._broken:
                opened = self._opened(task.clip)
                first = task.number * self.chunk_frames
                ids = opened.needed[first : first + self.chunk_frames]
                fault = opened.fault if task.is_last else None
                if self.gaps:
                    part = self._read_sound(opened, ids, fault, task.slot)
                else:
                    self.transform(opened.reader.frames(ids), self.slots[task.slot])
                    part = _Part(ids, fault)
        except DataError as e:
            self._broken = task.clip
            part = _Part(fault=Fault(task.clip, self.clips[task.clip].name, str(e)))
        if part.fault or task.is_last:
            self._close()
        yield part

    def _read_sound(self, opened: _OpenClip, ids: np.ndarray, fault: Fault | None, slot: int) -> _Part:
        """Read those of the frames that can be used into a slot."""
        unusable: dict[int, str] = {}

        def usable() -> Iterator[Tensor]:
            for frame, picture in zip(ids.tolist(), opened.reader.sound_frames(ids, opened.needed), strict=True):
                if isinstance(picture, str):
                    unusable[frame] = picture
                else:
                    yield picture

        self.transform(usable(), self.slots[slot])
        return _Part(np.setdiff1d(ids, list(unusable)) if unusable else ids, fault, unusable)

    def _opened(self, number: int) -> _OpenClip:
        """Return a clip, opened unless it is open. Raises DataError where there is nothing of it."""
        if self._open is None or self._open.number != number:
            self._close()
            reader = open_clip(self.clips[number])
            needed, fault = self.index.needed_frames(number), None
            self._open = _OpenClip(number, reader, needed, fault)
            mismatch, usable = reader.mismatch(), reader.usable_frames()
            if not usable:
                raise DataError(mismatch)
            if mismatch:
                fault = Fault(number, self.clips[number].name, mismatch, usable)
            self._open = _OpenClip(number, reader, needed[needed < usable], fault)
        return self._open

    def _close(self) -> None:
        if self._open:
            self._open.reader.close()
        self._open = None


class _Line:
    """What a reading process has to do: the chunks of its clips, as slots come free.

    tasks: that it was sent, and has not answered.
    """

    def __init__(self, stream: ClipStream, clips: list[int]):
        self.child = Child(stream._read, stream.read_timeout)
        self.tasks: deque[_Task] = deque()
        self._stream, self._unreadable = stream, None
        self._to_come = ((clip, *numbered) for clip in clips for numbered in stream._numbered(clip))

    def go_on(self, slot: int) -> None:
        """Have the next chunk read into a slot, if there is one."""
        for clip, number, is_last in self._to_come:
            if clip != self._unreadable:
                self._send(_Task(clip, number, is_last, slot))
                return

    def receive(self) -> tuple[_Task, _Part]:
        """Wait for the first of `tasks`; return it and what came of it."""
        known = self.tasks[0].clip == self._unreadable
        part = self._answer()
        task = self.tasks.popleft()
        if known:
            return task, _Part()
        if part.fault and not part.fault.frames:
            self._unreadable = task.clip
        return task, part

    def _answer(self) -> _Part:
        try:
            while True:
                kind, value = self.child.receive()
                if kind == "result":
                    return value
        except ReadFailure as e:
            return _Part(fault=self._give_up(str(e)))

    def _give_up(self, reason: str) -> Fault:
        """Return the Fault of a clip whose reading ended the process; another one goes on with the clips after it."""
        self.child.kill()  # the one that goes on with the same clip
        first, *rest = self.tasks
        self._unreadable = first.clip
        self.tasks = deque([first])
        others = [task for task in rest if task.clip != first.clip]
        for task in others:
            self._send(task)
        for task in rest[: len(rest) - len(others)]:  # they come first
            self.go_on(task.slot)
        return Fault(first.clip, self._stream.clips[first.clip].name, reason)

    def _send(self, task: _Task) -> None:
        self.tasks.append(task)
        self.child.send(task)
