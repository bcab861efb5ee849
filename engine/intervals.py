"""Bootstrap intervals of frame and clip metrics over clips or sources, alone and of paired differences. NumPy only.

A unit (a clip, or all clips of a recording) brings all its frames. Frames as units are wrong: those of a clip are
alike, and an interval over them is several times too narrow.

How it is fast: the metrics need counts by score alone. Frames are counted by unit and score, a replicate is a row of
multiplicities of the units, and the counts of all replicates are one matrix product. Up to EXACT distinct scores
nothing is lost. Of more, frames fall into bins between quantiles of each class and the thresholds of AUC_MCC, which
stays exact; within a bin, frames of both classes count as evenly mixed. What AUC_ROC and AP lose by that can be
measured: `Replicated.estimate` is of the bins.

Sources: percentile and BCa after Efron, Better Bootstrap Confidence Intervals (1987); the draws are
Generator(PCG64(seed)).integers(0, units, size=(replicates, units)).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from engine.metrics import HALF, THRESHOLDS

EXACT = 2048  # distinct scores up to which each has its own count,
EXACT_OF_FEW, FEW_CELLS = 8192, 2**23  # or so many, where they times the units are no more cells than these
BINS = 1024  # about, where there are more
LEVEL = 0.95
FEWEST_UNITS = 10  # of each class
UNDEFINED_AT_MOST = 0.05  # share of the replicates
METRICS = ("auroc", "ap", "auc_mcc", "mcc_05")
_CHUNK = 1024  # units whose counts are unfolded at a time
_FLOAT32_EXACT = 2**24


@dataclass(frozen=True)
class ScoreTable:
    """Scores and labels, counted by unit and score.

    unit: (n,) ascending number of the unit of each frame; column: (n,) of its score; label: (n,) bool.
    n_units: units there are, those without frames too. n_columns: distinct scores, or bins, ascending.
    thresholds: (101,) first column at or above each of THRESHOLDS.
    exact: whether every distinct score has its own column.
    """

    unit: np.ndarray
    column: np.ndarray
    label: np.ndarray
    n_units: int
    n_columns: int
    thresholds: np.ndarray
    exact: bool

    @classmethod
    def of(cls, scores: np.ndarray, labels: np.ndarray, unit: np.ndarray, n_units: int | None = None) -> "ScoreTable":
        """Scores in [0, 1], 0/1 labels and numbers of units from 0, (n,) each -> the table.

        n_units: None = the highest number + 1. Raises ValueError for other scores or labels.
        """
        scores, labels = np.asarray(scores, np.float32).ravel(), np.asarray(labels).ravel()
        unit = np.asarray(unit).ravel()
        if not len(scores) == len(labels) == len(unit):
            raise ValueError(f"{len(scores)} scores, {len(labels)} labels and {len(unit)} units")
        if not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError("scores must be probabilities in [0, 1]; some are outside or NaN")
        if not ((labels == 0) | (labels == 1)).all():
            raise ValueError("labels must be 0 or 1")
        label = labels.astype(bool)
        n_units = n_units or (int(unit.max()) + 1 if len(unit) else 0)
        edges, exact = _edges(scores, label, n_units)
        column = (np.searchsorted(edges, scores, "right") - 1).astype(np.int32)
        if (np.diff(unit) < 0).any():
            order = np.argsort(unit, kind="stable")
            unit, column, label = unit[order], column[order], label[order]
        at = np.searchsorted(edges, THRESHOLDS.astype(np.float32), "left")
        return cls(unit, column, label, n_units, len(edges), at, exact)

    def units_with(self, label: bool) -> int:
        """Return how many units have a frame of this label."""
        return len(np.unique(self.unit[self.label == label]))

    def chunks(self, dtype: type = np.float64):
        """Yield (first unit, counts (units, 2 x n_columns)) of consecutive units, the negative frames first."""
        width = 2 * self.n_columns
        starts = np.searchsorted(self.unit, np.arange(0, self.n_units + _CHUNK, _CHUNK))
        for chunk, first in enumerate(range(0, self.n_units, _CHUNK)):
            rows = slice(starts[chunk], starts[chunk + 1])
            size = min(_CHUNK, self.n_units - first)
            cell = (self.unit[rows] - first) * width + self.label[rows] * self.n_columns + self.column[rows]
            yield first, np.bincount(cell, minlength=size * width).reshape(size, width).astype(dtype)

    def total(self) -> np.ndarray:
        """(1, 2 x n_columns) counts of all units, the negative frames first."""
        cell = self.label * self.n_columns + self.column
        return np.bincount(cell, minlength=2 * self.n_columns).astype(np.float64)[None]

    def resampled(self, multiplicity: np.ndarray) -> np.ndarray:
        """Multiplicities (replicates, n_units) -> counts (replicates, 2 x n_columns) float64, exact."""
        largest = float(multiplicity.max()) if multiplicity.size else 0.0
        counts = np.zeros((len(multiplicity), 2 * self.n_columns))
        for first, part in self.chunks():
            fits = part.sum() * largest < _FLOAT32_EXACT
            kind = np.float32 if fits else np.float64
            counts += multiplicity[:, first : first + len(part)].astype(kind, copy=False) @ part.astype(kind)
        return counts

    def metrics(self, counts: np.ndarray) -> np.ndarray:
        """Counts (b, 2 x n_columns) -> (METRICS, b) float64; NaN where a class is absent."""
        parts = [self._metrics(counts[i : i + 128]) for i in range(0, len(counts), 128)]
        return np.concatenate(parts, axis=1)

    def _metrics(self, counts: np.ndarray) -> np.ndarray:
        negative, positive = counts[:, : self.n_columns], counts[:, self.n_columns :]
        fp = np.cumsum(negative[:, ::-1], axis=1)[:, ::-1]  # at or above each column
        tp = np.cumsum(positive[:, ::-1], axis=1)[:, ::-1]
        n_neg, n_pos = fp[:, 0], tp[:, 0]
        with np.errstate(invalid="ignore", divide="ignore"):
            lower = n_neg[:, None] - fp + negative / 2
            auroc = np.einsum("ij,ij->i", positive, lower) / (n_pos * n_neg)
            called = tp + fp
            if self.exact:
                precision = np.divide(tp, called, out=np.zeros_like(tp), where=called > 0)
            else:  # at the middle of a bin: its frames do not come at once, as ties do
                middle = called - (positive + negative - 1) / 2
                precision = np.divide(tp - (positive - 1) / 2, middle, out=np.zeros_like(tp), where=middle > 0)
            ap = np.einsum("ij,ij->i", positive, precision) / n_pos
        mcc = _mcc(*(np.pad(x, ((0, 0), (0, 1)))[:, self.thresholds] for x in (tp, fp)), n_pos[:, None], n_neg[:, None])
        one_class = (n_pos == 0) | (n_neg == 0)
        rows = np.stack([auroc, ap, np.trapezoid(mcc, THRESHOLDS, axis=1), mcc[:, HALF]])
        return np.where(one_class & (np.arange(4) != 1)[:, None], np.nan, rows)


def _edges(scores: np.ndarray, label: np.ndarray, n_units: int) -> tuple[np.ndarray, bool]:
    """Return the lowest score of each column, ascending, one at least, and whether each distinct score has its own."""
    if not len(scores):
        return np.zeros(1, np.float32), True
    ordered = [np.sort(scores[label]), np.sort(scores[~label])]
    distinct = np.unique(np.concatenate([s[np.r_[True, s[1:] != s[:-1]]] if len(s) else s for s in ordered]))
    if len(distinct) <= EXACT or (len(distinct) <= EXACT_OF_FEW and len(distinct) * n_units <= FEW_CELLS):
        return distinct, True
    quantiles = [s[np.linspace(0, len(s) - 1, BINS // 2).astype(np.int64)] for s in ordered if len(s)]
    top = [s[-np.geomspace(1, len(s), BINS // 4).astype(np.int64)] for s in ordered if len(s)]  # AP hangs on them
    return np.unique(np.concatenate([*quantiles, *top, THRESHOLDS.astype(np.float32)])), False


def _mcc(tp: np.ndarray, fp: np.ndarray, n_pos: np.ndarray, n_neg: np.ndarray) -> np.ndarray:
    fn, tn = n_pos - tp, n_neg - fp
    norm = np.sqrt((tp + fp) * n_pos * n_neg * (tn + fn))
    return np.divide(tp * tn - fp * fn, norm, out=np.zeros_like(norm), where=norm > 0)


@dataclass(frozen=True)
class Replicated:
    """METRICS of a sample, of its replicates, and of the sample without each unit.

    estimate: (METRICS,); replicates: (METRICS, replicates); left_out: (METRICS, units); all float64.
    units: of each class, the smaller number.
    """

    estimate: np.ndarray
    replicates: np.ndarray
    left_out: np.ndarray
    units: int

    def minus(self, other: "Replicated") -> "Replicated":
        """Return the paired difference to another, whose replicates are of the same draws of the same units."""
        parts = (mine - theirs for mine, theirs in zip(self._parts, other._parts, strict=True))
        return Replicated(*parts, min(self.units, other.units))

    @property
    def _parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.estimate, self.replicates, self.left_out

    def interval(self, metric: str) -> "Interval":
        """Return the interval of one of METRICS."""
        row = METRICS.index(metric)
        return interval(self.estimate[row], self.replicates[row], self.left_out[row], self.units)


def mean_of(samples: Sequence[Replicated]) -> Replicated:
    """Return the mean of the metrics of several files of scores, as of seeds, over the same draws of the same units."""
    parts = (np.mean(part, axis=0) for part in zip(*(s._parts for s in samples), strict=True))
    return Replicated(*parts, min(s.units for s in samples))


def multiplicities(n_units: int, replicates: int = 1000, seed: int = 0) -> np.ndarray:
    """Return how often each unit is in each replicate, (replicates, n_units) float32."""
    draws = np.random.Generator(np.random.PCG64(seed)).integers(0, n_units, size=(replicates, n_units))
    return np.stack([np.bincount(row, minlength=n_units) for row in draws]).astype(np.float32)


def replicate(table: ScoreTable, multiplicity: np.ndarray) -> Replicated:
    """Return the metrics of a table and of its replicates. multiplicity: as `multiplicities` gives it."""
    total = table.total()
    left_out = np.concatenate(
        [table.metrics(total - part) for _, part in table.chunks()] or [np.zeros((len(METRICS), 0))], axis=1
    )
    units = min(table.units_with(True), table.units_with(False))
    return Replicated(table.metrics(total)[:, 0], table.metrics(table.resampled(multiplicity)), left_out, units)


@dataclass(frozen=True)
class Interval:
    """Intervals of LEVEL around an estimate; NaN where there are none, and `reason` says why.

    percentile, bca: (low, high).
    bias, acceleration: z0 and a of BCa.
    standard_error: standard deviation of the replicates, ddof 1.
    units: of the rarer class. undefined: replicates in which the metric is.
    """

    estimate: float
    percentile: tuple[float, float] = (float("nan"),) * 2
    bca: tuple[float, float] = (float("nan"),) * 2
    bias: float = float("nan")
    acceleration: float = float("nan")
    standard_error: float = float("nan")
    units: int = 0
    undefined: int = 0
    reason: str = field(default="")

    def excludes_0(self) -> bool:
        """Tell whether the percentile interval exists and does not hold 0."""
        return self.percentile[0] > 0 or self.percentile[1] < 0


def interval(estimate: float, replicates: np.ndarray, left_out: np.ndarray, units: int | None = None) -> Interval:
    """Return the percentile and BCa intervals of an estimate.

    Args:
        replicates: (b,) values of the replicates, NaN where undefined: those are left out and counted; there is no
            interval where they are more than 5 %.
        left_out: (n,) values without each unit, for the acceleration of BCa.
        units: of the rarer class; fewer than 10 have no interval. None = not checked.
    """
    defined = replicates[~np.isnan(replicates)]
    undefined = len(replicates) - len(defined)
    known = {"estimate": float(estimate), "units": units or len(left_out), "undefined": undefined}
    if np.isnan(estimate):
        return Interval(**known, reason="the metric is undefined")
    if units is not None and units < FEWEST_UNITS:
        return Interval(**known, reason=f"{units} units of a class; {FEWEST_UNITS} are needed")
    if len(defined) < 2 or undefined > UNDEFINED_AT_MOST * len(replicates):
        return Interval(**known, reason=f"undefined in {undefined} of {len(replicates)} replicates")
    tail = (1 - LEVEL) / 2
    known["percentile"] = tuple(np.percentile(defined, [100 * tail, 100 * (1 - tail)]).tolist())
    known["standard_error"] = float(np.std(defined, ddof=1))
    if (defined == defined[0]).all():
        return Interval(**known, bca=known["percentile"], bias=0.0, acceleration=0.0)
    below = ((defined < estimate).sum() + (defined <= estimate).sum()) / (2 * len(defined))
    acceleration = _acceleration(left_out)
    if not 0 < below < 1 or np.isnan(acceleration):
        return Interval(**known, acceleration=acceleration, reason="no BCa: all replicates are on one side")
    normal = NormalDist()
    bias = normal.inv_cdf(float(below))
    z = [bias + normal.inv_cdf(p) for p in (tail, 1 - tail)]
    shares = [normal.cdf(bias + x / (1 - acceleration * x)) for x in z]
    bca = tuple(np.percentile(defined, [100 * p for p in shares]).tolist())
    return Interval(**known, bca=bca, bias=bias, acceleration=acceleration)


def _acceleration(left_out: np.ndarray) -> float:
    """Return a of BCa of the values without each unit; 0 where they are all alike, NaN where one is undefined."""
    apart = left_out.mean() - left_out
    spread = np.sum(apart**2)
    return float(np.sum(apart**3) / (6 * spread**1.5)) if spread else 0.0
