"""Samples in a reproducible order for training, and a stream of clips decoded once for evaluation.

Training. The order of an epoch is a permutation that depends on (seed, epoch) alone. Step t takes the t-th slice of
it, each rank its share of the slice; a sample's augmentation depends on (seed, epoch, position in the order). So the
content of a batch depends neither on workers nor on ranks, and resuming at step t means starting at slice t.

Evaluation. Ranks and their workers take whole clips. A worker decodes each frame that any window needs once and sends
it as uint8; windows are gathered on the device, for one clip at a time, so that the scores of a clip do not depend on
how many workers or ranks there are.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from datasets.clips import ClipTable, DataError, smooth_labels
from datasets.readers import open_clip
from datasets.transforms import EvalTransform
from datasets.windows import WindowIndex

Key = tuple[int, int, int]  # (epoch, position in the epoch's order, window)


class EpochSampler(Sampler[list[Key]]):
    """The batches of one rank: lists of (epoch, position, window), one list for each forward pass.

    Args:
        num_windows: windows to draw from. batch_size: per rank and forward pass. accumulate: forward passes per step.
        samples_per_epoch: windows drawn each epoch, without replacement; 0 or more than num_windows: all of them.
            What does not fill a last step is left out.

    Raises DataError where an epoch has less than one step.
    """

    def __init__(
        self,
        num_windows: int,
        *,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        samples_per_epoch: int = 0,
        seed: int = 0,
    ):
        self.num_windows, self.batch_size, self.accumulate = num_windows, batch_size, accumulate
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.samples = min(samples_per_epoch or num_windows, num_windows)
        self.step_size = batch_size * world_size * accumulate
        self.steps_per_epoch = self.samples // self.step_size
        self.epoch, self.start_step = 0, 0
        if not self.steps_per_epoch:
            raise DataError(
                f"an epoch of {self.samples} windows is less than one step of {self.step_size}: use a smaller batch"
            )

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """The epoch the next iteration yields, from step start_step on."""
        self.epoch, self.start_step = epoch, start_step

    def order(self, epoch: int) -> np.ndarray:
        """(samples,) windows of an epoch, over all ranks. O(samples) memory, however many windows there are."""
        rng = np.random.default_rng([self.seed, epoch])
        return rng.choice(self.num_windows, size=self.samples, replace=False)

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = self.epoch, self.order(self.epoch)
        for step in range(self.start_step, self.steps_per_epoch):
            for micro in range(self.accumulate):
                first = step * self.step_size + (micro * self.world_size + self.rank) * self.batch_size
                yield [(epoch, i, int(order[i])) for i in range(first, first + self.batch_size)]


class WindowDataset(Dataset):
    """Training windows: (epoch, position, window) -> a dictionary of tensors with a leading axis of V views.

    What `transform(frames, rng)` returns, with window int64 (V,) and, of the last frame of a labelled clip, label
    int64, ttc and soft_label float32 (V,). A DataError is returned, not raised, so that the main process reports it
    instead of a worker's traceback.
    """

    def __init__(
        self,
        clips: ClipTable,
        index: WindowIndex,
        transform: Callable[[Iterable[Tensor], np.random.Generator], dict[str, Tensor]],
        *,
        seed: int,
    ):
        self.clips, self.index, self.transform, self.seed = clips, index, transform, seed

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: Key) -> dict[str, Tensor] | DataError:
        epoch, position, window = key
        number, frames = self.index[window]
        clip = self.clips[number]
        try:
            with open_clip(clip) as reader:
                sample = self.transform(reader.frames(frames), np.random.default_rng([self.seed, epoch, position]))
        except DataError as e:
            return DataError(f"{clip.name}: {e}")
        views = len(sample["video"])
        sample["window"] = torch.full((views,), window)
        if clip.labels is not None:
            last, ttc = frames[-1], clip.ttc
            sample["label"] = torch.full((views,), int(clip.labels[last]))
            sample["ttc"] = torch.full((views,), float(ttc[last]))
            sample["soft_label"] = torch.full((views,), float(smooth_labels(clip.labels, ttc)[last]))
        return sample


def collate(items: Sequence[dict[str, Tensor] | DataError]) -> dict[str, Tensor] | DataError:
    """Samples -> one batch, their views side by side; the first DataError if there is one."""
    error = next((item for item in items if isinstance(item, DataError)), None)
    return error or {name: torch.cat([item[name] for item in items]) for name in items[0]}


def train_loader(dataset: WindowDataset, sampler: EpochSampler, *, num_workers: int, pin_memory: bool) -> DataLoader:
    """Batches of the sampler's epoch; workers live on from epoch to epoch."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )


def checked(batches: Iterable) -> Iterator:
    """Pass batches on; raise the DataError that a worker sent in place of one."""
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


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

    A DataError is yielded, not raised; the stream of that worker ends there.
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

    def __iter__(self) -> Iterator[FrameChunk | DataError]:
        worker = get_worker_info()
        share = self.share
        if worker:
            own = balance(self.index.frame_counts[share], worker.num_workers)[worker.id]
            share = [share[i] for i in own]
        for number in share:
            try:
                yield from self._chunks(number)
            except DataError as e:
                yield e
                return

    def _chunks(self, number: int) -> Iterator[FrameChunk]:
        needed = self.index.needed_frames(number)
        with open_clip(self.clips[number]) as reader:
            for first in range(0, len(needed), self.chunk_frames):
                ids = needed[first : first + self.chunk_frames]
                yield FrameChunk(number, ids, self.transform(reader.frames(ids)))


def eval_loader(stream: ClipStream, *, num_workers: int, pin_memory: bool) -> DataLoader:
    """The FrameChunks of a ClipStream, read by workers."""
    workers = min(num_workers, max(len(stream.share), 1))
    return DataLoader(stream, batch_size=None, num_workers=workers, pin_memory=pin_memory)


def window_batches(
    chunks: Iterable[FrameChunk], index: WindowIndex, *, batch_size: int, device: torch.device | str
) -> Iterator[WindowBatch]:
    """Gather the windows of a stream of chunks on the device, batch_size at most at a time, each window once.

    Chunks of different clips may alternate. Frames are kept until the last window that needs them.
    """
    kept: dict[int, tuple[np.ndarray, Tensor]] = {}
    done: dict[int, int] = {}  # windows of the clip handed out so far
    for chunk in checked(chunks):
        ids, frames = chunk.frame_ids, chunk.frames.to(device, non_blocking=True)
        if chunk.clip in kept:
            ids = np.concatenate([kept[chunk.clip][0], ids])
            frames = torch.cat([kept[chunk.clip][1], frames])
        lasts = index.last_frames(chunk.clip)
        first, end = done.get(chunk.clip, 0), int(np.searchsorted(lasts, ids[-1], side="right"))
        for start in range(first, end, batch_size):
            last = lasts[start : min(start + batch_size, end)]
            where = torch.from_numpy(np.searchsorted(ids, index.frames(chunk.clip, last))).to(device)
            yield WindowBatch(chunk.clip, last, frames[where].transpose(1, 2))
        done[chunk.clip] = end
        if end < len(lasts):
            keep = int(np.searchsorted(ids, index.frames(chunk.clip, lasts[end])[0]))
            kept[chunk.clip] = ids[keep:], frames[keep:]
        else:
            kept.pop(chunk.clip, None)
