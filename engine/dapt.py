"""The DAPT objective: a batch of augmented clips and their masks -> loss and statistics."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class DaptObjective:
    """Called by `engine.loop` as objective(model, batch) -> (loss, statistics).

    Beside "loss" stands "trivial_loss", that of predicting each masked cube's mean colour: below it, more than
    colours is predicted. A batch of weight 0, of which nothing could be read, adds nothing to gradients and statistics.

    Args:
        autoencoder: the MaskedAutoencoder as it is, not wrapped. to_input: uint8 video on the device -> normalised.
        device: where the model is.
    """

    def __init__(self, autoencoder: nn.Module, to_input: Callable[[Tensor], Tensor], device: torch.device):
        self.autoencoder, self.to_input, self.device = autoencoder, to_input, device

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        video = self.to_input(batch["video"].to(self.device, non_blocking=True))
        target = self.autoencoder.target(video, batch["mask"])
        loss = batch["weight"] * model(video, batch["mask"], target)
        return loss, {"loss": loss, "trivial_loss": batch["weight"] * self.autoencoder.trivial_loss(target)}
