"""Masked autoencoder over a Video ViT: VideoMAE's pre-training (arXiv:2203.12602), continued by DAPT on driving video.

The encoder sees the visible tokens alone, a light decoder predicts the pixels of the masked ones. State-dict keys are
those of the published pre-training checkpoints (github.com/MCG-NJU/VideoMAE): `encoder.`, `encoder_to_decoder.`,
`mask_token`, `decoder.`; files go both ways.

Shapes: B clips, N tokens in (t h w) order, n visible and m masked ones, p pixels of a token's cube in (t y x) order.
"""

from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from models.pos_embed import sinusoid_1d
from models.registry import Dropout, VideoInput, build_model, register_autoencoder
from models.vit import LayerNorm, Size, VideoEncoder, build_blocks, run_blocks


class Split(NamedTuple):
    """Positions of the visible (B, n) and of the masked (B, m) tokens of a batch, ascending, int64."""

    visible: torch.Tensor
    masked: torch.Tensor


class Decoder(nn.Module):
    """(B, N, D) tokens of which the last m are masked -> (B, m, 3 p) pixels, channel fastest."""

    def __init__(self, size: Size, *, outputs: int, drop_path_rate: float):
        super().__init__()
        self.blocks = build_blocks(size, Dropout(drop_path_rate=drop_path_rate))
        self.norm = LayerNorm(size.embed_dim)
        self.head = nn.Linear(size.embed_dim, outputs)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor, num_masked: int) -> torch.Tensor:
        x = run_blocks(self.blocks, x, recompute=self.grad_checkpointing and self.training)
        return self.head(self.norm(x[:, -num_masked:]))


