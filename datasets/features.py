"""Batches of training windows by features that are at hand, in place of video."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.clips import ClipTable
from datasets.faults import Fault
from datasets.labels import smooth_labels
from datasets.loader import EpochSampler, Key
from datasets.windows import WindowIndex


class FeatureBatches:
    """The batches of the sampler's epoch, as often as asked, as a BatchLoader's, with "features" in place of "video".

    Args:
        clips: labelled.
        index: their windows, one source alone.
        sampler: yields the windows of each batch.
        read: numbers of windows, int64 (n,) -> their features (n, ...).
        missing: {number of a window: why it has none}.
        device: where the features of a batch are.

    Raises DataError where a clip is unlabelled.
    """

    def __init__(
        self,
        clips: ClipTable,
        index: WindowIndex,
        sampler: EpochSampler,
        read: Callable[[np.ndarray], Tensor],
        missing: Mapping[int, str],
        device: torch.device,
    ):
        clips.require_labels()
        self.clips, self.index, self.sampler, self.read, self.missing = clips, index, sampler, read, missing
        self.device, self.waited = device, 0.0
        self.clip, self.last = index.locations()
        self._targets = self._all_targets()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for keys in self.sampler:
            asked = time.perf_counter()
            batch = self._batch(keys)
            self.waited += time.perf_counter() - asked
            yield batch

    def _batch(self, keys: list[Key]) -> dict[str, Any]:
        numbers = np.array([window for *_, window in keys], dtype=np.int64)
        there = np.array([number not in self.missing for number in numbers.tolist()])
        skipped = [self._fault(number) for number in numbers[~there].tolist()]
        samples = [self._name(number) for number in numbers[there].tolist()]
        rows = numbers[there] if samples else numbers[:1]
        features = self.read(rows)
        if not samples:
            features = torch.zeros_like(features)
        targets = {name: values[torch.from_numpy(rows)] for name, values in self._targets.items()}
        batch = {"features": features.to(self.device), "samples": samples, "skipped": skipped, "notes": []}
        return batch | targets | {"weight": float(bool(samples))}

    def _all_targets(self) -> dict[str, Tensor]:
        """Return label int64, soft_label and ttc float32, each (n,), of the last frames of all windows."""
        found: dict[str, list[np.ndarray]] = {"label": [], "soft_label": [], "ttc": []}
        for number in np.flatnonzero(self.index.counts).tolist():
            clip, lasts = self.clips[number], self.index.last_frames(number)
            ttc = clip.ttc
            found["label"].append(np.asarray(clip.labels)[lasts].astype(np.int64))
            found["soft_label"].append(smooth_labels(clip.labels, ttc)[lasts].astype(np.float32))
            found["ttc"].append(ttc[lasts].astype(np.float32))
        return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in found.items()}

    def _fault(self, number: int) -> Fault:
        clip = int(self.clip[number])
        return Fault(clip, self.clips[clip].name, self.missing[number])

    def _name(self, number: int) -> str:
        clip, frames = self.index[number]
        return f"{self.clips.name} {self.clips[clip].name}, frames {frames[0]} to {frames[-1]}"
