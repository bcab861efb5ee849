"""The files of an evaluation: predictions.csv first, then what can be made again from it.

OUTPUT_DIR/
    eval_args.json          arguments and weights; with predictions.csv comes under "scores" what is known of them
    predictions.csv         a row for each scored frame
    metrics.json  plots/    made of it
    report.html  .json      made of it, with more of the data set where that is at hand

The operating point is made of it, too. It is written into the weights file first, then into metrics.json: an evaluation
that is whole has done both. eval_args.json keeps under "amended" which weights files this has made of the one scored.
"""

import logging
import os
import socket
import tempfile
import zlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.baselines import LabelTable
from engine.checkpoint import CheckpointWriteError, NotAmended, amend_spec
from engine.evaluate import EvaluationError, Predictions, read_predictions, summary, write_metrics, write_predictions
from engine.events import EventRule
from engine.operating_point import NoOperatingPoint, OperatingPoint, find_operating_point, labelled_curves
from engine.plots import FIGURES, evaluation_figures, save_figures
from engine.report import Options, ScoresError, make_report, read_frames, save_report
from engine.report.build import Pictures
from utils.cli import ConfigError
from utils.damage import parse_json
from utils.files import replaced
from utils.record import differing, write_json, write_run_record

SCORES, RECORD = "predictions.csv", "eval_args.json"
BYTES_OF_A_ROW = 200  # of predictions.csv, about
_REST = ("metrics.json", *(f"plots/{name}.png" for name in FIGURES), "report.json", "report.html")
logger = logging.getLogger("tad")


@dataclass(frozen=True)
class WantedPoint:
    """The operating point that an evaluation is to find, and the weights file that is to have it.

    criterion: of `find_operating_point`; None = "mcc", unless the file has an operating point; "none" = no point.
    false_alarms_per_hour: None = 1, if that is the criterion.
    rule: what an event is; its threshold is not used.
    weights: path or URL of the weights; None = there are none.
    as_trained: whether they are evaluated as their spec says.

    Raises ConfigError where a number of false alarms comes with another criterion.
    """

    criterion: str | None
    false_alarms_per_hour: float | None
    rule: EventRule
    weights: str | None
    as_trained: bool

    def __post_init__(self):
        if self.false_alarms_per_hour is not None and self.criterion != "false_alarms":
            raise ConfigError("--false_alarms_per_hour is for --operating_point false_alarms: give both")

    def find(self, predictions: Predictions, split: str) -> OperatingPoint | None:
        """Return the operating point; None, with a warning, where there is none. split: "DoTA val"."""
        if self.criterion == "none":
            return None
        rate = 1.0 if self.false_alarms_per_hour is None else self.false_alarms_per_hour
        try:
            point = find_operating_point(
                labelled_curves(predictions),
                self.criterion or "mcc",
                self.rule,
                false_alarms_per_hour=rate,
                split=split,
            )
        except NoOperatingPoint as e:
            logger.warning(f"no operating point: {e}")
            return None
        logger.info(point)
        return point

    def store(self, folder: Path, point: OperatingPoint) -> None:
        """Write an operating point into the weights file of the evaluation in a folder, or say why it is not."""
        if not self.weights:
            return
        try:
            done = self._amend(folder, point)
        except (NotAmended, CheckpointWriteError) as e:
            logger.warning(f"{e}: the operating point is in {folder / 'metrics.json'} alone")
        else:
            kept = "keeps the operating point that it has; --operating_point replaces it"
            logger.info(f"{self.weights} {'has this operating point' if done else kept}")

    def _amend(self, folder: Path, point: OperatingPoint) -> bool:
        """Return whether the weights file has the operating point now. Raises what `amend_spec` does."""
        record = parse_json((folder / RECORD).read_bytes())
        amended = record.get("amended", [])

        def require_same() -> None:
            if _stamp(self.weights) not in (record["weights"], *amended):
                raise NotAmended(f"{self.weights} has changed since it was scored")

        def ready(new: Path) -> None:
            require_same()
            try:
                write_json(folder / RECORD, {**record, "amended": [*amended, _stamp(str(new))]})
            except OSError as e:
                raise NotAmended(f"{e.filename} cannot be written ({e.strerror})") from e

        if self.weights.startswith(("http://", "https://")):
            raise NotAmended(f"{self.weights} is no local file")
        if not self.as_trained:
            raise NotAmended(f"{self.weights} was evaluated in another way than it was trained (--override_spec)")
        require_same()
        return amend_spec(self.weights, replace=bool(self.criterion), ready=ready, operating_point=point.to_spec())


def unfinished_evaluation(
    folder: Path, arguments: Mapping[str, Any], free: Set[str], weights: str | None
) -> dict[str, Any] | None:
    """Return what is known of the scores in a folder that lacks metrics, plots or the report; None where none are.

    Args:
        arguments: of this evaluation, which must equal those of the scores but for the names in `free`.
        weights: the weights file, which must have the size and time that it had then.

    Raises ConfigError where the evaluation is complete, or another.
    """
    path = folder / SCORES
    if not path.exists():
        return None
    refusal = f"{path} exists: choose another --output_dir or remove it"
    if all((folder / name).exists() for name in _REST):
        raise ConfigError(refusal)
    try:
        record = parse_json((folder / RECORD).read_bytes())
        known, before, then = record["scores"], record["args"], record["weights"]
        _ = known["about"]["coverage"], known["windows"], known["crc32"]
        of = [then, *record.get("amended", [])]
        if not isinstance(before, dict):
            raise TypeError("its arguments are no dictionary")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{refusal} ({RECORD} does not tell what it is of)") from e
    if changes := differing(before, arguments, free):
        raise ConfigError(f"{refusal} (it is of an evaluation with other arguments: {'; '.join(changes)})")
    if _stamp(weights) not in of:
        raise ConfigError(f"{refusal} (it is of weights that have changed since)")
    logger.info(f"{path} is there: nothing is scored, metrics, plots and the report are made of it")
    return known


