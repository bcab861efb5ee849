"""The operating point: the threshold from which scores make events, found on scores whose labels are known."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.evaluate import Predictions
from engine.events import ROUNDING, EventRule, counts, find_events, is_missing, smooth
from engine.metrics import exact_threshold_curve

_BEST = {"mcc": "best MCC", "f1": "best F1"}


class NoOperatingPoint(ValueError):
    """There is no threshold to be found; the message says why."""


@dataclass(frozen=True)
class LabelledCurve:
    """The scores of a clip, whose labels are known.

    time: (n,) ascending, in seconds.
    score: (n,) in [0, 1].
    label: (n,) 0 or 1.
    """

    time: np.ndarray
    score: np.ndarray
    label: np.ndarray

    @property
    def normal_seconds(self) -> float:
        """The footage without anomaly: a score stands for the usual time between two; for none in a clip of one."""
        step = float(np.median(np.diff(self.time))) if len(self.time) > 1 else 0.0
        return step * int((self.label == 0).sum())

    @property
    def accidents(self) -> list[tuple[int, int]]:
        """The stretches of anomalous scores: [(first, last), ...] as indices."""
        edges = np.flatnonzero(np.diff(np.r_[0, self.label, 0]))
        return list(zip(edges[::2].tolist(), (edges[1::2] - 1).tolist(), strict=True))


@dataclass(frozen=True)
class OperatingPoint:
    """A rule that was found, and what it does on the clips it was found on.

    criterion: "mcc", "f1" or "false_alarms".
    measured: figures by name, see `measure`; what is undefined is None.
    """

    rule: EventRule
    criterion: str
    measured: dict[str, Any]

    def to_spec(self) -> dict[str, Any]:
        """Return it in plain types, as metrics.json and the spec of a weights file hold it."""
        return self.rule.to_spec() | {"criterion": self.criterion, "measured": self.measured}

    def __str__(self) -> str:
        shown = {k: "n/a" if v is None else f"{v:.3g}" if isinstance(v, float) else v for k, v in self.measured.items()}
        return (
            f"operating point: {self.rule.source}: threshold {self.rule.threshold:.4g}; MCC {shown['mcc']}, F1 "
            f"{shown['f1']}, precision {shown['precision']}, recall {shown['recall']}; "
            f"{shown['accidents_detected']} of {shown['accidents']} accidents found, {shown['false_alarms_per_hour']} "
            f"false alarms per hour in {shown['normal_hours']} h without anomaly"
        )


def labelled_curves(predictions: Predictions) -> list[LabelledCurve]:
    """Return the scores of each clip. Raises NoOperatingPoint where their times or labels are not known."""
    if predictions.time is None or predictions.label is None:
        raise NoOperatingPoint("the scores are without times or labels, as an earlier version wrote them")
    starts = np.flatnonzero(np.diff(predictions.clip)) + 1
    columns = (np.split(values, starts) for values in (predictions.time, predictions.score, predictions.label))
    return [LabelledCurve(*columns) for columns in zip(*columns, strict=True)]


def find_operating_point(
    clips: Sequence[LabelledCurve],
    criterion: str,
    rule: EventRule,
    *,
    false_alarms_per_hour: float = 1.0,
    split: str = "",
) -> OperatingPoint:
    """Find the threshold among all distinct scores, as the rule sees them, smoothed where it says so.

    Args:
        clips: their scores.
        criterion: "mcc" or "f1", the threshold at which that of all frames is best (the highest of several), or
            "false_alarms", the smallest from which upwards none gives more false alarms than wanted. Where none does at
            all, it is that of the best MCC. A false alarm is an event without an anomalous frame in it.
        rule: says what an event is; its threshold and source are not used.
        false_alarms_per_hour: wanted, in an hour of footage without anomaly.
        split: what the clips are of, for the reader: "DoTA val".

    Raises NoOperatingPoint where there is none: no clips, frames of one class, no footage without anomaly, scores that
    are all alike, more false alarms at the highest score; ValueError for scores that are none.
    """
    clips = [clip for clip in clips if len(clip.time)]
    if not clips:
        raise NoOperatingPoint("there are no scores")
    seen = [_seen(clip, rule) for clip in clips]
    if criterion == "false_alarms":
        threshold, words = _by_false_alarms(seen, rule, false_alarms_per_hour)
    else:
        threshold, words = _best(seen, criterion), _BEST[criterion]
    where = f"{split} ({len(clips)} clip{'' if len(clips) == 1 else 's'})".lstrip()
    found = replace(rule, threshold=threshold, source=f"{words} on {where}")
    return OperatingPoint(found, criterion, measure(clips, found) | {"split": split})


def measure(clips: Sequence[LabelledCurve], rule: EventRule) -> dict[str, Any]:
    """Return what a rule does on clips, in plain types; what is undefined is None.

    mcc, f1, precision, recall: of frames, risky ones against anomalous ones. events, false_alarms: how many; a false
    alarm has no anomalous frame. normal_hours: footage without anomaly. false_alarms_per_hour: of that. accidents: the
    stretches of anomalous frames; accidents_detected: those with a frame in an event. clips: how many.
    """
    tp = fp = fn = tn = events = false_alarms = accidents = detected = 0
    for clip in clips:
        risky, anomalous = _seen(clip, rule).score >= np.float32(rule.threshold), clip.label == 1
        tp, fp = tp + int((risky & anomalous).sum()), fp + int((risky & ~anomalous).sum())
        fn, tn = fn + int((~risky & anomalous).sum()), tn + int((~risky & ~anomalous).sum())
        inside = np.zeros(len(clip.time), dtype=bool)
        for event in find_events(clip.time, clip.score, rule):
            within = (clip.time >= event.start) & (clip.time <= event.end)
            inside |= within
            events, false_alarms = events + 1, false_alarms + int(not anomalous[within].any())
        stretches = clip.accidents
        accidents += len(stretches)
        detected += sum(bool(inside[first : last + 1].any()) for first, last in stretches)
    hours = sum(clip.normal_seconds for clip in clips) / 3600
    both = (tp + fn) * (fp + tn)
    return {
        "mcc": _ratio(tp * tn - fp * fn, float(both * (tp + fp) * (tn + fn)) ** 0.5) if both else None,
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "events": events,
        "false_alarms": false_alarms,
        "normal_hours": hours,
        "false_alarms_per_hour": _ratio(false_alarms, hours),
        "accidents": accidents,
        "accidents_detected": detected,
        "clips": len(clips),
    }


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def _seen(clip: LabelledCurve, rule: EventRule) -> LabelledCurve:
    """Return a clip with its scores as the rule sees them."""
    return replace(clip, score=smooth(clip.time, clip.score, rise=rule.rise, fall=rule.fall))


def _best(clips: Sequence[LabelledCurve], criterion: str) -> float:
    """Return the threshold at which the MCC or the F1 of all frames is best."""
    scores, labels = (np.concatenate([getattr(clip, name) for clip in clips]) for name in ("score", "label"))
    if labels.min() == labels.max():
        raise NoOperatingPoint(f"all frames are {'anomalous' if labels[0] else 'normal'}: no threshold is better")
    thresholds, curve = exact_threshold_curve(scores, labels)
    values = getattr(curve, criterion)
    if len(thresholds) == 1 or values.max() <= 0:
        raise NoOperatingPoint("the scores do not tell anomalous frames from normal ones")
    return float(thresholds[values.argmax()])


# ----------------------------------------------------------------------------------------------------------------------
# False alarms


def _by_false_alarms(clips: Sequence[LabelledCurve], rule: EventRule, per_hour: float) -> tuple[float, str]:
    """Return the threshold for at most so many false alarms per hour, and its description."""
    hours = sum(clip.normal_seconds for clip in clips) / 3600
    if not hours:
        raise NoOperatingPoint("there is no footage without anomaly, in which alarms would be false")
    thresholds, alarms = false_alarms_by_threshold(clips, rule)
    words = f"{per_hour:g} false alarm{'' if per_hour == 1 else 's'} per hour"
    too_many = np.flatnonzero(alarms / hours > per_hour)
    if not len(too_many):
        try:
            return _best(clips, "mcc"), f"best MCC, as no threshold gives more than {words},"
        except NoOperatingPoint as e:
            raise NoOperatingPoint(f"no threshold gives more than {words}, and {e}") from e
    if not too_many[0]:
        raise NoOperatingPoint(f"the highest score alone, {thresholds[0]:.3g}, gives more than {words}")
    return float(thresholds[too_many[0] - 1]), f"at most {words}"


def false_alarms_by_threshold(clips: Sequence[LabelledCurve], rule: EventRule) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct scores (m,), descending, and the false alarms at each of them as threshold, (m,) int64.

    clips: with scores as the rule sees them. As the threshold falls, events only grow and join, so that each score is
    looked at once.
    """
    scores, changes = [], []
    for clip in clips:
        for score, change in _changes(clip, rule):
            scores.append(score)
            changes.append(change)
    thresholds, inverse = np.unique(np.array(scores), return_inverse=True)
    total = np.zeros(len(thresholds), dtype=np.int64)
    np.add.at(total, inverse, changes)
    return thresholds[::-1], np.cumsum(total[::-1])


