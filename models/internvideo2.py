"""InternVideo2's Video ViT (arXiv:2403.15377), distilled sizes: class token, RMSNorm, LayerScale, attention pooling.

Shapes: B clips, T frames, H x W pixels, N tokens in (t h w) order, D channels of a token, P pooled channels, K classes.
State-dict keys are those of the published checkpoints (github.com/OpenGVLab/InternVideo, InternVideo2).
"""

from functools import partial

import torch
from einops import rearrange
from timm.layers import DropPath, LayerScale, Mlp, trunc_normal_, use_fused_attn
from torch import nn
from torch.nn import functional as F

from models.pos_embed import sincos_3d
from models.registry import Dropout, ModelDefaults, VideoInput, register_model
from models.vit import Size, VideoEncoder, drop_path_rates, gelu_layer


class RMSNorm(nn.RMSNorm):
    """PyTorch's, in the type of its input: under autocast its weight is float32, which no fused kernel takes."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, num_heads: int, fused: bool, dropout: float = 0.0
) -> torch.Tensor:
    """Attend with q (B, n, D) to k, v (B, m, D), by softmax; returns (B, n, D). fused: by PyTorch's kernels."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=num_heads) for x in (q, k, v))
    if fused:
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    else:
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(dim=-1)
        x = F.dropout(weights, dropout) @ v
    return rearrange(x, "b h n d -> b n (h d)")


class Attention(nn.Module):
    """(B, n, D) -> (B, n, D): self-attention whose queries and keys are normalised over all heads together."""

    def __init__(self, dim: int, num_heads: int, dropout: Dropout):
        super().__init__()
        self.num_heads, self.attn_drop_rate, self.fused = num_heads, dropout.attn_drop_rate, use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm, self.k_norm = RMSNorm(dim), RMSNorm(dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout.drop_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.attn_drop_rate if self.training else 0.0
        x = attend(q, k, v, num_heads=self.num_heads, fused=self.fused, dropout=dropout)
        return self.proj_drop(self.proj(x))


class Block(nn.Module):
    """(B, n, D) -> (B, n, D): pre-norm transformer block with LayerScale."""

    def __init__(self, dim: int, num_heads: int, dropout: Dropout, *, gelu: str, drop_path: float):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.attn = Attention(dim, num_heads, dropout)
        self.mlp = Mlp(dim, 4 * dim, act_layer=gelu_layer(gelu), drop=dropout.drop_rate)
        self.ls1, self.ls2 = LayerScale(dim, 1e-5), LayerScale(dim, 1e-5)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))).to(x.dtype))  # LayerScale's weight is float32
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))).to(x.dtype))


class CrossAttention(nn.Module):
    """q (B, n, D) over k, v (B, m, D) -> (B, n, P)."""

    def __init__(self, dim: int, num_heads: int, *, out_dim: int):
        super().__init__()
        self.num_heads, self.fused = num_heads, use_fused_attn()
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        # Beside the layers they belong to, as published. A key bias changes no softmax; the files have one.
        self.q_bias, self.k_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(3))
        self.proj = nn.Linear(dim, out_dim)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = F.linear(q, self.q.weight, self.q_bias)
        k = F.linear(k, self.k.weight, self.k_bias)
        v = F.linear(v, self.v.weight, self.v_bias)
        return self.proj(attend(q, k, v, num_heads=self.num_heads, fused=self.fused))


