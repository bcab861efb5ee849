"""V-JEPA 2 (arXiv:2506.09985) and 2.1 (arXiv:2603.14482): encoders whose positions are rotations of query and key.

Shapes: B clips, T frames, H x W pixels, N tokens in (t h w) order, D channels of a token, K classes.
State-dict keys are those of the published checkpoints (github.com/facebookresearch/vjepa2). The versions share blocks
and sizes; 2.1 has other rotations, a modality embedding, a patch embedding for single pictures, and four final norms.
"""

from functools import partial

import torch
from einops import rearrange
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.pos_embed import Grid
from models.registry import Dropout, ModelDefaults, VideoInput, register_model
from models.vit import LayerNorm, Size, TubeletEmbed, VideoEncoder, drop_path_rates, gelu_layer, init_weights

_PRETRAINED_SIDE = 16  # rows and columns of tokens in pre-training, to which version 2.1 scales every other number
_LEVELS = 4


def rotary_table(positions: torch.Tensor, grid: Grid, head_dim: int, version: str) -> torch.Tensor:
    """Return (2, ..., head_dim) float32, cosines and sines, by which `rotate` turns the heads of tokens.

    A head is cut into three equal even parts for slot, row and column; the rest is not turned. Channel pair j of r / 2
    turns by position / 10000^(2 j / r). Version "2.1" gives both channels of a pair its angle, and numbers rows and
    columns from 0 to 15 whatever their count. "2.0" lists all angles twice in a row instead, a slip that its weights
    were trained with, and counts rows and columns.

    Args:
        positions: (...) int64, numbers of tokens in (t h w) order.
        grid: tokens in time, height, width of the clip.

    Raises ValueError for version 2.1 and a grid of one row or column.
    """
    _, h, w = grid
    slot, row, column = positions // (h * w), positions // w % h, positions % w
    axes = [slot.float(), row.float(), column.float()]
    if version == "2.1":
        if min(h, w) < 2:
            raise ValueError(f"V-JEPA 2.1 needs 2 rows and columns of tokens or more, not {h} x {w}")
        axes[1:] = [axis * (_PRETRAINED_SIDE - 1) / (n - 1) for axis, n in zip(axes[1:], (h, w), strict=True)]
    part = 2 * (head_dim // 3 // 2)
    frequency = 10000 ** -(torch.arange(part // 2, device=positions.device, dtype=torch.float32) / (part / 2))
    angles = [axis[..., None] * frequency for axis in axes]
    angles = [a.repeat_interleave(2, dim=-1) if version == "2.1" else torch.cat([a, a], dim=-1) for a in angles]
    angles = F.pad(torch.cat(angles, dim=-1), (0, head_dim - 3 * part))
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring channels of (B, heads, n, d) by a table (2, B or 1, n, d), see `rotary_table`."""
    cos, sin = table[:, :, None].to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


class Attention(nn.Module):
    """(B, n, D), table of `rotary_table` -> (B, n, D). The key bias counts here: it is turned, too."""

    def __init__(self, dim: int, num_heads: int, dropout: Dropout):
        super().__init__()
        self.num_heads, self.attn_drop_rate = num_heads, dropout.attn_drop_rate
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout.drop_rate)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        q, k = rotate(q, table), rotate(k, table)
        dropout = self.attn_drop_rate if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.proj_drop(self.proj(rearrange(x, "b h n d -> b n (h d)")))


class Block(nn.Module):
    """(B, n, D), table -> (B, n, D): pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, dropout: Dropout, *, gelu: str, drop_path: float):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.attn = Attention(dim, num_heads, dropout)
        self.mlp = Mlp(dim, 4 * dim, act_layer=gelu_layer(gelu), drop=dropout.drop_rate)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), table))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VJEPA(VideoEncoder):
    """V-JEPA 2 or 2.1: (B, 3, T, H, W) normalised RGB -> (B, K) logits.

    Args:
        version: "2.0" or "2.1".
        pool_heads: the heads of the attentive probe.
        final_reduction: "attention" = norm, all tokens to an attentive head; "mean" = norm, then the mean over tokens;
            "none" = norm, all tokens (B, N, D).
        The others: as VideoViT's. Positions are rotations, so there is no table.

    What only pictures and the inner levels need is kept with the weights, frozen. Raises ValueError where sizes do not
    divide, or version, final_reduction or gelu is unknown.
    """

    reductions = {"attention": "attentive", "mean": "linear"}
    probe_depth = 4

    def __init__(
        self,
        size: Size,
        version: str,
        pool_heads: int,
        video: VideoInput,
        dropout: Dropout,
        *,
        num_classes: int = 2,
        gelu: str = "erf",
        init_scale: float = 0.001,
        final_reduction: str = "attention",
    ):
        kind = f"rotary {version}"
        super().__init__(size, video, gelu=gelu, final_reduction=final_reduction, pos_embed_kind=kind)
        dim = size.embed_dim
        self.version, self.head_dim = version, dim // size.num_heads
        rotary_table(torch.zeros(1, dtype=torch.int64), self.grid, self.head_dim, version)  # raises where it cannot be
        self.blocks = nn.ModuleList(
            Block(dim, size.num_heads, dropout, gelu=gelu, drop_path=drop_path)
            for drop_path in drop_path_rates(dropout.drop_path_rate, size.depth)
        )
        self.add_head(num_classes, fc_norm=None, drop_rate=dropout.fc_drop_rate, probe_heads=pool_heads)
        if version == "2.1":
            self.norm = nn.Identity()
            self.norms_block = nn.ModuleList(LayerNorm(dim) for _ in range(_LEVELS))
            self.patch_embed_img = TubeletEmbed((1, size.patch_size, size.patch_size), dim)
            self.img_mod_embed, self.video_mod_embed = (nn.Parameter(torch.zeros(1, 1, dim)) for _ in range(2))
            for unused in (*self.norms_block[:-1], self.patch_embed_img):
                unused.requires_grad_(False)
            self.img_mod_embed.requires_grad_(False)
        self.initialize(init_scale)

    def initialize(self, init_scale: float) -> None:
        """Draw the weights as the published code does; the deeper a block, the less it adds at first."""
        for module in self.modules():
            init_weights(module)
            if isinstance(module, nn.Conv3d):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for i, block in enumerate(self.blocks):
                block.attn.proj.weight.div_((2 * (i + 1)) ** 0.5)
                block.mlp.fc2.weight.div_((2 * (i + 1)) ** 0.5)
            if isinstance(self.head, nn.Linear):
                self.head.weight.mul_(init_scale)
        for name, parameter in self.named_parameters():
            if name.endswith("_mod_embed"):
                nn.init.normal_(parameter, std=1e-6)

    def embed(self, video: torch.Tensor) -> torch.Tensor:
        """Map (B, 3, T, H, W) to (B, N, D): tokens, in version 2.1 with what marks them as a video's.

        Raises ValueError on another number of channels, T, H or W; see `features` for these.
        """
        x = super().embed(video)
        return x + self.video_mod_embed.to(x.dtype) if self.version == "2.1" else x

    def encode(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Map (B, n, D) to (B, n, D): any subset of the tokens of `embed`, with their numbers (B, n), normed."""
        return self._run(x, positions, self.grid)[-1]

    def features(
        self, video: torch.Tensor, positions: torch.Tensor | None = None, levels: tuple[int, ...] = (-1,)
    ) -> torch.Tensor:
        """Map clips of any T, H and W that divide to (B, n, D x levels): normed tokens, concatenated over levels.

        Args:
            video: (B, 3, T, H, W) normalised; one frame is a picture to version 2.1.
            positions: (B, n) int64, the numbers of the tokens to encode, ascending; None stands for all.
            levels: 0 to 3 of version 2.1, after a quarter to all of the blocks; -1 is the last.

        Raises ValueError where sizes do not divide.
        """
        is_picture = video.shape[2] == 1 and self.version == "2.1"
        patches = self.patch_embed_img if is_picture else self.patch_embed
        sizes = list(zip(video.shape[2:], patches.cube, strict=True))
        if any(n % side for n, side in sizes):
            raise ValueError(f"a clip of {tuple(video.shape[2:])} does not divide into tokens of {patches.cube}")
        x = patches(video)
        if self.version == "2.1":
            x = x + (self.img_mod_embed if is_picture else self.video_mod_embed).to(x.dtype)
        if positions is not None:
            x = x.take_along_dim(positions[:, :, None], dim=1)
        found = self._run(x, positions, tuple(n // side for n, side in sizes), all_levels=self.version == "2.1")
        return torch.cat([found[level] for level in levels], dim=-1)

    def forward_features(self, video: torch.Tensor) -> torch.Tensor:
        """Map (B, 3, T, H, W) to all normed tokens (B, N, D), or to their mean (B, D)."""
        x = self.encode(self.embed(video))
        return x.mean(dim=1) if self.final_reduction == "mean" else x

    def no_weight_decay(self) -> set[str]:
        """Return names of parameters without weight decay, beyond the 1-D ones."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer grouping for layer decay: embeddings 0, block i at i + 1, all behind the blocks last."""
        return {"stem": r"^patch_embed|^img_mod_embed|^video_mod_embed", "blocks": [(r"^blocks\.(\d+)", None)]}

    def _run(
        self, x: torch.Tensor, positions: torch.Tensor | None, grid: Grid, *, all_levels: bool = False
    ) -> list[torch.Tensor]:
        """Return the normed tokens of all levels, or of the last alone."""
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        table = rotary_table(positions, grid, self.head_dim, self.version)
        recompute, found = self.grad_checkpointing and self.training, []
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, table, use_reentrant=False) if recompute else block(x, table)
            level, between = divmod((i + 1) * _LEVELS, len(self.blocks))
            if all_levels and not between:
                found.append(self.norms_block[level - 1](x))
        last = self.norms_block[-1] if self.version == "2.1" else self.norm
        return [*found[:-1], last(x)]


_TINY = {"num_frames": 4, "view_fps": 4, "input_size": 64, "finetune_lr": 1e-3}
BASE, LARGE = Size(768, 12, 12), Size(1024, 24, 16)
MODELS = {  # name: size, version, heads of the probe, defaults; the tiny ones are for tests, not published
    "vjepa2_vit_tiny_patch16_64": (Size(96, 2, 3), "2.0", 3, _TINY),
    "vjepa2_vit_large_patch16_256": (LARGE, "2.0", 16, {"view_fps": 4, "input_size": 256}),  # 304 M parameters
    "vjepa21_vit_tiny_patch16_64": (Size(96, 4, 3), "2.1", 3, _TINY),
    "vjepa21_vit_base_patch16_384": (BASE, "2.1", 16, {"view_fps": 4, "input_size": 384}),  # 87 M
    "vjepa21_vit_large_patch16_384": (LARGE, "2.1", 16, {"view_fps": 4, "input_size": 384}),  # 305 M
}
for _name, (_size, _version, _pool_heads, _defaults) in MODELS.items():
    register_model(_name, partial(VJEPA, _size, _version, _pool_heads), ModelDefaults(**_defaults))
