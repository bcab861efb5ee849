"""Evaluation: every frame of a clip is read once, every window of a split handed out once over all ranks.

The device normalises each frame once and gathers the windows.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.augment.frames import EvalTransform
from datasets.chunks import ClipStream, FrameChunk
from datasets.clips import Clip, ClipTable
from datasets.faults import ClipEnd, Fault, agree_on_faults
from datasets.slots import Slots
from datasets.windows import WindowIndex
from utils.logging import progress_bar


@dataclass(frozen=True)
class WindowBatch:
    """Windows on the device.

    clip: (n,) number of each window's clip.
    last: (n,) last source frame of each window.
    video: (m, 3, T, S, S), m >= n, normalised; the rows from n on are padding. The next batch overwrites it.
    """

    clip: np.ndarray
    last: np.ndarray
    video: Tensor


class _Gatherer:
    """Makes batches of windows from chunks of frames that it normalises as they come.

    It keeps one batch, since fresh memory would cost more than the copy into it, and of each clip in progress, one for
    each loading process, the frames that later windows need: fewer than a window spans.

    To a CUDA device chunks are copied in a stream of its own, beside the batches that the host has put in line. Only
    the copy is waited for, since the memory of a chunk is used again.
    """

    def __init__(
        self,
        index: WindowIndex,
        normalize: Callable[[Tensor], Tensor],
        device: torch.device,
        *,
        batch_size: int,
        across_clips: bool,
    ):
        self.index, self.normalize, self.device, self.across_clips = index, normalize, device, across_clips
        self.kept: dict[int, tuple[np.ndarray, Tensor]] = {}  # of each clip in progress: frame ids and frames
        self._clip, self._last = np.zeros((2, batch_size), np.int64)
        self._count = 0  # windows in the batch so far
        self._video: Tensor | None = None  # (batch_size, T, 3, S, S)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def add(self, chunk: FrameChunk) -> Iterator[WindowBatch]:
        """Yield the batches that the windows which end in a chunk complete."""
        lasts, ids, frames = self._windows(chunk)
        if self._video is None and len(lasts):
            new = frames.new_zeros if self.across_clips else frames.new_empty  # padding is scored; other rows are not
            self._video = new(len(self._last), self.index.num_frames, *frames.shape[1:])
        while len(lasts):
            rows = slice(self._count, min(self._count + len(lasts), len(self._last)))
            now, lasts = np.split(lasts, [rows.stop - rows.start])
            where = torch.from_numpy(np.searchsorted(ids, self.index.frames(chunk.clip, now)).ravel())
            where = where.to(self.device, non_blocking=True)
            torch.index_select(frames, 0, where, out=self._video[rows].flatten(0, 1))
            self._clip[rows], self._last[rows], self._count = chunk.clip, now, rows.stop
            if self._count == len(self._last):
                yield from self.rest()
        if not self.across_clips:
            yield from self.rest()

    def rest(self) -> Iterator[WindowBatch]:
        """Yield the batch as it is, unless it is empty, and begin another."""
        n, self._count = self._count, 0
        if n:
            video = self._video if self.across_clips else self._video[:n]
            yield WindowBatch(self._clip[:n].copy(), self._last[:n].copy(), video.transpose(1, 2))

    def _windows(self, chunk: FrameChunk) -> tuple[np.ndarray, np.ndarray, Tensor]:
        """Return the last frames of the windows that end in a chunk, and (ids, frames) that they are made of.

        Windows are left out that need a frame which the chunks have left out.
        """
        ids, frames = chunk.frame_ids, self._on_device(chunk.frames)
        frames = self.normalize(frames.transpose(0, 1)[None])[0].transpose(0, 1)
        lasts = self.index.last_frames(chunk.clip)
        first, end = np.searchsorted(lasts, (ids[0], ids[-1] + 1)).tolist()
        if chunk.clip in self.kept:
            kept_ids, kept_frames = self.kept.pop(chunk.clip)
            ids, frames = np.concatenate([kept_ids, ids]), torch.cat([kept_frames, frames])
        if end < len(lasts):
            keep = int(np.searchsorted(ids, self.index.frames(chunk.clip, lasts[end])[0]))
            self.kept[chunk.clip] = ids[keep:], frames[keep:].clone()  # a view would keep the others too
        return self._complete(chunk.clip, lasts[first:end], ids), ids, frames

    def _complete(self, clip: int, lasts: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return those of last frames, ascending, whose windows are made of frames in `ids`, ascending."""
        frames = self.index.frames(clip, lasts)
        places = np.searchsorted(ids, frames).clip(max=len(ids) - 1)
        return lasts[(ids[places] == frames).all(axis=1)]

    def _on_device(self, frames: Tensor) -> Tensor:
        if self._stream is None:
            return frames.to(self.device)
        with torch.cuda.stream(self._stream):
            frames = frames.to(self.device, non_blocking=True)
        self._stream.synchronize()
        frames.record_stream(torch.cuda.current_stream(self.device))
        return frames


