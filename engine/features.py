"""Features of windows: what an encoder makes of them, before any head."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from engine.evaluate import Windows, window_outputs


@dataclass(frozen=True)
class WindowFeatures:
    """Features of windows, sorted by clip and frame.

    clip: (n,) number of the clip.
    frame: (n,) last source frame.
    values: (n, F) float32, on the CPU.
    faults: what the windows said of clips that cannot be read, or not to their end; no window of theirs need be here.
    """

    clip: np.ndarray
    frame: np.ndarray
    values: Tensor
    faults: list


class FromFeatures(nn.Module):
    """Features (B, F) or (B, N, F) that a model's encoder made -> the model's logits: stands for it before a Scorer."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def normalize(self, features: Tensor) -> Tensor:
        """Return the features as they are."""
        return features

    def forward(self, features: Tensor) -> Tensor:
        """Map features to logits (B, K)."""
        return self.model(features, encoded=True)


def extract(encoder: nn.Module, windows: Windows, dtype: torch.dtype = torch.float32) -> WindowFeatures:
    """Return the pooled features of this rank's share of windows: those the encoder's head gets, or its tokens' mean.

    Nothing waits for other ranks. The encoder is left in the mode that it was in, and no random number is drawn.

    Args:
        encoder: has `normalize` and `forward_features(video)`: (B, F), or tokens (B, N, F); it is on windows.device.
            Of a masked autoencoder it is `encoder`.
        windows: as a Scorer takes them.
        dtype: of autocast; float32 turns it off.
    """
    training, clips, frames, values, faults = encoder.training, [], [], [], []
    try:
        for item, output in window_outputs(windows, encoder, encoder.forward_features, dtype):
            if output is None:
                faults.append(item)
                continue
            clips.append(item.clip)
            frames.append(item.last)
            values.append((output.float().mean(dim=1) if output.ndim == 3 else output.float()).cpu())
    finally:
        encoder.train(training)
    if not values:
        return WindowFeatures(np.zeros(0, np.int64), np.zeros(0, np.int64), torch.zeros(0, 0), faults)
    clip, frame = np.concatenate(clips), np.concatenate(frames)
    order = np.lexsort((frame, clip))
    return WindowFeatures(clip[order], frame[order], torch.cat(values)[torch.from_numpy(order)], faults)
