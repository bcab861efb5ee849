"""Labels of frames: from times in seconds, and as functions of time (seconds to the nearest anomaly, soft labels).

A frame is safe (0), anomalous (1) or IGNORED (2): nobody can say which, or nobody should ask. No window that ends on an
ignored frame is trained on or scored; it may be seen inside a window. The value is one that no loss or metric takes for
a class, so that a reader that forgets about it fails.
"""

import math
from collections.abc import Sequence

import numpy as np

SAFE, ANOMALOUS, IGNORED = 0, 1, 2
BEFORE_EVENT = 1.5  # seconds that count as anomalous before an event, where nobody said when it could be told
_EXACT = 1e-6  # of a frame: times with few decimals fall on a frame as they were meant to
ANTICIPATION = 2.0  # seconds before an anomaly that time_to_anomaly counts down
AFTERMATH = 1.0  # seconds after it that it counts up
FAR = -100.0  # further away than that


def frame_at(seconds: float, fps: float) -> int:
    """Return the first frame that is shown at `seconds` or later; frame i is shown at i / fps."""
    return math.ceil(seconds * fps - _EXACT)


def labels_of_times(
    num_frames: int,
    fps: float,
    *,
    intervals: Sequence[tuple[float, float]] = (),
    event: float | None = None,
    alert: float | None = None,
    before: float = BEFORE_EVENT,
) -> np.ndarray:
    """Turn times in seconds from the beginning of a clip into (num_frames,) uint8 labels.

    Frame i is shown at t = i / fps. The first rule that applies:
        intervals: start <= t < end of any is anomalous, and all else is safe, as in DoTA and DADA-2000.
        alert and event: alert <= t < event is anomalous, what comes before it safe.
        event alone: event - before <= t < event is anomalous, what comes before it safe.
        neither: all is safe.
    From an event on, frames are IGNORED unless intervals say otherwise: they show what is to be foreseen, and what
    comes of it. An event may lie after the last frame. The alert rule is that of the best entry to Nexar's challenge,
    the rule of 1.5 s that of its fourth public place. Raises ValueError for times that contradict each other.
    """
    labels = np.zeros(num_frames, dtype=np.uint8)

    def place(seconds: float) -> int:
        return min(max(frame_at(seconds, fps), 0), num_frames)

    for start, end in intervals:
        if not 0 <= start < end:
            raise ValueError(f"from {start:g} s to {end:g} s is no interval")
        labels[place(start) : place(end)] = ANOMALOUS
    if alert is not None and (event is None or not 0 <= alert <= event):
        raise ValueError(f"an alert at {alert:g} s needs an event then or later, not {event}")
    if event is not None and not 0 <= event < math.inf:
        raise ValueError(f"an event at {event:g} s is not in a clip")
    if event is not None and not intervals:
        labels[place(event - before if alert is None else alert) : place(event)] = ANOMALOUS
        labels[place(event) :] = IGNORED
    return labels


def time_to_anomaly(
    labels: np.ndarray, fps: float, anticipation: float = ANTICIPATION, aftermath: float = AFTERMATH
) -> np.ndarray:
    """Turn (T,) labels into (T,) float64 seconds relative to the nearest anomaly; IGNORED frames are none.

    A frame has 0 inside an anomaly; -d before the next one if d <= anticipation (this wins over the one before); +d
    after the last one if d <= aftermath; FAR otherwise. In a clip without anomaly all are NaN, where the reference
    (simple-tad) has 0, which reads "inside an anomaly".
    """
    labels = np.asarray(labels) == ANOMALOUS
    if not labels.any():
        return np.full(len(labels), np.nan)
    frame = np.arange(len(labels))
    anomalous = frame[labels]
    following = np.searchsorted(anomalous, frame)  # the first anomalous frame at or after each frame
    none = len(labels) + int((anticipation + aftermath) * fps) + 1  # a distance beyond every limit
    until = np.where(following < len(anomalous), anomalous[np.minimum(following, len(anomalous) - 1)] - frame, none)
    since = np.where(following > 0, frame - anomalous[following - 1], none)
    ttc = np.full(len(labels), FAR)
    after = since <= int(aftermath * fps)
    ttc[after] = since[after] / fps
    before = until <= int(anticipation * fps)
    ttc[before] = -until[before] / fps
    ttc[labels] = 0.0
    return ttc


def smooth_labels(
    labels: np.ndarray, ttc: np.ndarray, anticipation: float = ANTICIPATION, aftermath: float = AFTERMATH
) -> np.ndarray:
    """Turn (T,) labels and their `time_to_anomaly` into (T,) float32 soft probabilities of an anomaly.

    These ramp up along a sigmoid from 0.0025 at -anticipation to 0.9975 at 0 seconds, and back down over aftermath, as
    in simple-tad. An IGNORED frame that is not in reach of an anomaly has NaN.
    """
    hard = np.where(np.asarray(labels) == IGNORED, np.nan, labels)
    with np.errstate(over="ignore", invalid="ignore"):
        before = 1 / (1 + np.exp(-(12 / anticipation) * (ttc + anticipation / 2)))
        after = 1 / (1 + np.exp(-(12 / aftermath) * (aftermath / 2 - ttc)))
        soft = np.where((-anticipation <= ttc) & (ttc < 0), before, hard)
        return np.where((ttc > 0) & (ttc <= aftermath), after, soft).astype(np.float32)
