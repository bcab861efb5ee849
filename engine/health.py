"""The health of an encoder in pre-training: a linear probe on labelled windows, between epochs, and its effective rank.

A loss that falls does not say that features get better for the task; a probe does. Nothing here draws from the random
states of the run, or touches its weights: with the probe and without it a run ends in the same bits.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.checkpoint import Progress
from engine.evaluate import Predictions, Scorer, Windows
from engine.intervals import Interval, Replicated, ScoreTable, multiplicities, replicate
from engine.linear_probe import effective_rank, fit_and_score, parts_by_unit
from engine.metrics import auroc_and_ap
from engine.plots import health_figure, save_figures
from engine.session import Session
from utils.cli import ConfigError
from utils.distributed import broadcast

_PARTS = 3  # one of which is held out
BEST = "probe"  # checkpoint-best_probe.pth, and the name of its value in Progress.best
logger = logging.getLogger("tad")


class PooledEncoder(nn.Module):
    """(B, 3, T, H, W) normalised -> (B, D) float32: the mean of all tokens, none masked, after the encoder's last norm.

    encoder: (B, 3, T, H, W) -> (B, N, D), as a masked autoencoder's; `normalize` takes uint8.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def normalize(self, video: Tensor) -> Tensor:
        """Map uint8 RGB (B, 3, T, H, W) to float32, as the encoder takes it."""
        return self.encoder.normalize(video)

    def forward(self, video: Tensor) -> Tensor:
        return self.encoder(video).float().mean(dim=1)


