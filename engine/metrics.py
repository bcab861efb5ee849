"""Frame-level metrics of a risk score: arrays in, dictionary out. NumPy only, exact, tie-aware.

The reference (simple-tad) reports AUROC and AP on 101 thresholds; those figures stand beside the exact ones under
`*_binned101`. AUC_MCC, the area under MCC over the threshold, is defined on the same 101 thresholds (arXiv:2507.09338).
"""

from dataclasses import dataclass

import numpy as np

THRESHOLDS = np.arange(0.0, 1.001, 0.01)
HALF = 50  # THRESHOLDS[50] is exactly 0.5


@dataclass(frozen=True)
class ThresholdCurve:
    """Confusion counts at each of n thresholds, where a frame is called anomalous if score >= threshold: int64 (n,)."""

    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    tn: np.ndarray

    @property
    def mcc(self) -> np.ndarray:
        """(n,) Matthews correlation coefficient, 0 where it is undefined."""
        tp, fp, fn, tn = (x.astype(np.float64) for x in (self.tp, self.fp, self.fn, self.tn))
        norm = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        return np.divide(tp * tn - fp * fn, norm, out=np.zeros_like(norm), where=norm > 0)

    @property
    def f1(self) -> np.ndarray:
        """(n,) harmonic mean of precision and recall, 0 where it is undefined."""
        called = 2 * self.tp + self.fp + self.fn
        return np.divide(2 * self.tp, called, out=np.zeros(len(called)), where=called > 0)


def _checked(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, dtype=np.float32).ravel(), np.asarray(labels).ravel()
    if scores.shape != labels.shape or not len(scores):
        raise ValueError(f"{len(scores)} scores for {len(labels)} labels")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError("scores must be probabilities in [0, 1]; some are outside or NaN")
    return scores, labels.astype(bool)


def threshold_curve(scores: np.ndarray, labels: np.ndarray) -> ThresholdCurve:
    """Scores in [0, 1] and 0/1 labels, (n,) each -> confusion counts at THRESHOLDS (compared in float32).

    Raises ValueError for other shapes, labels or scores.
    """
    scores, labels = _checked(scores, labels)
    thresholds = THRESHOLDS.astype(np.float32)
    tp, fp = (len(s) - np.searchsorted(np.sort(s), thresholds, side="left") for s in (scores[labels], scores[~labels]))
    return ThresholdCurve(tp=tp, fp=fp, fn=labels.sum() - tp, tn=(~labels).sum() - fp)


def exact_threshold_curve(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ThresholdCurve]:
    """Return the distinct scores (m,), descending, and the confusion counts at each of them as threshold.

    scores: (n,), at least one, compared as they are. labels: (n,) 0 or 1.
    """
    scores, labels = np.asarray(scores), np.asarray(labels).astype(bool)
    tp, fp = _cumulative(scores, labels)
    return np.unique(scores)[::-1], ThresholdCurve(tp=tp, fp=fp, fn=tp[-1] - tp, tn=fp[-1] - fp)


def roc_curve(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (false, true) positive rates by distinct score, from (0, 0) to (1, 1); NaN where a class is absent."""
    tp, fp = _cumulative(*_checked(scores, labels))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.r_[0.0, fp / fp[-1]], np.r_[0.0, tp / tp[-1]]


def precision_recall_curve(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (precision, recall) at every distinct score, recall ascending. Recall is NaN without positives."""
    tp, fp = _cumulative(*_checked(scores, labels))
    with np.errstate(invalid="ignore", divide="ignore"):
        return tp / (tp + fp), tp / tp[-1]


def _cumulative(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return true and false positives at each distinct score, descending."""
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.r_[np.flatnonzero(np.diff(scores[order])), len(scores) - 1]
    tp = np.cumsum(labels[order])[last_of_ties]
    return tp, last_of_ties + 1 - tp


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else 0.0


def frame_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores in [0, 1] and 0/1 labels, (n,) each -> the metrics, in [0, 1] (MCC in [-1, 1]).

    auroc, ap: exact. auroc_binned101, ap_binned101: the reference's. auc_mcc, mcc_max (at mcc_max_threshold), mcc_05.
    accuracy, precision, recall, f1 at score >= 0.5. n, n_pos: frames, anomalous frames.
    auroc needs both classes, ap a positive one; without they are NaN. Raises ValueError for other input.
    """
    curve = threshold_curve(scores, labels)
    fpr, tpr = roc_curve(scores, labels)
    precision, recall = precision_recall_curve(scores, labels)
    mcc = curve.mcc
    tp, fp, fn, tn = (int(x[HALF]) for x in (curve.tp, curve.fp, curve.fn, curve.tn))
    n, n_pos = tp + fp + fn + tn, tp + fn
    p, r = _ratio(tp, tp + fp), _ratio(tp, n_pos)
    return {
        "auroc": float(np.trapezoid(tpr, fpr)),
        "ap": float(np.sum(np.diff(np.r_[0.0, recall]) * precision)),
        "auc_mcc": float(np.trapezoid(mcc, THRESHOLDS)),
        "mcc_max": float(mcc.max()),
        "mcc_max_threshold": round(float(THRESHOLDS[mcc.argmax()]), 2),
        "mcc_05": float(mcc[HALF]),
        "accuracy": (tp + tn) / n,
        "precision": p,
        "recall": r,
        "f1": _ratio(2 * p * r, p + r),
        **_binned(curve, n_pos, n - n_pos),
        "n": n,
        "n_pos": n_pos,
    }


def _binned(curve: ThresholdCurve, n_pos: int, n_neg: int) -> dict[str, float]:
    """Return AUROC and AP as torchmetrics has them on THRESHOLDS: without (0, 0), so scores of 1.0 lose their area."""
    if not n_pos or not n_neg:
        return {"auroc_binned101": float("nan"), "ap_binned101": float("nan")}
    tpr, fpr = curve.tp / n_pos, curve.fp / n_neg
    called = curve.tp + curve.fp
    precision = np.r_[np.divide(curve.tp, called, out=np.zeros(len(called)), where=called > 0), 1.0]
    recall = np.r_[tpr, 0.0]
    return {
        "auroc_binned101": float(np.trapezoid(tpr[::-1], fpr[::-1])),
        "ap_binned101": float(-np.sum(np.diff(recall) * precision[:-1])),
    }
