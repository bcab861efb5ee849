"""Score every window of every clip exactly once, over all ranks; predictions.csv and metrics.json."""

import copy
import csv
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from engine.metrics import frame_metrics
from engine.report.lists import clip_list
from engine.session import Session
from utils.distributed import gather
from utils.files import replaced
from utils.logging import jsonable
from utils.signals import EXIT_CODE, Preempted, stop_requested

_NUMBERS_AT_ONCE = 2**21  # of videos, on the CPU: with more, a ViT-S of 224 pixels takes up to a fifth longer
logger = logging.getLogger("tad")
Columns = tuple[np.ndarray, ...]  # of windows: (clip (n,), last frame (n,), ...)


class EvaluationError(RuntimeError):
    """Scores that cannot be trusted; the message says why."""


class Windows(Protocol):
    """What a Scorer reads; `datasets.stream.SplitWindows` is one.

    clips: the ClipTable.
    device: where the videos of the batches are.
    """

    clips: Sequence
    device: torch.device

    def batches(self, normalize: Callable[[Tensor], Tensor]) -> Iterator[Any]:
        """Yield batches, with clip (n,), last (n,) and video (m, 3, T, H, W), and faults, which have no video.

        normalize: maps frames uint8 (1, 3, k, H, W), on the device, to those of the videos; each frame once, whatever
            windows it is in. video: its rows from n on are padding; it holds until the next batch is asked for.
        """

    def locations(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (clip, last frame) of every window there is, over all ranks, sorted."""

    def agree(self, faults: list) -> list:
        """Return the faults of all ranks, with number, name and frames that can be used, or refuse them."""


def risk_of(logits: np.ndarray) -> np.ndarray:
    """Return the softmax probability of an anomaly, (n,) float32, of logits (n, 2), safe and anomalous."""
    margin = logits[:, 0].astype(np.float64) - logits[:, 1]
    return (1 / (1 + np.exp(np.clip(margin, -700, 700)))).astype(np.float32)


@dataclass(frozen=True)
class Predictions:
    """Scored windows, sorted by clip and frame.

    clip: (n,) number of the clip.
    frame: (n,) last source frame.
    label: (n,) 0 or 1; None where the clips are unlabelled.
    logits: (n, 2) float32, safe and anomalous; of a model that is no classifier what it returns, (n, D).
    faults: what is wrong with clips, each with number, name and frames, 0 where the clip cannot be read.
    time: (n,) float64, when the frame is shown, in seconds of the clip; None where that is not known.
    """

    clip: np.ndarray
    frame: np.ndarray
    label: np.ndarray | None
    logits: np.ndarray
    faults: list = field(default_factory=list)
    time: np.ndarray | None = None

    @property
    def score(self) -> np.ndarray:
        """(n,) float32: softmax probability of an anomaly."""
        return risk_of(self.logits)

    def metrics(self) -> dict[str, float]:
        """Return `frame_metrics` of the scores, and the mean cross-entropy as "loss". The windows must be labelled."""
        true_logit = self.logits[np.arange(len(self.label)), self.label].astype(np.float64)
        loss = np.logaddexp(self.logits[:, 0].astype(np.float64), self.logits[:, 1]) - true_logit
        metrics = {"loss": float(loss.mean()), **frame_metrics(self.score, self.label)}
        if metrics["n_pos"] in (0, metrics["n"]):
            logger.warning("all evaluated frames are of one class: AUC_ROC, AP and MCC say nothing")
        return metrics


@dataclass(frozen=True)
class ClipScores:
    """The scored windows of a clip.

    clip: its number.
    frame: (n,) last source frame of each window, ascending.
    logits: (n, 2) float32, safe and anomalous.
    end: what the windows said of the clip at its end.
    """

    clip: int
    frame: np.ndarray
    logits: np.ndarray
    end: Any

    @property
    def score(self) -> np.ndarray:
        """(n,) float32: softmax probability of an anomaly."""
        return risk_of(self.logits)


@dataclass(frozen=True)
class Scorer:
    """Scores the windows of some clips with a model, as often as asked.

    windows: the windows, on every rank its share.
    dtype: of autocast; float32 turns it off.
    """

    windows: Windows
    dtype: torch.dtype = torch.float32

    def score(self, model: nn.Module, session: Session | None = None) -> Predictions | None:
        """Score every window once; returns all of them on rank 0, None on the others. Every rank calls it.

        model: normalises uint8 video itself (`model.normalize`). session: of a run in training, which a signal may
        stop in the middle.

        Raises EvaluationError unless each window was scored exactly once, with finite logits, and there are any; what
        windows.agree raises; Preempted.
        """
        scored, faults = self._score_share(_on_device(model, self.windows.device), session)
        faults = self.windows.agree(faults)
        usable = {fault.number: fault.frames for fault in faults}
        scored, expected = (keep_usable(columns, usable) for columns in (scored, self.windows.locations()))
        return gather_predictions(scored, expected, self.windows.clips, faults, self.dtype)

    def by_clip(self, model: nn.Module) -> Iterator[ClipScores]:
        """Yield the scores of each clip of this rank as it ends, whatever the other ranks do.

        windows.batches must yield, after the windows of a clip, its end, which has `clip`, the number, and no video.

        Raises EvaluationError for logits that are not finite, what windows.batches raises, and Preempted after a signal
        that `catch_signals` caught; the clips in progress are lost.
        """
        parts: dict[int, list[tuple[np.ndarray, Tensor]]] = {}
        for item, output in self._outputs(_on_device(model, self.windows.device)):
            if stop_requested():
                raise Preempted(EXIT_CODE)
            if output is None:
                frames, logits = _joined(parts.pop(item.clip, []))
                require_finite(logits, self.dtype)
                yield ClipScores(item.clip, frames, logits, item)
                continue
            for clip in np.unique(item.clip).tolist():
                rows = np.flatnonzero(item.clip == clip)
                parts.setdefault(clip, []).append((item.last[rows], output[rows]))

    def _score_share(self, model: nn.Module, session: Session | None) -> tuple[Columns, list]:
        """Return (clip (n,), frame (n,), logits (n, 2) float32) of this rank's windows as they come, and the faults."""
        clips, parts, faults = [], [], []
        for item, output in self._outputs(model):
            if session and stop_requested():
                break
            if output is None:
                faults.append(item)
                continue
            clips.append(item.clip)
            parts.append((item.last, output))
        if session:
            session.stop_if_asked("in an evaluation, which will be repeated")
        return (np.concatenate([np.zeros(0, np.int64), *clips]), *_joined(parts)), faults

    def _outputs(self, model: nn.Module) -> Iterator[tuple[Any, Tensor | None]]:
        """Yield what the windows yield, batches of videos with their logits (n, 2) float32."""
        for item, output in window_outputs(self.windows, model, model, self.dtype):
            yield item, None if output is None else output.float()


@torch.inference_mode()
def window_outputs(
    windows: Windows, model: nn.Module, run: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Iterator[tuple[Any, Tensor | None]]:
    """Yield what windows.batches yields: batches of n videos with what `run` makes of them (n, ...), others with None.

    The output stays on the device: nothing waits for a batch.

    Args:
        model: normalises uint8 video (`model.normalize`); it is put into evaluation mode.
        run: the model, or a part of it: normalised video (m, 3, T, H, W) -> (m, ...).
        dtype: of autocast; float32 turns it off.
    """
    model.eval()

    def normalize(video: Tensor) -> Tensor:
        return model.normalize(video).to(dtype)  # which a first layer under autocast would do to each window

    for item in windows.batches(normalize):
        if not hasattr(item, "video"):
            yield item, None
            continue
        with torch.autocast(item.video.device.type, dtype, enabled=dtype != torch.float32):
            output = torch.cat([run(part) for part in _passes(item.video)])
        yield item, output[: len(item.last)]


def require_finite(logits: np.ndarray, dtype: torch.dtype) -> None:
    """Raise EvaluationError where logits (n, 2) are not finite. dtype: of autocast."""
    if len(broken := np.flatnonzero(~np.isfinite(logits).all(axis=1))):
        overflow = "" if dtype == torch.float32 else f", or {dtype} overflows, where --precision fp32 does not"
        raise EvaluationError(
            f"{len(broken)} of {len(logits)} windows have NaN or infinite logits: the weights have diverged, as "
            f"at too high a rate{overflow}"
        )


def _joined(parts: Sequence[tuple[np.ndarray, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Return (frame (n,), logits (n, 2) float32) of batches of them."""
    if not parts:
        return np.zeros(0, np.int64), np.zeros((0, 2), np.float32)
    return np.concatenate([last for last, _ in parts]), torch.cat([output for _, output in parts]).cpu().numpy()


def _passes(video: Tensor) -> tuple[Tensor, ...]:
    """Split (B, 3, T, H, W) into what goes through a model at once: on the CPU no more than its caches hold."""
    if video.device.type != "cpu":
        return (video,)
    return video.split(max(1, _NUMBERS_AT_ONCE // video[0].numel()))


def _on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model, or a copy of it where it is kept elsewhere, as an average on the CPU is."""
    own = next(itertools.chain(model.parameters(), model.buffers())).device  # an exported program has no parameters
    return model if own == device else copy.deepcopy(model).to(device)


def keep_usable(windows: Columns, usable: Mapping[int, int]) -> Columns:
    """Return of columns (clip (n,), last frame (n,), ...) the rows within the first usable[clip] frames of the clip.

    A clip that is not in `usable` keeps all its rows.
    """
    keep = np.ones(len(windows[0]), dtype=bool)
    for clip, frames in usable.items():
        keep &= (windows[0] != clip) | (windows[1] < frames)
    return tuple(column[keep] for column in windows)


def gather_predictions(
    scored: Columns,
    expected: tuple[np.ndarray, np.ndarray],
    clips: Sequence,
    faults: Sequence = (),
    dtype: torch.dtype = torch.float32,
) -> Predictions | None:
    """Return the Predictions of all ranks on rank 0, None on the others.

    Args:
        scored: (clip (n,), frame (n,), logits (n, 2)) of this rank.
        expected: (clip (n,), frame (n,)) of every window there is, sorted.
        clips: the ClipTable; the windows are labelled where its clips are.
        faults: what is wrong with clips.
        dtype: of autocast.

    Raises EvaluationError unless each expected window was scored exactly once, with finite logits, and there are any.
    """
    if not len(expected[0]):
        raise EvaluationError("no window can be scored: the frames of every clip end before its first window does")
    parts = gather(scored)
    if parts is None:
        return None
    parts = [part for part in parts if len(part[0])] or parts[:1]  # without windows it is (0, 2)
    clip, frame, logits = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((frame, clip))
    clip, frame, logits = clip[order], frame[order], logits[order]
    if not (np.array_equal(clip, expected[0]) and np.array_equal(frame, expected[1])):
        scored_windows, expected_windows = (
            Counter(zip(*(a.tolist() for a in pair), strict=True)) for pair in ((clip, frame), expected)
        )
        first = min((scored_windows - expected_windows) + (expected_windows - scored_windows))
        raise EvaluationError(
            f"scored {len(clip)} windows for {len(expected[0])} expected; the first that is missing, double or "
            f"foreign is clip {first[0]}, frame {first[1]}"
        )
    require_finite(logits, dtype)
    label = None
    if all(clips[c].labels is not None for c in np.unique(clip)):
        label = np.concatenate([np.asarray(clips[c].labels)[frame[clip == c]] for c in np.unique(clip)])
        label = label.astype(np.int64)
    fps = {c: clips[c].fps for c in np.unique(clip).tolist()}
    time = frame / np.array([fps[c] for c in clip.tolist()], dtype=np.float64)
    return Predictions(clip, frame, label, logits, list(faults), time)


_OF_CLIPS = ("category", "ego", "night", "source", "is_positive", "event_time", "alert_time")
COLUMNS = ("clip", "filename", "frame", "time", "logits_safe", "logits_risk", "score", "label", "ttc", *_OF_CLIPS)


def write_predictions(path: str | Path, predictions: Predictions, clips: Any) -> None:
    """Write predictions.csv: COLUMNS and a column for each of the clips' groups, one row per window.

    A group called as one of COLUMNS goes to "group_<name>". time, ttc, event_time and alert_time are in seconds; ttc is
    empty in a clip without anomaly, and what says something of the clip (1 or 0 for yes or no) where it is not known.

    clips: the ClipTable, labelled.
    """
    scored = np.unique(predictions.clip).tolist()
    ttc = {c: clips[c].ttc for c in scored}
    groups = list(dict.fromkeys(name for c in scored for name in clips[c].groups))
    about = {c: [*_about_clip(clips[c]), *(clips[c].groups.get(name) for name in groups)] for c in scored}
    with Path(path).open("w", newline="", encoding="utf-8", errors="surrogateescape") as f:
        writer = csv.writer(f)
        writer.writerow([*COLUMNS, *(f"group_{name}" if name in COLUMNS else name for name in groups)])
        for c, frame, time, label, (safe, risk), score in zip(
            predictions.clip.tolist(),
            predictions.frame.tolist(),
            predictions.time.tolist(),
            predictions.label.tolist(),
            predictions.logits.tolist(),
            predictions.score.tolist(),
            strict=True,
        ):
            clip, seconds = clips[c], ttc[c][frame]
            row = [clip.name, clip.filename(frame), frame, round(time, 9)]
            row += [f"{value:.9g}" for value in (safe, risk, score)]
            writer.writerow([*row, label, "" if np.isnan(seconds) else f"{seconds:.6g}", *about[c]])


def _about_clip(clip: Any) -> list[Any]:
    """Return the cells of _OF_CLIPS; None is an empty one."""
    flags = [known if known is None else int(known) for known in (clip.ego, clip.night, clip.is_positive)]
    times = [known if known is None else round(float(known), 9) for known in (clip.event_time, clip.alert_time)]
    return [clip.category, *flags[:2], clip.recording, flags[2], *times]


def read_predictions(path: str | Path) -> Predictions:
    """Read what `write_predictions` wrote; clips are numbered as they come. Files from before `time` have none.

    Raises EvaluationError for another file.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8", errors="surrogateescape") as f:
            rows = [(r["clip"], int(r["frame"]), int(r["label"]), r["logits_safe"], r["logits_risk"], r.get("time"))
                    for r in csv.DictReader(f)]  # fmt: skip
        names, frames, labels, safe, risk, times = zip(*rows, strict=True)
        logits = np.stack([np.array(column, dtype=np.float32) for column in (safe, risk)], axis=1)
        time = None if times[0] is None else np.array(times, dtype=np.float64)
        if not (set(labels) <= {0, 1} and np.isfinite(logits).all() and (time is None or np.isfinite(time).all())):
            raise ValueError("a label that is not 0 or 1, or a logit or time that is not finite")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as e:
        raise EvaluationError(f"{path}: not the scores of an evaluation ({e}); remove it to score again") from e
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    clip = np.array([numbers[n] for n in names])
    return Predictions(clip, np.array(frames), np.array(labels), logits, time=time)


def write_metrics(path: str | Path, metrics: dict[str, Any]) -> None:
    """Write metrics.json; what is undefined is null."""
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(jsonable(metrics), indent=2) + "\n")


def coverage(predictions: Predictions, clips: Any) -> dict[str, Any]:
    """Say what of a split the predictions cover, for metrics.json: "coverage" is "35 of 40 clips".

    "clip_list" is the `clip_list` of what is scored, so that figures on other clips can be told apart.

    clips: the ClipTable. A clip that is not scored is in "unreadable", "left_out", "frame_mismatch" or, without a
    fault, "too_short" for a window, or "ignored": all of its windows end on frames that are neither safe nor anomalous.
    """
    scored, faults = set(predictions.clip.tolist()), predictions.faults
    known = scored | {fault.number for fault in faults}
    windowless = [clip for number, clip in enumerate(clips) if number not in known]
    names = [clips[number].name for number in sorted(scored)]
    return {
        "clips": clips.listed,
        "clips_scored": len(scored),
        "coverage": f"{len(scored)} of {clips.listed} clips",
        "clip_list": clip_list(names, clips.listed_names),
        "unreadable": [*clips.unreadable, *(fault.name for fault in faults if not fault.frames)],
        "left_out": clips.left_out,
        "frame_mismatch": [fault.name for fault in faults if fault.frames],
        "too_short": [clip.name for clip in windowless if not clip.has_ignored],
        "ignored": [clip.name for clip in windowless if clip.has_ignored],
        "frames": int(clips.frame_counts.sum()),
    }


def summary(metrics: dict[str, float]) -> str:
    """Return the figures of the published tables, in percent, on one line."""
    names = {"auroc": "AUC_ROC", "ap": "AP", "auc_mcc": "AUC_MCC", "mcc_05": "MCC@0.5", "accuracy": "accuracy"}
    return "  ".join(f"{shown} {100 * metrics[name]:.2f}" for name, shown in names.items()) + f"  {metrics['n']} frames"
