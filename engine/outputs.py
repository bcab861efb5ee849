"""The files of an evaluation: predictions.csv first, then what can be made again from it.

OUTPUT_DIR/
    eval_args.json          arguments; with predictions.csv comes under "scores" what is known of them
    predictions.csv         a row for each scored frame
    metrics.json  plots/    made of it
"""

import json
import os
import socket
import tempfile
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from engine.evaluate import EvaluationError, Predictions, read_predictions, write_metrics, write_predictions
from engine.plots import FIGURES, evaluation_figures, save_figures
from utils.cli import ConfigError
from utils.files import replaced
from utils.record import differing

SCORES, RECORD = "predictions.csv", "eval_args.json"
BYTES_OF_A_ROW = 128  # of predictions.csv, about
_REST = ("metrics.json", *(f"plots/{name}.png" for name in FIGURES))


def unfinished_evaluation(
    folder: Path, arguments: Mapping[str, Any], free: Set[str], weights: str | None
) -> dict[str, Any] | None:
    """Return what is known of the scores in a folder that lacks metrics.json or plots; None where nothing is scored.

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
        record = json.loads((folder / RECORD).read_text())
        known, before = record["scores"], record["args"]
        then, _ = known["weights"], (known["about"]["coverage"], known["windows"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{refusal} ({RECORD} does not tell what it is of)") from e
    if changes := differing(before, arguments, free):
        raise ConfigError(f"{refusal} (it is of an evaluation with other arguments: {'; '.join(changes)})")
    if then != _stamp(weights):
        raise ConfigError(f"{refusal} (it is of weights that have changed since)")
    return known


def keep_scores(
    folder: Path, predictions: Predictions, clips: Any, about: Mapping[str, Any], weights: str | None
) -> dict[str, Any]:
    """Write predictions.csv, and to eval_args.json what is known of it, which is returned.

    about: what metrics.json says beside the metrics. weights: the weights file. Raises EvaluationError where they
    cannot be written; then they are in a temporary folder, which it names.
    """
    known = {"about": dict(about), "windows": len(predictions.frame), "weights": _stamp(weights)}
    try:
        record = json.loads((folder / RECORD).read_text()) | {"scores": known}
        _write_scores(folder, predictions, clips, record)
    except (OSError, ValueError) as e:
        why = f"{folder / SCORES}: cannot be written ({getattr(e, 'strerror', None) or e})"
        try:
            refuge = Path(tempfile.mkdtemp(prefix="scores-"))
            _write_scores(refuge, predictions, clips, record)
        except OSError as second:
            raise EvaluationError(f"{why}, nor anything in {tempfile.gettempdir()} ({second.strerror})") from e
        raise EvaluationError(
            f"{why}; the scores are in {refuge} on {socket.gethostname()}: move both files to {folder}, and the same "
            "command makes metrics and plots of them"
        ) from e
    return known


def _stamp(weights: str | None) -> list[int] | None:
    """Return [size in bytes, modification time in ns] of a file."""
    status = os.stat(weights) if weights else None
    return status and [status.st_size, status.st_mtime_ns]


def _write_scores(folder: Path, predictions: Predictions, clips: Any, record: Mapping[str, Any]) -> None:
    """Write predictions.csv, which appears when its record is there."""
    with replaced(folder / SCORES) as temporary:
        write_predictions(temporary, predictions, clips)
        with replaced(folder / RECORD) as record_file:
            record_file.write_text(json.dumps(record, indent=2) + "\n")


def finish_evaluation(folder: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Make metrics.json and plots/ of predictions.csv; returns what metrics.json says.

    known: "about", and "windows", the number of rows. Raises EvaluationError where they cannot be written.
    """
    predictions = read_predictions(folder / SCORES)
    if len(predictions.frame) != known["windows"]:
        raise EvaluationError(
            f"{folder / SCORES} has {len(predictions.frame)} rows, {known['windows']} were written: remove it to score "
            "again"
        )
    metrics = predictions.metrics()
    content = dict(known["about"]) | metrics
    try:
        write_metrics(folder / "metrics.json", content)
        save_figures(folder / "plots", evaluation_figures(predictions.score, predictions.label, metrics))
    except OSError as e:
        raise EvaluationError(
            f"{e.filename}: cannot be written ({e.strerror}); {SCORES} is kept, and the same command goes on from it"
        ) from e
    return content
