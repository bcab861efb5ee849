"""The figures of one file: of all frames with intervals, beside baselines, by group, by position, calibration."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.baselines import PRIORS, LabelTable, clip_oracle, cross_fitted_prior, prior
from engine.intervals import METRICS, Replicated, ScoreTable
from engine.metrics import frame_metrics
from engine.report.frames import CLIP_COLUMNS, ScoredFrames
from engine.report.lists import clip_list
from engine.report.units import Units, intervals, units_of

GROUP_VALUES = 20  # a column with more distinct values makes no groups
POSITIONS = 10  # parts of a clip
SCORE_BINS = 10  # of the calibration
PRIOR = "position"  # the baseline that a model is held against
HEADLINE = ("auroc", "ap", "auc_mcc")


def data(frames: ScoredFrames, listed: Sequence[str] | None) -> dict[str, Any]:
    """Return what was scored: clips, sources, frames, hours, the clip list. listed: of `clip_list`."""
    source, how = frames.sources
    positive = np.bincount(frames.clip, frames.label, len(frames.names)) > 0
    step = frames.frame_seconds
    return {
        "clip_list": clip_list(frames.names, listed),
        "clips": len(frames.names),
        "clips_with_anomaly": int(positive.sum()),
        "sources": None if source is None else int(source.max()) + 1,
        "sources_are_from": how,
        "frames": len(frames.clip),
        "frames_anomalous": int(frames.label.sum()),
        "rows_without_label": frames.unlabelled,
        "hours": float(len(frames.clip) * step / 3600),
        "seconds_between_frames": step,
        "notes": list(frames.notes),
    }


def totals(frames: ScoredFrames, units: Sequence[Units], samples: Mapping[str, Replicated]) -> dict[str, Any]:
    """Return the exact and binned metrics of all frames, and their intervals by each kind of unit.

    samples: the replicated metrics by kind. binning_error: by how much the estimate of the replicates' bins is off.
    """
    metrics = frame_metrics(frames.score, frames.label)
    estimate = samples[units[0].kind].estimate
    return {
        "metrics": metrics,
        "chance_ap": metrics["n_pos"] / metrics["n"],
        "why_undefined": _why_undefined(metrics["n_pos"], metrics["n"]),
        "intervals": {kind: intervals(sample) for kind, sample in samples.items()},
        "honest_unit": units[-1].kind,
        "binning_error": {m: float(estimate[i] - metrics[m]) for i, m in enumerate(METRICS)},
    }


def _why_undefined(n_pos: int, n: int) -> str | None:
    if n_pos == 0:
        return "no frame is anomalous: AUC_ROC and AP are undefined"
    return "all frames are anomalous: AUC_ROC is undefined and AP is 1 for any score" if n_pos == n else None


def baseline_scores(
    frames: ScoredFrames, train: LabelTable | None, train_words: str
) -> dict[str, tuple[np.ndarray | None, str]]:
    """Return {baseline: (scores (n,) or None, how it was learned or why there is none)}.

    train_words: what the training labels are, or why there are none.
    """
    source, _ = frames.sources
    source = np.arange(len(frames.names)) if source is None else source
    result: dict[str, tuple[np.ndarray | None, str]] = {}
    for name in PRIORS:
        try:
            if train is None:
                how = f"learned on the scored clips themselves, each tenth from the others: {train_words}"
                result[name] = cross_fitted_prior(name, frames.table, source), how
            else:
                result[name] = prior(name, train, frames.table), f"learned on {train_words}"
        except ValueError as e:
            result[name] = None, str(e) if train is not None else f"{e}; {train_words}"
    result["clip_oracle"] = clip_oracle(frames.table), "knows of each clip what share of it is anomalous, not when"
    result["constant"] = np.full(len(frames.clip), 0.5), "knows nothing"
    return result


def baselines(
    frames: ScoredFrames,
    scores: Mapping[str, tuple[np.ndarray | None, str]],
    units: Units,
    sample: Replicated,
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    """Return the baselines' metrics, the model's distance from the position prior with intervals, and a verdict.

    scores: as `baseline_scores` gives them. units: the honest ones; sample: the model's replicated metrics over them.
    metrics: of the model.
    """
    result: dict[str, Any] = {"of": {}}
    for name, (score, how) in scores.items():
        found = None
        if score is not None:
            table = ScoreTable.of(score, frames.label, np.zeros(len(score), np.int64))
            found = dict(zip(METRICS, table.metrics(table.total())[:, 0].tolist(), strict=True))
        result["of"][name] = {"metrics": found, "how": how}
    score, how = scores[PRIOR]
    if score is None:
        return result | {"difference": None, "verdict": f"The position prior is n/a: {how}."}
    difference = intervals(sample.minus(units.replicated(frames, score)))
    return result | {"difference": difference, "verdict": _verdict(difference, result["of"][PRIOR]["metrics"], metrics)}


def _verdict(difference: Mapping[str, Any], found: Mapping[str, float], metrics: Mapping[str, float]) -> str:
    """Say in words whether the model beats a prior that knows nothing but where in its clip a frame stands."""
    auroc, mcc = difference["auroc"], difference["auc_mcc"]
    if np.isnan(auroc["estimate"]):
        return "Whether the model beats the position prior is n/a: AUC_ROC is undefined."
    figures = (
        f"AUC_ROC {100 * metrics['auroc']:.1f} against {100 * found['auroc']:.1f}, "
        f"AUC_MCC {100 * metrics['auc_mcc']:.1f} against {100 * found['auc_mcc']:.1f}"
    )
    prior_words = "a prior that knows nothing but where in its clip a frame stands"
    low, high = auroc["percentile"]
    if auroc["estimate"] <= 0:
        return f"The model does NOT beat {prior_words}: {figures}."
    if np.isnan(low):
        return f"The model is above {prior_words}: {figures}; whether that is chance is n/a: {auroc['reason']}."
    span = f"{100 * low:+.1f} to {100 * high:+.1f}"
    if low <= 0:
        return f"The model is NOT shown to beat {prior_words}: {figures}; the difference of AUC_ROC is {span}."
    mind = "" if mcc["percentile"][0] > 0 else "; by AUC_MCC that is not shown"
    return f"The model beats {prior_words}: {figures}; the difference of AUC_ROC is {span}{mind}."


def groups(frames: ScoredFrames, replicates: int, seed: int) -> dict[str, Any]:
    """Return {column: {value: clips, frames, metrics, intervals over the honest units}} of each free column.

    A column of one value or of more than GROUP_VALUES is said, not split; an empty value is "unknown".
    """
    result: dict[str, Any] = {}
    for column, values in frames.columns.items():
        if column in CLIP_COLUMNS:
            continue
        values = np.array([value or "unknown" for value in values])
        distinct = np.unique(values)
        if not 1 < len(distinct) <= GROUP_VALUES:
            why = f"{len(distinct)} distinct values make no groups"
            result[column] = {"left_out": why if len(distinct) > 1 else f"{distinct[0]} for every clip"}
            continue
        result[column] = {
            str(value): _group(frames.where((values == value)[frames.clip]), replicates, seed) for value in distinct
        }
    return result


def _group(frames: ScoredFrames, replicates: int, seed: int) -> dict[str, Any]:
    units = units_of(frames, replicates, seed)[-1]
    metrics = frame_metrics(frames.score, frames.label)
    return {
        "clips": len(frames.names),
        "units": units.count,
        "unit": units.kind,
        "metrics": metrics,
        "why_undefined": _why_undefined(metrics["n_pos"], metrics["n"]),
        "intervals": intervals(units.replicated(frames, frames.score), HEADLINE),
    }


def by_position(frames: ScoredFrames) -> list[dict[str, float]]:
    """Return, by tenths of a clip, frames, share of anomalous ones, mean score and AUC_ROC within the tenth."""
    part = np.minimum((frames.table.position * POSITIONS).astype(np.int64), POSITIONS - 1)
    rows = []
    for i in range(POSITIONS):
        inside = part == i
        row = {"from": i / POSITIONS, "to": (i + 1) / POSITIONS, "frames": int(inside.sum())}
        values = dict.fromkeys(("anomalous", "mean_score", "auroc"), float("nan"))
        if inside.any():
            score, label = frames.score[inside], frames.label[inside]
            table = ScoreTable.of(score, label, np.zeros(len(score), np.int64))
            auroc = float(table.metrics(table.total())[0, 0])
            values = {"anomalous": float(label.mean()), "mean_score": float(score.mean()), "auroc": auroc}
        rows.append(row | values)
    return rows


def calibration(frames: ScoredFrames) -> dict[str, Any]:
    """Return the Brier score, that of the base rate, the ECE and the reliability by SCORE_BINS equal bins of the score.

    ECE = sum over bins of (share of the frames) x |mean score - share of anomalous frames|. Source: Guo et al., On
    Calibration of Modern Neural Networks (2017), for the probability of one class.
    """
    score, label = frames.score.astype(np.float64), frames.label
    at = np.minimum((score * SCORE_BINS).astype(np.int64), SCORE_BINS - 1)
    n = np.bincount(at, minlength=SCORE_BINS)
    with np.errstate(invalid="ignore"):
        mean, share = (np.bincount(at, values, SCORE_BINS) / n for values in (score, label))
    base = float(label.mean())
    return {
        "brier": float(np.mean((score - label) ** 2)),
        "brier_of_base_rate": base * (1 - base),
        "ece": float(np.nansum(n / n.sum() * np.abs(mean - share))),
        "bins": [
            {"from": i / SCORE_BINS, "to": (i + 1) / SCORE_BINS, "frames": int(n[i]), "mean_score": float(mean[i])}
            | {"anomalous": float(share[i])}
            for i in range(SCORE_BINS)
        ],
    }
