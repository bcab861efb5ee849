"""The DAPT objective: a batch of augmented clips and their masks -> loss and statistics."""

from torch import Tensor, nn


class DaptObjective:
    """Called by `engine.loop` as objective(model, batch) -> (loss, statistics).

    Beside "loss" stands "trivial_loss", that of predicting each masked cube's mean colour: below it, more than
    colours is predicted. The video of a batch, uint8, is where the model is. A batch of weight 0, of which nothing
    could be read, adds nothing to gradients and statistics.

    Args:
        autoencoder: the MaskedAutoencoder as it is, not wrapped; it normalises uint8 video and makes the target.
    """

    def __init__(self, autoencoder: nn.Module):
        self.autoencoder = autoencoder

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        video = self.autoencoder.normalize(batch["video"])
        split = self.autoencoder.split(batch["mask"])
        target = self.autoencoder.target(video, split)
        loss = batch["weight"] * model(video, split, target)
        return loss, {"loss": loss, "trivial_loss": batch["weight"] * self.autoencoder.trivial_loss(target)}
