"""Parameter groups with layer decay, and learning-rate schedules as pure functions of the step."""

import math
from collections.abc import Sequence

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn


def parameter_groups(model: nn.Module, *, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Optimizer groups with "lr_scale" and "weight_decay".

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
    groups: list[dict], *, name: str, lr: float, eps: float, betas: Sequence[float], fused: bool
) -> torch.optim.Optimizer:
    """An optimizer over `parameter_groups`, by timm's name for it. fused: AdamW in one kernel (CUDA)."""
    options = {"eps": eps, "betas": tuple(betas)} if "adam" in name else {}
    if fused and name == "adamw":
        options["fused"] = True
    return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=0.0, **options)


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
