"""DAPT: its objective, a batch of augmented clips and their masks -> loss and statistics; pictures of what it makes."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from engine.plots import reconstruction_picture
from utils.files import replaced
from utils.logging import TensorBoard

logger = logging.getLogger("tad")


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


class Pictures:
    """The same few clips, input, masked and reconstructed, after each epoch: a PNG and a TensorBoard image.

    Args:
        folder: where the PNGs go.
        names: what the clips are called.
        video: uint8 (B, 3, T, H, W).
        mask: (B, N) bool, True = masked.
    """

    def __init__(
        self, folder: str | Path, tensorboard: TensorBoard, names: Sequence[str], *, video: Tensor, mask: Tensor
    ):
        self.folder, self.tensorboard = Path(folder), tensorboard
        self.names, self.video, self.mask = names, video, mask

    def draw(self, model: nn.Module, device: torch.device, epoch: int, *, step: int) -> None:
        """Write epoch-<epoch>.png. model: the MaskedAutoencoder."""
        model.eval()
        video = model.normalize(self.video.to(device))
        captions = [f"{model.name} after epoch {epoch}"]
        if model.normalize_target:
            captions.append("mean and contrast of each masked cube are the input's, only the pattern is predicted")
        picture = reconstruction_picture(model.reconstruct(video, self.mask), self.names, captions)
        model.train()
        self.tensorboard.picture("reconstruction", picture, step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replaced(self.folder / f"epoch-{epoch:03d}.png") as temporary:
                Image.fromarray(picture).save(temporary, format="PNG")
        except OSError as e:  # no reason to end a run
            logger.warning(f"{e.filename}: cannot be written ({e.strerror}); the run goes on")
