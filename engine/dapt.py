"""The DAPT objective: a batch of augmented clips and their masks -> loss and statistics."""

import torch
from torch import Tensor, nn


class DaptObjective:
    """Called by `engine.loop` as objective(model, batch) -> (loss, statistics).

    Beside "loss" stands "trivial_loss", that of predicting each masked cube's mean colour: below it, more than
    colours is predicted. A batch of weight 0, of which nothing could be read, adds nothing to gradients and statistics.

    Args:
        autoencoder: the MaskedAutoencoder as it is, not wrapped; it normalises uint8 video and makes the target.
        device: where the model is.
    """

    def __init__(self, autoencoder: nn.Module, device: torch.device):
        self.autoencoder, self.device = autoencoder, device

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        video = self.autoencoder.normalize(batch["video"].to(self.device, non_blocking=True))
        split = self.autoencoder.split(batch["mask"])
        target = self.autoencoder.target(video, split)
        loss = batch["weight"] * model(video, split, target)
        return loss, {"loss": loss, "trivial_loss": batch["weight"] * self.autoencoder.trivial_loss(target)}
