"""What every data set boils down to: clips with a source of frames, a frame count, a frame rate and labels."""

import errno
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.labels import ANOMALOUS, IGNORED, time_to_anomaly
from utils.text import first_few, one_line

logger = logging.getLogger("tad")

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}  # a video's name may leave no room for ".zip" behind it
MOST_FRAMES = 10**7  # of a clip: 46 hours at 60 per second; a number beyond is damage


class DataError(RuntimeError):
    """Input data cannot be used; the message names the file, what was expected and the remedy."""


class Unreadable(DataError):
    """The frames of a clip cannot be counted; the other clips can be used without it."""


class BeyondEnd(DataError):
    """Labels go on after the last frame there is."""


@contextmanager
def data_errors(path: str | Path, what: str = "read") -> Iterator[None]:
    """Turn an OSError of the body into a DataError: path cannot be `what`, for the reason the system gives.

    So is a ValueError, which is Python's for a path that no file can have.
    """
    try:
        yield
    except (OSError, ValueError) as e:
        raise DataError(f"{one_line(str(path))}: cannot be {what} ({getattr(e, 'strerror', None) or e})") from e


def is_there(path: str | Path) -> bool:
    """Return whether there is a file or folder of a name. Raises DataError where the system does not say."""
    with data_errors(path):
        try:
            os.stat(path)
        except OSError as e:
            if e.errno not in _ABSENT:
                raise
            return False
    return True


@dataclass(frozen=True, eq=False)
class Clip:
    """One clip. Frame i of [0, num_frames) is called frame_name.format(first_frame + i) in its source.

    name: what the clip is called in its data set.
    source: path of a video file, or of a folder of frames that may be packed as "<source>.zip" instead.
    num_frames: frames in the source.
    fps: frames per second of the source.
    frame_name: format of a frame's file name.
    first_frame: number of frame 0 in these names.
    labels: (num_frames,) uint8, 0 safe, 1 anomalous, 2 IGNORED (see datasets.labels); None for unlabelled video.
    category: name of the accident type; None = unknown.
    ego: whether the recording car is involved; None = unknown.
    night: whether it was filmed at night; None = unknown.
    pack_step: the source is a zip of `datasets.tools.pack`, which holds every pack_step-th frame, counted back from
        the last; numbers, rate and labels are those of the original all the same. None = not packed.
    aspect: width / height of the frames as filmed, upright, where the source holds them squashed to another shape; at
        least 1, so their height is that of the short side. None = they are as filmed, or shrunk alike.
    offset: the clip is a stretch of its source: its frame 0 is the source's frame `offset`. None = it is all of it.
    recording: name of the recording it was cut from: clips of one recording belong into one split, and are no
        independent samples. None = no other clip is of the same.
    positive: whether it holds, or leads up to, an accident, where its labels do not tell; None = they do.
    event_time, alert_time: seconds from frame 0 to the accident, and to when a careful person could first tell; after
        the last frame where the clip was cut before. None = unknown, or there is none.
    groups: whatever else is known of it, {name: value}, to report by.

    Raises ValueError where there is not one label for each frame, or a label is above IGNORED.
    """

    name: str
    source: str
    num_frames: int
    fps: float
    frame_name: str = "{:06d}.jpg"
    first_frame: int = 0
    labels: np.ndarray | None = field(default=None, repr=False)
    category: str | None = None
    ego: bool | None = None
    night: bool | None = None
    pack_step: int | None = None
    aspect: float | None = None
    offset: int | None = None
    recording: str | None = None
    positive: bool | None = None
    event_time: float | None = None
    alert_time: float | None = None
    groups: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if self.labels is not None and len(self.labels) != self.num_frames:
            raise ValueError(f"clip {self.name}: {len(self.labels)} labels for {self.num_frames} frames")
        if self.labels is not None and len(self.labels) and (highest := np.max(self.labels)) > IGNORED:
            raise ValueError(f"clip {self.name}: a label {highest}; 0, 1 and {IGNORED} are known")

    def number(self, frame: int) -> int:
        """Return the number of frame i in the names of its source."""
        return self.first_frame + self.in_source(frame)

    def in_source(self, frame: int | np.ndarray) -> int | np.ndarray:
        """Return the place of frame i, or of each of an array, in its source, counted from 0."""
        return (self.offset or 0) + frame

    def filename(self, frame: int) -> str:
        """Return the name of frame i in the original source."""
        return self.frame_name.format(self.number(frame))

    def picture(self, frame: int) -> str:
        """Return the name of the picture that holds frame i: its filename, or in a pack the JPEG of that number."""
        return f"{self.number(frame):06d}.jpg" if self.pack_step else self.filename(frame)

    @property
    def stored_frames(self) -> np.ndarray:
        """The ascending int64 numbers of the frames that the source holds: all of them, or what the pack kept."""
        step = self.pack_step or 1
        return np.arange((self.num_frames - 1) % step, self.num_frames, step)

    @property
    def is_positive(self) -> bool | None:
        """Whether the clip holds, or leads up to, an accident: as stated, else by its labels; None = unknown."""
        if self.positive is not None or self.labels is None:
            return self.positive
        return bool((np.asarray(self.labels) == ANOMALOUS).any())

    @property
    def has_ignored(self) -> bool:
        """Whether windows may be left out since they end on IGNORED frames."""
        return self.labels is not None and bool((np.asarray(self.labels) == IGNORED).any())

    @property
    def ttc(self) -> np.ndarray:
        """The `time_to_anomaly` of the labels, (num_frames,) float64 seconds."""
        return time_to_anomaly(self.labels, self.fps)


