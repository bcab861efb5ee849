"""One epoch of training, for any objective.

Nothing in the loop waits for the device: statistics add up there and are read every `log_every` steps.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from engine.optim import set_schedule
from utils.logging import Averages, TensorBoard, progress_bar

logger = logging.getLogger("tad")
Step = Callable[[nn.Module, Any], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says where and what to try."""


@dataclass
class Progress:
    """Where a run stands: epoch in progress, optimizer steps done in it, best value of each metric so far.

    means: of the last epoch trained, for a run that is killed between training and evaluation.
    """

    epoch: int = 0
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Optimization:
    """How gradients become steps.

    lr, weight_decay: functions of the optimizer step since the start of training. accumulate: forward passes per step.
    clip_grad: largest gradient norm, or None. dtype: of autocast (float32 turns it off). scaler: for float16.
    """

    optimizer: torch.optim.Optimizer
    lr: Callable[[int], float]
    weight_decay: Callable[[int], float]
    accumulate: int = 1
    clip_grad: float | None = None
    dtype: torch.dtype = torch.float32
    scaler: torch.amp.GradScaler | None = None
    ema: ModelEmaV3 | None = None


@dataclass(frozen=True)
class Reporting:
    """Where statistics go. clips_per_step counts all ranks; progress_bar: draw one if this is a terminal."""

    tensorboard: TensorBoard
    clips_per_step: int
    log_every: int = 20
    progress_bar: bool = False


def train_one_epoch(
    model: nn.Module,
    batches: Iterable,
    compute: Step,
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
        compute: the objective's step function.

    Returns epoch means over all ranks. Raises TrainingError where the loss is not finite.
    """
    model.train()
    averages, clock = Averages(device), _Clock()
    batches = iter(batches)
    first = progress.epoch * steps_per_epoch
    remaining = range(progress.step, steps_per_epoch)
    for _ in progress_bar(remaining, description=f"epoch {progress.epoch}", enabled=reporting.progress_bar):
        lr = optimization.lr(first + progress.step)
        weight_decay = optimization.weight_decay(first + progress.step)
        set_schedule(optimization.optimizer, lr=lr, weight_decay=weight_decay)
        _optimizer_step(model, batches, compute, optimization, averages, clock, device, first + progress.step)
        progress.step += 1
        clock.steps += 1
        if progress.step % reporting.log_every == 0 or progress.step == steps_per_epoch:
            means = averages.read_window()
            if not math.isfinite(means["loss"]):
                raise TrainingError(
                    f"the loss became {means['loss']} between steps {first + progress.step - clock.steps} and "
                    f"{first + progress.step}; try a lower --lr, --clip_grad 1 or --precision fp32"
                )
            _report(means, {"lr": lr, "weight_decay": weight_decay}, clock, progress, steps_per_epoch, reporting)
            clock = _Clock()
    return averages.read_total()


def _optimizer_step(
    model: nn.Module,
    batches: Iterator,
    compute: Step,
    optimization: Optimization,
    averages: Averages,
    clock: "_Clock",
    device: torch.device,
    number: int,
) -> None:
    optimizer, scaler = optimization.optimizer, optimization.scaler
    sums: dict[str, torch.Tensor] = {}
    for micro in range(optimization.accumulate):
        asked = time.perf_counter()
        batch = next(batches)
        clock.data_seconds += time.perf_counter() - asked
        last = micro == optimization.accumulate - 1
        with nullcontext() if last else getattr(model, "no_sync", nullcontext)():
            with torch.autocast(device.type, optimization.dtype, enabled=optimization.dtype != torch.float32):
                loss, statistics = compute(model, batch)
            loss = loss / optimization.accumulate
            (scaler.scale(loss) if scaler else loss).backward()
        for name, value in statistics.items():
            sums[name] = sums.get(name, 0) + value.detach() / optimization.accumulate
    if scaler:
        scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    sums["grad_norm"] = nn.utils.clip_grad_norm_(trained, optimization.clip_grad or math.inf)
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if optimization.ema:
        optimization.ema.update(getattr(model, "module", model), step=number)
    averages.update(sums)


@dataclass
class _Clock:
    """Wall time, steps and seconds spent waiting for data since the last report."""

    start: float = field(default_factory=time.perf_counter)
    data_seconds: float = 0.0
    steps: int = 0


def _report(
    means: dict[str, float],
    schedule: dict[str, float],
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
    reporting.tensorboard.scalars("train", means | schedule, step)
    reporting.tensorboard.scalars("perf", performance, step)
    eta = seconds / clock.steps * (steps_per_epoch - progress.step)
    numbers = "  ".join(f"{k} {v:.4g}" for k, v in (means | schedule | performance).items() if k != "weight_decay")
    logger.info(f"epoch {progress.epoch}  step {progress.step}/{steps_per_epoch}  eta {eta / 60:.1f} min  {numbers}")
