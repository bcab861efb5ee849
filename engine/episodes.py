"""Episodes of alarm: false alarms per hour, and events found with a tolerance. NumPy only.

An episode is a run of scored frames with score >= threshold, from its first frame's time to the end of its last frame.
Episodes that are at most `merge` seconds apart are one; then those shorter than `shortest` seconds are dropped.
"""

from collections.abc import Sequence

import numpy as np

from engine.anticipation import EPS, NAN, ScoredClip


def episodes(clip: ScoredClip, threshold: float, merge: float = 0.0, shortest: float = 0.0) -> np.ndarray:
    """Return the episodes of a clip, (n, 2) float64 (start, end) in seconds, in order."""
    alarm = np.zeros(len(clip.score) + 2, dtype=bool)
    alarm[1:-1] = clip.score >= threshold
    changes = np.flatnonzero(alarm[1:] != alarm[:-1])
    starts, ends = changes[::2], changes[1::2] - 1
    if not len(starts):
        return np.zeros((0, 2))
    start, end = clip.time[starts], clip.time[ends] + clip.frame_seconds
    apart = np.ones(len(start) + 1, dtype=bool)
    apart[1:-1] = start[1:] - end[:-1] > merge + EPS
    start, end = start[apart[:-1]], end[apart[1:]]
    return np.stack([start, end], axis=1)[end - start >= shortest - EPS]


def false_alarms(
    clips: Sequence[ScoredClip], threshold: float, merge: float = 0.0, shortest: float = 0.0, horizon: float = 5.0
) -> dict[str, float]:
    """Return how often an alarm comes for nothing, per hour.

    episodes_negative, hours_negative, per_hour_negative: in negative clips. share_negative_under_alarm: of their time;
    a constant alarm is ONE episode a clip, so the rate alone rewards long alarms. episodes_too_early, hours_too_early:
    in timed positives, of episodes that end, and of frames, at least `horizon` seconds before the event. per_hour_all:
    of both. A rate per hour holds for this choice of clips, not for an hour of driving.
    """
    negatives = [c for c in clips if not c.positive and len(c.time)]
    timed = [c for c in clips if c.timed]
    runs = [episodes(c, threshold, merge, shortest) for c in negatives]
    n_negative = sum(map(len, runs))
    seconds = sum(len(c.time) * c.frame_seconds for c in negatives)
    under_alarm = sum(float((c.score >= threshold).sum()) * c.frame_seconds for c in negatives)
    early = sum(int((episodes(c, threshold, merge, shortest)[:, 1] <= c.event - horizon + EPS).sum()) for c in timed)
    early_seconds = sum(int((c.time < c.event - horizon - EPS).sum()) * c.frame_seconds for c in timed)
    whole = seconds + early_seconds
    return {
        "episodes_negative": n_negative,
        "hours_negative": seconds / 3600,
        "per_hour_negative": 3600 * n_negative / seconds if seconds else NAN,
        "share_negative_under_alarm": under_alarm / seconds if seconds else NAN,
        "episodes_too_early": early,
        "hours_too_early": early_seconds / 3600,
        "per_hour_all": 3600 * (n_negative + early) / whole if whole else NAN,
    }


def event_detection(
    clips: Sequence[ScoredClip], threshold: float, merge: float = 0.0, shortest: float = 0.0, tolerance: float = 0.0
) -> dict[str, float]:
    """Return tp, fp, fn, precision, recall, f1 and mean_onset_error of episodes as detections of `intervals`.

    In the order of time each true interval that reaches the scored part takes the first unused episode that begins by
    its end + tolerance and ends from its start - tolerance on. One alarm serves one event; a second alarm on it is a
    false positive. mean_onset_error: begin of the episode - begin of the event, in seconds; negative is early. One
    constant alarm a clip has F1 near 1 where each clip holds one event: see `false_alarms`' share of time.
    """
    tp = fp = fn = 0
    onsets = []
    for clip in clips:
        if not len(clip.time):
            continue
        found = episodes(clip, threshold, merge, shortest)
        used = np.zeros(len(found), bool)
        for start, end in sorted(i for i in clip.intervals if i[1] > clip.time[0] + EPS):
            fits = ~used & (found[:, 0] <= end + tolerance + EPS) & (found[:, 1] >= start - tolerance - EPS)
            if not fits.any():
                fn += 1
                continue
            used[first := int(fits.argmax())] = True
            onsets.append(found[first, 0] - start)
        tp, fp = tp + int(used.sum()), fp + int((~used).sum())
    return {
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "precision": tp / (tp + fp) if tp + fp else NAN,
        "recall": tp / (tp + fn) if tp + fn else NAN,
        "f1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else NAN,
        "mean_onset_error": float(np.mean(onsets)) if onsets else NAN,
    }