class MaskedAutoencoder(nn.Module):
    """(video, mask) -> loss: the mean squared error of the masked tokens' pixels.

    Args:
        encoder: a Video ViT without head whose final_reduction is "none".
        decoder: the size of the decoder; its patch_size is not used.
        drop_path_rate: stochastic depth of the decoder; the encoder has its own.
        normalize_target: predict each cube's pixels less their mean, over their standard deviation, per channel; else
            the pixels, in [0, 1].
    """

    name = ""  # where it is registered

    def __init__(
        self, encoder: VideoEncoder, decoder: Size, *, drop_path_rate: float = 0.0, normalize_target: bool = True
    ):
        super().__init__()
        self.grid, self.cube, self.normalize_target = encoder.grid, encoder.patch_embed.cube, normalize_target
        self.encoder, self.pos_embed_kind = encoder, encoder.pos_embed_kind
        self.encoder_to_decoder = nn.Linear(encoder.embed_dim, decoder.embed_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.embed_dim))
        self.decoder = Decoder(decoder, outputs=3 * prod(self.cube), drop_path_rate=drop_path_rate)
        self.register_buffer("pos_embed", sinusoid_1d(prod(self.grid), decoder.embed_dim)[None], persistent=False)

        for module in (*self.encoder.modules(), *self.decoder.modules()):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(self.decoder.head.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    @property
    def spec(self) -> dict:
        """All that `models.load` builds the model from, in plain types: a new dictionary each time."""
        about = {"decoder_depth": len(self.decoder.blocks), "normalize_target": self.normalize_target}
        return {**self.encoder.spec, "model": self.name, "classes": [], **about}

    def normalize(self, video: torch.Tensor) -> torch.Tensor:
        """Map uint8 RGB (B, 3, T, H, W), on the model's device, to float32, as the encoder takes it."""
        return self.encoder.normalize(video)

    def split(self, mask: torch.Tensor | Split) -> Split:
        """Return the Split, on the model's device, of a mask (B, N) bool, True = masked; a Split as it is.

        Raises ValueError where the clips differ in how many are masked, or none is. A mask on the CPU costs no wait for
        the device; made before a compiled model is called, the Split does not break its graph.
        """
        if isinstance(mask, Split):
            return mask
        counts = mask.sum(dim=1)
        masked = int(counts[0])
        if not (counts == masked).all() or masked == 0:
            raise ValueError(f"each clip must have the same number of masked tokens, at least 1; got {counts.tolist()}")
        order = mask.to(self.mask_token.device, non_blocking=True).byte().argsort(dim=1, stable=True)
        return Split(order[:, :-masked], order[:, -masked:])

    def forward(
        self, video: torch.Tensor, mask: torch.Tensor | Split, target: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the loss, a float32 scalar.

        Args:
            video: (B, 3, T, H, W) normalised.
            mask: what `split` takes; so do the other methods.
            target: `self.target(video, mask)` where the caller has it already.
        """
        if target is None:
            target = self.target(video, mask)
        return F.mse_loss(self.predict(video, mask).float(), target)

    def predict(self, video: torch.Tensor, mask: torch.Tensor | Split) -> torch.Tensor:
        """Return (B, m, 3 p): the decoder's output for the masked tokens, in ascending order."""
        visible, masked = self.split(mask)
        latent = self.encoder.encode(_take(self.encoder.embed(video), visible), visible)
        latent = self.encoder_to_decoder(latent)
        positions = self.pos_embed.to(latent.dtype).expand(len(video), -1, -1)
        tokens = [latent + _take(positions, visible), self.mask_token.to(latent.dtype) + _take(positions, masked)]
        return self.decoder(torch.cat(tokens, dim=1), masked.shape[1])

    @torch.no_grad()
    def target(self, video: torch.Tensor, mask: torch.Tensor | Split) -> torch.Tensor:
        """Return (B, m, 3 p) float32: what `predict` should return."""
        cubes = self._cubes(video)[self._where(self.split(mask))]  # copies no other cube
        pixels = rearrange(cubes.float(), "b m a p q c -> b m (a p q) c")
        pixels = pixels * self.encoder.std + self.encoder.mean
        if self.normalize_target:
            pixels = (pixels - pixels.mean(dim=2, keepdim=True)) / self._deviation(pixels)
        return rearrange(pixels, "b m p c -> b m (p c)")

    @torch.no_grad()
    def trivial_loss(self, target: torch.Tensor) -> torch.Tensor:
        """Return the loss, a scalar, of predicting each cube's mean colour: below it, more than that is predicted."""
        pixels = rearrange(target, "b m (p c) -> b m p c", c=3)
        return (pixels - pixels.mean(dim=2, keepdim=True)).square().mean()

    @torch.no_grad()
    def reconstruct(self, video: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return three videos, (B, 3, T, H, W) float32 in [0, 1]: the input, and with masked cubes grey and predicted.

        Normalised predictions get the mean and deviation of the cube they stand for.
        """
        where = self._where(self.split(mask))
        cubes = self._cubes(video).float() * self.encoder.std + self.encoder.mean
        pixels = rearrange(cubes[where], "b m a p q c -> b m (a p q) c")
        predicted = rearrange(self.predict(video, mask).float(), "b m (p c) -> b m p c", c=3)
        if self.normalize_target:
            predicted = predicted * self._deviation(pixels) + pixels.mean(dim=2, keepdim=True)
        pictures = []
        for content in (pixels, torch.full_like(pixels, 0.5), predicted):
            cubes[where] = content.unflatten(2, self.cube)
            pictures.append(self._video(cubes).clamp(0, 1))
        return tuple(pictures)

    def _cubes(self, video: torch.Tensor) -> torch.Tensor:
        """Return a view of a video (B, 3, T, H, W) as (B, t, h, w, *cube, 3)."""
        a, p, q = self.cube
        return rearrange(video, "b c (t a) (h p) (w q) -> b t h w a p q c", a=a, p=p, q=q)

    def _video(self, cubes: torch.Tensor) -> torch.Tensor:
        """Return the inverse of `_cubes`, copied."""
        return rearrange(cubes, "b t h w a p q c -> b c (t a) (h p) (w q)")

    def _where(self, split: Split) -> tuple[torch.Tensor, ...]:
        """Return the indices of masked cubes in `_cubes`: those of the clip (B, 1), of slot, row and column (B, m)."""
        _, h, w = self.grid
        clip = torch.arange(len(split.masked), device=split.masked.device)[:, None]
        return clip, split.masked // (h * w), split.masked // w % h, split.masked % w

    @staticmethod
    def _deviation(pixels: torch.Tensor) -> torch.Tensor:
        """Map (B, m, p, 3) to (B, m, 1, 3): the standard deviation of each cube, kept above zero as published."""
        return pixels.var(dim=2, unbiased=True, keepdim=True).sqrt() + 1e-6

    def no_weight_decay(self) -> set[str]:
        """Return names of parameters without weight decay, beyond the 1-D ones."""
        return {"mask_token"} | {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable


def _take(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return tokens[b, positions[b]] for each clip b."""
    return tokens.take_along_dim(positions[:, :, None], dim=1)  # its backward is cheaper than that of indexing


DECODERS = {  # width of an encoder -> VideoMAE's decoder for it and for narrower ones; V2's for huge is 512 wide
    128: Size(64, 1, 2),  # for tests and the demo
    384: Size(192, 4, 3),  # of ViT-S: 2 M parameters
    768: Size(384, 4, 6),  # of ViT-B: 8 M
    1024: Size(512, 12, 8),  # of ViT-L: 39 M
    1280: Size(640, 12, 8),  # of ViT-H
}


def _build(
    encoder: str,
    video: VideoInput,
    dropout: Dropout,
    *,
    decoder_depth: int | None = None,
    normalize_target: bool = True,
    **options,
) -> MaskedAutoencoder:
    """Return the MaskedAutoencoder over a registered encoder, which takes the options."""
    built = build_model(encoder, video, dropout, num_classes=0, final_reduction="none", **options)
    decoder = next((DECODERS[width] for width in DECODERS if built.embed_dim <= width), DECODERS[max(DECODERS)])
    return MaskedAutoencoder(
        built,
        decoder if decoder_depth is None else replace(decoder, depth=decoder_depth),
        drop_path_rate=dropout.drop_path_rate,
        normalize_target=normalize_target,
    )


register_autoencoder(_build)
