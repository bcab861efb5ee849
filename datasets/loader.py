"""Samples in a reproducible order, for training.

The order of an epoch is a permutation that depends on (seed, epoch) alone, one for each data set of a mix. Step t takes
the t-th slice of it, each rank its share of the slice; a sample's augmentation depends on (seed, epoch, data set,
position in the order). So the content of a batch depends neither on workers nor on ranks, and resuming at step t means
starting at slice t.

What cannot be read comes out as a Fault, not as an exception: training skips the sample and counts it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from datasets.augment.frames import Fit, Read
from datasets.clips import Clip, ClipTable, DataError
from datasets.faults import Fault
from datasets.labels import smooth_labels
from datasets.readers import Reader, open_clip
from datasets.windows import RandomClipIndex, WindowIndex

_ORDER, _SAMPLE = 1, 2  # end the seeds of the orders and of the samples, so that none is shared
Key = tuple[int, int, int, int]  # (epoch, source, position in the source's order of the epoch, window)


class Transform(Protocol):
    """What is done to the frames of a window in a worker; `FinetuneTransform` is one."""

    def shape(self, frames: int) -> tuple[int, ...]:
        """Return the shape of the video of a window of so many frames: (V, frames, H, W, 3)."""

    def __call__(self, read: Read, rng: np.random.Generator, out: Tensor, *, aspect: float | None) -> dict[str, Tensor]:
        """Write V views of the frames into out; return what else a batch has of them, each (V, ...)."""


@dataclass(frozen=True)
class Source:
    """One of the data sets of a mix: its clips, their windows, and what is done to them."""

    clips: ClipTable
    index: WindowIndex | RandomClipIndex
    transform: Transform


class EpochSampler:
    """The batches of one rank: lists of (epoch, source, position, window), one list for each forward pass.

    Every batch holds batch_sizes[k] windows of source k, source after source. A source that is too small for an epoch
    is gone through again, in another order.

    Args:
        num_windows: windows to draw from, for each source.
        batch_sizes: of each source, per rank and forward pass.
        accumulate: forward passes per step.
        samples_per_epoch: windows of all sources together; 0, or more than the longest source can give: once through
            that one. What does not fill a last step is left out.
        together: windows that follow each other in the order and, in their clips, each other at a distance of `apart`,
            so that they can be read together; 1: the order is left to chance alone.
        apart: that distance for each source, in windows.

    Raises DataError where an epoch has less than one step.
    """

    def __init__(
        self,
        num_windows: Sequence[int],
        *,
        batch_sizes: Sequence[int],
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        samples_per_epoch: int = 0,
        seed: int = 0,
        together: int = 1,
        apart: Sequence[int] = (),
    ):
        self.together, self.apart = together, list(apart)
        self.num_windows, self.batch_sizes, self.accumulate = list(num_windows), list(batch_sizes), accumulate
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.step_sizes = [b * world_size * accumulate for b in batch_sizes]
        steps = max(n // step for n, step in zip(self.num_windows, self.step_sizes, strict=True))
        self.steps_per_epoch = min(samples_per_epoch // sum(self.step_sizes), steps) if samples_per_epoch else steps
        self.epoch, self.start_step = 0, 0
        if not self.steps_per_epoch:
            samples = min(samples_per_epoch or sum(self.num_windows), sum(self.num_windows))
            raise DataError(
                f"an epoch of {samples} windows is less than one step of {sum(self.step_sizes)}: use a smaller batch"
            )

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Announce the epoch that the next iteration yields, from step start_step on."""
        self.epoch, self.start_step = epoch, start_step

    def order(self, epoch: int, source: int = 0) -> np.ndarray:
        """Return the (samples,) windows of a source in an epoch, over all ranks, in O(samples) memory."""
        rng = np.random.default_rng([epoch, source, self.seed, _ORDER])
        number, missing = self.num_windows[source], self.steps_per_epoch * self.step_sizes[source]
        passes = []
        while missing:
            size = min(missing, number)
            if self.together > 1:
                passes.append(grouped_order(number, self.together, self.apart[source], rng)[:size])
            else:
                passes.append(rng.choice(number, size=size, replace=False))
            missing -= size
        return np.concatenate(passes)

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, orders = self.epoch, [self.order(self.epoch, source) for source in range(len(self.num_windows))]
        for step in range(self.start_step, self.steps_per_epoch):
            for micro in range(self.accumulate):
                batch = []
                for source, size in enumerate(self.batch_sizes):
                    first = step * self.step_sizes[source] + (micro * self.world_size + self.rank) * size
                    batch += [(epoch, source, i, int(orders[source][i])) for i in range(first, first + size)]
                yield batch


