"""The plain Video ViT: encoder and classifier of VideoMAE and of the families that share its architecture.

Shapes: B clips, C channels, T frames, H x W pixels, N tokens in (t h w) order, D channels of a token, K classes.
State-dict keys are those of the published fine-tuned checkpoints (github.com/MCG-NJU/VideoMAE), so files go both ways.
"""

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import trunc_normal_
from timm.models.beit import Block  # the VideoMAE block: q and v bias without k bias, keys `attn.q_bias`, `attn.v_bias`
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.pos_embed import position_table
from models.registry import register_model

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class TubeletEmbed(nn.Module):
    """(B, C, T, H, W) -> (B, N, D): one token per tubelet_size x patch_size x patch_size cube of pixels."""

    def __init__(self, *, patch_size: int, tubelet_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.cube = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=self.cube, stride=self.cube)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return self.proj(video).flatten(2).transpose(1, 2)


def gelu_layer(kind: str) -> Callable[[], nn.Module]:
    """The constructor of a GELU, "erf" or "tanh", its approximation. Raises ValueError for another."""
    if kind not in ("erf", "tanh"):
        raise ValueError(f"gelu must be erf or tanh, not {kind!r}")
    return partial(nn.GELU, approximate="none" if kind == "erf" else "tanh")


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth of each block: linear from 0 at the first to `last`."""
    return torch.linspace(0, last, depth, device="cpu").tolist()


def build_blocks(
    embed_dim: int,
    depth: int,
    num_heads: int,
    *,
    mlp_ratio: float = 4.0,
    gelu: str = "erf",
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> nn.ModuleList:
    """VideoMAE's transformer blocks. Raises ValueError for an unknown gelu."""
    blocks = nn.ModuleList(
        Block(
            embed_dim,
            num_heads,
            qkv_bias=True,
            mlp_ratio=mlp_ratio,
            proj_drop=drop_rate,
            attn_drop=attn_drop_rate,
            drop_path=drop_path,
            act_layer=gelu_layer(gelu),
            norm_layer=LayerNorm,
        )
        for drop_path in drop_path_rates(drop_path_rate, depth)
    )
    for block in blocks:
        block.mlp.drop1 = nn.Identity()  # VideoMAE drops after fc2 only
    return blocks