class AttentionPool(nn.Module):
    """(B, n, D) -> (B, P): the tokens' mean attends to the tokens."""

    def __init__(self, dim: int, num_heads: int, *, out_dim: int):
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v = (nn.LayerNorm(dim, eps=1e-5) for _ in range(3))
        self.cross_attn = CrossAttention(dim, num_heads, out_dim=out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.norm1_q(x.mean(dim=1, keepdim=True))
        return self.cross_attn(query, self.norm1_k(x), self.norm1_v(x)).squeeze(1)


class InternVideo2(VideoEncoder):
    """InternVideo2's Video ViT: (B, 3, T, H, W) normalised RGB -> (B, K) logits.

    Args:
        pool_dim: P of the pooling.
        final_reduction: "attention" pools the class token and the others by attention, then norms; "attentive" = norm,
            all tokens but the class token to an attentive head; "none" = norm, the same tokens (B, N, D). The pooling
            is kept with the weights all the same, frozen and unused, so that a masked autoencoder's checkpoint has all
            a classifier starts from.
        The others: as VideoViT's. The position table is learned, from a 3-D sin-cos table.

    Raises ValueError where sizes do not divide or final_reduction or gelu is unknown.
    """

    reductions = {"attention": "linear", "attentive": "attentive"}

    def __init__(
        self,
        size: Size,
        pool_dim: int,
        video: VideoInput,
        dropout: Dropout,
        *,
        num_classes: int = 2,
        gelu: str = "tanh",
        init_scale: float = 0.001,
        final_reduction: str = "attention",
    ):
        super().__init__(size, video, gelu=gelu, final_reduction=final_reduction, pos_embed_kind="learned")
        dim, pooled = size.embed_dim, final_reduction == "attention"
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = F.pad(sincos_3d(self.grid, dim), (0, 0, 1, 0))  # the class token's position: zeros
        self.pos_embed = nn.Parameter(table[None])
        self.blocks = nn.ModuleList(
            Block(dim, size.num_heads, dropout, gelu=gelu, drop_path=drop_path)
            for drop_path in drop_path_rates(dropout.drop_path_rate, size.depth)
        )
        self.clip_projector = AttentionPool(dim, 16, out_dim=pool_dim)
        fc_norm = nn.LayerNorm(pool_dim, eps=1e-5) if pooled else None
        self.add_head(num_classes, fc_norm=fc_norm, drop_rate=dropout.fc_drop_rate)
        self.initialize(init_scale)
        self.clip_projector.requires_grad_(pooled)

    def initialize(self, init_scale: float) -> None:
        """Draw the weights as VideoViT's, the class token too; the deeper a block, the less it adds at first."""
        super().initialize(init_scale)
        trunc_normal_(self.cls_token, std=0.02)
        with torch.no_grad():
            for i, block in enumerate(self.blocks):
                block.attn.proj.weight.div_((2 * (i + 1)) ** 0.5)
                block.mlp.fc2.weight.div_((2 * (i + 1)) ** 0.5)

    def encode(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Map (B, n, D) to (B, n, D): any subset of the tokens, with the class token, through the blocks and `norm`."""
        return self.norm(self._with_class_token(x)[:, 1:])

    def forward_features(self, video: torch.Tensor) -> torch.Tensor:
        """Map (B, 3, T, H, W) to (B, P) pooled and normed, or to all tokens but the class token (B, N, D)."""
        x = self.embed(video)
        if self.final_reduction != "attention":
            return self.encode(x)
        return self.fc_norm(self.clip_projector(self._with_class_token(x)))

    def _with_class_token(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, n, D) to (B, 1 + n, D) through the blocks."""
        first = (self.cls_token + self.pos_embed[:, :1]).to(x.dtype)
        return self.run_blocks(torch.cat([first.expand(x.shape[0], -1, -1), x], dim=1))


_TINY = {"num_frames": 4, "view_fps": 5, "input_size": 56, "tubelet_size": 1, "finetune_lr": 1e-3}
_LARGE = {"num_frames": 8, "view_fps": 5, "tubelet_size": 1}
_SMALL = {**_LARGE, "finetune_lr": 1e-3}

MODELS = {  # name: size, width of the pooling, defaults; the tiny one is for tests, not published
    "internvideo2_tiny_patch14_56": (Size(96, 2, 3, patch_size=14), 64, _TINY),
    "internvideo2_small_patch14_224": (Size(384, 12, 6, patch_size=14), 768, _SMALL),  # 23 M parameters
    "internvideo2_base_patch14_224": (Size(768, 12, 12, patch_size=14), 768, _LARGE),  # 89 M
    "internvideo2_large_patch14_224": (Size(1024, 24, 16, patch_size=14), 768, _LARGE),  # 309 M
}
for _name, (_size, _pool_dim, _defaults) in MODELS.items():
    register_model(_name, partial(InternVideo2, _size, _pool_dim), ModelDefaults(**_defaults))
