"""Anticipation: how early a score warns of an event, and how often for nothing. NumPy only.

Words. A *timed positive* is a clip with an event at a known time E > 0 and scored frames. Frames *before the event* are
those with t < E; in a clip without an event, all. A frame alarms where score >= threshold, ties too. A lead is E - t.
What is undefined is NaN (null in JSON, "n/a" in print), never 0. Clips without scored frames are in no figure.

All leads hold for the E that was given: a collision, or the start of an anomaly as in DoTA, which are not comparable.
Most of these figures can be gamed: a constant score has the longest lead there is. Read them beside the false alarms,
and beside the same figures of a constant (`with_scores`). `at_false_alarm_rate` holds both together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from engine.metrics import auroc_and_ap

NAN = float("nan")
EPS = 1e-9  # seconds: a frame's time is a quotient, whose rounding is not to decide
TIME_BINS = ((0.0, 0.5), (0.5, 1.0), (1.0, 1.5), (1.5, 2.0), (2.0, 3.0))  # seconds before the event


@dataclass(frozen=True)
class ScoredClip:
    """The scores of a clip, and what is known of its event. Times are in seconds of the clip.

    name: of the clip.
    time: (n,) float64, of the scored frames, ascending.
    score: (n,) in [0, 1].
    frame_seconds: how long a scored frame stands for.
    positive: whether the clip holds an event, scored or not.
    event: its time; None = unknown, or there is none. It may be before the first scored frame or after the last.
    intervals: anomalous stretches (start, end).
    time_to_accident: how long before the event the clip was cut (Nexar's test clips, negatives too); None = not cut.
    """

    name: str
    time: np.ndarray
    score: np.ndarray
    frame_seconds: float
    positive: bool
    event: float | None = None
    intervals: tuple[tuple[float, float], ...] = ()
    time_to_accident: float | None = None

    @cached_property
    def timed(self) -> bool:
        """Whether the clip is a timed positive."""
        return self.positive and self.event is not None and self.event > 0 and len(self.time) > 0

    @cached_property
    def before(self) -> int:
        """Number of scored frames before the event: all of a negative clip, 0 where the event's time is unknown."""
        if not self.positive:
            return len(self.time)
        return 0 if self.event is None else int(np.searchsorted(self.time, self.event - EPS, side="left"))


def with_scores(clips: Sequence[ScoredClip], score: Callable[[ScoredClip], np.ndarray]) -> list[ScoredClip]:
    """Return the clips with other scores, score(clip) -> (n,), such as those of a trivial baseline."""
    return [replace(clip, score=score(clip)) for clip in clips]


def counts(clips: Sequence[ScoredClip]) -> dict[str, int]:
    """Return how many clips there are of each kind, those that no figure holds among them."""
    scored = [c for c in clips if len(c.time)]
    positives = [c for c in scored if c.positive]
    return {
        "positive": len(positives),
        "negative": len(scored) - len(positives),
        "timed_positive": sum(c.timed for c in positives),
        "unscored": len(clips) - len(scored),
        "no_event_time": sum(c.event is None for c in positives),
        "no_pre_event_frame": sum(c.timed and not c.before for c in positives),
    }


def auc_ap(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return "auc" (ties count half; needs both classes) and "ap" (sum of recall step x precision; needs a positive).

    Scores (n,) in [0, 1], labels (n,) 0 or 1. AP of positives alone is 1.0 and says nothing: show the counts.
    """
    if not len(scores):
        return {"auc": NAN, "ap": NAN}
    return dict(zip(("auc", "ap"), auroc_and_ap(scores, labels), strict=True))


def reduced(clip: ScoredClip, reduction: str) -> float:
    """Return one score of a clip, NaN where there is none.

    reduction: max_all, last_all: of all scored frames; max_before, last_before: of those before the event;
    at_K, as at_1.5: the last frame at least K seconds before the event; in a clip without an event the last of all.
    Max over all frames sees the crash itself: that is detection. Longer clips have higher maxima.
    """
    kind, _, part = reduction.partition("_")
    known = part == "all" or not clip.positive or (clip.event is not None and clip.event > 0)
    if not len(clip.score) or not known:
        return NAN
    end = len(clip.score) if part == "all" else clip.before
    if kind == "at" and clip.positive:
        end = int(np.searchsorted(clip.time, clip.event - float(part) + EPS, side="right"))
    if not end:
        return NAN
    return float(clip.score[:end].max() if kind == "max" else clip.score[end - 1])


def clip_level(clips: Sequence[ScoredClip], reduction: str) -> dict[str, float]:
    """Return AUC and AP over clips by their `reduced` scores: auc, ap, n_pos, n_neg, n_na (clips left out).

    The chance level of AP is n_pos / (n_pos + n_neg).
    """
    scores = np.array([reduced(clip, reduction) for clip in clips])
    labels = np.array([clip.positive for clip in clips], dtype=int)
    known = ~np.isnan(scores)
    return auc_ap(scores[known], labels[known]) | {
        "n_pos": int(labels[known].sum()),
        "n_neg": int((1 - labels[known]).sum()),
        "n_na": int((~known).sum()),
    }


def clip_classification(
    clips: Sequence[ScoredClip], threshold: float, reduction: str = "max_all", *, unscored: float | None = None
) -> dict[str, float]:
    """Return precision, recall, f1, accuracy, fpr, auc and ap of clips by their `reduced` scores >= threshold.

    unscored: the score of a clip that has none (the package badas: 0); None leaves it out.
    """
    scores = np.array([reduced(clip, reduction) for clip in clips])
    labels = np.array([clip.positive for clip in clips], dtype=bool)
    scores = scores if unscored is None else np.where(np.isnan(scores), unscored, scores)
    known = ~np.isnan(scores)
    scores, labels = scores[known], labels[known]
    alarm = scores >= threshold
    tp, fp = int((alarm & labels).sum()), int((alarm & ~labels).sum())
    n_pos, n = int(labels.sum()), len(labels)
    return auc_ap(scores, labels.astype(int)) | {
        "precision": _share(tp, tp + fp),
        "recall": _share(tp, n_pos),
        "f1": _share(2 * tp, tp + fp + n_pos),
        "accuracy": _share(tp + (n - n_pos) - fp, n),
        "fpr": _share(fp, n - n_pos),
    }


def nexar_map_grouped(clips: Sequence[ScoredClip], reduction: str = "last_all") -> dict[str, float]:
    """Return Nexar's mAP on cut clips: AP in each group of equal time_to_accident, and their plain mean "map".

    {"0.5": AP, "1": AP, "1.5": AP, "map": mean}. A group of one class is NaN and is left out of the mean. Source: the
    rules of Kaggle's nexar-collision-prediction, where a clip without a score gets 0; here it is left out. The package
    badas has reduction max_all.
    """
    groups = sorted({c.time_to_accident for c in clips if c.time_to_accident is not None})
    result = {}
    for group in groups:
        level = clip_level([c for c in clips if c.time_to_accident == group], reduction)
        result[f"{group:g}"] = level["ap"] if level["n_pos"] and level["n_neg"] else NAN
    defined = [ap for ap in result.values() if not np.isnan(ap)]
    return result | {"map": float(np.mean(defined)) if defined else NAN}


def nexar_map_shared_negatives(clips: Sequence[ScoredClip], seconds: Sequence[float] = (0.5, 1.0, 1.5)) -> dict:
    """Return {"at_K": `clip_level` at K seconds before the event} for uncut clips, and "map", the mean of their AP.

    All negatives are in each of them: close in spirit to Nexar's mAP, and NOT the number of its leaderboard.
    """
    levels = {f"at_{k:g}": clip_level(clips, f"at_{k:g}") for k in seconds}
    return levels | {"map": float(np.mean([level["ap"] for level in levels.values()]))}


def _first(alarm: np.ndarray) -> int | None:
    return int(alarm.argmax()) if alarm.any() else None


def _negatives(clips: Sequence[ScoredClip]) -> list[ScoredClip]:
    return [c for c in clips if not c.positive and len(c.score)]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else NAN


def _share(part: int, whole: int) -> float:
    return part / whole if whole else NAN


def first_crossing(clips: Sequence[ScoredClip], threshold: float, *, above: bool = False) -> dict[str, float]:
    """Return the lead of the first alarm before the event, and what it costs in negative clips.

    recall: detected / timed positives; mean_lead_detected, median_lead_detected: seconds, of the detected alone;
    mean_lead_missed_as_0; n_pos, n_detected; false_alarm_clips, n_neg, false_alarm_rate: of negative clips with any
    alarm. above: score > threshold alarms, not >=. GAMEABLE without the false-alarm rate: a constant has recall 1.
    """
    alarms = (lambda s: s > threshold) if above else (lambda s: s >= threshold)
    timed, negatives = [c for c in clips if c.timed], _negatives(clips)
    firsts = [(c, _first(alarms(c.score[: c.before]))) for c in timed]
    leads = [c.event - c.time[first] for c, first in firsts if first is not None]
    false = sum(bool(alarms(c.score).any()) for c in negatives)
    return {
        "recall": _share(len(leads), len(timed)),
        "mean_lead_detected": _mean(leads),
        "median_lead_detected": float(np.median(leads)) if leads else NAN,
        "mean_lead_missed_as_0": sum(leads) / len(timed) if timed else NAN,
        "n_pos": len(timed),
        "n_detected": len(leads),
        "false_alarm_clips": false,
        "n_neg": len(negatives),
        "false_alarm_rate": _share(false, len(negatives)),
    }


def sustained_alert(clips: Sequence[ScoredClip], threshold: float, gap: int) -> dict[str, float]:
    """Return the lead of the alert that stands when the event comes, as the package badas 1.1.3 has it.

    An alert begins at a frame that alarms; more than `gap` CONSECUTIVE frames below the threshold void it. mtta,
    mtta_std: mean and standard deviation (ddof 0) of the leads in seconds; early_warning_recall: clips with an alert
    / timed positives; n_with_alert, n_pos. gap counts predictions: seconds x rate. GAMEABLE: no false alarms in it.
    """
    timed, leads = [c for c in clips if c.timed], []
    for clip in timed:
        alarm = np.flatnonzero(clip.score[: clip.before] >= threshold)
        if len(alarm) and clip.before - 1 - alarm[-1] <= gap:
            breaks = np.flatnonzero(np.diff(alarm) - 1 > gap)
            leads.append(clip.event - clip.time[alarm[breaks[-1] + 1 if len(breaks) else 0]])
    return {
        "mtta": _mean(leads),
        "mtta_std": float(np.std(leads)) if leads else NAN,
        "early_warning_recall": _share(len(leads), len(timed)),
        "n_with_alert": len(leads),
        "n_pos": len(timed),
    }


def stable_tta(clips: Sequence[ScoredClip], threshold: float, *, with_event_frame: bool = False) -> dict[str, float]:
    """Return the mean stable time to accident, in seconds over ALL timed positives: mean, n_pos, n_zero.

    Of a clip: E - the first frame from which score > threshold holds without a break up to the event; 0 if there is
    none. with_event_frame: the first frame at or after the event must hold, too, as in the Kaggle competition
    zero-shot-taa, which counts frames. GAMEABLE by scores that never fall, and without false alarms in it.
    """
    timed, leads = [c for c in clips if c.timed], []
    for clip in timed:
        end = min(clip.before + with_event_frame, len(clip.score))
        quiet = np.flatnonzero(~(clip.score[:end] > threshold))
        start = quiet[-1] + 1 if len(quiet) else 0
        leads.append(max(0.0, clip.event - clip.time[start]) if start < end else 0.0)
    return {"mean": _mean(leads), "n_pos": len(timed), "n_zero": sum(bool(lead <= 0) for lead in leads)}


_LEAD = ("recall", "mean_lead_detected", "median_lead_detected", "false_alarm_rate", "n_detected", "n_pos", "n_neg")


def at_false_alarm_rate(clips: Sequence[ScoredClip], rate: float) -> dict[str, float]:
    """Return `first_crossing` at the lowest threshold with at most this share of negative clips alarmed.

    The threshold is one of the scores; where none is high enough it is NaN and recall is 0. With n negative clips the
    rate moves in steps of 1/n: below that it means "no false alarm". It is chosen on these very clips. Without negative
    clips all is NaN.
    """
    negatives = _negatives(clips)
    if not negatives:
        return {"threshold": NAN, **dict.fromkeys(_LEAD[:4], NAN)}
    highest = np.sort([c.score.max() for c in negatives])[::-1]
    allowed = int(np.floor(rate * len(negatives) + EPS))
    scores = np.concatenate([c.score for c in clips])
    above = scores[scores > highest[allowed]] if allowed < len(highest) else scores
    if not len(above):
        return {"threshold": NAN, "recall": 0.0, **dict.fromkeys(_LEAD[1:3], NAN), "false_alarm_rate": 0.0}
    threshold = float(above.min())
    crossing = first_crossing(clips, threshold)
    return {"threshold": threshold} | {name: crossing[name] for name in _LEAD}


def at_recall(clips: Sequence[ScoredClip], recall: float) -> dict[str, float]:
    """Return threshold, recall, precision, mean_lead_detected and false_alarm_rate at a recall of timed positives.

    The threshold is the highest with at least this recall; all is NaN where the lowest score does not reach it.
    precision = detected / (detected + false-alarm clips), which depends on the share of positive clips. The threshold
    is chosen on these very clips.
    """
    timed = [c for c in clips if c.timed]
    highest = np.sort([c.score[: c.before].max() if c.before else -1.0 for c in timed])[::-1]
    needed = max(1, int(np.ceil(recall * len(timed) - EPS)))
    if not timed or highest[needed - 1] < 0:
        return dict.fromkeys(("threshold", "recall", "precision", "mean_lead_detected", "false_alarm_rate"), NAN)
    crossing = first_crossing(clips, threshold := float(highest[needed - 1]))
    return {
        "threshold": threshold,
        "recall": crossing["recall"],
        "precision": crossing["n_detected"] / (crossing["n_detected"] + crossing["false_alarm_clips"]),
        "mean_lead_detected": crossing["mean_lead_detected"],
        "false_alarm_rate": crossing["false_alarm_rate"],
    }


def time_bins(
    clips: Sequence[ScoredClip], threshold: float = 0.5, *, own_before: float | None = None
) -> dict[str, dict[str, float]]:
    """Return by seconds before the event {"0-0.5": {auc, ap, recall, frames_pos, clips_pos, frames_neg}}.

    Positives: frames of timed positives with E - t in (low, high]; negatives: all frames of negative clips, the same in
    every bin. recall: share of the positives with score >= threshold. Compare AUC between bins, not AP, whose chance
    level is the share of positives.

    own_before: for sets without negative clips: negatives are the frames of timed positives more than so many seconds
    before the event. A frame's position in its clip then tells its class: show the position prior's figures beside.
    """
    timed, negatives = [c for c in clips if c.timed], _negatives(clips)
    lead = np.concatenate([c.event - c.time for c in timed] or [np.zeros(0)])
    score = np.concatenate([c.score for c in timed] or [np.zeros(0)])
    owner = np.repeat(np.arange(len(timed)), [len(c.time) for c in timed])
    negative = np.concatenate([c.score for c in negatives] or [np.zeros(0)])
    negative = negative if own_before is None else score[lead > own_before + EPS]
    result = {}
    for low, high in TIME_BINS:
        inside = (lead > low + EPS) & (lead <= high + EPS)
        positive = score[inside]
        labels = np.r_[np.ones(len(positive), int), np.zeros(len(negative), int)]
        result[f"{low:g}-{high:g}"] = auc_ap(np.r_[positive, negative], labels) | {
            "recall": float((positive >= threshold).mean()) if len(positive) else NAN,
            "frames_pos": len(positive),
            "clips_pos": len(np.unique(owner[inside])),
            "frames_neg": len(negative),
        }
    return result


def brier_per_second(clips: Sequence[ScoredClip]) -> dict[str, float]:
    """Return "brier" and "n_clips" of the package badas 1.1.3: the mean over seconds of a clip, then over clips.

    Seconds begin at the first prediction (numpy.arange(first, last + 1, 1); a last prediction exactly whole seconds
    after the first falls out, as in badas). In each, (mean score - target)^2, where the target is 1 if the MIDDLE of a
    second is in [E - 2, E + 1]. Positives without an event's time are left out. It measures calibration only as far as
    that target is true; a silent model scores the base rate.
    """
    values = []
    for clip in clips:
        if not len(clip.time) or (clip.positive and clip.event is None):
            continue
        edges = np.arange(clip.time[0], clip.time[-1] + 1, 1.0)
        owner = np.searchsorted(edges, clip.time, side="right") - 1
        inside = owner < len(edges) - 1
        n = np.bincount(owner[inside], minlength=max(len(edges) - 1, 0))
        total = np.bincount(owner[inside], clip.score[inside], minlength=max(len(edges) - 1, 0))
        if not n.any():
            continue
        middle = (edges[:-1] + 0.5)[n > 0]
        target = (middle >= clip.event - 2) & (middle <= clip.event + 1) if clip.positive else np.zeros(len(middle))
        values.append(float(np.mean((total[n > 0] / n[n > 0] - target) ** 2)))
    return {"brier": _mean(values), "n_clips": len(values)}
