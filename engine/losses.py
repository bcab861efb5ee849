"""Fine-tuning losses by name: (logits (B, 2), targets) -> scalar. Class 0 is safe, class 1 anomalous.

These are simple-tad's (arXiv:2507.09338 publishes results with cross-entropy only). CE is the cross-entropy of a frame,
p = exp(-CE) the probability of its true class. To add one, write it here and name it in LOSSES and in utils/names.py;
what else it needs of a frame is a field of Targets, which WindowDataset fills and engine/finetune.py names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Targets:
    """What a loss may use of each frame, (B,) each: label int64 0/1, soft_label float32 probability of an anomaly,
    ttc float32 seconds relative to the anomaly (0 inside; negative before; NaN in a clip without one)."""

    label: Tensor
    soft_label: Tensor
    ttc: Tensor


def cross_entropy(logits: Tensor, targets: Targets) -> Tensor:
    """Mean CE."""
    return F.cross_entropy(logits, targets.label)


def focal(logits: Tensor, targets: Targets, *, gamma: float, weights: tuple[float, float]) -> Tensor:
    """Mean of weights[label] (1 - p)^gamma CE, after arXiv:1708.02002; p comes from the unweighted CE."""
    ce = F.cross_entropy(logits, targets.label, reduction="none")
    safe, anomalous = weights
    weight = torch.where(targets.label == 1, anomalous, safe)
    return (weight * (1 - torch.exp(-ce)) ** gamma * ce).mean()


def pairwise_hinge(logits: Tensor, targets: Targets, *, margin: float = 0.01) -> Tensor:
    """Sum over pairs of relu(s_negative - s_positive + margin), over the number of positives; s = softmax risk.

    The reference calls it "smoothap". Pairs are those of the local batch; without positives it is 0.
    """
    risk, positive = logits.softmax(dim=1)[:, 1], targets.label == 1
    hinge = F.relu(risk[None, :] - risk[:, None] + margin)  # (i, j): how far j outranks i
    pairs = positive[:, None] & ~positive[None, :]
    return (hinge * pairs).sum() / positive.sum().clamp(min=1)


def soft_binary(logits: Tensor, targets: Targets) -> Tensor:
    """Mean over the batch of BCE(z_0, 1 - s) + BCE(z_1, s), s the soft label. The reference calls it "2bce"."""
    soft = torch.stack([1 - targets.soft_label, targets.soft_label], dim=1).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, soft, reduction="none").sum(dim=1).mean()


def exponential(logits: Tensor, targets: Targets, *, before: float = 0.1, after: float = 0.5) -> Tensor:
    """Mean of w CE: w = exp(before * ttc) before an anomaly, exp(-after * ttc) after it, 1 inside and without one."""
    ttc = targets.ttc.nan_to_num(0.0)
    weight = torch.exp(torch.where(ttc < 0, before * ttc, -after * ttc))
    return (weight * F.cross_entropy(logits, targets.label, reduction="none")).mean()


LOSSES: dict[str, Callable[[Tensor, Targets], Tensor]] = {
    "crossentropy": cross_entropy,
    "focal": partial(focal, gamma=2, weights=(0.75, 0.75)),
    "focal6x100": partial(focal, gamma=6, weights=(75.0, 75.0)),  # 100 x 0.75
    "focal2_6": partial(focal, gamma=6, weights=(20.0, 30.0)),  # 50 x (0.4, 0.6)
    "focal2_2": partial(focal, gamma=2, weights=(4.0, 6.0)),  # 10 x (0.4, 0.6)
    "smoothap": pairwise_hinge,
    "exponential1": exponential,
    "2bce": soft_binary,
}
