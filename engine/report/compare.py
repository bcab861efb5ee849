"""Several files of scores on the frames that they share: paired differences, and runs with other seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np

from engine.intervals import mean_of
from engine.metrics import frame_metrics
from engine.report.frames import ScoredFrames, ScoresError
from engine.report.lists import KNOWN, clip_hash, clip_list
from engine.report.units import intervals, units_of

COMPARED = ("auroc", "ap", "auc_mcc", "mcc_05", "accuracy", "f1")
RULE = "One is better only where the interval of the paired difference excludes 0."


def shared(files: Sequence[ScoredFrames]) -> list[ScoredFrames]:
    """Return the files on the frames (of clips of one name) that all of them have, in one order.

    Raises ScoresError where there are none.
    """
    common_names = set.intersection(*(set(f.names) for f in files))
    names = [name for name in files[0].names if name in common_names]
    numbers = {name: i for i, name in enumerate(names)}
    stride = 1 + max(int(f.frame.max()) for f in files)
    clips = [np.array([numbers.get(name, -1) for name in f.names], np.int64)[f.clip] for f in files]
    keys = [np.where(clip < 0, -1, clip * stride + f.frame) for clip, f in zip(clips, files, strict=True)]
    common = reduce(np.intersect1d, keys)
    common = common[common >= 0]
    if not len(common):
        paths = ", ".join(f.path for f in files)
        raise ScoresError(
            f"{paths}: they have no frame of a clip of one name in common: compare scores of one data set"
        )
    return [_aligned(f, names, key, common, stride) for f, key in zip(files, keys, strict=True)]


def _aligned(
    frames: ScoredFrames, names: Sequence[str], key: np.ndarray, common: np.ndarray, stride: int
) -> ScoredFrames:
    order = np.argsort(key, kind="stable")
    rows = order[np.searchsorted(key[order], common)]
    own = {name: i for i, name in enumerate(frames.names)}
    arrays = {name: getattr(frames, name)[rows] for name in ("frame", "score", "label", "time", "ttc")}
    columns = {column: [values[own[name]] for name in names] for column, values in frames.columns.items()}
    aligned = replace(frames, names=list(names), clip=common // stride, columns=columns, **arrays)
    return aligned.where(np.ones(len(rows), bool))


def compare(models: Mapping[str, Sequence[ScoredFrames]], replicates: int, seed: int) -> dict[str, Any]:
    """Return runs, their mean and standard deviation, and paired differences to the first model, on shared frames.

    models: {name: its runs, as of several seeds}. Labels are those of the first file. Raises ScoresError.
    """
    files = [run for runs in models.values() for run in runs]
    aligned = shared(files)
    first = aligned[0]
    same = all(len(f.clip) == len(first.clip) for f in files)
    differing = max(int((f.label != first.label).sum()) for f in aligned)
    aligned = [replace(f, label=first.label) for f in aligned]
    by_name, start = {}, 0
    for name, runs in models.items():
        by_name[name], start = aligned[start : start + len(runs)], start + len(runs)
    metrics = {name: [_metrics(run) for run in runs] for name, runs in by_name.items()}
    result = {
        "clip_list": clip_list(first.names, _known(files)),
        "clips": len(first.names),
        "frames": len(first.clip),
        "same_frames": same,
        "of": [{"path": f.path, "clips": len(f.names), "frames": len(f.clip)} for f in files],
        "labels_differ": differing,
        "runs": {
            n: [{"path": r.path, "metrics": m} for r, m in zip(by_name[n], metrics[n], strict=True)] for n in models
        },
        "mean": {name: _spread(rows) for name, rows in metrics.items()},
        "all_runs": _spread([row for rows in metrics.values() for row in rows]),
        "rule": RULE,
    }
    return result | _differences(by_name, replicates, seed)


def _known(files: Sequence[ScoredFrames]) -> list[str] | None:
    """Return the clips of a file whose list has a name."""
    return next((f.names for f in files if clip_hash(f.names) in KNOWN), None)


def _metrics(frames: ScoredFrames) -> dict[str, float]:
    metrics = frame_metrics(frames.score, frames.label)
    return {name: metrics[name] for name in COMPARED}


def _spread(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return {metric: mean, std (ddof 1; NaN of one run), runs}."""
    values = {name: np.array([row[name] for row in rows]) for name in COMPARED}
    return {
        name: {"mean": float(v.mean()), "std": float(v.std(ddof=1)) if len(v) > 1 else float("nan"), "runs": len(v)}
        for name, v in values.items()
    }


def _differences(by_name: Mapping[str, Sequence[ScoredFrames]], replicates: int, seed: int) -> dict[str, Any]:
    """Return the differences of each model's mean over its runs to that of the first, by each kind of unit."""
    names = list(by_name)
    result: dict[str, Any] = {"against": names[0], "differences": {name: {} for name in names[1:]}}
    all_units = units_of(by_name[names[0]][0], replicates, seed) if len(names) > 1 else []
    for units in all_units:
        means = {n: mean_of([units.replicated(run, run.score) for run in runs]) for n, runs in by_name.items()}
        for name in names[1:]:
            result["differences"][name][units.kind] = intervals(means[name].minus(means[names[0]]))
    result["verdicts"] = [_verdict(name, names[0], result["differences"][name]) for name in names[1:]]
    if len(names) > 1 and all(len(runs) == 1 for runs in by_name.values()):
        result["seeds"] = "One run each: the intervals hold the choice of clips, not that of the seed."
    return result


def _verdict(name: str, other: str, by_kind: Mapping[str, Any]) -> str:
    kind = list(by_kind)[-1]
    found = by_kind[kind]["auroc"]
    difference, (low, high) = found["estimate"], found["percentile"]
    if np.isnan(difference) or np.isnan(low):
        return f"{name} against {other}: n/a, {found['reason']}."
    span = f"{100 * difference:+.2f} points of AUC_ROC ({100 * low:+.2f} to {100 * high:+.2f} over {kind}s)"
    if low > 0 or high < 0:
        return f"{name} is {'better' if low > 0 else 'worse'} than {other}: {span}."
    return f"{name} is not shown to differ from {other}: {span}."