def begin_evaluation(
    folder: Path, arguments: Mapping[str, Any], weights: str | None, world_size: int
) -> dict[str, Any]:
    """Write eval_args.json, before the weights are read: what is there under their name later may be others.

    Returns what it says. Raises ConfigError where it cannot be written.
    """
    return write_run_record(folder / RECORD, arguments, world_size, weights=_stamp(weights))


def keep_scores(
    folder: Path, predictions: Predictions, clips: Any, about: Mapping[str, Any], record: Mapping[str, Any]
) -> dict[str, Any]:
    """Write predictions.csv, and to eval_args.json what is known of it, which is returned.

    about: what metrics.json says beside the metrics. record: what `begin_evaluation` returned. Raises EvaluationError
    where they cannot be written; then they are in a temporary folder, which it names.
    """
    known = {"about": dict(about), "windows": len(predictions.frame)}
    try:
        return _write_scores(folder, predictions, clips, record, known)
    except OSError as e:
        why = f"{folder / SCORES}: cannot be written ({e.strerror})"
        try:
            refuge = Path(tempfile.mkdtemp(prefix="scores-"))
            _write_scores(refuge, predictions, clips, record, known)
        except OSError as second:
            raise EvaluationError(f"{why}, nor in a temporary folder ({second.strerror})") from e
        raise EvaluationError(
            f"{why}; the scores are in {refuge} on {socket.gethostname()}: move both files to {folder}, and the same "
            "command makes metrics and plots of them"
        ) from e


def _stamp(weights: str | None) -> list[int] | None:
    """Return [size in bytes, modification time in ns] of a file; None where there is none."""
    try:
        status = os.stat(weights or "")
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _write_scores(
    folder: Path, predictions: Predictions, clips: Any, record: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
    """Write predictions.csv, which appears when its record is there; returns what that says of it."""
    with replaced(folder / SCORES) as temporary:
        write_predictions(temporary, predictions, clips)
        known = {**known, "crc32": zlib.crc32(temporary.read_bytes())}
        write_json(folder / RECORD, {**record, "scores": known})
    return known


def finish_evaluation(folder: Path, known: Mapping[str, Any], wanted: WantedPoint) -> dict[str, Any]:
    """Make metrics.json, plots/ and the operating point of predictions.csv; returns what metrics.json says.

    known: "about", "windows", the number of rows, and "crc32", the sum of the file. Raises EvaluationError where they
    cannot be written, or predictions.csv has been changed.
    """
    path = folder / SCORES
    predictions = read_predictions(path)
    if len(predictions.frame) != known["windows"]:
        raise EvaluationError(
            f"{path} has {len(predictions.frame)} rows, {known['windows']} were written: remove it to score again"
        )
    if zlib.crc32(path.read_bytes()) != known["crc32"]:
        raise EvaluationError(f"{path} is not as it was written: remove it to score again")
    metrics, about = predictions.metrics(), known["about"]
    split = f"{about['data_set']} {about['split']}"
    point = wanted.find(predictions, split)
    content = {**about, **metrics, "operating_point": point and point.to_spec()}
    if point:
        wanted.store(folder, point)
    try:
        write_metrics(folder / "metrics.json", content)
        of = ", ".join(filter(None, (about.get("model"), split)))  # scores of earlier versions name no model
        save_figures(folder / "plots", evaluation_figures(predictions.score, predictions.label, metrics, of))
    except OSError as e:
        raise EvaluationError(
            f"{e.filename}: cannot be written ({e.strerror}); {SCORES} is kept, and the same command goes on from it"
        ) from e
    logger.info(f"{SCORES}, metrics.json and plots/ are in {folder}")
    logger.info(f"{summary(content)}  {content['coverage']}")
    return content


def report_evaluation(
    folder: Path,
    train: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
    train_words: str,
    listed: Sequence[str] | None,
    pictures: Pictures | None,
) -> None:
    """Write report.html and report.json of predictions.csv, and log whether the model beats the position prior.

    Where they cannot be made, that is logged, and how to make them: the evaluation is whole without.

    train: clip, frame and label, (n,) each, that the baselines are learned on; train_words, listed: of Options.
    pictures: of `save_report`.
    """
    options = Options(train=LabelTable(*train) if train else None, train_words=train_words, listed=listed)
    try:
        report = make_report({folder.absolute().name: [read_frames(folder / SCORES)]}, options)
        *_, page = save_report(report, folder, pictures)
    except (OSError, ScoresError) as e:
        why = f"{e.filename}: cannot be written ({e.strerror})" if isinstance(e, OSError) else e
        again = f"the same command makes it of {SCORES}, as python -m engine.report {folder} does"
        logger.warning(f"there is no report: {why}; metrics.json and plots/ are whole, and {again}")
        return
    logger.info(report["models"][0]["baselines"]["verdict"])
    logger.info(f"report: {page}")
