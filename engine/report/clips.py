"""The clips behind the figures: the best and the worst with their curves, the worst false alarms, anticipation."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from engine import anticipation as ant
from engine.episodes import episodes, event_detection, false_alarms
from engine.intervals import ScoreTable, replicate
from engine.published import mtta_of_clips
from engine.report.frames import ScoredFrames
from engine.report.units import Units, intervals

SHOWN = 6  # best clips, and worst
ALARMS = 10  # worst false alarms
POINTS = 200  # of a curve
MERGE = 1.0  # seconds between episodes that are one
SUSTAINED_GAP = 1.0  # seconds below the threshold that void an alert
FALSE_ALARM_RATES = (0.05, 0.1, 0.2)
RECALLS = (0.5, 0.8)
OWN_BEFORE = ant.TIME_BINS[-1][1]  # seconds before the event from which frames of its own clip are negatives
REDUCTIONS = ("max_all", "last_all", "max_before", "last_before", "at_0.5", "at_1", "at_1.5", "at_2")


def auc_of_clips(frames: ScoredFrames) -> np.ndarray:
    """Return the AUC_ROC within each clip, (number of clips,) float64; NaN where it has frames of one class alone."""
    order = np.lexsort((frames.score, frames.clip))
    clip, score, label = frames.clip[order], frames.score[order], frames.label[order].astype(np.float64)
    n = len(frames.names)
    starts = np.flatnonzero(np.r_[True, (np.diff(clip) != 0) | (np.diff(score) != 0)])  # of ties
    positive, size = np.add.reduceat(label, starts), np.diff(np.r_[starts, len(clip)])
    negative, owner = size - positive, clip[starts]
    below = np.cumsum(negative) - negative
    first = np.searchsorted(owner, np.arange(n))
    below -= below[first][owner]
    wins = np.bincount(owner, positive * (below + negative / 2), n)
    pairs = np.bincount(owner, positive, n) * np.bincount(owner, negative, n)
    return np.divide(wins, pairs, out=np.full(n, np.nan), where=pairs > 0)


def extremes(frames: ScoredFrames) -> dict[str, Any]:
    """Return the clips with the highest and the lowest AUC_ROC within the clip, ties by Brier score, with curves."""
    auc = auc_of_clips(frames)
    n = np.bincount(frames.clip, minlength=len(frames.names))
    brier = np.bincount(frames.clip, (frames.score - frames.label) ** 2, len(frames.names)) / n
    ranked = np.lexsort((-brier, auc))
    ranked = ranked[~np.isnan(auc[ranked])]
    shown = min(SHOWN, len(ranked) // 2)

    def of(numbers: np.ndarray, right: bool) -> list[dict[str, Any]]:
        return [
            {"auroc": float(auc[i]), "brier": float(brier[i]), **curve(frames, i, _telling(frames, i, right))}
            for i in numbers.tolist()
        ]

    why = None if shown else "fewer than two clips have both anomalous and safe frames"
    return {
        "best": of(ranked[::-1][:shown], True),
        "worst": of(ranked[:shown], False),
        "clips_with_both": len(ranked),
        "mean_auroc_within_clip": float(np.nanmean(auc)) if len(ranked) else float("nan"),
        "why_undefined": why,
    }


def _telling(frames: ScoredFrames, number: int, right: bool) -> list[int]:
    """Return the rows of the safe and the anomalous frame of a clip that are scored most right, or most wrong."""
    rows = np.arange(frames.bounds[number], frames.bounds[number + 1])
    safe, anomalous = (rows[frames.label[rows] == label] for label in (0, 1))
    low, high = (np.argmin, np.argmax) if right else (np.argmax, np.argmin)
    return sorted([int(safe[low(frames.score[safe])]), int(anomalous[high(frames.score[anomalous])])])


def curve(frames: ScoredFrames, number: int, shown: Sequence[int]) -> dict[str, Any]:
    """Return name, x, score and anomalous stretches of a clip, at most POINTS points; x is in seconds or frames.

    shown: rows whose pictures stand beside the curve; "shown" says frame, x, score and label of each.
    """
    rows = np.arange(frames.bounds[number], frames.bounds[number + 1])
    unit = "frames" if np.isnan(frames.time[rows]).any() else "seconds"
    x = (frames.frame if unit == "frames" else frames.time)[rows]
    edges = np.diff(np.r_[0, frames.label[rows], 0])
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1
    kept = np.unique(np.linspace(0, len(rows) - 1, min(POINTS, len(rows))).astype(np.int64))
    return {
        "clip": frames.names[number],
        "unit": unit,
        "x": x[kept].tolist(),
        "score": [round(float(s), 4) for s in frames.score[rows][kept]],
        "anomalous": [[float(x[s]), float(x[e])] for s, e in zip(starts, ends, strict=True)],
        "shown": [
            {"frame": int(frames.frame[row]), "x": float(x[row - rows[0]]), "score": float(frames.score[row])}
            | {"label": int(frames.label[row])}
            for row in shown
        ],
    }


def wanted_frames(report: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return {clip: frames, ascending} of what a report shows pictures of."""
    wanted: dict[str, set[int]] = {}
    for model in report["models"]:
        for clip in (*model["clips"]["best"], *model["clips"]["worst"], *model["false_alarms"]):
            wanted.setdefault(clip["clip"], set()).update(point["frame"] for point in clip["shown"])
    return {name: sorted(frames) for name, frames in wanted.items()}