def _changes(clip: LabelledCurve, rule: EventRule) -> Iterator[tuple[float, int]]:
    """Yield (score, more false alarms than before) as the threshold falls to each score of a clip."""
    seconds = np.diff(clip.time)
    is_cut = is_missing(seconds, np.minimum.accumulate(seconds), rule.gap) if len(seconds) else np.zeros(0, bool)
    cuts = [0, *(np.flatnonzero(is_cut) + 1).tolist(), len(clip.time)]
    for first, last in zip(cuts[:-1], cuts[1:], strict=True):
        stretch = _Stretch(clip.time[first:last], clip.label[first:last], rule)
        score = clip.score[first:last]
        for i in np.argsort(-score, kind="stable").tolist():
            yield float(score[i]), stretch.add(i)


class _Stretch:
    """The events of scores that none is missing among, while more and more of them are risky.

    An event is kept by its first risky score: its last one, and seconds of its longest run.
    """

    def __init__(self, time: np.ndarray, label: np.ndarray, rule: EventRule):
        self.time, self.rule = time.tolist(), rule
        self._anomalous = np.r_[0, np.cumsum(label)].tolist()  # before each score
        self._run_start, self._run_end = {}, {}  # of the run that ends, or starts, at a score
        self._starts: list[int] = []  # of the events, in order
        self._events: dict[int, tuple[int, float]] = {}

    def add(self, i: int) -> int:
        """Make score i risky; returns how many more false alarms there are."""
        first, last = self._run_start.get(i - 1, i), self._run_end.get(i + 1, i)
        self._run_start[last], self._run_end[first] = first, last
        event = i, i, self.time[last] - self.time[first]
        place = bisect_left(self._starts, i)
        more = 0
        if place < len(self._starts) and self._joins(i, self._starts[place]):
            event, more = self._join(event, self._starts.pop(place), more)
        if place and self._joins(self._events[self._starts[place - 1]][0], i):
            event, more = self._join(event, self._starts.pop(place - 1), more)
            place -= 1
        self._starts.insert(place, event[0])
        self._events[event[0]] = event[1:]
        return more + self._is_false(*event)

    def _joins(self, last: int, first: int) -> bool:
        """Return whether a risky score `first` belongs to the event up to `last`."""
        return first <= last + 1 or self.time[first] - self.time[last + 1] <= self.rule.gap + ROUNDING

    def _join(self, event: tuple[int, int, float], start: int, more: int) -> tuple[tuple[int, int, float], int]:
        """Return an event with the one from `start` on, which is one less."""
        last, longest_run = self._events.pop(start)
        joined = min(event[0], start), max(event[1], last), max(event[2], longest_run)
        return joined, more - self._is_false(start, last, longest_run)

    def _is_false(self, first: int, last: int, longest_run: float) -> bool:
        clean = self._anomalous[last + 1] == self._anomalous[first]
        return clean and counts(self.rule, longest_run, self.time[last] - self.time[first])
