"""Labels of frames as functions of time: seconds to the nearest anomaly, and soft labels."""

import numpy as np

ANTICIPATION = 2.0  # seconds before an anomaly that time_to_anomaly counts down
AFTERMATH = 1.0  # seconds after it that it counts up
FAR = -100.0  # further away than that


def time_to_anomaly(
    labels: np.ndarray, fps: float, anticipation: float = ANTICIPATION, aftermath: float = AFTERMATH
) -> np.ndarray:
    """Turn (T,) 0/1 labels into (T,) float64 seconds relative to the nearest anomaly.

    A frame has 0 inside an anomaly; -d before the next one if d <= anticipation (this wins over the one before); +d
    after the last one if d <= aftermath; FAR otherwise. In a clip without anomaly all are NaN, where the reference
    (simple-tad) has 0, which reads "inside an anomaly".
    """
    labels = np.asarray(labels) > 0
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
    """Turn (T,) 0/1 labels and their `time_to_anomaly` into (T,) float32 soft probabilities of an anomaly.

    These ramp up along a sigmoid from 0.0025 at -anticipation to 0.9975 at 0 seconds, and back down over aftermath, as
    in simple-tad.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        before = 1 / (1 + np.exp(-(12 / anticipation) * (ttc + anticipation / 2)))
        after = 1 / (1 + np.exp(-(12 / aftermath) * (aftermath / 2 - ttc)))
        soft = np.where((-anticipation <= ttc) & (ttc < 0), before, np.asarray(labels, dtype=np.float64))
        return np.where((ttc > 0) & (ttc <= aftermath), after, soft).astype(np.float32)
