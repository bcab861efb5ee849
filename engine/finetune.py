"""The fine-tuning objective: a batch of augmented windows -> loss and statistics."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.losses import Targets


class FinetuneObjective:
    """Called by `engine.loop` as objective(model, batch) -> (loss, statistics).

    A batch has video, uint8, or features that a frozen encoder made of it, where the model is. A batch of weight 0, of
    which nothing could be read, adds nothing to gradients and statistics.

    Args:
        loss: one of engine.losses.LOSSES.
        to_input: (uint8 video, boxes, seeds) -> normalised float video with erased boxes.
    """

    def __init__(self, loss: Callable[[Tensor, Targets], Tensor], to_input: Callable[..., Tensor]):
        self.loss, self.to_input = loss, to_input

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if "features" in batch:
            logits = model(batch["features"], encoded=True)
        else:
            logits = model(self.to_input(batch["video"], batch["boxes"], batch["seed"]))
        logits = logits.float()  # a half-precision exponential would saturate
        targets = Targets(*(batch[k].to(logits.device, non_blocking=True) for k in ("label", "soft_label", "ttc")))
        with torch.no_grad():
            accuracy = (logits.argmax(dim=1) == targets.label).float().mean()
        loss = batch["weight"] * self.loss(logits, targets)
        return loss, {"loss": loss, "accuracy": batch["weight"] * accuracy}