def worst_false_alarms(frames: ScoredFrames, clips: list[ant.ScoredClip], threshold: float) -> list[dict[str, Any]]:
    """Return the episodes of alarm without an anomalous frame that hold the most, peak x seconds, with their curves."""
    found = []
    numbers = {name: i for i, name in enumerate(frames.names)}
    for clip in clips:
        for start, end in episodes(clip, threshold, MERGE):
            if not any(a < end and b > start for a, b in clip.intervals):
                inside = (clip.time >= start - ant.EPS) & (clip.time < end)
                found.append((float(clip.score[inside].max()) * (end - start), clip, start, end, inside))
    found.sort(key=lambda item: -item[0])
    alarms = []
    for _, clip, start, end, inside in found[:ALARMS]:
        number, within = numbers[clip.name], np.flatnonzero(inside)
        peak = within[np.argmax(clip.score[within])]
        alarm = {"from": float(start), "to": float(end), "peak": float(clip.score[peak])}
        alarm["mean_score"] = float(clip.score[inside].mean())
        alarms.append(alarm | curve(frames, number, [int(frames.bounds[number] + peak)]))
    return alarms


def anticipation(
    clips: list[ant.ScoredClip], frames: ScoredFrames, prior: np.ndarray | None, units: Units, threshold: float
) -> dict[str, Any]:
    """Return the anticipation metrics of clips, beside those of a constant and of a ramp; or why there are none.

    The ramp rises from 0 to 1 over the scored frames of a clip. prior: (n,) scores of the position prior, which stand
    beside the time bins where no clip is negative. units: of the intervals at the level of clips.
    """
    if not clips:
        return {"why_undefined": "No clip has two scored frames with times: give a file with the column time"}
    counts = ant.counts(clips)
    if not counts["timed_positive"]:
        return {"counts": counts, "why_undefined": "No clip has an event after its beginning"}
    gap = int(np.floor(SUSTAINED_GAP / np.median([c.frame_seconds for c in clips]) + ant.EPS))
    constant = ant.with_scores(clips, lambda c: np.full(len(c.score), np.float32(0.51)))
    ramp = ant.with_scores(clips, lambda c: np.linspace(0, 1, len(c.score), dtype=np.float32))
    return {
        "event": _event_words(frames, counts["timed_positive"]),
        "threshold": threshold,
        "counts": counts,
        "sustained_gap_seconds": SUSTAINED_GAP,
        "why_undefined": None
        if counts["negative"]
        else "No clip is without an event: AUC, AP and false alarms of such clips are n/a",
        "model": _figures(clips, threshold, gap) | _of_clips(clips),
        "clip_level_intervals": _clip_intervals(clips, frames, units),
        **_bins(clips, frames, prior, threshold),
        "as_published": _published(clips),
        "constant_0.51": _figures(constant, 0.5, gap),
        "ramp": _figures(ramp, 0.5, gap),
    }


def _event_words(frames: ScoredFrames, timed: int) -> str:
    """Say what the event of a clip is. timed: clips whose event is known."""
    stated = sum(time is not None for time in frames.stated("event_time"))
    first = "start of the anomaly, the first anomalous frame"
    if not stated:
        return first
    return "event_time of the file" + (f"; where it has none, the {first}" if stated < timed else "")