class SplitWindows:
    """The windows of a split, for `engine.evaluate.Scorer`, as often as asked.

    Args:
        transform: preprocesses frames.
        device: where windows are gathered.
        batch_size: frames read at a time, and windows of a batch at most.
        num_workers: reading processes; 0: this one.
        allow_missing: whether clips that cannot be read are left out, instead of refused.
        across_clips: whether batches are filled with windows of several clips, the last one with padding, so that each
            has batch_size rows. None stands for all devices but the CPU: there it would gain nothing, and the last bits
            of a row's result depend on its place in the batch (for a model with a class token, in fp32 and several
            threads), hence the scores of a clip on workers and ranks.
        reading: of ClipStream: pin_memory, read_timeout, gaps.

    Raises DataError where some clips are known to be unreadable, unless allow_missing.
    """

    def __init__(
        self,
        clips: ClipTable,
        index: WindowIndex,
        transform: EvalTransform,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 64,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        allow_missing: bool = False,
        across_clips: bool | None = None,
        **reading: Any,
    ):
        self.clips, self.index, self.device = clips, index, torch.device(device)
        self.batch_size = batch_size
        self.across_clips = self.device.type != "cpu" if across_clips is None else across_clips
        self.allow_missing, self._show_progress = allow_missing, rank == 0
        self._reading = {"chunk_frames": batch_size, "num_workers": num_workers, **reading}
        self.stream = ClipStream(clips, index, transform, rank=rank, world_size=world_size, **self._reading)
        self.agree([])  # refuses now what is known to be unreadable

    def batches(self, normalize: Callable[[Tensor], Tensor]) -> Iterator[WindowBatch | Fault | ClipEnd]:
        """Yield each window of this rank once, and a Fault for each clip with other frames than it should have.

        Unless allow_missing, no window follows the first clip that cannot be read: the rest is read to find the other
        ones.

        With `gaps`, windows that need a frame which cannot be used are left out, and no others. The windows of a clip
        come in ascending order; after them comes one ClipEnd, with its gaps and any Fault.

        normalize: maps frames uint8 (1, 3, n, S, S), on the device, to what the windows are made of, of this shape.
        """
        total = self.stream.num_chunks
        options = {"batch_size": self.batch_size, "across_clips": self.across_clips}
        windows, refused = _Gatherer(self.index, normalize, self.device, **options), False
        for item in progress_bar(self.stream, total=total, description="evaluation", enabled=self._show_progress):
            if isinstance(item, Fault):
                windows.kept.pop(item.number, None)
                refused = refused or not (item.frames or self.allow_missing)
                yield item
            elif isinstance(item, ClipEnd):
                windows.kept.pop(item.clip, None)
                yield from windows.rest()
                yield item
            elif not refused:
                yield from windows.add(item)
        if not refused:
            yield from windows.rest()

    @property
    def slots(self) -> Slots:
        """The memory that reading takes."""
        return self.stream.slots

    def only(self, clips: Collection[int]) -> "SplitWindows":
        """Return the windows of some clips alone, whose numbers stay, all for this rank."""
        other = copy.copy(self)
        other.index = self.index.only(clips)
        other.stream = ClipStream(self.clips, other.index, self.stream.transform, **self._reading)
        return other

    def identity(self, clip: int) -> str:
        """Return a digest of what the windows of a clip are made of: it stays where the data is moved or labelled anew.

        It is of the clip, of how frames make a window, and of the size in bytes of its source, of a folder that of the
        pictures of its first, middle and last frame.
        """
        source, index = self.clips[clip], self.index
        about = [source.name, source.num_frames, source.fps, source.frame_name, source.first_frame, source.offset]
        about += [source.pack_step, source.aspect, index.num_frames, index.view_fps, self.stream.transform.size]
        return hashlib.sha256(json.dumps([*about, _bytes_of(source)]).encode()).hexdigest()

    def locations(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (clip, last frame) of every window of the split, over all ranks: two int64 (n,), sorted."""
        return self.index.locations()

    def agree(self, faults: list[Fault]) -> list[Fault]:
        """Return the faults of all ranks on every rank; each calls it. Raises DataError as `agree_on_faults` does."""
        return agree_on_faults(faults, self.clips, allow_missing=self.allow_missing)


def _bytes_of(clip: Clip) -> list[int]:
    """Return the sizes in bytes by which the source of a clip is known again; -1 for what is not there."""
    source = Path(clip.source)
    frames = clip.stored_frames[[0, len(clip.stored_frames) // 2, -1]].tolist() if clip.num_frames else []
    files = [source, source.with_name(f"{source.name}.zip")]
    file = next((file for file in files if file.is_file()), None)
    return [_size_of(path) for path in ([file] if file else [source / clip.picture(i) for i in frames])]


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
