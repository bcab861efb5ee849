"""The risk curve of a video: a score for each frame that a window ends on."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.evaluate import EvaluationError
from engine.events import Event, EventRule, find_events
from utils.files import replaced
from utils.text import short_reason

if TYPE_CHECKING:  # a live source draws nothing, and starts without matplotlib
    from matplotlib.figure import Figure

COLUMNS = ("time", "frame", "score", "warming_up")


@dataclass(frozen=True)
class Gap:
    """A stretch of a video without pictures that can be used. Times are in seconds.

    start, end: of its first frame, and of the first frame after it.
    reason: what is wrong there.
    """

    start: float
    end: float
    reason: str


@dataclass(frozen=True)
class Thumbnail:
    """A picture of a frame.

    frame: its number.
    picture: uint8 (H, W, 3) RGB.
    """

    frame: int
    picture: np.ndarray


@dataclass(frozen=True)
class RiskCurve:
    """The scores of a video. Frame i is the picture shown at i / fps seconds; a score uses frames up to its own.

    name: of the video, relative to what was asked for: "day1/0004.mp4".
    fps: frames per second.
    num_frames: frames of the video; its duration is num_frames / fps seconds.
    frame: (n,) int64 scored frames, ascending.
    score: (n,) float32 in [0, 1], the softmax probability of an anomaly, as it came from the model.
    warming_up: (n,) bool, whether the window of a score began before the video and repeats its first frame.
    rule: that makes events of the scores; None = there is none.
    gaps: stretches that cannot be read, in order; no score uses a frame of them.
    """

    name: str
    fps: float
    num_frames: int
    frame: np.ndarray
    score: np.ndarray
    warming_up: np.ndarray
    rule: EventRule | None = None
    gaps: tuple[Gap, ...] = ()

    @property
    def time(self) -> np.ndarray:
        """(n,) float64 seconds of the scored frames."""
        return self.frame / self.fps

    @property
    def duration(self) -> float:
        """Seconds of the video."""
        return self.num_frames / self.fps

    @property
    def step(self) -> int:
        """Frames from a score to the next one, where no gap lies between them; 1 where there is but one score."""
        return int(np.diff(self.frame).min()) if len(self.frame) > 1 else 1

    def events(self) -> list[Event]:
        """Return the events of the scores by the rule; none where there is no rule."""
        return list(self._events)

    @cached_property
    def _events(self) -> list[Event]:
        return find_events(self.time, self.score, self.rule) if self.rule else []

    def pieces(self) -> list[slice]:
        """Return slices of the scores that follow each other at every step, in order; between them some are missing."""
        breaks = np.flatnonzero(np.diff(self.frame) > self.step) + 1
        edges = [0, *breaks.tolist(), len(self.frame)]
        return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False) if b > a]

    def filling(self) -> list[tuple[float, float]]:
        """Return (start, end) in seconds of stretches with pictures where no window is full: at the beginning, the
        windows that repeat the first frame included, and after each gap.
        """
        full = self.time[~self.warming_up]
        starts = [0.0, *(gap.end for gap in self.gaps)]
        ends = [*(gap.start for gap in self.gaps), self.duration]
        spans = []
        for start, end in zip(starts, ends, strict=True):
            following = full[np.searchsorted(full, start - 1e-9) :]
            spans.append((start, min(end, float(following[0])) if len(following) else end))
        return [(start, end) for start, end in spans if end - start > 1e-9]

    def write_csv(self, path: str | Path) -> None:
        """Write time (seconds, %.6f), frame, score (%.9g, which holds all of a float32) and warming_up (0 or 1).

        Raises OSError, which names the file.
        """
        with replaced(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerow(COLUMNS)
            columns = (self.time.tolist(), self.frame.tolist(), self.score.tolist(), self.warming_up.tolist())
            for time, frame, score, warming_up in zip(*columns, strict=True):
                writer.writerow([f"{time:.6f}", frame, f"{score:.9g}", int(warming_up)])

    def plot(self, path: str | Path | None = None, thumbnails: Sequence[Thumbnail] = ()) -> "Figure":
        """Return a figure of the risk over time, as `curve_plot.curve_figure` draws it; write it as PNG where asked.

        Raises OSError, which names the file.
        """
        from engine.curve_plot import curve_figure, save_figure

        figure = curve_figure(self, thumbnails)
        if path is not None:
            save_figure(path, figure)
        return figure


def read_scores(path: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (frame (n,) int64, score (n,) float32, warming_up (n,) bool) of what `RiskCurve.write_csv` wrote.

    Raises EvaluationError for another file.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as f:
            reader = csv.reader(f, strict=True)
            if (header := next(reader, None)) != list(COLUMNS):
                raise ValueError(f"its first line is not {','.join(COLUMNS)}" if header else "it is empty")
            rows = [(int(frame), float(score), ("0", "1").index(flag)) for _, frame, score, flag in reader]
        frame, score, warming_up = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
        frame, score = np.array(frame, np.int64), np.array(score, np.float32)
        if not ((score >= 0) & (score <= 1)).all():
            raise ValueError("a score is not in [0, 1]")
        if (np.diff(frame, prepend=-1) <= 0).any():
            raise ValueError("its frames do not ascend")
    except (OSError, ValueError, OverflowError, csv.Error) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else short_reason(e)
        raise EvaluationError(f"{path}: not the scores of a video ({reason}); remove it to score again") from e
    return frame, score, np.array(warming_up, dtype=bool)


def envelope(curve: RiskCurve, most: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (time (k,), score (k,) float64) of each piece of a curve, few enough to draw.

    The video is divided into `most` parts of equal length; of a piece that has more scores than that, those are kept
    that are the highest and lowest of a part, and both ends: no peak is lost.
    """
    return [_envelope(curve.frame[piece] * (most / curve.num_frames), curve.time[piece], curve.score[piece])
            for piece in curve.pieces()]  # fmt: skip


def _envelope(part: np.ndarray, time: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    edges = [0, *(np.flatnonzero(np.diff(part.astype(int))) + 1).tolist(), len(part)]
    if 2 * len(edges) >= len(part):
        return time, score.astype(np.float64)
    keep = {0, len(part) - 1}
    for a, b in zip(edges[:-1], edges[1:], strict=True):
        keep |= {a + int(score[a:b].argmax()), a + int(score[a:b].argmin())}
    kept = sorted(keep)
    return time[kept], score[kept].astype(np.float64)
