"""The files of an evaluation: predictions.csv first, then what can be made again from it.

OUTPUT_DIR/
    eval_args.json          arguments and weights; with predictions.csv comes under "scores" what is known of them
    predictions.csv         a row for each scored frame
    metrics.json  plots/    made of it
"""

import os
import socket
import tempfile
import zlib
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from engine.evaluate import EvaluationError, Predictions, read_predictions, write_metrics, write_predictions
from engine.plots import FIGURES, evaluation_figures, save_figures
from utils.cli import ConfigError
from utils.damage import parse_json
from utils.files import replaced
from utils.record import differing, write_json, write_run_record

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
        record = parse_json((folder / RECORD).read_bytes())
        known, before, then = record["scores"], record["args"], record["weights"]
        _ = known["about"]["coverage"], known["windows"], known["crc32"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{refusal} ({RECORD} does not tell what it is of)") from e
    if changes := differing(before, arguments, free):
        raise ConfigError(f"{refusal} (it is of an evaluation with other arguments: {'; '.join(changes)})")
    if then != _stamp(weights):
        raise ConfigError(f"{refusal} (it is of weights that have changed since)")
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


def finish_evaluation(folder: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Make metrics.json and plots/ of predictions.csv; returns what metrics.json says.

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
