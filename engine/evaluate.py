"""Score every window of every clip exactly once, over all ranks; predictions.csv and metrics.json."""

import csv
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.metrics import frame_metrics
from utils.distributed import gather
from utils.files import replaced
from utils.logging import jsonable

logger = logging.getLogger("tad")


class EvaluationError(RuntimeError):
    """Scores that cannot be trusted; the message says why."""


@dataclass(frozen=True)
class Predictions:
    """Scored windows, sorted by clip and frame, (n,) each: clip number, last source frame, label 0/1.

    logits (n, 2) float32, safe and anomalous.
    """

    clip: np.ndarray
    frame: np.ndarray
    label: np.ndarray
    logits: np.ndarray

    @property
    def score(self) -> np.ndarray:
        """(n,) float32: softmax probability of an anomaly."""
        margin = self.logits[:, 0].astype(np.float64) - self.logits[:, 1]
        return (1 / (1 + np.exp(np.clip(margin, -700, 700)))).astype(np.float32)

    def metrics(self) -> dict[str, float]:
        """`frame_metrics` of the scores, and the mean cross-entropy as "loss"."""
        own = self.logits[np.arange(len(self.label)), self.label].astype(np.float64)
        loss = np.logaddexp(self.logits[:, 0].astype(np.float64), self.logits[:, 1]) - own
        metrics = {"loss": float(loss.mean()), **frame_metrics(self.score, self.label)}
        if metrics["n_pos"] in (0, metrics["n"]):
            logger.warning("all evaluated frames are of one class: AUC_ROC, AP and MCC say nothing")
        return metrics


@torch.inference_mode()
def score_windows(
    model: nn.Module, batches: Iterable, to_input: Callable[[Tensor], Tensor], *, dtype: torch.dtype = torch.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The windows of this rank -> (clip (n,), frame (n,), logits (n, 2) float32), in the order they come.

    batches: objects with clip, last (n,) and video uint8 (n, 3, T, H, W) on the model's device. dtype: of autocast.
    """
    model.eval()
    clips, frames, logits = [], [], []
    for batch in batches:
        video = to_input(batch.video)
        with torch.autocast(video.device.type, dtype, enabled=dtype != torch.float32):
            output = model(video)
        clips.append(np.full(len(batch.last), batch.clip))
        frames.append(batch.last)
        logits.append(output.float())  # stays on the device: no wait per batch
    if not logits:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 2), np.float32)
    return np.concatenate(clips), np.concatenate(frames), torch.cat(logits).cpu().numpy()


def within(windows: tuple[np.ndarray, ...], usable: Mapping[int, int]) -> tuple[np.ndarray, ...]:
    """Of columns (clip (n,), last frame (n,), ...) the rows that end within the first usable[clip] frames of the clip.

    A clip that is not in `usable` keeps all its rows.
    """
    keep = np.ones(len(windows[0]), dtype=bool)
    for clip, frames in usable.items():
        keep &= (windows[0] != clip) | (windows[1] < frames)
    return tuple(column[keep] for column in windows)


def gather_predictions(
    local: tuple[np.ndarray, np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray], labels: Callable
) -> Predictions | None:
    """The Predictions of all ranks, on rank 0; None on the others.

    Args:
        local: from `score_windows`. expected: (clip (n,), frame (n,)) of every window there is, sorted.
        labels: clip number -> (T,) labels.

    Raises EvaluationError unless each expected window was scored exactly once, with finite logits, and there are any.
    """
    if not len(expected[0]):
        raise EvaluationError("no window can be scored: the frames of every clip end before its first window does")
    parts = gather(local)
    if parts is None:
        return None
    clip, frame, logits = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((frame, clip))
    clip, frame, logits = clip[order], frame[order], logits[order]
    if not (np.array_equal(clip, expected[0]) and np.array_equal(frame, expected[1])):
        scored, wanted = (Counter(zip(*(a.tolist() for a in pair), strict=True)) for pair in ((clip, frame), expected))
        odd = min((scored - wanted) + (wanted - scored))
        raise EvaluationError(
            f"scored {len(clip)} windows for {len(expected[0])} expected; the first that is missing, double or "
            f"foreign is clip {odd[0]}, frame {odd[1]}"
        )
    if len(broken := np.flatnonzero(~np.isfinite(logits).all(axis=1))):
        raise EvaluationError(f"{len(broken)} of {len(clip)} windows have NaN or infinite logits; use --precision fp32")
    label = np.concatenate([np.asarray(labels(c))[frame[clip == c]] for c in np.unique(clip)]).astype(np.int64)
    return Predictions(clip, frame, label, logits)


def write_predictions(path: str | Path, predictions: Predictions, clips: Any) -> None:
    """predictions.csv: clip, filename, frame, logits_safe, logits_risk, score, label, ttc; one row per window.

    clips: the ClipTable. ttc is empty in a clip without anomaly.
    """
    ttc = {c: clips[c].ttc for c in np.unique(predictions.clip)}
    with replaced(path) as temporary, temporary.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["clip", "filename", "frame", "logits_safe", "logits_risk", "score", "label", "ttc"])
        for c, frame, label, (safe, risk), score in zip(
            predictions.clip.tolist(),
            predictions.frame.tolist(),
            predictions.label.tolist(),
            predictions.logits.tolist(),
            predictions.score.tolist(),
            strict=True,
        ):
            seconds = ttc[c][frame]
            writer.writerow(
                [
                    clips[c].name,
                    clips[c].filename(frame),
                    frame,
                    f"{safe:.9g}",
                    f"{risk:.9g}",
                    f"{score:.9g}",
                    label,
                    "" if np.isnan(seconds) else f"{seconds:.6g}",
                ]
            )


def write_metrics(path: str | Path, metrics: dict[str, Any]) -> None:
    """metrics.json; what is undefined is null."""
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(jsonable(metrics), indent=2) + "\n")


def coverage(predictions: Predictions, clips: Any, faults: Iterable) -> dict[str, Any]:
    """What of a split the predictions cover, for metrics.json: "coverage" is "35 of 40 clips".

    clips: the ClipTable. faults: of its clips, with number, name and frames, 0 where the clip cannot be read. A clip
    that is not scored is in "unreadable", "left_out", "frame_mismatch" or, without a fault, "too_short" for a window.
    """
    scored, faults = set(predictions.clip.tolist()), list(faults)
    known = scored | {fault.number for fault in faults}
    return {
        "clips": clips.listed,
        "clips_scored": len(scored),
        "coverage": f"{len(scored)} of {clips.listed} clips",
        "unreadable": [*clips.unreadable, *(fault.name for fault in faults if not fault.frames)],
        "left_out": clips.left_out,
        "frame_mismatch": [fault.name for fault in faults if fault.frames],
        "too_short": [clip.name for number, clip in enumerate(clips) if number not in known],
        "frames": int(clips.frame_counts.sum()),
    }


def summary(metrics: dict[str, float]) -> str:
    """The figures of the published tables, in percent, on one line."""
    names = {"auroc": "AUC_ROC", "ap": "AP", "auc_mcc": "AUC_MCC", "mcc_05": "MCC@0.5", "accuracy": "accuracy"}
    return "  ".join(f"{shown} {100 * metrics[name]:.2f}" for name, shown in names.items()) + f"  n {metrics['n']}"
