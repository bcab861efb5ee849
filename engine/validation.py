"""What fine-tuning does after an epoch: score the clips that the best weights are chosen on, and keep weights."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.checkpoint import is_kept, save_weights
from engine.evaluate import Scorer, coverage, summary
from engine.feature_cache import FeatureCache, FromFeatures
from engine.plots import evaluation_figures
from engine.session import Session
from utils.distributed import broadcast

logger = logging.getLogger("tad")


def validate(windows: Any, model: nn.Module, session: Session, dtype: torch.dtype, name: str) -> dict[str, float]:
    """Return the metrics of a split, on every rank; scalars and figures go to TensorBoard.

    Args:
        windows: its SplitWindows, or a FeatureCache of the model's encoder.
        dtype: of autocast.
        name: of the model, for the figures.
    """
    scored = FromFeatures(model) if isinstance(windows, FeatureCache) else model
    predictions = Scorer(windows, dtype).score(scored, session)
    metrics, step = None, session.progress.steps_done
    if predictions:
        metrics = predictions.metrics()
        logger.info(f"{summary(metrics)}  {coverage(predictions, windows.clips)['coverage']}")
        session.tensorboard.scalars("val", metrics, step)
        figures = evaluation_figures(predictions.score, predictions.label, metrics, f"{name}, {windows.clips}")
        session.tensorboard.figures("val", figures, step)
    return broadcast(metrics)


def keep_weights(
    session: Session,
    model: nn.Module,
    metrics: Mapping[str, float],
    *,
    selected_on: str,
    stop_epoch: int,
    every: int,
    **about: Any,
) -> None:
    """Write checkpoint-best_<metric>.pth for each of progress.best that improved, and checkpoint-<epoch>.pth if due.

    Args:
        metrics: of this epoch; empty where nothing was validated.
        selected_on: what the metrics are of, which the spec of the best weights says.
        stop_epoch, every: of `is_kept`.
        about: what the spec of all says beside it.
    """
    progress = session.progress
    improved = [name for name, best in progress.best.items() if metrics and metrics[name] > best]
    progress.best |= {name: metrics[name] for name in improved}
    if improved:
        logger.info(f"best {' and '.join(improved)} so far, on {selected_on}")
    kept: list[tuple[str, dict[str, str]]] = [(f"best_{name}", {"selected_on": selected_on}) for name in improved]
    if is_kept(progress.epoch, stop_epoch=stop_epoch, every=every):
        kept.append((str(progress.epoch), {}))
    for name, chosen in kept if session.save_ckpt and session.process.is_main else ():
        path = Path(session.output_dir, f"checkpoint-{name}.pth")
        save_weights(path, model, epoch=progress.epoch, **about, **chosen)