@dataclass(frozen=True)
class ClipTable(Sequence):
    """The clips of one split of one data set, in the order of its split file.

    name: of the data set.
    split: of the data set.
    clips: those that can be used.
    one_clip_per_video: an epoch draws one random clip of each video (Kinetics), instead of windows from all of them.
    unreadable: clips that are not in `clips`, since their frames cannot be counted: {name: reason}.
    left_out: names of clips that are not in `clips`, since a list of bad clips names them.
    """

    name: str
    split: str
    clips: list[Clip] = field(repr=False)
    one_clip_per_video: bool = False
    unreadable: dict[str, str] = field(default_factory=dict, repr=False)
    left_out: list[str] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        return f"{self.name} {self.split}"

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, i: int) -> Clip:
        return self.clips[i]

    @property
    def listed_names(self) -> list[str]:
        """The names of the clips of the split, with those that are not in the table."""
        return [*(clip.name for clip in self.clips), *self.unreadable, *self.left_out]

    @property
    def listed(self) -> int:
        """The number of clips of the split, with those that are not in the table."""
        return len(self.listed_names)

    def require_labels(self) -> None:
        """Raise DataError where a clip is unlabelled."""
        if unlabelled := next((c.name for c in self.clips if c.labels is None), None):
            problem = "has no labels to train on or to evaluate with; run_predict.py scores video without labels"
            raise DataError(f"{self.name}: clip {unlabelled} {problem}")

    @property
    def frame_counts(self) -> np.ndarray:
        """The frames of each clip, (clips,) int64."""
        return np.array([c.num_frames for c in self.clips], dtype=np.int64)

    @property
    def fps(self) -> np.ndarray:
        """The source frames per second of each clip, (clips,) float64."""
        return np.array([c.fps for c in self.clips], dtype=np.float64)

    @property
    def pack_steps(self) -> np.ndarray:
        """The pack_step of each clip, 1 where it is not packed, (clips,) int64."""
        return np.array([c.pack_step or 1 for c in self.clips], dtype=np.int64)


@dataclass(frozen=True)
class Selection:
    """Which clips of a split are used, and what becomes of one that cannot be made.

    leave_out: names of clips to pass over.
    problems: where not None, collects {clip: error} instead of raising it.
    """

    leave_out: Collection[str] = frozenset()
    problems: dict[str, DataError] | None = None

    def table(self, name: str, split: str, names: Iterable[str], make: Callable[[str], Clip], **options) -> ClipTable:
        """Return the ClipTable of make(clip) for each of `names` but leave_out. options: of ClipTable.

        Raises what `make` does; but Unreadable clips are logged and left to ClipTable.unreadable, if there are others.
        """
        table = ClipTable(name, split, [], **options)
        for clip in names:
            if clip in self.leave_out:
                table.left_out.append(clip)
                continue
            try:
                table.clips.append(make(clip))
            except DataError as e:
                if self.problems is not None:
                    self.problems[clip] = e
                elif isinstance(e, Unreadable):
                    table.unreadable[clip] = str(e)
                else:
                    raise
        if bad := table.unreadable:
            reasons = first_few((f"{clip} ({why})" for clip, why in bad.items()), sep="; ")
            message = f"{table}: {len(bad)} of {table.listed} clips cannot be read: {reasons}"
            if not table.clips:
                raise DataError(message)
            logger.warning(message)
        return table
