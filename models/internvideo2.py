"""InternVideo2's Video ViT (arXiv:2403.15377), distilled sizes: class token, RMSNorm, LayerScale, attention pooling.

Shapes: B clips, T frames, H x W pixels, N tokens in (t h w) order, D channels of a token, P pooled channels, K classes.
State-dict keys are those of the published checkpoints (github.com/OpenGVLab/InternVideo, InternVideo2).
"""

import torch
from timm.layers import DropPath, LayerScale, Mlp, trunc_normal_, use_fused_attn
from torch import nn
from torch.nn import functional as F

from models.pos_embed import sincos_3d
from models.registry import register_model
from models.vit import LayerNorm, VideoEncoder, drop_path_rates, gelu_layer, init_weights


class RMSNorm(nn.RMSNorm):
    """PyTorch's, in the type of its input: under autocast its weight is float32, which no fused kernel takes."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, num_heads: int, dropout: float, fused: bool
) -> torch.Tensor:
    """Softmax attention: q (B, n, D) over k, v (B, m, D) -> (B, n, D). fused: PyTorch's kernels."""
    q, k, v = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    if fused:
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    else:
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(dim=-1)
        x = F.dropout(weights, dropout) @ v
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """(B, n, D) -> (B, n, D): self-attention whose queries and keys are normalised over all heads together."""

    def __init__(self, dim: int, num_heads: int, *, attn_drop_rate: float, drop_rate: float):
        super().__init__()
        self.num_heads, self.attn_drop_rate, self.fused = num_heads, attn_drop_rate, use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm, self.k_norm = RMSNorm(dim), RMSNorm(dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.attn_drop_rate if self.training else 0.0
        return self.proj_drop(self.proj(attend(q, k, v, num_heads=self.num_heads, dropout=dropout, fused=self.fused)))


class Block(nn.Module):
    """(B, n, D) -> (B, n, D): pre-norm transformer block with LayerScale."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        gelu: str,
        init_values: float,
        drop_rate: float,
        attn_drop_rate: float,
        drop_path: float,
    ):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.attn = Attention(dim, num_heads, attn_drop_rate=attn_drop_rate, drop_rate=drop_rate)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=gelu_layer(gelu), drop=drop_rate)
        self.ls1, self.ls2 = LayerScale(dim, init_values), LayerScale(dim, init_values)
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
        return self.proj(attend(q, k, v, num_heads=self.num_heads, dropout=0.0, fused=self.fused))


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
        final_reduction: "attention" pools the class token and the others by attention, then norms; "none" = norm, all
            tokens but the class token (B, N, D); the pooling is then kept with the weights, frozen and unused, so
            that a masked autoencoder's checkpoint has all a classifier starts from.
        pool_heads, pool_dim: heads and P of the pooling. init_values: initial LayerScale.
        The others: as VideoViT's. The position table is learned, from a 3-D sin-cos table.

    Raises ValueError where sizes do not divide or final_reduction or gelu is unknown.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        input_size: int,
        patch_size: int = 14,
        num_frames: int = 8,
        tubelet_size: int = 1,
        in_chans: int = 3,
        num_classes: int = 2,
        mlp_ratio: float = 4.0,
        gelu: str = "tanh",
        init_values: float = 1e-5,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        fc_drop_rate: float = 0.0,
        init_scale: float = 0.001,
        final_reduction: str = "attention",
        pool_heads: int = 16,
        pool_dim: int = 768,
    ):
        super().__init__(
            embed_dim=embed_dim,
            input_size=input_size,
            patch_size=patch_size,
            num_frames=num_frames,
            tubelet_size=tubelet_size,
            in_chans=in_chans,
            pos_embed_kind="learned",
        )
        if final_reduction not in ("attention", "none"):
            raise ValueError(f"InternVideo2 pools by attention; final_reduction cannot be {final_reduction!r}")
        self.final_reduction = final_reduction
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        table = F.pad(sincos_3d(self.grid, embed_dim), (0, 0, 1, 0))  # the class token's position: zeros
        self.pos_embed = nn.Parameter(table[None])
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                gelu=gelu,
                init_values=init_values,
                drop_rate=drop_rate,
                attn_drop_rate=attn_drop_rate,
                drop_path=drop_path,
            )
            for drop_path in drop_path_rates(drop_path_rate, depth)
        )
        self.clip_projector = AttentionPool(embed_dim, pool_heads, out_dim=pool_dim)
        pooled = final_reduction == "attention"
        self.norm = nn.Identity() if pooled else LayerNorm(embed_dim)
        self.fc_norm = nn.LayerNorm(pool_dim, eps=1e-5) if pooled else nn.Identity()
        self.fc_dropout = nn.Dropout(fc_drop_rate)
        self.head = nn.Linear(pool_dim if pooled else embed_dim, num_classes) if num_classes else nn.Identity()

        self.apply(init_weights)
        trunc_normal_(self.cls_token, std=0.02)
        with torch.no_grad():
            for i, block in enumerate(self.blocks):
                block.attn.proj.weight.div_((2 * (i + 1)) ** 0.5)
                block.mlp.fc2.weight.div_((2 * (i + 1)) ** 0.5)
            if num_classes:
                self.head.weight.mul_(init_scale)
        self.clip_projector.requires_grad_(pooled)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, D) -> (B, n, D): any subset of the tokens, with the class token, through the blocks and `norm`."""
        return self.norm(self._with_class_token(x)[:, 1:])

    def forward_features(self, video: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, P) pooled and normed; (B, N, D) where final_reduction is "none"."""
        x = self.embed(video)
        if self.final_reduction == "none":
            return self.encode(x)
        return self.fc_norm(self.clip_projector(self._with_class_token(x)))

    def _with_class_token(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, D) -> (B, 1 + n, D) through the blocks."""
        first = (self.cls_token + self.pos_embed[:, :1]).to(x.dtype)
        return self.run_blocks(torch.cat([first.expand(len(x), -1, -1), x], dim=1))


@register_model(num_frames=8, view_fps=5, input_size=224, tubelet_size=1, finetune_lr=1e-3)
def internvideo2_small_patch14_224(**kwargs) -> InternVideo2:
    """InternVideo2-S/14: 23 M parameters."""
    return InternVideo2(embed_dim=384, depth=12, num_heads=6, **kwargs)


@register_model(num_frames=8, view_fps=5, input_size=224, tubelet_size=1)
def internvideo2_base_patch14_224(**kwargs) -> InternVideo2:
    """InternVideo2-B/14: 89 M parameters."""
    return InternVideo2(embed_dim=768, depth=12, num_heads=12, **kwargs)


@register_model(num_frames=8, view_fps=5, input_size=224, tubelet_size=1)
def internvideo2_large_patch14_224(**kwargs) -> InternVideo2:
    """InternVideo2-L/14: 309 M parameters."""
    return InternVideo2(embed_dim=1024, depth=24, num_heads=16, **kwargs)


@register_model(num_frames=4, view_fps=5, input_size=56, tubelet_size=1, finetune_lr=1e-3)
def internvideo2_tiny_patch14_56(**kwargs) -> InternVideo2:
    """InternVideo2's for tests; no published weights."""
    return InternVideo2(embed_dim=96, depth=2, num_heads=3, pool_dim=64, **kwargs)
