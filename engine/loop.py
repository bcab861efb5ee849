"""Epochs of training, for any objective.

Nothing in the loop waits for the device, but for optimizers without a fused step, and an average of the weights kept on
the CPU for the step before: statistics add up on the device and are read every `log_every` steps.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.guard import nan_unless_finite, step_if_finite
from engine.optim import Optimization, set_schedule
from engine.session import Session
from utils.logging import progress_bar

logger = logging.getLogger("tad")

_READ_EVERY = 20  # steps at most until one that was left out is noticed

# (model, batch) -> (loss, statistics with "loss" among them)
Objective = Callable[[nn.Module, Any], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class Reporting:
    """What is reported, and how often.

    clips_per_step: clips of an optimizer step, over all ranks.
    log_every: steps between log lines.
    progress_bar: whether one is drawn where this is a terminal.
    """

    clips_per_step: int
    log_every: int = 20
    progress_bar: bool = False


def train_epochs(
    model: nn.Module,
    batches: Iterable,
    set_epoch: Callable[[int, int], None],
    objective: Objective,
    session: Session,
    reporting: Reporting,
    *,
    stop_epoch: int,
    after_epoch: Callable[[], dict[str, float]],
) -> None:
    """Train from where session.progress stands until stop_epoch epochs are done.

    The state is saved when an epoch is trained, and again after `after_epoch`.

    Args:
        model: the model as it is wrapped (DDP or not).
        batches: iterates over the batches of the epoch that set_epoch(epoch, first step) announced.
        objective: what is minimised.
        after_epoch: evaluates, draws or keeps weights once an epoch is trained; what it returns goes to the log.

    Raises Preempted where a signal stops the run, TrainingError where too many steps in a row are not finite.
    """
    progress = session.progress
    while progress.epoch < stop_epoch:
        session.stop_if_asked()
        started = time.perf_counter()
        if progress.step < progress.steps_per_epoch:  # else a kill during the evaluation left a trained epoch behind
            set_epoch(progress.epoch, progress.step)
            progress.means = train_one_epoch(model, batches, objective, session, reporting)
            session.save()
            session.stop_if_asked()
        record = {f"train_{name}": value for name, value in progress.means.items()} | after_epoch()
        session.end_epoch(record | {"seconds": round(time.perf_counter() - started, 1)})
        session.save()


def train_one_epoch(
    model: nn.Module, batches: Iterable, objective: Objective, session: Session, reporting: Reporting
) -> dict[str, float]:
    """Train from session.progress.step to the end of the epoch, and move it along. Every step but the last may save.

    batches: the remaining ones of the epoch, `accumulate` for each step.

    Returns the means of the objective's statistics and of grad_norm over the steps of the epoch and all ranks, those
    left out excepted. Raises TrainingError where too many steps in a row are not finite, Preempted.
    """
    model.train()
    progress, averages, guard = session.progress, session.state.statistics, session.guard
    clock = _Clock(session.process.device, batches)
    optimization = session.state.optimization
    if progress.step == 0:
        averages.reset()
    batches = iter(batches)
    steps = range(progress.step, progress.steps_per_epoch)
    for _ in progress_bar(steps, description=f"epoch {progress.epoch}", enabled=reporting.progress_bar):
        step = progress.steps_done
        lr, weight_decay = optimization.lr(step), optimization.weight_decay(step)
        set_schedule(optimization.optimizer, lr=lr, weight_decay=weight_decay)
        statistics, left_out, samples = _optimizer_step(model, batches, objective, optimization, session.process.device)
        averages.update(statistics, leave_out=left_out)
        guard.note(samples, statistics["loss"], left_out)
        if optimization.ema:
            optimization.ema.update(getattr(model, "module", model))
        progress.step += 1
        clock.steps += 1
        if progress.step % reporting.log_every == 0 or progress.step == progress.steps_per_epoch:
            guard.read()
            _report(averages.read_window() | {"lr": lr}, weight_decay, clock, session, reporting)
            clock.restart()
        elif guard.unread >= _READ_EVERY:
            guard.read()
        if progress.step < progress.steps_per_epoch:
            session.after_step()
    return averages.read_total()


def _optimizer_step(
    model: nn.Module, batches: Iterator, objective: Objective, optimization: Optimization, device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[str]]:
    """Make the forward and backward passes, then one step unless something is not finite.

    Returns the means of the statistics over the passes, and grad_norm; bool (), whether the step was left out; the
    samples.
    """
    optimizer, scaler, passes = optimization.optimizer, optimization.scaler, optimization.accumulate
    means: dict[str, torch.Tensor] = {}
    samples: list[str] = []
    for i in range(passes):
        batch = next(batches)
        samples += batch.get("samples", []) if isinstance(batch, Mapping) else []
        last = i == passes - 1
        with nullcontext() if last else getattr(model, "no_sync", nullcontext)():
            with torch.autocast(device.type, optimization.dtype, enabled=optimization.dtype != torch.float32):
                loss, statistics = objective(model, batch)
            loss = nan_unless_finite(loss / passes)
            (scaler.scale(loss) if scaler else loss).backward()
        for name, value in statistics.items():
            means[name] = means.get(name, 0) + value.detach() / passes
    if scaler:
        scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    means["grad_norm"] = nn.utils.get_total_norm([p.grad for p in trained])
    if optimization.clip_grad:
        nn.utils.clip_grads_with_norm_(trained, optimization.clip_grad, means["grad_norm"])
    left_out = step_if_finite(optimization, means["loss"], means["grad_norm"])
    if scaler:
        means["grad_norm"] = means["grad_norm"].nan_to_num(0, 0, 0)  # the scaler leaves such a step out
    optimizer.zero_grad(set_to_none=True)
    return means, left_out, samples


class _Clock:
    """Wall time, steps, seconds spent waiting for data and the most memory held on the GPU since the last restart.

    The wait is what batches count as such, if they do: until one comes a GPU that is busy may hold up the host as well.
    """

    def __init__(self, device: torch.device, batches: Iterable = ()):
        self.device, self.batches = device, batches
        self.restart()

    def restart(self) -> None:
        self.start, self.waited, self.steps = time.perf_counter(), self._waited(), 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def data_seconds(self) -> float:
        """Return the seconds of waiting for data."""
        return self._waited() - self.waited

    def _waited(self) -> float:
        return getattr(self.batches, "waited", 0.0)

    def memory(self) -> dict[str, float]:
        """Return {"mem_gib": GiB} of tensors at their most; {} on the CPU."""
        return {"mem_gib": torch.cuda.max_memory_allocated(self.device) / 2**30} if self.device.type == "cuda" else {}


def _report(
    means: dict[str, float], weight_decay: float, clock: _Clock, session: Session, reporting: Reporting
) -> None:
    progress = session.progress
    seconds = time.perf_counter() - clock.start
    performance = {
        "clips_per_s": clock.steps * reporting.clips_per_step / seconds,
        "data_wait_pct": 100 * clock.data_seconds() / seconds,
        **clock.memory(),
    }
    session.tensorboard.scalars("train", means | {"weight_decay": weight_decay}, progress.steps_done)
    session.tensorboard.scalars("perf", performance, progress.steps_done)
    left = seconds / clock.steps * (progress.steps_per_epoch - progress.step) / 60
    numbers = "  ".join(f"{k} {v:.4g}" for k, v in (means | performance).items())
    place = f"epoch {progress.epoch}  step {progress.step}/{progress.steps_per_epoch}"
    logger.info(f"{place}  {f'{left:.1f} min to its end  ' * bool(left)}{numbers}")
