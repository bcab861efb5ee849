"""What of a data set a report on scores can use beside them: labels of the train split, and pictures.

A report is whole without these. Nothing here raises, opens a video to count its frames, or waits for ever.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from datasets import build_clips
from datasets.clips import Clip, ClipTable, DataError
from datasets.parallel import ReadFailure, in_processes
from datasets.readers import UNREADABLE, open_clip
from datasets.scan import VideoScan
from datasets.windows import window_labels
from utils.text import first_few, short_reason

logger = logging.getLogger("tad")


@dataclass(frozen=True)
class TrainLabels:
    """Labels that trivial baselines learn on.

    columns: clip, last frame and label of every window, three int64 (n,); None = there are none.
    words: which they are, or why there are none.
    """

    columns: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    words: str


@dataclass(frozen=True)
class DataAtHand:
    """A data set, as far as its annotations tell. Frames of videos are counted already, or the split is not at hand.

    name, root, assume_fps, labels: of `build_clips`.
    scan_cache: of VideoScan.
    """

    name: str
    root: str
    scan_cache: str
    assume_fps: float | None
    labels: str

    def clips(self, split: str) -> ClipTable | None:
        """Return the clips of a split; None, with a warning, where they are not at hand."""
        try:
            return self._read(split)
        except DataError as e:
            logger.warning(f"there are no pictures in the report, since {self.name} {split} is not at hand: {e}")
            return None

    def train_labels(self, scored: Collection[str], *, num_frames: int, view_fps: float, stride: int) -> TrainLabels:
        """Return the labels of windows of the split train. scored: names of clips that none may be learned of."""
        try:
            train = self._read("train")
        except DataError as e:
            return TrainLabels(None, f"{self.name} train is not at hand ({short_reason(e, 300)})")
        if shared := {clip.name for clip in train} & set(scored):
            return TrainLabels(None, f"{len(shared)} of the clips are in {train}, too")
        columns = window_labels(train, num_frames=num_frames, view_fps=view_fps, stride=stride)
        if not len(columns[0]):
            return TrainLabels(None, f"no clip of {train} is long enough for a window")
        return TrainLabels(columns, f"the labels of {train}, {len(train)} clips")

    def _read(self, split: str) -> ClipTable:
        scan = VideoScan(self.scan_cache, workers=1, known_only=True)
        table = build_clips(self.name, self.root, split, scan, self.assume_fps, labels=self.labels)
        table.require_labels()
        return table


def read_pictures(
    clips: Sequence[Clip], wanted: Mapping[str, Sequence[int]], *, workers: int, read_timeout: float
) -> dict[tuple[str, int], np.ndarray]:
    """Return {(clip, frame): uint8 (H, W, 3) RGB} of wanted {clip: frames}; those that cannot be read are logged.

    workers, read_timeout: of `in_processes`.
    """
    by_name = {clip.name: clip for clip in clips}
    items = [(by_name[name], tuple(frames)) for name, frames in wanted.items() if name in by_name]
    found: dict[tuple[str, int], np.ndarray] = {}
    problems = []
    options = {"workers": workers, "description": "pictures", "limit": read_timeout, "failed": _failed}
    try:
        for (clip, frames), pictures in in_processes(_read, items, **options):
            if isinstance(pictures, str):
                problems.append(f"{clip.name} ({pictures})")
            else:
                found |= {(clip.name, frame): p for frame, p in zip(frames, pictures, strict=True)}
    except DataError as e:  # no process could start
        problems.append(str(e))
    if problems:
        few = first_few(problems, sep="; ")
        logger.warning(f"pictures of {len(problems)} of {len(items)} clips are not in the report: {few}")
    return found


def _read(item: tuple[Clip, tuple[int, ...]]) -> list[np.ndarray] | str:
    """Return the pictures of frames of a clip, in the shape they were filmed in, or why they cannot be read."""
    clip, frames = item
    try:
        with open_clip(clip) as reader:
            return [_as_filmed(clip, frame.numpy().copy()) for frame in reader.frames(frames)]
    except (DataError, *UNREADABLE) as e:
        return short_reason(e)


def _failed(item: tuple[Clip, tuple[int, ...]], error: ReadFailure) -> str:
    return str(error)


def _as_filmed(clip: Clip, picture: np.ndarray) -> np.ndarray:
    if not clip.aspect:
        return picture
    height = len(picture)
    return np.asarray(Image.fromarray(picture).resize((round(height * clip.aspect), height)))
