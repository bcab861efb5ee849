"""mTTA, TTA@R80 and AP as the published code of UString, DSTA and LOTVS-CAP computes them. NumPy only. GAMEABLE.

For tables beside published numbers alone. What is wrong in them, and where it is kept:

1. Seconds are (clip length) x (relative lead), not (event time) x (relative lead): 4.5 s become 5.0 on DAD.
   Kept in `mtta_published`, not in `mtta_true_seconds`.
2. The mean is over all recalls, those of low thresholds included, and negative clips play no part: a constant score has
   the highest value there is. Kept in both: it is the definition.
3. Where any evaluated score is 0 the first threshold is 0, and every negative clip counts as a detected positive:
   recall and AP above 1. Kept in `mtta_published` alone, and there only with zero_bug.
4. At the highest recall the published code takes whatever row an unstable sort puts first. Kept in neither: the highest
   precision and time of a recall count.
5. Fewer evaluated frames than thresholds end the published code in an IndexError. Kept in neither.
"""

from collections.abc import Sequence

import numpy as np

from engine.anticipation import NAN, ScoredClip


def mtta_published(
    scores: np.ndarray,
    labels: np.ndarray,
    event_frame: np.ndarray,
    fps: float,
    *,
    step: float = 0.001,
    zero_bug: bool = True,
) -> dict[str, float]:
    """Return ap, mtta, tta_r80, p_r80, recall_used_for_tta_r80, n_recalls, max_recall (`formula_published`). GAMEABLE.

    Args:
        scores: (N, T) in [0, 1]; NaN where a frame is not scored.
        labels: (N,) 1 where the clip holds an event.
        event_frame: (N,) frame of the event; in a negative clip larger than T - 1.
        fps: frames per second. Leads are in seconds as published: relative lead x T / fps.
        step: between thresholds; LOTVS-CAP has 0.1.
        zero_bug: keep defect 3 above.
    """
    seconds = np.full(len(scores), scores.shape[1] / fps)
    return _sweep(scores, labels, event_frame, seconds, step, zero_bug)


def mtta_true_seconds(
    scores: np.ndarray, labels: np.ndarray, event_frame: np.ndarray, fps: float | np.ndarray, *, step: float = 0.001
) -> dict[str, float]:
    """Return the figures of `mtta_published` with leads in true seconds, and without defect 3. GAMEABLE all the same.

    fps: frames per second, one for all clips or (N,).
    """
    return _sweep(scores, labels, event_frame, np.asarray(event_frame) / fps, step, False)


def mtta_of_clips(clips: Sequence[ScoredClip], *, step: float = 0.001) -> dict[str, float]:
    """Return the figures of `mtta_true_seconds` for clips of any length and rate. GAMEABLE.

    Positives are the timed ones; frames are counted in scored frames.
    """
    used = [c for c in clips if len(c.time) and (c.timed or not c.positive)]
    frames = [np.rint(c.time / c.frame_seconds) for c in used]
    parts = [(f[: c.before], c.score[: c.before]) for f, c in zip(frames, used, strict=True)]
    labels = np.array([c.positive for c in used], bool)
    seconds = np.array([c.event if c.positive else 0.0 for c in used])
    event_frame = np.array([c.event / c.frame_seconds if c.positive else np.inf for c in used])
    return _figures(parts, labels, event_frame, seconds, step, False)


def _sweep(
    scores: np.ndarray, labels: np.ndarray, event_frame: np.ndarray, seconds: np.ndarray, step: float, zero_bug: bool
) -> dict[str, float]:
    labels, event_frame = np.asarray(labels).astype(bool), np.asarray(event_frame)
    evaluated = ~np.isnan(scores) & ((np.arange(scores.shape[1]) < event_frame[:, None]) | ~labels[:, None])
    parts = [(np.flatnonzero(row), s[row]) for row, s in zip(evaluated, scores, strict=True)]
    return _figures(parts, labels, event_frame, seconds, step, zero_bug)


def _figures(
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
    labels: np.ndarray,
    event_frame: np.ndarray,
    seconds: np.ndarray,
    step: float,
    zero_bug: bool,
) -> dict[str, float]:
    """parts: (frame, score) of the evaluated frames of each clip. seconds: by which its relative lead is multiplied."""
    names = ("ap", "mtta", "tta_r80", "p_r80", "recall_used_for_tta_r80", "n_recalls", "max_recall")
    lowest = min((s.min() for _, s in parts if len(s)), default=None)
    if lowest is None or not labels.any():
        return dict.fromkeys(names, NAN)
    thresholds = np.arange(max(0.0, lowest), 1.0 + step / 2, step)
    first = np.full((len(parts), len(thresholds)), np.nan)  # frame of the first alarm, NaN where there is none
    for row, (frame, score) in enumerate(parts):
        at = np.searchsorted(np.maximum.accumulate(score), thresholds, "left")
        first[row, at < len(score)] = np.asarray(frame)[at[at < len(score)]]
    rows = []
    for column, threshold in zip(first.T, thresholds, strict=True):
        alarmed = ~np.isnan(column)
        true = alarmed & (labels | (zero_bug and threshold <= 0))
        if true.any():
            lead = (1 - column[true] / event_frame[true]) * seconds[true]
            rows.append((true.sum() / labels.sum(), true.sum() / alarmed.sum(), lead.mean()))
    if not rows:
        return dict.fromkeys(names, NAN)
    recall, precision, time = _best_of_each_recall(rows)
    near, enough = int(np.abs(recall - 0.8).argmin()), np.flatnonzero(recall >= 0.8)
    return {
        "ap": float(precision[0] * recall[0] + np.sum(np.diff(recall) * (precision[1:] + precision[:-1]) / 2)),
        "mtta": float(time.mean()),
        "tta_r80": float(time[near]),
        "p_r80": float(precision[enough[0]]) if len(enough) else NAN,
        "recall_used_for_tta_r80": float(recall[near]),
        "n_recalls": len(recall),
        "max_recall": float(recall[-1]),
    }


def _best_of_each_recall(rows: Sequence[tuple[float, float, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return recall (ascending, distinct), and the highest precision and time at each, of (recall, precision, time)."""
    recall, owner = np.unique([row[0] for row in rows], return_inverse=True)
    best = np.full((2, len(recall)), -np.inf)
    for column, values in enumerate(np.array(rows)[:, 1:].T):
        np.maximum.at(best[column], owner, values)
    return recall, best[0], best[1]
