"""What makes one vector of an encoder's tokens: V-JEPA's attentive probe.

Shapes: B clips, N tokens, D channels. State-dict keys are those of `pooler` in its AttentiveClassifier
(github.com/facebookresearch/vjepa2), so files go both ways.
"""

import torch
from einops import rearrange
from timm.layers import Mlp
from torch import nn
from torch.nn import functional as F

# Hugging Face's; torch's default, 1e-5, in Meta's own code changes logits by about 1e-5.
_EPS = 1e-6


class SelfAttention(nn.Module):
    """(B, N, D) -> (B, N, D): softmax attention with biases of query, key and value."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class CrossAttention(nn.Module):
    """Queries (B, n, D) over tokens (B, N, D) -> (B, n, D), without a projection behind."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)

    def forward(self, queries: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        q = rearrange(self.q(queries), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = rearrange(self.kv(x), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


class ProbeBlock(nn.Module):
    """(B, N, D) -> (B, N, D): pre-norm transformer block without positions."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=_EPS), nn.LayerNorm(dim, eps=_EPS)
        self.attn, self.mlp = SelfAttention(dim, num_heads), Mlp(dim, 4 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """Queries (B, n, D), which no norm precedes, over tokens (B, N, D) -> (B, n, D)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=_EPS), nn.LayerNorm(dim, eps=_EPS)
        self.xattn, self.mlp = CrossAttention(dim, num_heads), Mlp(dim, 4 * dim)

    def forward(self, queries: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        queries = queries + self.xattn(queries, self.norm1(x))
        return queries + self.mlp(self.norm2(queries))


class AttentivePooler(nn.Module):
    """(B, N, D) -> (B, D): blocks of self-attention, then a learned query attends to the tokens.

    Source: V-JEPA 2 (arXiv:2506.09985), whose probes have a depth of 4: 3 blocks and the one of the query.
    """

    def __init__(self, dim: int, num_heads: int, *, depth: int = 4):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, 1, dim))
        self.cross_attention_block = CrossBlock(dim, num_heads)
        self.blocks = nn.ModuleList(ProbeBlock(dim, num_heads) for _ in range(depth - 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        queries = self.query_tokens.to(x.dtype).expand(x.shape[0], -1, -1)
        return self.cross_attention_block(queries, x).squeeze(1)
