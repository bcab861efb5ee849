"""Epochs of training, for any objective.

Nothing in the loop waits for the device, but for GradScaler's overflow check under fp16 and for an average of the
weights kept on the CPU: statistics add up there and are read every `log_every` steps.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.optim import Optimization, set_schedule
from utils.logging import Averages, TensorBoard, append_json_line, progress_bar

logger = logging.getLogger("tad")

# (model, batch) -> (loss, statistics with "loss" among them)
Objective = Callable[[nn.Module, Any], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says where and what to try."""


@dataclass
class Progress:
    """Where a run stands: epoch in progress, optimizer steps done in it, best value of each metric so far.

    means: of the last epoch trained, for a run that is killed between training and evaluation. samples: the counts of
    what was read and skipped, of all ranks. steps_per_epoch: what the data and the batch make of an epoch; a resumed
    run must find the same.
    """

    epoch: int = 0
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    steps_per_epoch: int = 0


@dataclass(frozen=True)
class Reporting:
    """Where statistics go. clips_per_step counts all ranks; progress_bar: draw one if this is a terminal."""

    tensorboard: TensorBoard
    clips_per_step: int
    log_every: int = 20
    progress_bar: bool = False


def train_epochs(
    model: nn.Module,
    loader: Iterable,
    set_epoch: Callable[[int, int], None],
    objective: Objective,
    optimization: Optimization,
    progress: Progress,
    reporting: Reporting,
    *,
    steps_per_epoch: int,
    stop_epoch: int,
    device: torch.device,
    save: Callable[[], None],
    after_epoch: Callable[[], dict[str, float]],
    log_file: Path | None,
) -> None:
    """Train from where progress stands until stop_epoch epochs are done.

    Args:
        loader: the batches of the epoch that set_epoch(epoch, first step) announced.
        save: writes checkpoint-last; called after the training of an epoch and after what follows it.
        after_epoch: evaluates or draws, once the epoch is trained; what it returns goes to the log.
        log_file: a line of JSON for each epoch, or None.
    """
    while progress.epoch < stop_epoch:
        started = time.perf_counter()
        if progress.step < steps_per_epoch:  # else a kill during after_epoch left a trained epoch behind
            set_epoch(progress.epoch, progress.step)
            progress.means = train_one_epoch(
                model,
                loader,
                objective,
                optimization,
                progress,
                reporting,
                steps_per_epoch=steps_per_epoch,
                device=device,
            )
            save()
        record = {"epoch": progress.epoch} | {f"train_{k}": v for k, v in progress.means.items()} | after_epoch()
        if log_file:
            append_json_line(log_file, record | {"seconds": round(time.perf_counter() - started, 1)})
        progress.epoch, progress.step = progress.epoch + 1, 0
        save()


def train_one_epoch(
    model: nn.Module,
    batches: Iterable,
    objective: Objective,
    optimization: Optimization,
    progress: Progress,
    reporting: Reporting,
    *,
    steps_per_epoch: int,
    device: torch.device,
) -> dict[str, float]:
    """Train from progress.step to the end of the epoch; progress.step follows.

    Args:
        model: as wrapped (DDP or not). batches: the remaining ones of the epoch, `accumulate` for each step.

    Returns the means of the objective's statistics and of grad_norm over these steps and all ranks. Raises
    TrainingError where the loss is not finite.
    """
    model.train()
    averages, clock = Averages(device), _Clock()
    batches = clock.waiting_for(batches)
    before = progress.epoch * steps_per_epoch
    steps = range(progress.step, steps_per_epoch)
    for step in progress_bar(steps, description=f"epoch {progress.epoch}", enabled=reporting.progress_bar):
        lr, weight_decay = optimization.lr(before + step), optimization.weight_decay(before + step)
        set_schedule(optimization.optimizer, lr=lr, weight_decay=weight_decay)
        averages.update(_optimizer_step(model, batches, objective, optimization, device))
        if optimization.ema:
            optimization.ema.update(getattr(model, "module", model), step=before + step)
        progress.step += 1
        clock.steps += 1
        if progress.step % reporting.log_every == 0 or progress.step == steps_per_epoch:
            means = averages.read_window()
            if not math.isfinite(means["loss"]):
                raise TrainingError(
                    f"epoch {progress.epoch}: the loss became {means['loss']} between steps "
                    f"{progress.step - clock.steps} and {progress.step}; try a lower --lr, --clip_grad 1 or "
                    "--precision fp32"
                )
            _report(means | {"lr": lr}, weight_decay, clock, progress, steps_per_epoch, reporting)
            clock.restart()
    return averages.read_total()


def _optimizer_step(
    model: nn.Module, batches: Iterator, objective: Objective, optimization: Optimization, device: torch.device
) -> dict[str, torch.Tensor]:
    """Forward and backward passes, then one step; the means of the statistics over the passes, and grad_norm."""
    optimizer, scaler, passes = optimization.optimizer, optimization.scaler, optimization.accumulate
    means: dict[str, torch.Tensor] = {}
    for i in range(passes):
        batch = next(batches)
        last = i == passes - 1
        with nullcontext() if last else getattr(model, "no_sync", nullcontext)():
            with torch.autocast(device.type, optimization.dtype, enabled=optimization.dtype != torch.float32):
                loss, statistics = objective(model, batch)
            loss = loss / passes
            (scaler.scale(loss) if scaler else loss).backward()
        for name, value in statistics.items():
            means[name] = means.get(name, 0) + value.detach() / passes
    if scaler:
        scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    means["grad_norm"] = nn.utils.clip_grad_norm_(trained, optimization.clip_grad or math.inf)
    if scaler:
        means["grad_norm"] = means["grad_norm"].nan_to_num(0, 0, 0)  # the scaler leaves such a step out
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return means


class _Clock:
    """Wall time, steps and seconds spent waiting for data since the last restart."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.start, self.data_seconds, self.steps = time.perf_counter(), 0.0, 0

    def waiting_for(self, batches: Iterable) -> Iterator:
        """Pass batches on, counting the time each took to come."""
        asked = time.perf_counter()
        for batch in batches:
            self.data_seconds += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()


def _report(
    means: dict[str, float],
    weight_decay: float,
    clock: _Clock,
    progress: Progress,
    steps_per_epoch: int,
    reporting: Reporting,
) -> None:
    seconds = time.perf_counter() - clock.start
    performance = {
        "clips_per_s": clock.steps * reporting.clips_per_step / seconds,
        "data_wait_pct": 100 * clock.data_seconds / seconds,
    }
    if torch.cuda.is_available():
        performance["mem_gib"] = torch.cuda.max_memory_allocated() / 2**30
    step = progress.epoch * steps_per_epoch + progress.step
    reporting.tensorboard.scalars("train", means | {"weight_decay": weight_decay}, step)
    reporting.tensorboard.scalars("perf", performance, step)
    left = seconds / clock.steps * (steps_per_epoch - progress.step)
    numbers = "  ".join(f"{k} {v:.4g}" for k, v in (means | performance).items())
    logger.info(f"epoch {progress.epoch}  step {progress.step}/{steps_per_epoch}  {left / 60:.1f} min left  {numbers}")
