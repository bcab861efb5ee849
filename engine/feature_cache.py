"""Features of a frozen encoder on disk: made once, read in every epoch, by any number of processes.

    FOLDER/
        <encoder>/          of one encoder: a digest of its weights and spec, and of the precision
            <windows>.pth   of up to 512 windows and 8 MB, one window at least: a digest of what they are made of

Files hold {"features": (n, ...), "missing": (n,) bool, "faults": what is wrong with their clips}, and their CRC-32,
which is compared when a run starts. They are whole or absent, so what a killed run has made is not made again. A
damaged one is made again, and so is one with windows that could not be read. Runs on the same data share them. Nothing
is ever removed.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from engine.checkpoint import explained
from engine.evaluate import Windows, window_outputs
from utils.cli import ConfigError
from utils.damage import zip_damage
from utils.distributed import Process, broadcast, ended_together, from_main, gather
from utils.files import check_writable, replaced
from utils.memory import in_bytes
from utils.signals import EXIT_CODE, Preempted, stop_requested
from utils.text import first_few, short_reason

_FILE_BYTES, _FILE_WINDOWS = 8 * 10**6, 512  # at most; small, since ranks share out files and a kill costs one
_LATE = 60.0  # seconds for which a network file system may not show what another node has written
_MOST_FRAMES = 1 << 32  # of a clip, to sort windows by one number
_NOT_ENCODER = ("pooler.", "head.")
logger = logging.getLogger("tad")


class FromFeatures(nn.Module):
    """Features (B, F) or (B, N, F) that a model's encoder made -> the model's logits: stands for it before a Scorer."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def normalize(self, features: Tensor) -> Tensor:
        """Return the features as they are."""
        return features

    def forward(self, features: Tensor) -> Tensor:
        """Map features to logits (B, K)."""
        return self.model(features, encoded=True)


class SourceWindows(Windows, Protocol):
    """Windows that features are made of; `datasets.stream.SplitWindows` is one."""

    batch_size: int

    def only(self, clips: Sequence[int]) -> Windows:
        """Return the windows of some clips alone, whose numbers stay, all for this rank."""

    def identity(self, clip: int) -> str:
        """Return a digest of what the windows of a clip are made of."""


@dataclass(frozen=True)
class CachedBatch:
    """Windows on the device. clip, last: (n,), as those of the windows; video: (n, ...), their features."""

    clip: np.ndarray
    last: np.ndarray
    video: Tensor


@dataclass(frozen=True)
class _Part:
    """The windows first to end - 1, which a file holds; clips: all that they are of."""

    path: Path
    first: int
    end: int
    clips: range


