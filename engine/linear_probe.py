"""A linear classifier of fixed features, and how many dimensions they use. NumPy only, float64, nothing drawn by chance
but who is held out, from a fixed seed.

The classifier is ridge regression on labels -1 and 1 in which both classes weigh alike, as a closed form; its direction
is that of Fisher's discriminant (Hastie, Tibshirani, Friedman: The Elements of Statistical Learning, 4.3 and 3.4.1).
"""

from dataclasses import dataclass

import numpy as np

PENALTIES = np.logspace(-6, 3, 19)  # beside eigenvalues whose mean is 1 where no feature is constant
_FOLDS = 3
_SEED = 0


def parts_by_unit(unit: np.ndarray, label: np.ndarray, parts: int) -> np.ndarray:
    """Return (n,) int64: into which of 0 to parts - 1 each window goes, all of a unit into one.

    Units with an anomalous window, and those without, are shared out in turn, in an order that is drawn once for all:
    the same units and labels go into the same parts.

    Args:
        unit: (n,) number of the unit of each window, a recording.
        label: (n,) 0 or 1.
    """
    rng = np.random.Generator(np.random.PCG64(_SEED))
    units = np.unique(unit)
    anomalous = np.isin(units, unit[np.asarray(label) == 1])
    part = np.zeros(len(units), np.int64)
    for stratum in (anomalous, ~anomalous):
        rows = np.flatnonzero(stratum)
        part[rng.permutation(rows)] = np.arange(len(rows)) % parts
    return part[np.searchsorted(units, unit)]


@dataclass(frozen=True)
class _Ridge:
    """Closed forms of ridge regression on some windows, for any penalty."""

    mean: np.ndarray
    scale: np.ndarray
    directions: np.ndarray  # (D, r)
    spread: np.ndarray  # (r,)
    target: np.ndarray  # (r,)

    @classmethod
    def of(cls, features: np.ndarray, label: np.ndarray) -> "_Ridge":
        weight = _weights(label)[:, None]
        mean = (weight * features).sum(axis=0)
        centred = features - mean
        deviation = np.sqrt((weight * centred**2).sum(axis=0))
        constant = deviation <= 1e-12 * (1 + np.abs(mean))  # rounding is no signal
        scale = np.where(constant, 0, 1 / np.where(constant, 1, deviation))
        left, singular, right = np.linalg.svd(np.sqrt(weight) * centred * scale, full_matrices=False)
        return cls(mean, scale, right.T, singular**2, singular * (left.T @ (np.sqrt(weight[:, 0]) * _signs(label))))

    def predict(self, features: np.ndarray, penalties: np.ndarray) -> np.ndarray:
        """Return (n, penalties): values around -1 for safe and 1 for anomalous."""
        coefficients = self.target[:, None] / (self.spread[:, None] + penalties)
        return ((features - self.mean) * self.scale) @ (self.directions @ coefficients)


def _signs(label: np.ndarray) -> np.ndarray:
    return np.where(np.asarray(label) == 1, 1.0, -1.0)


def _weights(label: np.ndarray) -> np.ndarray:
    """Return (n,) weights that sum up to 1, half of it for either class."""
    positive = np.asarray(label) == 1
    return np.where(positive, 0.5 / positive.sum(), 0.5 / (~positive).sum())


def _both(label: np.ndarray) -> bool:
    return 0 < np.sum(label) < len(label)


def fit_and_score(
    features: np.ndarray, label: np.ndarray, unit: np.ndarray, held_out: np.ndarray
) -> tuple[np.ndarray, float]:
    """Fit the classifier on the windows that are not held out; return the scores in (0, 1) of those that are.

    The penalty is that of PENALTIES with the smallest error, both classes alike, on folds of the training windows that
    no unit is in two of; the middle one where these are too few for that.

    Args:
        features: (n, D), finite; standardised here, by the mean and deviation of the training windows.
        label: (n,) 0 or 1; both must be among the training windows.
        unit: (n,) number of the unit of each window, a recording.
        held_out: (n,) bool, no unit on both sides.

    Returns (held-out windows,) float64, and the penalty. Raises ValueError where a class is absent.
    """
    features, label = np.asarray(features, np.float64), np.asarray(label)
    train = np.flatnonzero(~held_out)
    if not _both(label[train]):
        raise ValueError("the windows to fit a probe on are all of one class")
    errors = np.zeros(len(PENALTIES))
    fold = parts_by_unit(unit[train], label[train], _FOLDS)
    for k in range(_FOLDS):
        fit, check = train[fold != k], train[fold == k]
        if _both(label[fit]) and _both(label[check]):
            missed = _Ridge.of(features[fit], label[fit]).predict(features[check], PENALTIES)
            errors += _weights(label[check]) @ (missed - _signs(label[check])[:, None]) ** 2
    penalty = PENALTIES[errors.argmin()] if errors.any() else PENALTIES[len(PENALTIES) // 2]
    value = _Ridge.of(features[train], label[train]).predict(features[held_out], np.array([penalty]))[:, 0]
    return 1 / (1 + np.exp(-np.clip(value, -30, 30))), float(penalty)


def effective_rank(features: np.ndarray) -> float:
    """Return RankMe of features (n, D), from 1 to min(n, D): how many dimensions they use; 0 where all are zero.

    exp of the entropy of the singular values, over their sum; features are taken as they are, not centred. Source:
    Garrido et al., RankMe (ICML 2023, arXiv:2210.02885), less the 1e-7 that it adds for the logarithm of zero.
    """
    singular = np.linalg.svd(np.asarray(features, np.float64), compute_uv=False)
    if not singular.any():
        return 0.0
    share = singular / singular.sum()
    share = share[share > 0]
    return float(np.exp(-np.sum(share * np.log(share))))