class Health:
    """Probes an encoder before the first epoch, and after one epoch in `every`.

    A third of the recordings is held out, or of the clips where recordings are too few: the classifier is fitted on the
    others, and AUC is of those held out. What was found is kept in `Progress.health`: "windows", which they were;
    "history", a record of each epoch, with figures of the probe where there was one; "base" and "best", the scores of
    the first probe and of the best one, NaN for a window that could not be read. Where the windows are others than the
    run had before, the history begins anew.

    Args:
        windows: the labelled windows, on every rank its share.
        folder: where probe.png is drawn.
        dtype: of autocast; float32 turns it off.

    Raises ConfigError where one class is in too few clips to be on both sides.
    """

    def __init__(self, windows: Windows, folder: str | Path, dtype: torch.dtype = torch.float32):
        self.windows, self.folder, self.scorer = windows, Path(folder), Scorer(windows, dtype)
        self._clip, self._last = windows.locations()
        clips = [windows.clips[c] for c in np.unique(self._clip)]
        number = np.unique(self._clip, return_inverse=True)[1]
        labels = [np.asarray(clip.labels)[self._last[number == i]] for i, clip in enumerate(clips)]
        self._label = np.concatenate(labels).astype(np.int64)
        self._names = [clip.name for clip in clips]
        recordings = [clip.recording or f"clip {clip.name}" for clip in clips]  # unknown: one of its own
        self._unit = np.unique(recordings, return_inverse=True)[1][number]
        self.held_out = parts_by_unit(self._unit, self._label, _PARTS) == 0
        if self._both_sides():
            return
        self._unit = number
        self.held_out = parts_by_unit(self._unit, self._label, _PARTS) == 0
        what = f"{windows.clips}: the {len(number)} windows of the probe, of {len(set(recordings))} recordings"
        if not self._both_sides():
            raise ConfigError(
                f"{what} and {len(clips)} clips, cannot be shared out so that both classes are among those held out "
                "and among the others: give more --probe_windows, or data with more clips"
            )
        logger.warning(f"{what}, are held out by clips, not by recordings: AUC is higher than on other roads")

    def _both_sides(self) -> bool:
        """Tell whether there are both classes among the windows held out, and among the others."""
        return all(0 < self._label[rows].sum() < rows.sum() for rows in (self.held_out, ~self.held_out))

    def before_training(self, encoder: nn.Module, session: Session) -> bool:
        """Probe the weights that a run starts from, unless that was done before; every rank calls it.

        Returns whether they are the best so far, as they are where they were probed. Raises what `measure` does.
        """
        progress = session.progress
        self._begin(progress)
        if progress.step or any("auroc" in record for record in progress.health["history"]):
            return False
        return self._add(self.measure(encoder, session), {"epochs": progress.epoch}, session)

    def after_epoch(self, encoder: nn.Module, session: Session, *, due: bool) -> tuple[dict[str, Any], bool]:
        """Probe the weights of the epoch just trained where it is due, and keep its losses; every rank calls it.

        Returns what log.txt says of it, and whether the weights are the best so far. Raises what `measure` does.
        """
        progress = session.progress
        losses = {name: progress.means[name] for name in ("loss", "trivial_loss") if name in progress.means}
        record = {"epochs": progress.epoch + 1, **losses}
        if not due:
            progress.health["history"].append(record)
            return {}, False
        is_best = self._add(self.measure(encoder, session), record, session)
        found = {name: value for name, value in record.items() if name not in ("epochs", *losses)}
        probed = [past for past in progress.health["history"] if "auroc" in past]
        found |= {"first_auroc": probed[0]["auroc"], "best_auroc": best_of(probed)["auroc"]}
        return {f"probe_{name}": value for name, value in found.items()}, is_best

    def measure(self, encoder: nn.Module, session: Session) -> dict[str, Any]:
        """Return, on every rank, the figures of the probe and the scores of the held-out windows; every rank calls it.

        {"figures": {"auroc", "ap", "effective_rank", "penalty", "windows", "features"}, "scores": [...]}; the score of
        a window that could not be read is NaN. Raises EvaluationError for features that are not finite, ConfigError
        where too few windows can be read, Preempted, and what windows.agree raises.
        """
        modes = [(module, module.training) for module in encoder.modules()]
        found = self.scorer.score(PooledEncoder(encoder), session)
        for module, training in modes:
            module.training = training
        return broadcast(found and self._fit(found))

    def _fit(self, found: Predictions) -> dict[str, Any]:
        """Return what `measure` does."""
        of_row = {pair: row for row, pair in enumerate(zip(self._clip.tolist(), self._last.tolist(), strict=True))}
        rows = np.array([of_row[pair] for pair in zip(found.clip.tolist(), found.frame.tolist(), strict=True)])
        held_out, label = self.held_out[rows], self._label[rows]
        features = found.logits
        scores = np.full(len(self._clip), np.nan)
        try:
            scores[rows[held_out]], penalty = fit_and_score(features, label, self._unit[rows], held_out)
            auroc, ap = auroc_and_ap(scores[rows[held_out]], label[held_out])
            if np.isnan(auroc):
                raise ValueError("those held out are all of one class")
        except ValueError as e:
            raise ConfigError(f"{self.windows.clips}: too few of the probe's windows can still be read ({e})") from e
        figures = {"auroc": auroc, "ap": ap, "effective_rank": effective_rank(features)}
        figures |= {"penalty": penalty, "windows": len(rows), "features": features.shape[1]}
        return {"figures": figures, "scores": scores[self.held_out].tolist()}

    def _begin(self, progress: Progress) -> None:
        """Make progress.health that of these windows."""
        what = (self._names, self._clip.tolist(), self._last.tolist(), self._label.tolist(), self.held_out.tolist())
        digest = hashlib.sha256(repr(what).encode()).hexdigest()
        if progress.health.get("windows") == digest:
            return
        if progress.health:
            logger.warning("the probe's windows are others than before: its history begins anew")
            progress.best.pop(BEST, None)
        progress.health = {"windows": digest, "history": []}

    def _add(self, measured: dict[str, Any], record: dict[str, Any], session: Session) -> bool:
        """Put what was measured into the record, that into the history, and say so; return whether it is the best."""
        progress = session.progress
        health, scores = progress.health, measured["scores"]
        before = best_of(health["history"])
        record |= measured["figures"]
        own = self._replicated(scores, scores).interval("auroc")
        record |= {"auroc_low": own.percentile[0], "auroc_high": own.percentile[1]}
        gains = {name: self._gain(scores, health[name]) for name in ("base", "best") if name in health}
        health["history"].append(record)
        if before is None or record["auroc"] > before["auroc"]:
            health["best"] = scores
        health.setdefault("base", scores)
        logger.info(in_words(health["history"], gains))
        shown = {name: value for name, value in record.items() if name != "epochs" and np.isfinite(value)}
        session.tensorboard.scalars("probe", shown, progress.steps_done)
        self._draw(session)
        is_best = record["auroc"] > progress.best.get(BEST, -np.inf)
        if is_best:
            progress.best[BEST] = record["auroc"]
        return is_best

    def _gain(self, scores: Sequence[float], others: Sequence[float]) -> Interval:
        """Return the interval of the difference in AUC to earlier scores, on the windows that both have."""
        return self._replicated(scores, others).minus(self._replicated(others, scores)).interval("auroc")

    def _replicated(self, scores: Sequence[float], others: Sequence[float]) -> Replicated:
        """Return the metrics of scores, on the windows that others have, too, replicated over recordings."""
        read = np.isfinite(scores) & np.isfinite(others)
        unit = np.unique(self._unit[self.held_out], return_inverse=True)[1]
        table = ScoreTable.of(
            np.asarray(scores)[read], self._label[self.held_out][read], unit[read], n_units=int(unit.max()) + 1
        )
        return replicate(table, multiplicities(table.n_units))

    def _draw(self, session: Session) -> None:
        """Draw the history: a PNG and a figure in TensorBoard. What cannot be written is no reason to end a run."""
        if not session.process.is_main:
            return
        of = f"{len(self._clip)} windows of {self.windows.clips}, features of {session.output_dir.name}"
        figure = health_figure(session.progress.health["history"], of)
        session.tensorboard.figures("probe", {"history": figure}, session.progress.steps_done)
        try:
            save_figures(self.folder, {"probe": figure})
        except OSError as e:
            logger.warning(f"{e.filename}: cannot be written ({e.strerror}); the run goes on")