class FeatureCache:
    """The features of all windows of some clips; before a Scorer it stands for the windows, with a `FromFeatures`.

    Args:
        folder: holds the files.
        windows: what the features are made of.
        model: has `forward_features`, frozen, and `spec`; it is on windows.device and the same on every rank.
        dtype: of autocast; float32 turns it off.

    What is not on disk is made, by all ranks together; every rank constructs the cache.

    faults: what is wrong with clips, of all ranks.

    Raises ConfigError where the folder cannot be written, has no room or is not shared by all nodes,
    CheckpointWriteError where it has no room later, what windows.agree raises, and Preempted after a signal that
    `catch_signals` caught.
    """

    def __init__(
        self, folder: str | Path, windows: SourceWindows, model: nn.Module, dtype: torch.dtype, process: Process
    ):
        self.windows, self.clips, self.device = windows, windows.clips, windows.device
        self.process, self.dtype = process, dtype
        self.clip, self.last = windows.locations()
        example = feature_like(model, self.device, dtype)
        self.bytes_of_a_window = example.nbytes
        encoder = Path(folder, from_main(lambda: encoder_digest(model, dtype)))
        self._parts = from_main(lambda: self._split(encoder))
        self._firsts = np.array([part.first for part in self._parts])
        self.faults = self._make_missing(model, example)
        contents = [_load(part.path) for part in self._parts]
        self._features = [content["features"] for content in contents]
        self._missing = np.concatenate([content["missing"].numpy() for content in contents])

    def read(self, numbers: np.ndarray) -> Tensor:
        """Return features (n, ...) of windows by number, on the CPU; of one that is missing 0."""
        of = np.searchsorted(self._firsts, numbers, side="right") - 1
        found = self._features[0].new_empty(len(numbers), *self._features[0].shape[1:])
        for part in np.unique(of).tolist():
            rows = np.flatnonzero(of == part)
            found[torch.from_numpy(rows)] = self._features[part][torch.from_numpy(numbers[rows] - self._firsts[part])]
        return found

    def missing(self) -> dict[int, str]:
        """Return {number of a window that has no features: why}."""
        reasons = {fault.number: fault.reason for fault in self.faults}
        numbers = np.flatnonzero(self._missing).tolist()
        return {number: reasons.get(int(self.clip[number]), "it could not be read") for number in numbers}

    def batches(self, normalize: Any) -> Iterator[CachedBatch]:
        """Yield the windows of this rank's share that have features. normalize: has no effect."""
        numbers = np.array_split(np.flatnonzero(~self._missing), self.process.world_size)[self.process.rank]
        for start in range(0, len(numbers), self.windows.batch_size):
            some = numbers[start : start + self.windows.batch_size]
            yield CachedBatch(self.clip[some], self.last[some], self.read(some).to(self.device))

    def locations(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (clip, last frame) of every window there is, over all ranks, sorted."""
        return self.clip, self.last

    def agree(self, faults: list) -> list:
        """Return the faults that were met when features were made, on every rank. faults: has no effect."""
        return self.faults

    def _split(self, folder: Path) -> list[_Part]:
        """Return which file holds which windows: those of several clips whole, or a part of one clip's."""
        most = max(1, min(_FILE_WINDOWS, _FILE_BYTES // self.bytes_of_a_window))
        numbers, firsts, counts = np.unique(self.clip, return_index=True, return_counts=True)
        parts, start = [], 0
        while start < len(numbers):
            end = start + 1
            while end < len(numbers) and firsts[end] + counts[end] - firsts[start] <= most:
                end += 1
            clips = range(int(numbers[start]), int(numbers[end - 1]) + 1)
            made_of = [self.windows.identity(clip) for clip in numbers[start:end].tolist()]
            last_window = int(firsts[end - 1] + counts[end - 1])
            for first in range(int(firsts[start]), last_window, most):
                stop = min(first + most, last_window)
                digest = hashlib.sha256(json.dumps([made_of, self.last[first:stop].tolist()]).encode()).hexdigest()
                parts.append(_Part(folder / f"{digest[:32]}.pth", first, stop, clips))
            start = end
        return parts

    def _make_missing(self, model: nn.Module, example: Tensor) -> list:
        """Make what is not on disk, by all ranks. Returns the faults, on every rank."""
        share = self._parts[self.process.rank :: self.process.world_size]
        found = {part.path: _state_of(part, example) for part in share}
        states = broadcast(_united(gather(found)))
        damaged = [f"{path} ({state})" for path, state in states.items() if state not in ("", "absent", "incomplete")]
        if damaged:
            logger.warning(f"features are damaged and made again: {first_few(damaged)}")
        todo = [part for part in self._parts if states[part.path]]
        folder = self._parts[0].path.parent
        from_main(lambda: self._say_and_check(folder, todo))
        groups: dict[range, list[_Part]] = {}
        for part in todo:
            groups.setdefault(part.clips, []).append(part)
        mine = [part for group in list(groups.values())[self.process.rank :: self.process.world_size] for part in group]
        with ended_together():
            faults = self._make(mine, model, example) if mine else []
        return self.windows.agree(faults)

    def _say_and_check(self, folder: Path, todo: list[_Part]) -> None:
        """Say what is there and what is to be made; raise ConfigError where there is no room for it."""
        count, windows = len(self._parts), sum(part.end - part.first for part in todo)
        size = windows * self.bytes_of_a_window
        whole = f"{self.clips}: features of {len(self.clip)} windows, {in_bytes(self.bytes_of_a_window)} each"
        if not todo:
            logger.info(f"{whole}, are in {folder}")
            return
        logger.info(f"{whole}: {windows} are made now and take {in_bytes(size)} in {folder} ({count - len(todo)} of "
                    f"{count} files are there)")  # fmt: skip
        try:
            check_writable(folder, size)
        except OSError as e:
            raise ConfigError(f"{folder}: cannot take {in_bytes(size)} of features ({e.strerror}); choose another "
                              "--cache_features, or a linear head, whose features are small") from e  # fmt: skip

    def _make(self, parts: list[_Part], model: nn.Module, example: Tensor) -> list:
        """Make the files of some parts. Returns the faults met."""
        making = {part.first: _Making(part, example) for part in parts}
        firsts, keys = np.array(sorted(making)), self.clip * _MOST_FRAMES + self.last
        faults = []
        windows = self.windows.only({clip for part in parts for clip in part.clips})
        for item, output in window_outputs(windows, model, model.forward_features, self.dtype):
            if stop_requested():
                raise Preempted(EXIT_CODE)
            if output is None:
                faults.append(item)
                continue
            output, numbers = output.cpu(), np.searchsorted(keys, item.clip * _MOST_FRAMES + item.last)
            of = firsts[np.searchsorted(firsts, numbers, side="right") - 1]
            for first in np.unique(of).tolist():
                rows = np.flatnonzero(of == first)
                if first in making and making[first].add(numbers[rows], output[torch.from_numpy(rows)]):
                    making.pop(first).write(faults=[])
        for rest in making.values():
            rest.write(faults)
        return faults


class _Making:
    """The content of a file in the making."""

    def __init__(self, part: _Part, example: Tensor):
        self.part, self.features = part, example.new_zeros(0)
        self.example, self.missing = example, torch.ones(part.end - part.first, dtype=torch.bool)

    def add(self, numbers: np.ndarray, features: Tensor) -> bool:
        """Take the features of windows, those of other parts left out; return whether there are all of this one now."""
        rows = torch.from_numpy(numbers - self.part.first)
        inside = (rows >= 0) & (rows < len(self.missing))
        self._rows()[rows[inside]] = features[inside]
        self.missing[rows[inside]] = False
        return not self.missing.any()

    def write(self, faults: list) -> None:
        """Write the file. faults: of any clips."""
        faults = [str(fault) for fault in faults if fault.number in self.part.clips]
        content = {"features": self._rows(), "missing": self.missing, "faults": faults}
        torch.serialization.set_crc32_options(True)  # whatever the program around us has set
        with explained(self.part.path), replaced(self.part.path) as temporary:
            torch.save(content, temporary)

    def _rows(self) -> Tensor:
        """Return (n, ...) of all windows; memory is taken when the first comes."""
        if not self.features.numel():
            self.features = self.example.new_zeros(len(self.missing), *self.example.shape)
        return self.features


def encoder_digest(model: nn.Module, dtype: torch.dtype) -> str:
    """Return what tells apart encoders that make other features of the same windows."""
    spec = {key: value for key, value in model.spec.items() if key not in ("version", "classes", "head")}
    digest = hashlib.sha256(json.dumps([spec, str(dtype)], sort_keys=True).encode())
    for key, tensor in sorted(model.state_dict().items()):
        if not key.startswith(_NOT_ENCODER):
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def feature_like(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor on the CPU like the features of a window; the model is put into evaluation mode."""
    video = torch.zeros(1, *model.input_shape, device=device)
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return torch.empty_like(model.forward_features(video)[0], device="cpu")


def _load(path: Path) -> dict[str, Any]:
    until = time.monotonic() + _LATE
    while not path.exists():
        if time.monotonic() > until:
            what = f"{path}: is made, but not here {_LATE:g} s later"
            raise ConfigError(f"{what}: --cache_features must be a folder that all nodes share")
        time.sleep(0.5)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _state_of(part: _Part, example: Tensor) -> str:
    """Return "" for a file that is whole, else "absent", "incomplete" or what is damaged."""
    if not part.path.exists():
        return "absent"
    if damage := zip_damage(part.path):
        return damage
    try:
        content = _load(part.path)
        shape = (part.end - part.first, *example.shape)
        if tuple(content["features"].shape) != shape or content["features"].dtype != example.dtype:
            return f"features of {tuple(content['features'].shape)}, not {shape}"
        return "incomplete" if content["missing"].any() or content["faults"] else ""
    except Exception as e:  # torch.load raises a dozen types, depending on where the bytes go wrong
        return short_reason(e)


def _united(parts: list[dict] | None) -> dict | None:
    return parts and {key: value for part in parts for key, value in part.items()}
