"""Evaluation: every frame of a clip read once, every window of a split handed out once over all ranks."""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datasets.augment.frames import EvalTransform
from datasets.clips import ClipTable, DataError
from datasets.faults import Fault, settle_faults
from datasets.readers import open_clip
from datasets.windows import WindowIndex
from utils.logging import progress_bar
from utils.signals import shield_worker


@dataclass(frozen=True)
class FrameChunk:
    """Some frames of a clip, preprocessed: frame_ids (n,) source frames, ascending; frames uint8 (n, 3, S, S)."""

    clip: int
    frame_ids: np.ndarray
    frames: Tensor

    def pin_memory(self) -> "FrameChunk":
        return FrameChunk(self.clip, self.frame_ids, self.frames.pin_memory())


@dataclass(frozen=True)
class WindowBatch:
    """Windows of one clip on the device: video uint8 (n, 3, T, S, S), last (n,) their last source frames."""

    clip: int
    last: np.ndarray
    video: Tensor


def balance(costs: Sequence[int] | np.ndarray, parts: int) -> list[list[int]]:
    """Split items over parts so that the sums of their costs are close (largest first); ascending within a part."""
    heap = [(0, part) for part in range(parts)]
    shares: list[list[int]] = [[] for _ in range(parts)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, part = heapq.heappop(heap)
        shares[part].append(item)
        heapq.heappush(heap, (load + int(costs[item]), part))
    return [sorted(share) for share in shares]


class ClipStream(IterableDataset):
    """FrameChunks of this rank's clips, each needed frame once, the chunks of a clip in order.

    A clip that cannot be read, or holds more or fewer frames than it should, ends with a Fault.
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
    ):
        self.clips, self.index, self.transform, self.chunk_frames = clips, index, transform, chunk_frames
        costs = np.where(index.counts > 0, index.frame_counts, 0)
        self.share = [c for c in balance(costs, world_size)[rank] if costs[c]]

    @property
    def num_chunks(self) -> int:
        """Chunks this rank will see."""
        return sum(-(-len(self.index.needed_frames(c)) // self.chunk_frames) for c in self.share)

    def __iter__(self) -> Iterator[FrameChunk | Fault]:
        worker = get_worker_info()
        share = self.share
        if worker:
            own = balance(self.index.frame_counts[share], worker.num_workers)[worker.id]
            share = [share[i] for i in own]
        for number in share:
            try:
                yield from self._chunks(number)
            except DataError as e:
                yield Fault(number, self.clips[number].name, str(e))

    def _chunks(self, number: int) -> Iterator[FrameChunk | Fault]:
        clip, needed = self.clips[number], self.index.needed_frames(number)
        with open_clip(clip) as reader:
            mismatch, usable = reader.mismatch(), reader.usable_frames()
            if not usable:
                raise DataError(mismatch)
            needed = needed[needed < usable]
            for first in range(0, len(needed), self.chunk_frames):
                ids = needed[first : first + self.chunk_frames]
                yield FrameChunk(number, ids, self.transform(reader.frames(ids)))
        if mismatch:
            yield Fault(number, clip.name, mismatch, usable)


def eval_loader(stream: ClipStream, *, num_workers: int, pin_memory: bool) -> DataLoader:
    """The FrameChunks of a ClipStream, read by workers."""
    workers = min(num_workers, max(len(stream.share), 1))
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        worker_init_fn=shield_worker,
    )


def window_batches(
    chunks: Iterable[FrameChunk | Fault],
    index: WindowIndex,
    *,
    batch_size: int,
    device: torch.device | str,
    faults: list[Fault] | None = None,
    allow_missing: bool = False,
) -> Iterator[WindowBatch]:
    """Gather the windows of a stream of chunks on the device, batch_size at most at a time, each window once.

    Chunks of different clips may alternate. Frames are kept until the last window that needs them. Faults are added to
    `faults`; after the first clip that cannot be read, unless allow_missing, the stream is read on to find the others,
    but no window follows. Without a list for them, a clip that cannot be read raises DataError.
    """
    kept: dict[int, tuple[np.ndarray, Tensor]] = {}
    done: dict[int, int] = {}  # windows of the clip handed out so far
    for chunk in chunks:
        if isinstance(chunk, Fault):
            if faults is None and not chunk.frames:
                raise DataError(str(chunk))
            faults = [] if faults is None else faults
            faults.append(chunk)
            kept.pop(chunk.number, None)
            continue
        if faults and not allow_missing and any(not fault.frames for fault in faults):
            continue
        ids, frames = chunk.frame_ids, chunk.frames.to(device, non_blocking=True)
        if chunk.clip in kept:
            ids = np.concatenate([kept[chunk.clip][0], ids])
            frames = torch.cat([kept[chunk.clip][1], frames])
        lasts = index.last_frames(chunk.clip)
        first, end = done.get(chunk.clip, 0), int(np.searchsorted(lasts, ids[-1], side="right"))
        for start in range(first, end, batch_size):
            last = lasts[start : min(start + batch_size, end)]
            where = torch.from_numpy(np.searchsorted(ids, index.frames(chunk.clip, last))).to(device, non_blocking=True)
            yield WindowBatch(chunk.clip, last, frames[where].transpose(1, 2))
        done[chunk.clip] = end
        if end < len(lasts):
            keep = int(np.searchsorted(ids, index.frames(chunk.clip, lasts[end])[0]))
            kept[chunk.clip] = ids[keep:], frames[keep:]
        else:
            kept.pop(chunk.clip, None)


class SplitWindows:
    """The windows of a split, for evaluation as often as asked.

    Args:
        batch_size: windows, and frames read at a time. allow_missing: go on where clips cannot be read.

    faults: what is known to be wrong with clips, after `settle`. Raises DataError where some clips are known to be
    unreadable, unless allow_missing.
    """

    def __init__(
        self,
        clips: ClipTable,
        index: WindowIndex,
        transform: EvalTransform,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        pin_memory: bool,
        allow_missing: bool,
    ):
        self.clips, self.index, self.batch_size, self.allow_missing = clips, index, batch_size, allow_missing
        self.num_workers, self.pin_memory, self.show_progress = num_workers, pin_memory, rank == 0
        self.stream = ClipStream(clips, index, transform, chunk_frames=batch_size, rank=rank, world_size=world_size)
        self.faults: list[Fault] = []
        self.settle()

    def batches(self, device: torch.device) -> Iterator[WindowBatch]:
        """This rank's windows; `settle` must follow."""
        self.faults = []
        loader = eval_loader(self.stream, num_workers=self.num_workers, pin_memory=self.pin_memory)
        chunks = progress_bar(
            loader, total=self.stream.num_chunks, description="evaluation", enabled=self.show_progress
        )
        yield from window_batches(
            chunks,
            self.index,
            batch_size=self.batch_size,
            device=device,
            faults=self.faults,
            allow_missing=self.allow_missing,
        )

    def settle(self) -> dict[int, int]:
        """Gather the faults of all ranks; returns {clip: frames that can be used} of the clips that have one.

        Every rank calls it. Raises DataError as `settle_faults` does.
        """
        self.faults = settle_faults(self.faults, self.clips, allow_missing=self.allow_missing)
        return {fault.number: fault.frames for fault in self.faults}