def _clip_intervals(clips: list[ant.ScoredClip], frames: ScoredFrames, units: Units) -> dict[str, Any]:
    """Return {reduction: {"auroc": interval, "ap": interval}} of AUC and AP over clips."""
    number = dict(zip(frames.names, units.number.tolist(), strict=True))
    unit = np.array([number[c.name] for c in clips])
    label = np.array([c.positive for c in clips], dtype=np.int8)
    result = {}
    for reduction in REDUCTIONS:
        score = np.array([ant.reduced(c, reduction) for c in clips])
        known = ~np.isnan(score)
        table = ScoreTable.of(score[known], label[known], unit[known], units.count)
        result[reduction] = intervals(replicate(table, units.draws), ("auroc", "ap"))
    return result


def _bins(
    clips: list[ant.ScoredClip], frames: ScoredFrames, prior: np.ndarray | None, threshold: float
) -> dict[str, Any]:
    """Return time_bins; without negative clips against the clips' own early frames, with the prior's beside."""
    if any(not c.positive for c in clips):
        return {"time_bins": ant.time_bins(clips, threshold), "time_bins_of_prior": None, "time_bins_against": None}
    theirs = [] if prior is None else replace(frames, score=prior).scored_clips()
    return {
        "time_bins": ant.time_bins(clips, threshold, own_before=OWN_BEFORE),
        "time_bins_of_prior": ant.time_bins(theirs, threshold, own_before=OWN_BEFORE) if theirs else None,
        "time_bins_against": f"frames of the same clips more than {OWN_BEFORE:g} s before the event",
    }


def _figures(clips: list[ant.ScoredClip], threshold: float, gap: int) -> dict[str, Any]:
    return {
        "at_false_alarm_rate": {f"{rate:g}": ant.at_false_alarm_rate(clips, rate) for rate in FALSE_ALARM_RATES},
        "at_recall": {f"{recall:g}": ant.at_recall(clips, recall) for recall in RECALLS},
        "first_crossing": ant.first_crossing(clips, threshold),
        "sustained_alert": ant.sustained_alert(clips, threshold, gap),
        "stable_tta": ant.stable_tta(clips, threshold),
        "false_alarms": false_alarms(clips, threshold, MERGE),
        "event_detection": event_detection(clips, threshold, MERGE, 0.0, 1.0),
        "brier_per_second": ant.brier_per_second(clips),
    }


def _of_clips(clips: list[ant.ScoredClip]) -> dict[str, Any]:
    """Return the figures of one score a clip, whose chance levels are known: no baseline stands beside them."""
    cut = any(clip.time_to_accident is not None for clip in clips)
    return {
        "clip_level": {reduction: ant.clip_level(clips, reduction) for reduction in REDUCTIONS},
        "nexar_map_shared_negatives": ant.nexar_map_shared_negatives(clips)["map"],
        "nexar_map": ant.nexar_map_grouped(clips) if cut else None,
    }


def _published(clips: list[ant.ScoredClip]) -> dict[str, Any]:
    """Return the figures of engine/published.py. Seconds as published need clips of one length."""
    names = ("ap", "mtta", "tta_r80", "recall_used_for_tta_r80")
    true = {name: value for name, value in mtta_of_clips(clips).items() if name in names}
    lengths = {round(float(c.time[-1] + c.frame_seconds), 3) for c in clips if len(c.time)}
    result: dict[str, Any] = {"gameable": True, "true_seconds": true, "published_seconds": None}
    if len(lengths) > 1:
        return result | {"why_undefined": "clips differ in length, for which the published code has no seconds"}
    # as published: relative lead x length of the clip
    length = lengths.pop()
    scaled = [c if not c.timed else _stretched(c, length) for c in clips]
    published = mtta_of_clips(scaled)
    return result | {"published_seconds": {name: published[name] for name in names if name != "ap"}}


def _stretched(clip: ant.ScoredClip, length: float) -> ant.ScoredClip:
    """Return a clip whose time runs so that its event is at its end: relative leads become shares of its length."""
    factor = length / clip.event
    return ant.ScoredClip(
        clip.name,
        clip.time * factor,
        clip.score,
        clip.frame_seconds * factor,
        clip.positive,
        clip.event * factor,
    )
