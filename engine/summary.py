"""The figures of a risk curve: of each video a row, and summary.csv, a row for every video, the riskiest first."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.curve import RiskCurve
from utils.files import replaced
from utils.text import one_line


class Result(Protocol):
    """What is known of a video.

    name: of the video.
    curve: its scores; None where there are none.
    problem: why there are none; "" where there are.
    """

    name: str
    curve: RiskCurve | None
    problem: str


@dataclass(frozen=True)
class SummaryRow:
    """The figures of a video. Times are in seconds.

    name: of the video.
    duration: of the video.
    highest, highest_time: the highest score, and when it comes first; None where nothing is scored.
    highest_warming_up: whether that is a score of a window which repeats the first frame.
    events: how many; None where there is no rule.
    seconds_at_risk: scores at or above the threshold, each for the step to the next one; None where there is no rule.
    gaps, gap_seconds: stretches without pictures, how many and how long together.
    scored, warming_up: scored frames, and how many of them have a window that repeats the first frame.
    """

    name: str
    duration: float
    highest: float | None
    highest_time: float | None
    highest_warming_up: bool
    events: int | None
    seconds_at_risk: float | None
    gaps: int
    gap_seconds: float
    scored: int
    warming_up: int


def summary_row(curve: RiskCurve) -> SummaryRow:
    """Return the figures of a curve; all of them can be computed from scores.csv, fps, gaps and rule."""
    peak = int(curve.score.argmax()) if len(curve.score) else None
    at_risk = None
    if curve.rule:
        at_risk = int(np.count_nonzero(risky(curve))) * curve.step / curve.fps
    return SummaryRow(
        name=curve.name,
        duration=curve.duration,
        highest=None if peak is None else float(curve.score[peak]),
        highest_time=None if peak is None else float(curve.time[peak]),
        highest_warming_up=peak is not None and bool(curve.warming_up[peak]),
        events=len(curve.events()) if curve.rule else None,
        seconds_at_risk=at_risk,
        gaps=len(curve.gaps),
        gap_seconds=float(sum(gap.end - gap.start for gap in curve.gaps)),
        scored=len(curve.frame),
        warming_up=int(np.count_nonzero(curve.warming_up)),
    )


def risky(curve: RiskCurve) -> np.ndarray:
    """Return (n,) bool: whether a score, not smoothed, reaches the threshold of the rule, in float32 as there."""
    return curve.score >= np.float32(curve.rule.threshold)


def riskiest_first(results: Iterable[Result]) -> list[tuple[Result, SummaryRow]]:
    """Return the results that have scores, with their figures, the highest score first, then by name."""
    rows = [(result, summary_row(result.curve)) for result in results if result.curve and len(result.curve.frame)]
    return sorted(rows, key=lambda pair: (-pair[1].highest, pair[1].name))


def unscored(results: Iterable[Result]) -> list[tuple[str, str]]:
    """Return (name, reason) of the results without scores, by name."""
    without = [result for result in results if not (result.curve and len(result.curve.frame))]
    return sorted((result.name, result.problem or "no window can be scored") for result in without)


def write_summary(path: str | Path, results: Iterable[Result]) -> None:
    """Write summary.csv: the fields of SummaryRow and `problem`, a row for each video, those without scores last.

    What is not known is empty. Raises OSError, which names the file.
    """
    results, names = list(results), [f.name for f in fields(SummaryRow)]
    with replaced(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow([*names, "problem"])
        for _, row in riskiest_first(results):
            writer.writerow([*(_cell(getattr(row, name)) for name in names), ""])
        for name, reason in unscored(results):
            writer.writerow([one_line(name), *[""] * (len(names) - 1), one_line(reason)])


def _cell(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, str):
        return one_line(value)
    return "" if value is None else int(value)


def peak_frames(curve: RiskCurve, most: int = 6) -> list[int]:
    """Return the frames that say most of a curve, ascending: the peaks of its highest events, at most `most`.

    Where there is no event: those of the highest scores, apart from each other by 1 / (2 `most`) of the video.
    """
    events = sorted(curve.events(), key=lambda event: -event.peak_score)[:most]
    if events:
        return sorted({int(round(event.peak * curve.fps)) for event in events})
    frames, left, apart = [], curve.score.astype(np.float64), curve.num_frames / (2 * most)
    while len(frames) < most and left.max(initial=-1) >= 0:
        frames.append(int(curve.frame[left.argmax()]))
        left[np.abs(curve.frame - frames[-1]) < apart] = -1
    return sorted(frames)


def score_at(curve: RiskCurve, frame: int) -> float | None:
    """Return the score of a frame; None where it has none."""
    place = int(np.searchsorted(curve.frame, frame))
    return float(curve.score[place]) if place < len(curve.frame) and curve.frame[place] == frame else None


def clock(seconds: float, span: float) -> str:
    """Return a time in words that suit a video of `span` seconds: "3.40 s", "2:03.4", "1:02:03.4"."""
    if span < 60:
        return f"{seconds:.2f} s"
    minutes, tenths = divmod(int(round(seconds * 10)), 600)
    if span < 3600:
        return f"{minutes}:{tenths / 10:04.1f}"
    return f"{minutes // 60}:{minutes % 60:02d}:{tenths / 10:04.1f}"
