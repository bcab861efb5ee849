"""Alerts out of scores: the rule that makes events of a risk curve, and events as scores come.

Scores at times t_1 < t_2 < ... are risky where they reach the threshold. An event begins with a risky score. It ends
where scores stay below the threshold for longer than `gap`, from the first of them to the next risky one, or where
scores are missing for longer than `gap`. It counts, and its alert is raised, at the first risky score at which both an
uninterrupted run of risky ones within it has lasted `alert_after` and it has itself lasted `min_duration`. All of this
is known at the time of each score, from it and those before it. Scores and threshold are compared in float32, as in
engine.metrics.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from utils.event_rule import RANGES, check_operating_point

ROUNDING = 1e-6  # seconds: a frame's time is a quotient, whose rounding is not to decide whether a limit is reached
_LATE = 1.5  # scores are missing where two are so many times further apart than neighbours: one does not come at all


@dataclass(frozen=True)
class EventRule:
    """What counts as an event. Times are in seconds of the video.

    threshold: score in [0, 1] from which a frame is risky.
    alert_after: how long every score must be risky before an event counts.
    gap: how long scores may stay below the threshold within an event.
    min_duration: how long an event must be, from its first risky frame to its last.
    source: where the rule comes from, in words for a reader: "best MCC on DoTA val (1402 clips)".
    rise, fall: time constants of the smoothing of scores before the rule sees them, see `smooth`; 0 = none.
    """

    threshold: float
    alert_after: float = 0.0
    gap: float = 0.5
    min_duration: float = 0.0
    source: str = ""
    rise: float = 0.0
    fall: float = 0.0

    def to_spec(self) -> dict[str, Any]:
        """Return the rule in plain types, as a weights file holds it."""
        return {name: float(value) if name in RANGES else value for name, value in asdict(self).items()}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "EventRule":
        """Return the rule that `to_spec` made these of, or an operating point holds; what is absent has its default.

        Raises ValueError, which says which value is damaged.
        """
        check_operating_point(spec)
        return cls(**{name: value for name, value in spec.items() if name in RANGES or name == "source"})


@dataclass(frozen=True)
class Event:
    """A stretch of risk. Times are in seconds of the video.

    start, end: of its first risky frame and its last.
    alert: when the rule was met, which is when a live alert is raised.
    peak, peak_score: when the score as it came, not smoothed, is highest (the first time), and that score.
    """

    start: float
    end: float
    alert: float
    peak: float
    peak_score: float


class Change(NamedTuple):
    """What a score changes.

    ended: the event that is over.
    raised: the event whose alert is raised, as far as it has come.
    """

    ended: Event | None = None
    raised: Event | None = None


class Smoother:
    """Smooths scores as they come; see `smooth`."""

    def __init__(self, rise: float, fall: float):
        self.rise, self.fall = rise, fall
        self._time = self._value = math.nan

    def push(self, time: float, score: float) -> float:
        """Return the smoothed score, to the precision of a float32, at a time in seconds, later than the one before."""
        seconds, value = time - self._time, self._value
        constant = self.rise if score > value else self.fall
        if constant and not math.isnan(value):
            score = value - math.expm1(-seconds / constant) * (score - value)
        self._time, self._value = time, score
        return float(np.float32(score))


def smooth(time: np.ndarray, score: np.ndarray, *, rise: float, fall: float) -> np.ndarray:
    """Smooth scores (n,) at ascending times (n,), in seconds, exponentially; returns (n,) float32.

    y_1 = s_1, y_i = y_{i-1} + (1 - exp(-(t_i - t_{i-1}) / tau)) (s_i - y_{i-1}), where tau, in seconds, is `rise` while
    the score is above what is smoothed, else `fall`. 0 = none. The number of frames per second makes no difference.
    """
    smoother = Smoother(rise, fall)
    return np.array([smoother.push(t, s) for t, s in zip(*_plain(time, score), strict=True)], dtype=np.float32)


@dataclass
class _Open:
    """An event that goes on. run_start: of the risky run; dip_start: of the scores below the threshold; or None.

    highest: (time, score) of the highest score so far; peak: of that up to `end`, the last risky one.
    """

    start: float
    end: float
    run_start: float | None
    dip_start: float | None
    highest: tuple[float, float]
    peak: tuple[float, float]
    longest_run: float = 0.0
    alert: float | None = None

    def event(self) -> Event | None:
        """Return the event so far, None where it does not count yet."""
        return None if self.alert is None else Event(self.start, self.end, self.alert, *self.peak)


class EventTracker:
    """Finds events as scores come, those that `find_events` finds of all of them."""

    def __init__(self, rule: EventRule):
        self.rule = rule
        self._threshold = float(np.float32(rule.threshold))
        self._restart()

    def push(self, time: float, score: float) -> Change:
        """Take the score in [0, 1] of a time in seconds, later than the one before; returns what it changes.

        Raises ValueError for another score or time.
        """
        if not (0 <= score <= 1 and math.isfinite(time) and time > self._time):
            after = f", after {self._time} s" if math.isfinite(self._time) else ""
            raise ValueError(f"score {score} at {time} s{after}: not a probability, or not at a later time")
        ended = self._end_before(time)
        score = float(np.float32(score))
        if self._smoother.push(time, score) >= self._threshold:
            return Change(ended, self._take_risky(time, score))
        if event := self._open:
            event.run_start = None
            event.dip_start = time if event.dip_start is None else event.dip_start
            event.highest = max(event.highest, (time, score), key=_score)
        return Change(ended)

    def close(self) -> Event | None:
        """Return the event that goes on, where it counts: it is the last. What is pushed then is of another video."""
        event = self._open and self._open.event()
        self._restart()
        return event

    def _restart(self) -> None:
        self._smoother = Smoother(self.rule.rise, self.rule.fall)
        self._time = -math.inf  # of the last score
        self._step = math.inf  # the shortest time between two scores
        self._open: _Open | None = None

    def _end_before(self, time: float) -> Event | None:
        """Move on to the time of a score; returns the event that is over by then, if it counts."""
        seconds, self._time = time - self._time, time
        self._step = min(self._step, seconds)
        if not (event := self._open):
            return None
        dip = 0.0 if event.dip_start is None else time - event.dip_start
        if dip <= self.rule.gap + ROUNDING and not is_missing(seconds, self._step, self.rule.gap):
            return None
        self._open = None
        return event.event()

    def _take_risky(self, time: float, score: float) -> Event | None:
        """Take a risky score; returns the event whose alert it raises."""
        here = time, score
        event = self._open = self._open or _Open(time, time, time, None, here, here)
        event.end, event.dip_start = time, None
        event.run_start = time if event.run_start is None else event.run_start
        event.peak = event.highest = max(event.highest, here, key=_score)
        event.longest_run = max(event.longest_run, time - event.run_start)
        if event.alert is not None or not counts(self.rule, event.longest_run, time - event.start):
            return None
        event.alert = time
        return event.event()


def _score(pair: tuple[float, float]) -> float:
    return pair[1]


def counts(rule: EventRule, longest_run: float, duration: float) -> bool:
    """Return whether an event counts, by its seconds and those of its longest run of risky scores."""
    return longest_run >= rule.alert_after - ROUNDING and duration >= rule.min_duration - ROUNDING


def is_missing(seconds: Any, step: Any, gap: float) -> Any:
    """Return whether scores are missing for longer than `gap` between two that follow each other.

    seconds: between the two, a number or an array. step: shortest time between two so far, alike. Scores further apart
    than the gap, as at a large stride, follow each other all the same.
    """
    return (seconds > gap + ROUNDING) & (seconds > _LATE * step)


def find_events(time: np.ndarray, score: np.ndarray, rule: EventRule) -> list[Event]:
    """Return the events of scores (n,) in [0, 1] at ascending times (n,) in seconds, in order.

    Raises ValueError for other scores or times.
    """
    tracker = EventTracker(rule)
    changes = [tracker.push(t, s) for t, s in zip(*_plain(time, score), strict=True)]
    events = [*(change.ended for change in changes), tracker.close()]
    return [event for event in events if event]


def _plain(time: np.ndarray, score: np.ndarray) -> tuple[list[float], list[float]]:
    """Return arrays as lists of Python's numbers; scores are those of a float32."""
    times, scores = np.asarray(time, dtype=np.float64), np.asarray(score, dtype=np.float32)
    if times.ndim != 1 or times.shape != scores.shape:
        raise ValueError(f"scores of shape {scores.shape} at times of shape {times.shape}")
    return times.tolist(), scores.tolist()
