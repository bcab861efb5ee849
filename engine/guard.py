"""Steps whose loss or gradient is not finite: left out on every rank, recorded, and an end of the run if they persist.

Whether a step is left out is decided on the device; the host learns of it when it reads the statistics.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import Progress
from engine.optim import Optimization
from utils.distributed import all_sum, gather
from utils.logging import append_json_line
from utils.text import first_few

logger = logging.getLogger("tad")


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says where and what to try."""


def nan_unless_finite(loss: Tensor) -> Tensor:
    """Return the loss, or one that makes every gradient NaN if it is not finite, and so the mean over all ranks."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def step_if_finite(optimization: Optimization, loss: Tensor, grad_norm: Tensor) -> Tensor:
    """Take an optimizer step unless the loss or gradient norm is not finite; returns bool (), whether it was left out.

    loss: () of this rank, its backward pass made through `nan_unless_finite`. grad_norm: () of the gradients that all
    ranks share, so the ranks decide alike. With a scaler, overflow is its affair while it scales gradients up; once it
    no longer does, a gradient that is not finite counts as without it. The host waits for the device unless the
    optimizer is fused: then its kernel leaves out a step by itself.
    """
    optimizer, scaler = optimization.optimizer, optimization.scaler
    bad = ~grad_norm.isfinite()
    if scaler:
        at_its_end = scaler.scale(torch.ones_like(loss)) <= 1  # nothing waits for the scale
        scaler.step(optimizer)
        scaler.update()
        return (all_sum((~loss.isfinite()).float()) > 0) | (bad & at_its_end)
    if all(group.get("fused") for group in optimizer.param_groups):  # as GradScaler does: the kernel reads found_inf
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif not bad:
        optimizer.step()
    return bad


class NonFinite:
    """The steps that were left out, and the end of the run after `limit` of them in a row.

    Args:
        progress: of the run; its left_out counts them up to the last step read.
        file: gets a line of JSON for each: epoch and step (from 0), the losses of all ranks, and the samples of the
            ranks whose loss was not finite, or of all ranks if only the gradient was not. None: no file.
        precise: whether it trains in float32, so that another format is no remedy.
    """

    def __init__(self, progress: Progress, file: Path | None = None, *, limit: int = 5, precise: bool = False):
        self.progress, self.file, self.limit, self.precise = progress, file, limit, precise
        self._steps: list[dict] = []
        self._values: list[Tensor] = []

    @property
    def unread(self) -> int:
        """Steps noted since they were last read."""
        return len(self._steps)

    def note(self, samples: Sequence[str], loss: Tensor, left_out: Tensor) -> None:
        """Keep the present step until `read`, without waiting for the device. loss, left_out: () of this rank."""
        self._steps.append({"epoch": self.progress.epoch, "step": self.progress.step, "samples": list(samples)})
        self._values.append(torch.stack([loss.float(), left_out.float()]))

    def read(self) -> None:
        """Record the steps noted; every rank calls it at the same step. Waits for the device. Raises TrainingError."""
        if not self._steps:
            return
        steps, values = self._steps, torch.stack(self._values).tolist()
        self._steps, self._values = [], []
        found = [step | {"loss": loss} for step, (loss, left_out) in zip(steps, values, strict=True) if left_out]
        if found and (ranks := gather(found)):
            for records in zip(*ranks, strict=True):
                self._record(records)
        for step, (_, left_out) in zip(steps, values, strict=True):
            self.progress.left_out = self.progress.left_out + 1 if left_out else 0
            if self.progress.left_out >= self.limit:
                precision = "" if self.precise else " --precision fp32,"
                raise TrainingError(
                    f"loss or gradient not finite in {self.limit} steps in a row, up to epoch {step['epoch']}, step "
                    f"{step['step']}; nonfinite.jsonl names the samples; try a lower --lr, --clip_grad 1,"
                    f"{precision} or a higher --max_nonfinite"
                )

    def _record(self, ranks: Sequence[dict]) -> None:
        losses = [rank["loss"] if math.isfinite(rank["loss"]) else str(rank["loss"]) for rank in ranks]
        not_finite = [rank for rank in ranks if not math.isfinite(rank["loss"])] or ranks
        samples = [sample for rank in not_finite for sample in rank["samples"]]
        place = {name: ranks[0][name] for name in ("epoch", "step")}
        try:
            if self.file:
                append_json_line(self.file, place | {"losses": losses, "samples": samples})
        except OSError as e:  # what it would keep is said below
            logger.warning(f"{self.file}: cannot be written ({e.strerror})")
        logger.warning(
            f"epoch {place['epoch']}, step {place['step']} left out: the loss is {', '.join(map(str, losses))}, the "
            f"gradient not finite; samples: {first_few(samples, 3)}"
        )