def run_blocks(blocks: nn.ModuleList, x: torch.Tensor, *, recompute: bool) -> torch.Tensor:
    """(B, n, D) through the blocks. recompute: their activations in the backward pass, to save memory."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return x


class VideoEncoder(nn.Module):
    """What the Video ViTs share: (B, C, T, H, W) to tokens, layers for learning-rate decay, freezing, a head in fp32.

    A subclass has `blocks`, `pos_embed`, `fc_dropout`, `head` and `forward_features`.

    Raises ValueError where sizes do not divide.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        input_size: int,
        patch_size: int,
        num_frames: int,
        tubelet_size: int,
        in_chans: int,
        pos_embed_kind: str,
    ):
        super().__init__()
        if input_size % patch_size or num_frames % tubelet_size:
            raise ValueError(
                f"input_size {input_size} must be a multiple of the patch size {patch_size}, "
                f"and num_frames {num_frames} of tubelet_size {tubelet_size}"
            )
        self.input_shape = (in_chans, num_frames, input_size, input_size)
        self.grid = (num_frames // tubelet_size, input_size // patch_size, input_size // patch_size)
        self.embed_dim, self.pos_embed_kind = embed_dim, pos_embed_kind
        self.grad_checkpointing = False
        self.patch_embed = TubeletEmbed(
            patch_size=patch_size, tubelet_size=tubelet_size, in_chans=in_chans, embed_dim=embed_dim
        )

    def embed(self, video: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, N, D): tokens with their position added. Raises ValueError on another C, T, H or W."""
        if tuple(video.shape[1:]) != self.input_shape:
            raise ValueError(f"expected a video of shape (B, {', '.join(map(str, self.input_shape))}), "
                             f"got {tuple(video.shape)}")  # fmt: skip
        x = self.patch_embed(video)
        positions = self.pos_embed[:, -x.shape[1] :]  # a class token's comes before them
        return x + positions.to(x.dtype)  # in the activations' type, as published, so autocast stays in half

    def run_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, D) through the blocks."""
        return run_blocks(self.blocks, x, recompute=self.grad_checkpointing and self.training)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, K) logits; (B, N, K) where final_reduction is "none"."""
        x = self.fc_dropout(self.forward_features(video))
        with torch.autocast(x.device.type, enabled=False):  # logits in half precision would tie
            return self.head(x.float())

    def learn_pos_embed(self) -> None:
        """Make the position table a parameter, trained and saved like the others; nothing where it is one."""
        table = self.pos_embed
        if not isinstance(table, nn.Parameter):
            del self.pos_embed
            self.pos_embed = nn.Parameter(table.clone())

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, beyond the 1-D ones."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's layer grouping for layer decay: embedding 0, block i at i + 1, all behind the blocks last."""
        return {"stem": r"^cls_token|^pos_embed|^patch_embed", "blocks": [(r"^blocks\.(\d+)", None)]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def freeze_blocks(self, num_blocks: int) -> None:
        """Stop the gradients of the embedding and of the first num_blocks blocks, their norms excepted.

        Raises ValueError unless 0 <= num_blocks <= depth.
        """
        if not 0 <= num_blocks <= len(self.blocks):
            raise ValueError(f"cannot freeze {num_blocks} of {len(self.blocks)} blocks")
        for param in self.parameters(recurse=False):
            param.requires_grad_(False)
        for module in (self.patch_embed, *self.blocks[:num_blocks]):
            for name, param in module.named_parameters():
                if not name.startswith("norm"):
                    param.requires_grad_(False)


class VideoViT(VideoEncoder):
    """Video ViT: (B, 3, T, H, W) normalised RGB -> (B, K) logits.

    Args:
        input_size: H and W in pixels, a multiple of patch_size. num_frames: T, a multiple of tubelet_size.
        num_classes: K; 0 leaves the head out (`forward` then returns the features).
        gelu: "erf", or "tanh" for its approximation.
        drop_rate, attn_drop_rate, fc_drop_rate: dropout after projections, on attention weights, before the head.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        init_scale: factor on the head's initial weights.
        final_reduction: "fc_norm" = mean over tokens, then norm; "cls" = norm, then the first token;
            "none" = norm, all tokens (B, N, D).
        pos_embed: position table, a kind of `position_table`; fixed unless `learn_pos_embed` is called.

    Raises ValueError where sizes do not divide or final_reduction or gelu is unknown.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        input_size: int,
        patch_size: int = 16,
        num_frames: int = 16,
        tubelet_size: int = 2,
        in_chans: int = 3,
        num_classes: int = 2,
        mlp_ratio: float = 4.0,
        gelu: str = "erf",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        fc_drop_rate: float = 0.0,
        init_scale: float = 0.001,
        final_reduction: str = "fc_norm",
        pos_embed: str = "sinusoid",
    ):
        super().__init__(
            embed_dim=embed_dim,
            input_size=input_size,
            patch_size=patch_size,
            num_frames=num_frames,
            tubelet_size=tubelet_size,
            in_chans=in_chans,
            pos_embed_kind=pos_embed,
        )
        if final_reduction not in ("fc_norm", "cls", "none"):
            raise ValueError(f"final_reduction must be fc_norm, cls or none, not {final_reduction!r}")
        self.final_reduction = final_reduction
        self.register_buffer("pos_embed", position_table(pos_embed, self.grid, embed_dim)[None], persistent=False)
        self.blocks = build_blocks(
            embed_dim,
            depth,
            num_heads,
            mlp_ratio=mlp_ratio,
            gelu=gelu,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
        )
        # One of the two exists, under the name its published checkpoints use.
        self.norm = nn.Identity() if final_reduction == "fc_norm" else LayerNorm(embed_dim)
        self.fc_norm = LayerNorm(embed_dim) if final_reduction == "fc_norm" else nn.Identity()
        self.fc_dropout = nn.Dropout(fc_drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

        self.apply(init_weights)
        if num_classes:
            with torch.no_grad():
                self.head.weight.mul_(init_scale)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, D) -> (B, n, D): any subset of the tokens through the blocks and `norm`."""
        return self.norm(self.run_blocks(x))

    def forward_features(self, video: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, D) pooled and normed; (B, N, D) where final_reduction is "none"."""
        x = self.encode(self.embed(video))
        if self.final_reduction == "fc_norm":
            return self.fc_norm(x.mean(dim=1))
        return x[:, 0] if self.final_reduction == "cls" else x


def init_weights(module: nn.Module) -> None:
    """VideoMAE's initialisation; the 3-D convolution keeps PyTorch's."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@register_model(num_frames=4, view_fps=5, input_size=64, finetune_lr=1e-3)
def vit_tiny_patch16_64(**kwargs) -> VideoViT:
    """A ViT for tests and the demo; no published weights."""
    return VideoViT(embed_dim=128, depth=4, num_heads=4, **kwargs)


@register_model(finetune_lr=1e-3)
def vit_small_patch16_224(**kwargs) -> VideoViT:
    """ViT-S/16: 22 M parameters."""
    return VideoViT(embed_dim=384, depth=12, num_heads=6, **kwargs)


@register_model()
def vit_base_patch16_224(**kwargs) -> VideoViT:
    """ViT-B/16: 86 M parameters."""
    return VideoViT(embed_dim=768, depth=12, num_heads=12, **kwargs)


@register_model()
def vit_large_patch16_224(**kwargs) -> VideoViT:
    """ViT-L/16: 304 M parameters."""
    return VideoViT(embed_dim=1024, depth=24, num_heads=16, **kwargs)


@register_model()
def vit_huge_patch16_224(**kwargs) -> VideoViT:
    """ViT-H/16: 633 M parameters."""
    return VideoViT(embed_dim=1280, depth=32, num_heads=16, **kwargs)


@register_model(finetune_lr=1e-3)
def mvd_vit_small_patch16_224(**kwargs) -> VideoViT:
    """MVD's ViT: a 3-D sin-cos position table; S/16."""
    return vit_small_patch16_224(pos_embed="sincos_3d", **kwargs)


@register_model()
def mvd_vit_base_patch16_224(**kwargs) -> VideoViT:
    """MVD's ViT: a 3-D sin-cos position table; B/16."""
    return vit_base_patch16_224(pos_embed="sincos_3d", **kwargs)


@register_model()
def mvd_vit_large_patch16_224(**kwargs) -> VideoViT:
    """MVD's ViT: a 3-D sin-cos position table; L/16."""
    return vit_large_patch16_224(pos_embed="sincos_3d", **kwargs)


@register_model(num_frames=8, view_fps=5, tubelet_size=1, finetune_lr=1e-3)
def umt_vit_small_patch16_224(**kwargs) -> VideoViT:
    """UMT's ViT: a token per frame; S/16."""
    return vit_small_patch16_224(pos_embed="umt", **kwargs)


@register_model(num_frames=8, view_fps=5, tubelet_size=1)
def umt_vit_base_patch16_224(**kwargs) -> VideoViT:
    """UMT's ViT: a token per frame; B/16."""
    return vit_base_patch16_224(pos_embed="umt", **kwargs)


@register_model(num_frames=8, view_fps=5, tubelet_size=1)
def umt_vit_large_patch16_224(**kwargs) -> VideoViT:
    """UMT's ViT: a token per frame; L/16."""
    return vit_large_patch16_224(pos_embed="umt", **kwargs)


@register_model(num_frames=4, view_fps=5, input_size=64, finetune_lr=1e-3)
def mvd_vit_tiny_patch16_64(**kwargs) -> VideoViT:
    """MVD's for tests; no published weights."""
    return vit_tiny_patch16_64(pos_embed="sincos_3d", **kwargs)


@register_model(num_frames=4, view_fps=5, input_size=64, tubelet_size=1, finetune_lr=1e-3)
def umt_vit_tiny_patch16_64(**kwargs) -> VideoViT:
    """UMT's for tests; no published weights."""
    return vit_tiny_patch16_64(pos_embed="umt", **kwargs)
