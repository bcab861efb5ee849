"""Which frames make sample i: window arithmetic in O(clips) memory, without lists of windows."""

import copy
import logging
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from datasets.clips import ClipTable, DataError
from datasets.labels import IGNORED
from utils.text import first_few
from utils.windows import window_offsets

logger = logging.getLogger("tad")


class WindowIndex:
    """All windows of all clips, clip after clip, in ascending time.

    A window is num_frames frames at view_fps; it carries the label of its last frame. Last frames are `stride` source
    frames apart and anchored at the end of the clip: the last window ends on the clip's last frame, and left-over
    frames are dropped at its beginning. A clip of T frames has (T - span) // stride + 1 windows, or none if it is
    shorter than the span.

    Where src_fps / view_fps is not a whole number, each frame is the nearest one to its ideal time, counted back from
    the last frame (ties go to the later frame); where it is below 1, frames repeat.

    Args:
        frame_counts: (clips,) frames per clip.
        src_fps: source frames per second, one number or one per clip.
        num_frames: frames of a window.
        view_fps: frames per second of a window.
        stride: step between windows in SOURCE frames.
        forward: anchor windows at the beginning instead: the first one starts on frame 0, and left-over frames are
            dropped at the end, so that a longer clip has the windows of a shorter one that it begins with.
        warm_up: begin with the window that ends on frame 0; where a window begins before the clip, frame 0 repeats.
            Windows go forward then.
        keep: {clip: (frames,) bool}: windows of these clips end on frames alone that are True; the others are left out.

    short_clips: the numbers of the clips too short for a single window, ascending.
    left_out: how many windows `keep` leaves out.

    Raises ValueError for a number that is not positive.
    """

    def __init__(
        self,
        frame_counts: Sequence[int] | np.ndarray,
        *,
        src_fps: float | Sequence[float] | np.ndarray,
        num_frames: int,
        view_fps: float,
        stride: int = 1,
        forward: bool = False,
        warm_up: bool = False,
        keep: Mapping[int, np.ndarray] | None = None,
    ):
        self.frame_counts = np.asarray(frame_counts, dtype=np.int64)
        self.src_fps = np.broadcast_to(np.asarray(src_fps, dtype=np.float64), self.frame_counts.shape)
        for name, value in (("num_frames", num_frames), ("view_fps", view_fps), ("stride", stride)):
            if not 0 < value < np.inf:
                raise ValueError(f"{name} must be positive, not {value}")
        if not (self.src_fps > 0).all():
            raise ValueError(f"src_fps must be positive, not {self.src_fps.min()}")
        self.num_frames, self.view_fps, self.stride = int(num_frames), float(view_fps), int(stride)

        rates, self._rate_of = np.unique(self.src_fps / self.view_fps, return_inverse=True)
        self._offsets = window_offsets(rates, self.num_frames)  # one row for each distinct rate
        self.spans = 1 - self._offsets[self._rate_of, 0]
        first_lasts = np.zeros_like(self.spans) if warm_up else self.spans - 1
        self._warm_up = warm_up
        self.counts = np.maximum((self.frame_counts - 1 - first_lasts) // self.stride + 1, 0)
        if not (forward or warm_up):
            first_lasts = self.frame_counts - 1 - (self.counts - 1) * self.stride
        self._first_lasts = first_lasts  # of each clip's first window
        self.short_clips = np.flatnonzero(self.counts == 0)
        self._kept: dict[int, np.ndarray] = {}  # {clip: last frames of its windows}, where not all are kept
        for clip, frames in (keep or {}).items():
            lasts = self.last_frames(clip)
            self._kept[clip] = lasts[frames[lasts]]
        self.left_out = 0  # windows
        for clip, lasts in self._kept.items():
            self.left_out += int(self.counts[clip]) - len(lasts)
            self.counts[clip] = len(lasts)
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def windows_apart(self) -> int:
        """How many windows further one begins half a window later, in the clip of the longest ones; 1 at least."""
        return -(-int(self.spans.max()) // (2 * self.stride))

    def __getitem__(self, i: int) -> tuple[int, np.ndarray]:
        """Return (number of the clip, (num_frames,) int64 source frames) of window i. Raises IndexError."""
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        clip = int(np.searchsorted(self._ends, i, side="right"))
        within = int(i - (self._ends[clip] - self.counts[clip]))
        kept = self._kept.get(clip)
        return clip, self.frames(clip, self._first_lasts[clip] + within * self.stride if kept is None else kept[within])

    def clip_of(self, i: int) -> int:
        """Return the clip of window i."""
        return self[i][0]

    def sample(self, i: int, rng: np.random.Generator) -> tuple[int, np.ndarray]:
        """Return self[i]: a window leaves nothing to chance."""
        return self[i]

    def last_frames(self, clip: int) -> np.ndarray:
        """Return the (windows,) int64 last frames of all windows of the clip, ascending."""
        if (kept := self._kept.get(int(clip))) is not None:
            return kept
        return self._first_lasts[clip] + np.arange(self.counts[clip]) * self.stride

    def frames(self, clip: int, last: int | np.ndarray) -> np.ndarray:
        """Return the (..., num_frames) int64 source frames of the windows of the clip that end on `last` (...)."""
        frames = np.asarray(last)[..., None] + self._offsets[self._rate_of[clip]]
        return np.maximum(frames, 0) if self._warm_up else frames

    def warming_up(self, clip: int, last: int | np.ndarray) -> np.ndarray:
        """Return (...) bool: which windows of the clip that end on `last` (...) begin before it, and repeat frame 0."""
        return np.asarray(last) < self.spans[clip] - 1

    def needed_frames(self, clip: int) -> np.ndarray:
        """Return the sorted source frames that at least one window of the clip uses."""
        return np.unique(self.frames(clip, self.last_frames(clip)))

    def only(self, clips: Collection[int]) -> "WindowIndex":
        """Return an index of the windows of some clips alone, whose numbers stay; the other clips have none."""
        other = copy.copy(self)
        other.counts = np.where(np.isin(np.arange(len(self.counts)), list(clips)), self.counts, 0)
        other._kept = {clip: lasts for clip, lasts in self._kept.items() if clip in clips}
        other._ends = np.cumsum(other.counts)
        return other

    def locations(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (clip, last frame) of every window in order: two int64 (len(self),)."""
        within = np.arange(len(self)) - np.repeat(self._ends - self.counts, self.counts)
        lasts = np.repeat(self._first_lasts, self.counts) + within * self.stride
        for clip, kept in self._kept.items():
            lasts[self._ends[clip] - self.counts[clip] : self._ends[clip]] = kept
        return np.repeat(np.arange(len(self.counts)), self.counts), lasts


class RandomClipIndex:
    """One random clip of each video: num_frames frames, `step` source frames apart, whatever the frame rate.

    In a video of T frames the clip starts at 0 to T - num_frames * step, or at 0 where that is negative; a video that
    ends early repeats the last frame reached. The rule is that of VideoMAE's Kinetics loader (arXiv:2203.12602).

    Args:
        frame_counts: (videos,) frames per video.
        num_frames: frames of a clip.
        step: step between them in source frames.

    Raises ValueError for a number that is not positive.
    """

    def __init__(self, frame_counts: Sequence[int] | np.ndarray, *, num_frames: int, step: int):
        if num_frames <= 0 or step <= 0:
            raise ValueError(f"num_frames and step must be positive, not {num_frames} and {step}")
        self.frame_counts = np.asarray(frame_counts, dtype=np.int64)
        self.num_frames, self.step = int(num_frames), int(step)

    def __len__(self) -> int:
        return len(self.frame_counts)

    @property
    def windows_apart(self) -> int:
        """1: a video is drawn from once in an epoch, so that none can be read together."""
        return 1

    def clip_of(self, i: int) -> int:
        """Return i: a video is a clip."""
        return i

    def sample(self, i: int, rng: np.random.Generator) -> tuple[int, np.ndarray]:
        """Draw a clip of video i; returns i and its (num_frames,) int64 source frames."""
        spare = int(self.frame_counts[i]) - self.num_frames * self.step
        return i, self.frames(i, int(rng.integers(max(spare, 0) + 1)))

    def frames(self, i: int, start: int) -> np.ndarray:
        """Return the (num_frames,) int64 source frames of the clip of video i that starts at `start`."""
        reachable = (int(self.frame_counts[i]) - 2 - start) // self.step  # steps that stay inside, as published
        return start + np.minimum(np.arange(self.num_frames), max(reachable, 0)) * self.step


def kept_frames(clips: ClipTable) -> dict[int, np.ndarray]:
    """Return the `keep` of a WindowIndex that leaves out windows which end on IGNORED frames."""
    return {number: np.asarray(clip.labels) != IGNORED for number, clip in enumerate(clips) if clip.has_ignored}


def index_clips(
    clips: ClipTable, *, num_frames: int, view_fps: float, stride: int, unlabelled: bool = False
) -> WindowIndex | RandomClipIndex:
    """Return the index of a table; logs how many windows there are and which clips are too short for one.

    stride: step between windows, or, where the table is one_clip_per_video, between the frames of a clip.
    unlabelled: the labels do not matter: windows that end on IGNORED frames are in the index, too.
    Raises DataError where none is long enough or a pack lacks frames, ValueError for a number that is not positive.
    """
    if clips.one_clip_per_video:
        if not len(clips):
            raise DataError(f"{clips}: no videos")
        if (clips.pack_steps > 1).any():
            raise DataError(f"{clips.name}: clips are drawn from all frames of a video; pack it with --fps 0")
        logger.info(f"{clips}: {len(clips)} videos, a random clip of each per epoch")
        return RandomClipIndex(clips.frame_counts, num_frames=num_frames, step=stride)
    index = WindowIndex(
        clips.frame_counts,
        src_fps=clips.fps,
        num_frames=num_frames,
        view_fps=view_fps,
        stride=stride,
        keep=None if unlabelled else kept_frames(clips),
    )
    _check_pack(clips, index)
    logger.info(f"{clips}: {len(clips)} clips, {clips.frame_counts.sum()} frames, {len(index)} windows")
    if index.left_out:
        logger.info(f"{clips}: {index.left_out} more windows end on ignored frames, neither trained on nor scored")
    if len(short := index.short_clips):
        names = first_few(clips[i].name for i in short)
        logger.warning(f"{clips}: {len(short)} clips are shorter than a window and go unused: {names}")
    if not len(clips):
        raise DataError(f"{clips}: no clips; its annotation lists none that can be used")
    if not len(index) and index.left_out:
        raise DataError(
            f"{clips}: every window ends on an ignored frame; the labels leave nothing to train on or score"
        )
    if not len(index):
        raise DataError(f"{clips}: no clip is long enough for a window of {num_frames} frames at {view_fps:g} fps")
    return index


def window_labels(
    clips: ClipTable, *, num_frames: int, view_fps: float, stride: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return clip, last frame and label of every window of labelled clips: three int64 (n,). Arguments as above."""
    options = {"num_frames": num_frames, "view_fps": view_fps, "stride": stride, "keep": kept_frames(clips)}
    clip, frame = WindowIndex(clips.frame_counts, src_fps=clips.fps, **options).locations()
    first = np.cumsum(clips.frame_counts) - clips.frame_counts
    labels = np.concatenate([np.zeros(0, np.int64), *(np.asarray(c.labels) for c in clips)]).astype(np.int64)
    return clip, frame, labels[first[clip] + frame]


def _check_pack(clips: ClipTable, index: WindowIndex) -> None:
    """Raise DataError where windows need frames that a pack left out. It keeps every n-th, back from the last one."""
    steps = clips.pack_steps
    step = math.lcm(*np.unique(steps).tolist())
    if index.stride % step:
        raise DataError(
            f"{clips}: this pack holds 1 frame in {step}, so windows can end on those alone: "
            f"use a step between windows of {max(round(index.stride / step), 1) * step} (--sampling_rate, "
            "in evaluation --sampling_rate_val), or pack again with --fps 0"
        )
    for clip in np.unique([index.src_fps, steps], axis=1, return_index=True)[1]:
        if (index.frames(clip, 0) % steps[clip]).any():
            raise DataError(
                f"{clips}: windows at {index.view_fps:g} fps need frames that this pack left out: "
                f"it holds 1 in {steps[clip]} of the source's {index.src_fps[clip]:g} per second; pack again with "
                f"--fps {index.view_fps:g}, or 0 for every frame"
            )
