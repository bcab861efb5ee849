"""The risk curve of a video: a score for each frame that a window ends on."""

from dataclasses import dataclass

import numpy as np

from engine.events import Event, EventRule, find_events


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

    def events(self) -> list[Event]:
        """Return the events of the scores by the rule; none where there is no rule."""
        return find_events(self.time, self.score, self.rule) if self.rule else []