def grouped_order(number: int, together: int, apart: int, rng: np.random.Generator) -> np.ndarray:
    """Return a permutation of 0 .. number - 1, (number,) int64: groups in random order, of members `apart` each.

    Where a group ends is drawn too; at either end of the numbers groups may be smaller.
    """
    block = together * apart
    first = int(rng.integers(block))  # of the numbers, within its block
    groups = np.arange(-(-(first + number) // block) * block).reshape(-1, together, apart).swapaxes(1, 2)
    order = rng.permutation(groups.reshape(-1, together)).reshape(-1) - first
    return order[(order >= 0) & (order < number)]


class WindowDataset:
    """Training windows by (epoch, source, position, window).

    shape: (V, T, H, W, 3) of the uint8 video of a window, the same for all sources; a smaller one lies in its corner.

    Raises DataError where targets are asked of unlabelled clips.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int, targets: bool):
        self.sources, self.seed, self.targets = list(sources), seed, targets
        for source in self.sources if targets else ():
            source.clips.require_labels()
        shapes = [source.transform.shape(source.index.num_frames) for source in self.sources]
        self.shape = tuple(max(sizes) for sizes in zip(*shapes, strict=True))

    def fill(self, key: Key, out: Tensor) -> dict[str, Any] | Fault:
        """Write the video of a window into out, uint8 of `shape`; return what else there is of it.

        That is what the source's transform returns, with source and window int64 (V,) and, with targets, of the last
        frame label int64, ttc and soft_label float32 (V,); "sample" says which it is, in words, and "notes" lists a
        Fault where the source holds more or fewer frames than the clip. A window that cannot be read is a Fault itself.
        """
        return self.fill_together([key], [out])[0]

    def fill_together(self, keys: Sequence[Key], outs: Sequence[Tensor]) -> list[dict[str, Any] | Fault]:
        """Do what `fill` does for windows of one clip, whose frames are read once."""
        drawn = [self._draw(key) for key in keys]
        source, _, number, _ = drawn[0]
        clip = source.clips[number]
        try:
            with open_clip(clip) as reader:
                mismatch, usable = reader.mismatch(), reader.usable_frames()
                ids = [frames for *_, frames in drawn if frames[-1] < usable]
                read = reader.frames if len(ids) < 2 else _shared_frames(reader, np.unique(ids))
                samples = []
                for key, out, (_, rng, _, frames) in zip(keys, outs, drawn, strict=True):
                    if frames[-1] >= usable:
                        samples.append(Fault(number, clip.name, mismatch))
                        continue
                    views = source.transform(partial(read, frames), rng, out, aspect=clip.aspect)
                    name = f"{source.clips.name} {clip.name}, frames {frames[0]} to {frames[-1]}"
                    notes = [Fault(number, clip.name, mismatch, usable)] if mismatch else []
                    sample = self._complete(views, key, clip, int(frames[-1]))
                    samples.append(sample | {"sample": name, "notes": notes})
        except DataError as e:
            return [Fault(number, clip.name, str(e))] * len(keys)
        return samples

    def together(self, keys: Sequence[Key]) -> list[list[int]]:
        """Return places of keys, those of neighbours of one clip in a list, for `fill_together`."""
        groups: list[list[int]] = []
        previous = None
        for place, key in enumerate(keys):
            source, _, number, _ = self._draw(key)
            if (id(source), number) == previous:
                groups[-1].append(place)
            else:
                groups.append([place])
            previous = id(source), number
        return groups

    def fill_black(self, key: Key, out: Tensor) -> dict[str, Any]:
        """Write black frames in place of a window; returns what `fill` does, without a name."""
        source, rng, number, frames = self._draw(key)
        black = [torch.zeros(90, 160, 3, dtype=torch.uint8)] * len(frames)
        drawn = source.transform(lambda _: black, rng, out, aspect=None)
        return self._complete(drawn, key, source.clips[number], int(frames[-1])) | {"sample": "", "notes": []}

    def fault(self, key: Key, reason: str) -> Fault:
        """Return the Fault of a window whose reading process hung or died."""
        source, _, number, _ = self._draw(key)
        return Fault(number, source.clips[number].name, reason)

    def _draw(self, key: Key) -> tuple[Source, np.random.Generator, int, np.ndarray]:
        """Return the source, the random state of the augmentation, the number of the clip and its frames."""
        _, number, _, window = key
        source, rng = self.sources[number], np.random.default_rng([*key[:3], self.seed, _SAMPLE])
        return source, rng, *source.index.sample(window, rng)

    def _complete(self, sample: dict[str, Any], key: Key, clip: Clip, last: int) -> dict[str, Any]:
        """Add to the views of a window what else a batch has."""
        views = self.shape[0]
        sample["source"], sample["window"] = torch.full((views,), key[1]), torch.full((views,), key[3])
        if self.targets:
            ttc = clip.ttc
            sample["label"] = torch.full((views,), int(clip.labels[last]))
            sample["ttc"] = torch.full((views,), float(ttc[last]))
            sample["soft_label"] = torch.full((views,), float(smooth_labels(clip.labels, ttc)[last]))
        return sample


def _shared_frames(reader: Reader, ids: np.ndarray) -> Callable[[np.ndarray, Fit | None], Iterator[Tensor]]:
    """Return what stands for reader.frames for any of the frames `ids`, all of which are read the first time, once."""
    kept: dict[int, tuple[Tensor, tuple[int, int]]] = {}

    def frames(wanted: np.ndarray, fit: Fit | None) -> Iterator[Tensor]:
        if not kept:
            for i, frame in zip(ids, reader.frames(ids, fit), strict=True):
                kept[i] = frame.clone(), fit and fit.size
        for i in wanted:
            frame, size = kept[i]
            if fit:
                fit.size = size
            yield frame

    return frames
