"""The plain Video ViT: encoder and classifier of VideoMAE and of the families that share its architecture.

Shapes: B clips, T frames, H x W pixels, N tokens in (t h w) order, D channels of a token, K classes.
State-dict keys are those of the published fine-tuned checkpoints (github.com/MCG-NJU/VideoMAE), so files go both ways.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
from einops import rearrange
from timm.layers import trunc_normal_
from timm.models.beit import Block  # the VideoMAE block: q and v bias without k bias, keys `attn.q_bias`, `attn.v_bias`
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.heads import AttentivePooler, Headed
from models.pos_embed import position_table
from models.registry import SPEC_VERSION, Dropout, ModelDefaults, VideoInput, register_model

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


@dataclass(frozen=True)
class Size:
    """How large a transformer is.

    embed_dim: D.
    depth: the number of blocks.
    num_heads: the heads of each attention.
    patch_size: height and width of an encoder's token in pixels.
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16


class TubeletEmbed(nn.Module):
    """(B, 3, T, H, W) -> (B, N, D): one token per cube of pixels, its sides in time, height, width."""

    def __init__(self, cube: tuple[int, int, int], embed_dim: int):
        super().__init__()
        self.cube = cube
        self.proj = nn.Conv3d(3, embed_dim, kernel_size=cube, stride=cube)  # holds the weights under published names

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        # As a matrix product: for half-precision convolutions whose kernel is their stride cuDNN may have none but slow
        # algorithms.
        a, p, q = self.cube
        cubes = rearrange(video, "b c (t a) (h p) (w q) -> b (t h w) (c a p q)", a=a, p=p, q=q)
        return F.linear(cubes, self.proj.weight.flatten(1), self.proj.bias)


def gelu_layer(kind: str) -> Callable[[], nn.Module]:
    """Return the constructor of a GELU, "erf" or "tanh", its approximation. Raises ValueError for another."""
    if kind not in ("erf", "tanh"):
        raise ValueError(f"gelu must be erf or tanh, not {kind!r}")
    return partial(nn.GELU, approximate="none" if kind == "erf" else "tanh")


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Return stochastic depth of each block: linear from 0 at the first to `last`."""
    return torch.linspace(0, last, depth, device="cpu").tolist()


def build_blocks(size: Size, dropout: Dropout, gelu: str = "erf") -> nn.ModuleList:
    """Return VideoMAE's transformer blocks. Raises ValueError for an unknown gelu."""
    blocks = nn.ModuleList(
        Block(
            size.embed_dim,
            size.num_heads,
            qkv_bias=True,
            proj_drop=dropout.drop_rate,
            attn_drop=dropout.attn_drop_rate,
            drop_path=drop_path,
            act_layer=gelu_layer(gelu),
            norm_layer=LayerNorm,
        )
        for drop_path in drop_path_rates(dropout.drop_path_rate, size.depth)
    )
    for block in blocks:
        block.mlp.drop1 = nn.Identity()  # VideoMAE drops after fc2 only
    return blocks


