"""Parameter groups with layer decay, and learning-rate schedules as pure functions of the step."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from engine.averages import WeightAverage

logger = logging.getLogger("tad")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # --precision
FUSED = ("adam", "adamw", "momentum", "sgd")  # --opt: in one kernel, which leaves out a step without the host's waiting


@dataclass(frozen=True)
class Optimization:
    """How gradients become steps.

    lr, weight_decay: functions of the optimizer step since the start of training.
    accumulate: forward passes per step.
    clip_grad: largest gradient norm, or None.
    dtype: of autocast; float32 turns it off.
    scaler: for float16.
    ema: the average of the weights, or None.
    """

    optimizer: torch.optim.Optimizer
    lr: Callable[[int], float]
    weight_decay: Callable[[int], float]
    accumulate: int = 1
    clip_grad: float | None = None
    dtype: torch.dtype = torch.float32
    scaler: torch.amp.GradScaler | None = None
    ema: WeightAverage | None = None


@dataclass(frozen=True)
class Schedule:
    """Warm-up and cosine of a run, by optimizer step. lr, min_lr: base rates, per 256 clips of a step.

    warmup_steps > 0 stands in place of warmup_epochs. Raises ValueError where the warm-up does not fit, or where
    weight decay is to grow from 0, which no parameter group would follow.
    """

    epochs: int
    steps_per_epoch: int
    lr: float
    min_lr: float
    warmup_epochs: int
    warmup_steps: int
    weight_decay: float
    weight_decay_end: float

    def __post_init__(self):
        if self.warmup >= self.total_steps:
            raise ValueError(
                f"the warm-up ({self.warmup} steps) must be shorter than --epochs {self.epochs} "
                f"({self.total_steps} steps): lower --warmup_epochs"
            )
        if self.weight_decay == 0 < self.weight_decay_end:
            raise ValueError("--weight_decay_end needs a --weight_decay above 0 to start from")

    @property
    def total_steps(self) -> int:
        """Steps the cosine is laid out for."""
        return self.epochs * self.steps_per_epoch

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        return self.warmup_steps if self.warmup_steps > 0 else self.warmup_epochs * self.steps_per_epoch


def build_optimization(
    model: nn.Module,
    schedule: Schedule,
    *,
    clips_per_step: int,
    opt: str,
    opt_eps: float,
    opt_betas: Sequence[float],
    layer_decay: float = 1.0,
    accumulate: int = 1,
    clip_grad: float | None = None,
    dtype: torch.dtype = torch.float32,
    ema_decay: float | None = None,
    ema_on_cpu: bool = False,
) -> Optimization:
    """Return optimizer, schedules, precision and weight average of a model; logs the learning rate and its formula.

    opt: timm's name.
    ema_decay: of the average of the weights; None keeps none.

    Raises ValueError for an unknown opt.
    """
    scale = clips_per_step / 256
    lr, min_lr = schedule.lr * scale, schedule.min_lr * scale
    steps, warmup = schedule.total_steps, schedule.warmup
    logger.info(
        f"learning rate {lr:.4g} = {schedule.lr:g} x {clips_per_step} / 256, down to {min_lr:.4g}; "
        f"{schedule.steps_per_epoch} steps per epoch, {warmup} of warm-up"
    )
    groups = parameter_groups(model, weight_decay=schedule.weight_decay, layer_decay=layer_decay)
    optimizer = build_optimizer(groups, name=opt, lr=lr, eps=opt_eps, betas=opt_betas)
    decay, decay_end = schedule.weight_decay, schedule.weight_decay_end
    return Optimization(
        optimizer=optimizer,
        lr=lambda step: cosine(step, base=lr, final=min_lr, total_steps=steps, warmup_steps=warmup),
        weight_decay=lambda step: cosine(step, base=decay, final=decay_end, total_steps=steps),
        accumulate=accumulate,
        clip_grad=clip_grad,
        dtype=dtype,
        scaler=torch.amp.GradScaler(next(model.parameters()).device.type) if dtype == torch.float16 else None,
        ema=None if ema_decay is None else WeightAverage(model, ema_decay, on_cpu=ema_on_cpu),
    )


def parameter_groups(model: nn.Module, *, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Return optimizer groups with "lr_scale" and "weight_decay".

    1-D parameters, biases and model.no_weight_decay() get no weight decay. With layer_decay < 1, layer i of L gets
    lr_scale layer_decay^(L - i); layers come from model.group_matcher(): embedding 0, block i at i + 1, head L.
    Frozen parameters are left out. Source: BEiT (arXiv:2106.08254), through timm.
    """
    no_decay = model.no_weight_decay()
    if layer_decay < 1:
        return param_groups_layer_decay(
            model, weight_decay=weight_decay, no_weight_decay_list=no_decay, layer_decay=layer_decay
        )
    groups = param_groups_weight_decay(model, weight_decay=weight_decay, no_weight_decay_list=no_decay)
    return [{"lr_scale": 1.0, **group} for group in groups]


def build_optimizer(
    groups: list[dict], *, name: str, lr: float, eps: float, betas: Sequence[float]
) -> torch.optim.Optimizer:
    """Return an optimizer over `parameter_groups`, by timm's name for it, in one kernel if it is one of FUSED."""
    name = name.lower()  # as timm does
    options = {"eps": eps, "betas": tuple(betas)} if "adam" in name else {}
    if name in FUSED:
        options["fused"] = True
    optimizer = create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=0.0, **options)
    if isinstance(optimizer, torch.optim.SGD):  # else a first step that is left out leaves its kernel a momentum unset
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def cosine(
    step: int, *, base: float, final: float, total_steps: int, warmup_steps: int = 0, start: float = 0.0
) -> float:
    """Value at an optimizer step: linear warm-up, then half a cosine from base towards final.

    As in VideoMAE: the warm-up includes both ends (start at step 0, base at step warmup_steps - 1), the cosine begins
    at base again, and its last value is a hair above final.
    """
    if step < warmup_steps:
        return start if warmup_steps == 1 else start + (base - start) * step / (warmup_steps - 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def set_schedule(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set every group's lr to lr x its lr_scale, and the weight decay of the groups that have any."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["weight_decay"] > 0:
            group["weight_decay"] = weight_decay