def best_of(history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the first record with the highest AUC; None where there is none."""
    return max((record for record in history if "auroc" in record), key=lambda record: record["auroc"], default=None)


def in_words(history: Sequence[dict[str, Any]], gains: dict[str, Interval]) -> str:
    """Say what the last probe found, and whether the encoder still improves.

    history: records as Health keeps them, the last one of the probe. gains: by "base" and "best", the differences in
    AUC to the first probe and to the best one before; without them it is the first.
    """
    now = history[-1]
    figures = f"AUC_ROC {100 * now['auroc']:.2f}"
    if np.isfinite(now["auroc_low"]):
        figures += f" [{100 * now['auroc_low']:.2f}, {100 * now['auroc_high']:.2f}]"
    figures += f"  AP {100 * now['ap']:.2f}  effective rank {now['effective_rank']:.1f} of {now['features']}"
    place = f"probe after {_epochs(now['epochs'])}" if now["epochs"] else "probe before the first epoch"
    if not gains:
        return f"{place}: {figures}; later ones are compared with this"
    best = best_of(history)
    over_base = f"{_signed(gains['base'])} to the first probe"
    if best is now:
        words = f"it still improves, {_signed(gains['best'])} to the best before"
        words += "" if gains["best"].excludes_0() else ", which may be chance"
    else:
        words = f"no better for {_epochs(now['epochs'] - best['epochs'])}: the best is {100 * best['auroc']:.2f}, "
        words += f"after {_epochs(best['epochs'])}" if best["epochs"] else "before the first epoch"
        words += ", and this one is below it" if gains["best"].excludes_0() else ", which this one may equal"
    return f"{place}: {figures}; {words}; {over_base}"


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' * (count != 1)}"


def _signed(gain: Interval) -> str:
    low, high = gain.percentile
    interval = f" [{100 * low:+.2f}, {100 * high:+.2f}]" if np.isfinite(low) else ""
    return f"{100 * gain.estimate:+.2f}{interval}"