def normalized(video: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Map uint8 RGB (B, 3, T, H, W) to float32: less the mean (3,), over the deviation (3,), both of pixels in [0, 1].

    All are on one device.
    """
    mean, std = (x[:, None, None, None] * 255 for x in (mean, std))
    return video.to(torch.float32, copy=True).sub_(mean).div_(std)


def run_blocks(blocks: nn.ModuleList, x: torch.Tensor, *, recompute: bool) -> torch.Tensor:
    """Run (B, n, D) through the blocks. recompute: their activations in the backward pass, to save memory."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return x


def init_weights(module: nn.Module) -> None:
    """Draw weights as VideoMAE does; the 3-D convolution keeps PyTorch's."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class VideoEncoder(Headed):
    """What the Video ViTs share: (B, 3, T, H, W) to tokens, layers for learning-rate decay, freezing, a head in fp32.

    A subclass adds `blocks`, calls `add_head` and `initialize`, and defines `forward_features(video)`, what the head
    gets: (B, features) pooled and normed, or for an attentive head, and where final_reduction is "none", as under a
    masked autoencoder, the normed tokens (B, N, D), without a class token. If it has a position table, that is
    `pos_embed`, (1, N, D), or (1, 1 + N, D) with a class token before the others, and `embed` adds it; else it defines
    `encode`, which recomputes blocks where self.grad_checkpointing and self.training, as `run_blocks` does. Its
    constructor takes a VideoInput, a Dropout, and num_classes, gelu, init_scale and final_reduction.

    Args:
        size, video: the transformer's size, the clips it takes.
        gelu: "erf", or "tanh" for its approximation.
        final_reduction: what becomes of the tokens before the head, one of `reductions` or "none".
        pos_embed_kind: a kind of `position_table`, "learned", or what stands in its place.

    Raises ValueError where sizes do not divide, or final_reduction is unknown.
    """

    name = ""  # where it is registered

    def __init__(self, size: Size, video: VideoInput, *, gelu: str, final_reduction: str, pos_embed_kind: str):
        super().__init__()
        self.reduction_of(final_reduction, None)  # raises for an unknown one
        num_frames, input_size = video.num_frames, video.input_size
        tubelet_size, patch_size = video.tubelet_size, size.patch_size
        if input_size % patch_size or num_frames % tubelet_size:
            raise ValueError(
                f"input_size {input_size} must be a multiple of the patch size {patch_size}, "
                f"and num_frames {num_frames} of tubelet_size {tubelet_size}"
            )
        self.video, self.gelu, self.final_reduction = video, gelu, final_reduction
        self.input_shape = (3, num_frames, input_size, input_size)
        self.grid = (num_frames // tubelet_size, input_size // patch_size, input_size // patch_size)
        self.embed_dim, self.num_heads, self.pos_embed_kind = size.embed_dim, size.num_heads, pos_embed_kind
        self.head_kind, self.grad_checkpointing = self.reductions.get(final_reduction), False
        self.register_buffer("pos_embed", None, persistent=False)
        self.register_buffer("mean", torch.tensor(video.mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(video.std, dtype=torch.float32), persistent=False)
        self.patch_embed = TubeletEmbed((tubelet_size, patch_size, patch_size), size.embed_dim)

    def add_head(
        self, num_classes: int, *, fc_norm: nn.LayerNorm | None, drop_rate: float, probe_heads: int | None = None
    ) -> None:
        """Add `norm`, `fc_norm`, `fc_dropout`, `head`, which is left out for 0 classes, and `pooler` if attentive.

        One of the two norms does something, under the name that its published checkpoints use: `fc_norm`, that of
        pooled features, or where that is None `norm`, that of tokens. probe_heads: the heads of an attentive
        probe, if not as many as the encoder's.
        """
        self.norm = nn.Identity() if fc_norm else LayerNorm(self.embed_dim)
        self.fc_norm = fc_norm or nn.Identity()
        self.fc_dropout = nn.Dropout(drop_rate)
        features = fc_norm.normalized_shape[0] if fc_norm else self.embed_dim
        self.head = nn.Linear(features, num_classes) if num_classes else nn.Identity()
        if self.head_kind == "attentive":
            self.pooler = AttentivePooler(self.embed_dim, probe_heads or self.num_heads, depth=self.probe_depth)

    def initialize(self, init_scale: float) -> None:
        """Draw the weights; init_scale is a factor on the head's."""
        self.apply(init_weights)
        if isinstance(self.head, nn.Linear):
            with torch.no_grad():
                self.head.weight.mul_(init_scale)

    @property
    def spec(self) -> dict:
        """All that `models.load` builds the model from, in plain types: a new dictionary each time."""
        video = {f.name: getattr(self.video, f.name) for f in fields(VideoInput)}
        count = getattr(self.head, "out_features", 0)
        return {
            "version": SPEC_VERSION,
            "model": self.name,
            **{key: [*map(float, value)] if key in ("mean", "std") else value for key, value in video.items()},
            "gelu": self.gelu,
            "final_reduction": self.final_reduction,
            **({"head": self.head_kind} if self.head_kind == "attentive" else {}),
            "pos_embed": "learned" if isinstance(self.pos_embed, nn.Parameter) else self.pos_embed_kind,
            "classes": ["safe", "risk"] if count == 2 else [f"class_{i}" for i in range(count)],
        }

    def normalize(self, video: torch.Tensor) -> torch.Tensor:
        """Map uint8 RGB (B, 3, T, H, W), on the model's device, to float32: less the mean, over the deviation."""
        return normalized(video, self.mean, self.std)

    def embed(self, video: torch.Tensor) -> torch.Tensor:
        """Map (B, 3, T, H, W) to (B, N, D): tokens, their position added if there is a table.

        Raises ValueError on another number of channels, T, H or W.
        """
        if tuple(video.shape[1:]) != self.input_shape:
            raise ValueError(f"expected a video of shape (B, {', '.join(map(str, self.input_shape))}), "
                             f"got {tuple(video.shape)}")  # fmt: skip
        x = self.patch_embed(video)
        if self.pos_embed is None:
            return x
        positions = self.pos_embed[:, -x.shape[1] :]  # a class token's comes before them
        return x + positions.to(x.dtype)  # in the activations' type, as published, so autocast stays in half

    def run_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """Run (B, n, D) through the blocks."""
        return run_blocks(self.blocks, x, recompute=self.grad_checkpointing and self.training)

    def encode(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Map (B, n, D) to (B, n, D): any subset of the tokens of `embed` through the blocks and `norm`.

        positions: (B, n) int64, the numbers of the tokens in (t h w) order; None stands for all of them in order. An
        encoder with a position table does without.
        """
        return self.norm(self.run_blocks(x))

    def learn_pos_embed(self) -> None:
        """Make the position table a parameter, trained and saved like the others; nothing where it is one.

        Raises ValueError where there is no table.
        """
        table = self.pos_embed
        if table is None:
            raise ValueError(f"{self.name or type(self).__name__} has no position table: {self.pos_embed_kind}")
        if not isinstance(table, nn.Parameter):
            del self.pos_embed
            self.pos_embed = nn.Parameter(table.clone())

    def no_weight_decay(self) -> set[str]:
        """Return names of parameters without weight decay, beyond the 1-D ones."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's layer grouping for layer decay: embedding 0, block i at i + 1, all behind the blocks last."""
        return {"stem": r"^cls_token|^pos_embed|^patch_embed", "blocks": [(r"^blocks\.(\d+)", None)]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations; a frozen one needs neither."""
        self.grad_checkpointing = enable and not self.encoder_frozen

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
        size, video, dropout: the transformer's size, the clips it takes, what is left out in training.
        pos_embed: position table, a kind of `position_table`; fixed unless `learn_pos_embed` is called.
        num_classes: K; 0 leaves the head out (`forward` then returns the features).
        gelu: "erf", or "tanh" for its approximation.
        init_scale: factor on the head's initial weights.
        final_reduction: "fc_norm" = mean over tokens, then norm; "cls" = norm, then the first token; "attentive" =
            norm, all tokens to an attentive head; "none" = norm, all tokens (B, N, D).

    Raises ValueError where sizes do not divide or final_reduction or gelu is unknown.
    """

    reductions = {"fc_norm": "linear", "cls": "linear", "attentive": "attentive"}

    def __init__(
        self,
        size: Size,
        pos_embed: str,
        video: VideoInput,
        dropout: Dropout,
        *,
        num_classes: int = 2,
        gelu: str = "erf",
        init_scale: float = 0.001,
        final_reduction: str = "fc_norm",
    ):
        super().__init__(size, video, gelu=gelu, final_reduction=final_reduction, pos_embed_kind=pos_embed)
        table = position_table(pos_embed, self.grid, size.embed_dim)
        self.register_buffer("pos_embed", table[None], persistent=False)
        self.blocks = build_blocks(size, dropout, gelu)
        fc_norm = LayerNorm(size.embed_dim) if final_reduction == "fc_norm" else None
        self.add_head(num_classes, fc_norm=fc_norm, drop_rate=dropout.fc_drop_rate)
        self.initialize(init_scale)

    def forward_features(self, video: torch.Tensor) -> torch.Tensor:
        """Map (B, 3, T, H, W) to (B, D) pooled and normed, or to all tokens (B, N, D)."""
        x = self.encode(self.embed(video))
        if self.final_reduction == "fc_norm":
            return self.fc_norm(x.mean(dim=1))
        return x[:, 0] if self.final_reduction == "cls" else x


TINY, SMALL, BASE = Size(128, 4, 4), Size(384, 12, 6), Size(768, 12, 12)
LARGE, HUGE = Size(1024, 24, 16), Size(1280, 32, 16)
_TINY = {"num_frames": 4, "view_fps": 5, "input_size": 64, "finetune_lr": 1e-3}
_UMT = {"num_frames": 8, "view_fps": 5, "tubelet_size": 1}  # a token per frame

MODELS = {  # name: size, position table, defaults; the tiny ones are for tests and the demo, none is published
    "vit_tiny_patch16_64": (TINY, "sinusoid", _TINY),
    "vit_small_patch16_224": (SMALL, "sinusoid", {"finetune_lr": 1e-3}),  # 22 M parameters
    "vit_base_patch16_224": (BASE, "sinusoid", {}),  # 86 M
    "vit_large_patch16_224": (LARGE, "sinusoid", {}),  # 304 M
    "vit_huge_patch16_224": (HUGE, "sinusoid", {}),  # 633 M
    "mvd_vit_tiny_patch16_64": (TINY, "sincos_3d", _TINY),
    "mvd_vit_small_patch16_224": (SMALL, "sincos_3d", {"finetune_lr": 1e-3}),
    "mvd_vit_base_patch16_224": (BASE, "sincos_3d", {}),
    "mvd_vit_large_patch16_224": (LARGE, "sincos_3d", {}),
    "umt_vit_tiny_patch16_64": (TINY, "umt", {**_TINY, "tubelet_size": 1}),
    "umt_vit_small_patch16_224": (SMALL, "umt", {**_UMT, "finetune_lr": 1e-3}),
    "umt_vit_base_patch16_224": (BASE, "umt", _UMT),
    "umt_vit_large_patch16_224": (LARGE, "umt", _UMT),
}
for _name, (_size, _pos_embed, _defaults) in MODELS.items():
    register_model(_name, partial(VideoViT, _size, _pos_embed), ModelDefaults(**_defaults))
