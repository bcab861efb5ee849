"""Batches of training windows, read by processes into memory that they share with this one.

A few batches are in the making at a time, each in a slot of memory of its final shape, which is kept and used again.
Every process takes windows of any of them, so the memory needed does not grow with the processes, and a window that
takes long holds up no other. A process that hangs or dies is replaced, and its window skipped (see parallel.py).
"""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from datasets.faults import Fault
from datasets.loader import EpochSampler, Key, WindowDataset
from datasets.parallel import READ_TIMEOUT, Child, ReadFailure, ready
from datasets.slots import Slots
from utils.signals import stop_requested

_AHEAD = 2  # windows at least that each process has to do


@dataclass
class _Batch:
    """A batch in the making.

    slot: where its video is.
    keys: its windows.
    samples: what there is of each.
    """

    slot: int
    keys: list[Key]
    samples: list[dict[str, Any] | Fault | None] = field(default_factory=list)

    def __post_init__(self):
        self.samples = [None] * len(self.keys)


class BatchLoader:
    """The batches of the sampler's epoch, as often as asked; reading processes live on from epoch to epoch.

    A batch is a dictionary: "video" uint8 (B, T, H, W, 3); what `WindowDataset.fill` returns, joined; "samples" says
    which windows they are, "skipped" lists the Faults of those that could not be read, "notes" further Faults.
    "weight" of the loss is 1.0, or 0.0 where none could be read: the video is black then, since each process needs a
    gradient, if of nothing.

    A batch is valid until the next one is asked for, which may overwrite its video. `waited` adds up the seconds for
    which this process had nothing to do but wait for windows to be read.

    Args:
        sampler: yields the windows of each batch, the same number for all.
        num_workers: reading processes; 0: this one.
        together: whether neighbours in a batch may be windows of one clip, which are read together then.
        pin_memory: whether the memory is page-locked for copies to a CUDA device.
        read_timeout: seconds without a picture read after which a reading process gives a window up as unreadable.
    """

    def __init__(
        self,
        dataset: WindowDataset,
        sampler: EpochSampler | Sequence[list[Key]],
        *,
        num_workers: int,
        together: bool = False,
        pin_memory: bool = False,
        read_timeout: float = READ_TIMEOUT,
    ):
        self.dataset, self.sampler, self.pin_memory = dataset, sampler, pin_memory
        self._groups = dataset.together if together else lambda keys: [[place] for place in range(len(keys))]
        self._children = [Child(self._work, read_timeout) for _ in range(num_workers)]
        self._tasks: dict[Child, deque[tuple[_Batch, int]]] = {child: deque() for child in self._children}
        self._failing: set[Child] = set()  # whose last window was none
        self.waited = 0.0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.slots.make()  # before a process is forked
        return self._from_processes() if self._children else self._from_here()

    @cached_property
    def slots(self) -> Slots:
        """Where the batches are made, each of as many windows as the first."""
        size = len(next(iter(self.sampler), ())) or 1
        count = 2 + math.ceil(_AHEAD * len(self._children) / size) if self._children else 1
        remedy = "use a smaller --batch_size, with a larger --update_freq for the same step, or fewer --num_workers"
        shape = (size, *self.dataset.shape)
        return Slots(count, shape, pin=self.pin_memory, what="a batch has", remedy=remedy)

    def _from_here(self) -> Iterator[dict[str, Any]]:
        for keys in self.sampler:
            asked = time.perf_counter()
            samples = list(self._filled(keys, self.slots[0]))
            self.waited += time.perf_counter() - asked
            yield self._joined(keys, samples, self.slots[0])

    def _from_processes(self) -> Iterator[dict[str, Any]]:
        making: deque[_Batch] = deque()
        free = deque(range(self.slots.count))
        to_come = iter(self.sampler)
        try:
            while True:
                while free and (keys := next(to_come, None)) is not None:
                    making.append(_Batch(free.popleft(), keys))
                    self._assign(making[-1])
                if not making:
                    return
                batch, asked = making[0], time.perf_counter()
                while None in batch.samples:
                    self._receive()
                self.waited += time.perf_counter() - asked
                yield self._joined(batch.keys, batch.samples, self.slots[batch.slot])
                making.popleft()
                free.append(batch.slot)
        finally:
            if making:  # left in the middle: nobody may write into the slots any more
                self.close()

    def close(self) -> None:
        """End the reading processes; another iteration starts new ones."""
        for child in self._children:
            child.kill()
            self._tasks[child].clear()
        self._failing.clear()

    def _assign(self, batch: _Batch) -> None:
        """Distribute the windows of a batch over the processes, each to that with the fewest to do."""
        share: dict[Child, list[int]] = {}
        for places in self._groups(batch.keys):
            child = min(self._children, key=lambda c: len(self._tasks[c]))
            self._tasks[child].extend((batch, place) for place in places)
            share.setdefault(child, []).extend(places)
        for child, places in share.items():
            self._send(child, batch, places)

    def _send(self, child: Child, batch: _Batch, places: list[int]) -> None:
        child.send((batch.slot, [(place, batch.keys[place]) for place in places]))

    def _work(self, task: tuple[int, list[tuple[int, Key]]]) -> Iterator[dict[str, Any] | Fault]:
        """Read windows into their places. Runs in the reading process."""
        slot, windows = task
        places, keys = zip(*windows, strict=True)
        yield from self._filled(keys, [self.slots[slot][place] for place in places])

    def _filled(self, keys: Sequence[Key], outs: Sequence[Tensor]) -> Iterator[dict[str, Any] | Fault]:
        for places in self._groups(keys):
            yield from self.dataset.fill_together([keys[i] for i in places], [outs[i] for i in places])

    def _receive(self) -> None:
        """Wait for a message of any process and note what it says."""
        for child in ready([child for child in self._children if self._tasks[child]]):
            try:
                kind, value = child.receive()
            except ReadFailure as e:
                self._skip(child, str(e))
                continue
            if kind == "result":
                batch, place = self._tasks[child].popleft()
                batch.samples[place] = value
                self._failing.discard(child)

    def _skip(self, child: Child, reason: str) -> None:
        """Note the end of a process in the middle of a window; the rest of what it was sent with that comes last.

        A run that is to stop does not wait for one window after the other of what cannot be read: after the second in a
        row, all that this process has to do is skipped.
        """
        tasks = self._tasks[child]
        batch, place = tasks.popleft()
        batch.samples[place] = self.dataset.fault(batch.keys[place], reason)
        if child in self._failing and stop_requested():
            child.kill()
            reason = f"not tried, since the run is to stop and those before failed ({reason})"
            for batch, place in tasks:
                batch.samples[place] = self.dataset.fault(batch.keys[place], reason)
            tasks.clear()
        self._failing.add(child)
        rest = []
        while tasks and tasks[0][0] is batch and tasks[0][1] > place:
            rest.append(tasks.popleft())
        if rest:
            tasks.extend(rest)
            self._send(child, batch, [place for _, place in rest])

    def _joined(self, keys: list[Key], samples: Sequence[dict[str, Any] | Fault], video: Tensor) -> dict[str, Any]:
        """Return a batch of those samples that are none of the Faults, their views side by side."""
        faults = [sample for sample in samples if isinstance(sample, Fault)]
        read = [sample for sample in samples if not isinstance(sample, Fault)]
        if not read:
            video, read = video[:1], [self.dataset.fill_black(keys[0], video[0])]
        elif faults:
            video = video[torch.tensor([not isinstance(sample, Fault) for sample in samples])]
        names = [name for sample in read if (name := sample["sample"])]
        notes = [note for sample in read for note in sample["notes"]]
        tensors = read[0].keys() - {"sample", "notes"}
        batch = {name: torch.cat([sample[name] for sample in read]) for name in sorted(tensors)}
        batch |= {"video": video.flatten(0, 1), "samples": names, "skipped": faults, "notes": notes}
        return batch | {"weight": float(bool(names))}


def example_batch(
    dataset: WindowDataset, count: int, *, num_workers: int, read_timeout: float
) -> tuple[dict[str, Any], list[str]]:
    """Return the same few samples at every call, in turn of each source, as a BatchLoader does, and their names.

    Clips that cannot be read stand neither in the batch nor in the names; a batch of none has one name that says so.
    """
    keys, sources = [], dataset.sources
    for k in range(count):
        number = k % len(sources)
        keys.append((0, number, k, (2 * k + 1) * len(sources[number].index) // (2 * count)))
    loader = BatchLoader(dataset, [keys], num_workers=min(num_workers, 1), read_timeout=read_timeout)
    (batch,) = loader
    loader.close()
    shown = zip(batch["source"].tolist(), batch["window"].tolist(), strict=True)
    names = [f"{s.clips.name}, {s.clips[s.index.clip_of(w)].name}" for s, w in ((sources[n], w) for n, w in shown)]
    if not batch["samples"]:
        names = ["none of the clips to show can be read"]
    return batch, names
