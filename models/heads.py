"""Heads of encoders, and V-JEPA's attentive probe, which makes one vector of any family's tokens.

Shapes: B clips, N tokens, D channels. State-dict keys are those of `pooler` in its AttentiveClassifier
(github.com/facebookresearch/vjepa2), so files go both ways.
"""

from collections.abc import Mapping

import torch
from einops import rearrange
from timm.layers import Mlp, trunc_normal_
from torch import nn
from torch.nn import functional as F

# Hugging Face's; torch's default, 1e-5, in Meta's own code changes logits by about 1e-5.
_EPS = 1e-6
_MODULES = ("pooler", "fc_dropout", "head")  # of a head


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

    Source: V-JEPA (arXiv:2404.08471), whose probes have a depth of 1: the query's block alone. Those of V-JEPA 2
    (arXiv:2506.09985) have one of 4: 3 blocks and the one of the query.
    """

    def __init__(self, dim: int, num_heads: int, *, depth: int):
        super().__init__()
        self.query_tokens = nn.Parameter(trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.cross_attention_block = CrossBlock(dim, num_heads)
        self.blocks = nn.ModuleList(ProbeBlock(dim, num_heads) for _ in range(depth - 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        queries = self.query_tokens.to(x.dtype).expand(x.shape[0], -1, -1)
        return self.cross_attention_block(queries, x).squeeze(1)


class Headed(nn.Module):
    """What the Video ViTs have of a head: its two kinds, its forward pass, and training it alone.

    The head gets what `forward_features(video)` returns. It is `fc_dropout` and `head`, and if attentive `pooler`.

    Attributes:
        reductions: what a family does to its tokens, and the kind of head behind that: {final_reduction: "linear" or
            "attentive"}, its default first. Here: their mean, normed, or where it is attentive all of them.
        probe_depth: the depth of an attentive head.
        head_kind: "linear", "attentive", or None where there is no pooling, as under a masked autoencoder.
        encoder_frozen: whether the head alone is trained.
    """

    reductions: Mapping[str, str] = {"fc_norm": "linear", "attentive": "attentive"}
    probe_depth = 1
    head_kind: str | None = None
    encoder_frozen = False

    @classmethod
    def reduction_of(cls, final_reduction: str | None, head: str | None) -> str:
        """Return the final_reduction that both stand for, None being left open.

        Raises ValueError where one is unknown, or they contradict each other.
        """
        if head not in (None, "linear", "attentive"):
            raise ValueError(f"head must be linear or attentive, not {head!r}")
        if final_reduction is None:
            return next(name for name, kind in cls.reductions.items() if head in (None, kind))
        if final_reduction not in (*cls.reductions, "none"):
            known = ", ".join(cls.reductions)
            raise ValueError(
                f"{cls.__name__} pools by {next(iter(cls.reductions))}; final_reduction cannot be {final_reduction!r}, "
                f"but {known} or none"
            )
        kind = cls.reductions.get(final_reduction, "no")
        if head not in (None, kind):
            raise ValueError(f"{cls.__name__}'s final_reduction {final_reduction} goes with {kind} head, not {head}")
        return final_reduction

    def forward(self, video: torch.Tensor, *, encoded: bool = False) -> torch.Tensor:
        """Map (B, 3, T, H, W) normalised to (B, K) logits; (B, N, K) where final_reduction is "none".

        encoded: `video` is what forward_features has made of it.
        """
        if encoded:
            return self.forward_head(video)
        if not self.encoder_frozen:
            return self.forward_head(self.forward_features(video))
        with torch.no_grad():
            features = self.forward_features(video)
        return self.forward_head(features)

    def forward_head(self, x: torch.Tensor) -> torch.Tensor:
        """Map what forward_features returns to logits, float32."""
        if self.head_kind == "attentive":
            x = self.pooler(x)
        x = self.fc_dropout(x)
        with torch.autocast(x.device.type, enabled=False):  # logits in half precision would tie
            return self.head(x.float())

    def train(self, mode: bool = True) -> "Headed":
        """Set the mode as a module does; a frozen encoder stays in evaluation mode, its head does not."""
        super().train(mode)
        for name, child in self.named_children() if self.encoder_frozen else ():
            if name not in _MODULES:
                child.eval()
        return self

    def freeze_encoder(self) -> None:
        """Train the head alone: `head` and an attentive head's `pooler`.

        All else, its final norm too, gets no gradient and drops nothing out.
        """
        self.encoder_frozen, self.grad_checkpointing = True, False
        for name, param in self.named_parameters():
            if name.partition(".")[0] not in _MODULES:
                param.requires_grad_(False)
        self.train(self.training)
