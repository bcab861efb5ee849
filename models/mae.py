"""Masked autoencoder over a Video ViT: VideoMAE's pre-training (arXiv:2203.12602), continued by DAPT on driving video.

The encoder sees the visible tokens alone, a light decoder predicts the pixels of the masked ones. State-dict keys are
those of the published pre-training checkpoints (github.com/MCG-NJU/VideoMAE): `encoder.`, `encoder_to_decoder.`,
`mask_token`, `decoder.`; files go both ways.

Shapes: B clips, N tokens in (t h w) order, n visible and m masked ones, p pixels of a token's cube in (t y x) order.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from models.pos_embed import sinusoid_1d
from models.registry import IMAGENET_MEAN, IMAGENET_STD, create_model, register_model
from models.vit import LayerNorm, VideoEncoder, build_blocks, run_blocks


class Decoder(nn.Module):
    """(B, N, D) tokens of which the last m are masked -> (B, m, 3 p) pixels, channel fastest."""

    def __init__(self, *, embed_dim: int, depth: int, num_heads: int, outputs: int, drop_path_rate: float):
        super().__init__()
        self.blocks = build_blocks(embed_dim, depth, num_heads, drop_path_rate=drop_path_rate)
        self.norm = LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, outputs)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor, num_masked: int) -> torch.Tensor:
        x = run_blocks(self.blocks, x, recompute=self.grad_checkpointing and self.training)
        return self.head(self.norm(x[:, -num_masked:]))


class MaskedAutoencoder(nn.Module):
    """(video, mask) -> loss: the mean squared error of the masked tokens' pixels.

    Args:
        encoder: a Video ViT without head whose final_reduction is "none".
        decoder_dim, decoder_depth, decoder_heads: the decoder's blocks.
        drop_path_rate: stochastic depth of the decoder; the encoder has its own.
        normalize_target: predict each cube's pixels less their mean, over their standard deviation, per channel; else
            the pixels, in [0, 1].
        mean, std: RGB normalisation of the input, undone for the target.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        *,
        decoder_dim: int,
        decoder_depth: int,
        decoder_heads: int,
        drop_path_rate: float = 0.0,
        normalize_target: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        super().__init__()
        self.grid, self.cube, self.normalize_target = encoder.grid, encoder.patch_embed.cube, normalize_target
        self.encoder, self.pos_embed_kind = encoder, encoder.pos_embed_kind
        self.encoder_to_decoder = nn.Linear(encoder.embed_dim, decoder_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        channels = encoder.input_shape[0]
        self.decoder = Decoder(
            embed_dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
            outputs=channels * self.cube[0] * self.cube[1] * self.cube[2],
            drop_path_rate=drop_path_rate,
        )
        num_tokens = self.grid[0] * self.grid[1] * self.grid[2]
        self.register_buffer("pos_embed", sinusoid_1d(num_tokens, decoder_dim)[None], persistent=False)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

        for module in (*self.encoder.modules(), *self.decoder.modules()):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(self.decoder.head.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, video: torch.Tensor, mask: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """The loss, a float32 scalar.

        Args:
            video: (B, 3, T, H, W) normalised. mask: (B, N) bool, True = masked, as many in each clip; kept on the CPU
                it costs no wait for the device.
            target: `self.target(video, mask)` where the caller has it already.
        """
        if target is None:
            target = self.target(video, mask)
        return F.mse_loss(self.predict(video, mask).float(), target)

    def predict(self, video: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, m, 3 p): the decoder's output for the masked tokens, in ascending order."""
        visible, masked = _split(mask, video.device)
        latent = self.encoder.encode(_take(self.encoder.embed(video), visible))
        latent = self.encoder_to_decoder(latent)
        positions = self.pos_embed.to(latent.dtype).expand(len(video), -1, -1)
        tokens = [latent + _take(positions, visible), self.mask_token.to(latent.dtype) + _take(positions, masked)]
        return self.decoder(torch.cat(tokens, dim=1), masked.shape[1])

    @torch.no_grad()
    def target(self, video: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, m, 3 p) float32: what `predict` should return."""
        pixels = self._cubes(video)[self._where(mask, video.device)].float().flatten(2, 4)  # copies no other cube
        pixels = pixels * self.std + self.mean
        if self.normalize_target:
            pixels = (pixels - pixels.mean(dim=2, keepdim=True)) / self._deviation(pixels)
        return pixels.flatten(2)

    @torch.no_grad()
    def trivial_loss(self, target: torch.Tensor) -> torch.Tensor:
        """The loss of predicting every cube's own mean colour; below it, more than colours is predicted. A scalar."""
        pixels = target.unflatten(2, (-1, len(self.mean)))
        return (pixels - pixels.mean(dim=2, keepdim=True)).square().mean()

    @torch.no_grad()
    def reconstruct(self, video: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures, (B, 3, T, H, W) float32 in [0, 1] each: the input, the input with masked cubes grey, and the input
        with masked cubes predicted. Normalised predictions get the mean and deviation of the cube they stand for.
        """
        where = self._where(mask, video.device)
        cubes = self._cubes(video).float() * self.std + self.mean
        pixels = cubes[where].flatten(2, 4)
        predicted = self.predict(video, mask).float().unflatten(2, (-1, len(self.mean)))
        if self.normalize_target:
            predicted = predicted * self._deviation(pixels) + pixels.mean(dim=2, keepdim=True)
        pictures = []
        for content in (pixels, torch.full_like(pixels, 0.5), predicted):
            cubes[where] = content.unflatten(2, self.cube)
            pictures.append(self._video(cubes).clamp(0, 1))
        return tuple(pictures)

    def _cubes(self, video: torch.Tensor) -> torch.Tensor:
        """A view of a video (B, 3, T, H, W) as (B, t, h, w, *cube, 3)."""
        (t, h, w), (a, b, c) = self.grid, self.cube
        return video.unflatten(4, (w, c)).unflatten(3, (h, b)).unflatten(2, (t, a)).permute(0, 2, 4, 6, 3, 5, 7, 1)

    def _video(self, cubes: torch.Tensor) -> torch.Tensor:
        """The inverse of `_cubes`, copied."""
        return cubes.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _where(self, mask: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Indices of the masked cubes into `_cubes`: those of the clip (B, 1), of slot, row and column (B, m)."""
        _, masked = _split(mask, device)
        _, h, w = self.grid
        clip = torch.arange(len(mask), device=device)[:, None]
        return clip, masked // (h * w), masked // w % h, masked % w

    @staticmethod
    def _deviation(pixels: torch.Tensor) -> torch.Tensor:
        """(B, m, p, 3) -> (B, m, 1, 3): the standard deviation of each cube, kept above zero as published."""
        return pixels.var(dim=2, unbiased=True, keepdim=True).sqrt() + 1e-6

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, beyond the 1-D ones."""
        return {"mask_token"} | {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable


@torch.compiler.disable  # counts on the host
def _split(mask: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, N) bool -> positions (B, n) of the visible and (B, m) of the masked tokens, ascending, on device.

    Raises ValueError where the clips differ in how many are masked, or none is.
    """
    counts = mask.sum(dim=1)
    masked = int(counts[0])
    if not (counts == masked).all() or masked == 0:
        raise ValueError(f"each clip must have the same number of masked tokens, at least 1; got {counts.tolist()}")
    order = mask.to(device, non_blocking=True).byte().argsort(dim=1, stable=True)
    return order[:, :-masked], order[:, -masked:]


def _take(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """tokens[b, positions[b]] for each clip b."""
    return tokens.take_along_dim(positions[:, :, None], dim=1)  # its backward is cheaper than that of indexing


def _over(encoder: str, *, decoder_dim: int, decoder_heads: int, decoder_depth: int, **kwargs) -> MaskedAutoencoder:
    """The MaskedAutoencoder over a registered encoder; kwargs are shared out between the two."""
    own = {name: kwargs.pop(name) for name in ("normalize_target", "mean", "std") if name in kwargs}
    drop_path_rate = kwargs.get("drop_path_rate", 0.0)
    return MaskedAutoencoder(
        create_model(encoder, num_classes=0, final_reduction="none", **kwargs),
        decoder_dim=decoder_dim,
        decoder_heads=decoder_heads,
        decoder_depth=decoder_depth,
        drop_path_rate=drop_path_rate,
        **own,
    )


@register_model(num_frames=4, view_fps=5, input_size=64)
def pretrain_videomae_tiny_patch16_64(*, decoder_depth: int = 1, **kwargs) -> MaskedAutoencoder:
    """A masked autoencoder for tests and the demo; no published weights."""
    return _over("vit_tiny_patch16_64", decoder_dim=64, decoder_heads=2, decoder_depth=decoder_depth, **kwargs)


@register_model()
def pretrain_videomae_small_patch16_224(*, decoder_depth: int = 4, **kwargs) -> MaskedAutoencoder:
    """VideoMAE-S: 24 M parameters, 2 M of them in the decoder."""
    return _over("vit_small_patch16_224", decoder_dim=192, decoder_heads=3, decoder_depth=decoder_depth, **kwargs)


@register_model()
def pretrain_videomae_base_patch16_224(*, decoder_depth: int = 4, **kwargs) -> MaskedAutoencoder:
    """VideoMAE-B: 94 M parameters, 8 M of them in the decoder."""
    return _over("vit_base_patch16_224", decoder_dim=384, decoder_heads=6, decoder_depth=decoder_depth, **kwargs)


@register_model()
def pretrain_videomae_large_patch16_224(*, decoder_depth: int = 12, **kwargs) -> MaskedAutoencoder:
    """VideoMAE-L: 343 M parameters, 39 M of them in the decoder."""
    return _over("vit_large_patch16_224", decoder_dim=512, decoder_heads=8, decoder_depth=decoder_depth, **kwargs)


@register_model()
def pretrain_videomae_huge_patch16_224(*, decoder_depth: int = 12, **kwargs) -> MaskedAutoencoder:
    """VideoMAE-H; the decoder is VideoMAE's, VideoMAE V2 has one of width 512."""
    return _over("vit_huge_patch16_224", decoder_dim=640, decoder_heads=8, decoder_depth=decoder_depth, **kwargs)


@register_model(num_frames=4, view_fps=5, input_size=64)
def pretrain_mvd_vit_tiny_patch16_64(*, decoder_depth: int = 1, **kwargs) -> MaskedAutoencoder:
    """DAPT of MVD's encoder with VideoMAE's decoder."""
    return _over("mvd_vit_tiny_patch16_64", decoder_dim=64, decoder_heads=2, decoder_depth=decoder_depth, **kwargs)


@register_model()
def pretrain_mvd_vit_small_patch16_224(*, decoder_depth: int = 4, **kwargs) -> MaskedAutoencoder:
    """DAPT of MVD's encoder with VideoMAE's decoder."""
    return _over("mvd_vit_small_patch16_224", decoder_dim=192, decoder_heads=3, decoder_depth=decoder_depth, **kwargs)


@register_model()
def pretrain_mvd_vit_base_patch16_224(*, decoder_depth: int = 4, **kwargs) -> MaskedAutoencoder:
    """DAPT of MVD's encoder with VideoMAE's decoder."""
    return _over("mvd_vit_base_patch16_224", decoder_dim=384, decoder_heads=6, decoder_depth=decoder_depth, **kwargs)


@register_model()
def pretrain_mvd_vit_large_patch16_224(*, decoder_depth: int = 12, **kwargs) -> MaskedAutoencoder:
    """DAPT of MVD's encoder with VideoMAE's decoder."""
    return _over("mvd_vit_large_patch16_224", decoder_dim=512, decoder_heads=8, decoder_depth=decoder_depth, **kwargs)


@register_model(num_frames=4, view_fps=5, input_size=64, tubelet_size=1)
def pretrain_umt_vit_tiny_patch16_64(*, decoder_depth: int = 1, **kwargs) -> MaskedAutoencoder:
    """DAPT of UMT's encoder with VideoMAE's decoder."""
    return _over("umt_vit_tiny_patch16_64", decoder_dim=64, decoder_heads=2, decoder_depth=decoder_depth, **kwargs)


@register_model(num_frames=8, view_fps=5, tubelet_size=1)
def pretrain_umt_vit_small_patch16_224(*, decoder_depth: int = 4, **kwargs) -> MaskedAutoencoder:
    """DAPT of UMT's encoder with VideoMAE's decoder."""
    return _over("umt_vit_small_patch16_224", decoder_dim=192, decoder_heads=3, decoder_depth=decoder_depth, **kwargs)


@register_model(num_frames=8, view_fps=5, tubelet_size=1)
def pretrain_umt_vit_base_patch16_224(*, decoder_depth: int = 4, **kwargs) -> MaskedAutoencoder:
    """DAPT of UMT's encoder with VideoMAE's decoder."""
    return _over("umt_vit_base_patch16_224", decoder_dim=384, decoder_heads=6, decoder_depth=decoder_depth, **kwargs)


@register_model(num_frames=8, view_fps=5, tubelet_size=1)
def pretrain_umt_vit_large_patch16_224(*, decoder_depth: int = 12, **kwargs) -> MaskedAutoencoder:
    """DAPT of UMT's encoder with VideoMAE's decoder."""
    return _over("umt_vit_large_patch16_224", decoder_dim=512, decoder_heads=8, decoder_depth=decoder_depth, **kwargs)


@register_model(num_frames=4, view_fps=5, input_size=56, tubelet_size=1)
def pretrain_internvideo2_tiny_patch14_56(*, decoder_depth: int = 1, **kwargs) -> MaskedAutoencoder:
    """DAPT of InternVideo2's encoder with VideoMAE's decoder."""
    return _over("internvideo2_tiny_patch14_56", decoder_dim=64, decoder_heads=2, decoder_depth=decoder_depth, **kwargs)


@register_model(num_frames=8, view_fps=5, tubelet_size=1)
def pretrain_internvideo2_small_patch14_224(*, decoder_depth: int = 4, **kwargs) -> MaskedAutoencoder:
    """DAPT of InternVideo2's encoder with VideoMAE's decoder."""
    encoder = "internvideo2_small_patch14_224"
    return _over(encoder, decoder_dim=192, decoder_heads=3, decoder_depth=decoder_depth, **kwargs)


@register_model(num_frames=8, view_fps=5, tubelet_size=1)
def pretrain_internvideo2_base_patch14_224(*, decoder_depth: int = 4, **kwargs) -> MaskedAutoencoder:
    """DAPT of InternVideo2's encoder with VideoMAE's decoder."""
    encoder = "internvideo2_base_patch14_224"
    return _over(encoder, decoder_dim=384, decoder_heads=6, decoder_depth=decoder_depth, **kwargs)


@register_model(num_frames=8, view_fps=5, tubelet_size=1)
def pretrain_internvideo2_large_patch14_224(*, decoder_depth: int = 12, **kwargs) -> MaskedAutoencoder:
    """DAPT of InternVideo2's encoder with VideoMAE's decoder."""
    encoder = "internvideo2_large_patch14_224"
    return _over(encoder, decoder_dim=512, decoder_heads=8, decoder_depth=decoder_depth, **kwargs)
