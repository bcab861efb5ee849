"""Alerts out of scores: the rule that makes events of a risk curve."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class EventRule:
    """What counts as an event. Times are in seconds of the video.

    threshold: score in [0, 1] from which a frame is risky.
    alert_after: how long every score must be risky before an event counts.
    gap: how long scores may stay below the threshold within an event.
    min_duration: how long an event must be, from its first risky frame to its last.
    source: where the rule comes from, in words for a reader: "best MCC on DoTA val (1402 clips)".
    """

    threshold: float
    alert_after: float = 0.0
    gap: float = 0.5
    min_duration: float = 0.0
    source: str = ""


@dataclass(frozen=True)
class Event:
    """A stretch of risk. Times are in seconds of the video.

    start, end: of its first risky frame and its last.
    alert: when the rule was met, which is when a live alert is raised.
    peak, peak_score: when the score is highest (the first time), and that score.
    """

    start: float
    end: float
    alert: float
    peak: float
    peak_score: float


def find_events(time: np.ndarray, score: np.ndarray, rule: EventRule) -> list[Event]:
    """Return the events of scores (n,) at ascending times (n,), in order."""
    raise NotImplementedError
