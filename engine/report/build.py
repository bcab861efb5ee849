"""A report from files of scores to report.json and report.html."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.baselines import LabelTable
from engine.intervals import LEVEL
from engine.pictures import data_uri
from engine.report.clips import anticipation, extremes, wanted_frames, worst_false_alarms
from engine.report.compare import compare, shared
from engine.report.frames import ScoredFrames, read_frames
from engine.report.html import report_html
from engine.report.text import report_text
from engine.report.totals import PRIOR, baseline_scores, baselines, by_position, calibration, data, groups, totals
from engine.report.units import units_of
from utils.files import check_writable, replaced
from utils.logging import jsonable

Pictures = Callable[[Mapping[str, Sequence[int]]], Mapping[tuple[str, int], np.ndarray]]


@dataclass(frozen=True)
class Options:
    """How a report is made.

    replicates, seed: of the bootstrap.
    same_clips: figures of each file are of the frames that all files have, not only those of the comparison.
    threshold: score in [0, 1] from which a frame alarms, for anticipation and false alarms; chosen beforehand.
    train: labels that the baselines are learned on; None = the scored clips themselves, each part from the others.
    train_words: which labels those are, or why there are none; None = words that say no more than that.
    listed: names of all clips of the split, scored or not; None = not known.
    """

    replicates: int = 1000
    seed: int = 0
    same_clips: bool = False
    threshold: float = 0.5
    train: LabelTable | None = None
    train_words: str | None = None
    listed: Sequence[str] | None = None


def make_report(models: Mapping[str, Sequence[ScoredFrames]], options: Options) -> dict[str, Any]:
    """Return the report, as report.json holds it but for NaN, which is null there.

    models: {name: its runs, as of several seeds}. Raises ScoresError where files that are compared share no frame.
    """
    named = [
        (name if len(runs) == 1 else f"{name}, run {number}", run)
        for name, runs in models.items()
        for number, run in enumerate(runs, 1)
    ]
    comparison = compare(models, options.replicates, options.seed) if len(named) > 1 else None
    files = [run for _, run in named]
    files = shared(files) if options.same_clips and len(files) > 1 else files
    return {
        "level": LEVEL,
        "replicates": options.replicates,
        "seed": options.seed,
        "same_clips": options.same_clips,
        "models": [{"name": name, **_of(run, options)} for (name, _), run in zip(named, files, strict=True)],
        "comparison": comparison,
    }


def _of(frames: ScoredFrames, options: Options) -> dict[str, Any]:
    units = units_of(frames, options.replicates, options.seed)
    samples = {u.kind: u.replicated(frames, frames.score) for u in units}
    total = totals(frames, units, samples)
    words = options.train_words or ("no training labels were given" if options.train is None else "the training labels")
    trivial = baseline_scores(frames, options.train, words)
    clips = frames.scored_clips()
    return {
        "path": frames.path,
        "data": data(frames, options.listed),
        "total": total,
        "baselines": baselines(frames, trivial, units[-1], samples[units[-1].kind], total["metrics"]),
        "groups": groups(frames, options.replicates, options.seed),
        "by_position": by_position(frames),
        "calibration": calibration(frames),
        "anticipation": anticipation(clips, frames, trivial[PRIOR][0], units[-1], options.threshold),
        "clips": extremes(frames),
        "false_alarms": worst_false_alarms(frames, clips, options.threshold),
    }


def write_report(
    files: Mapping[str, Sequence[str | Path]], out: str | Path, options: Options
) -> tuple[str, list[Path]]:
    """Read predictions.csv files, write OUT/report.json and OUT/report.html; returns the text and the two paths.

    files: {name of a model: its runs}. Raises ScoresError for a file that cannot be read, OSError, which names the
    file, for one that cannot be written.
    """
    check_writable(out)
    report = make_report({name: [read_frames(path) for path in paths] for name, paths in files.items()}, options)
    return report_text(report), save_report(report, out)


def save_report(report: Mapping[str, Any], out: str | Path, pictures: Pictures | None = None) -> list[Path]:
    """Write OUT/report.json and OUT/report.html; returns their paths.

    pictures: gets {clip: frames} and returns those that it can, {(clip, frame): uint8 (H, W, 3) RGB}; the page shows
    them of the best and the worst clips and of false alarms. None = none are at hand.

    Raises OSError, which names the file; what `pictures` raises passes through.
    """
    out = Path(out)
    found = pictures(wanted_frames(report)) if pictures else {}
    page = report_html(report, {where: data_uri(picture) for where, picture in found.items()})
    contents = {"report.json": json.dumps(jsonable(report), indent=1) + "\n", "report.html": page}
    for name, content in contents.items():
        with replaced(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
    return [out / name for name in contents]
