"""ViViT's unfactorised Video ViT (arXiv:2103.15691): a class token, a learned position table, tanh GELU.

Shapes: B clips, T frames, H x W pixels, N tokens in (t h w) order, D channels of a token, K classes.
State-dict keys are those of `models.vit`, with `cls_token` and `pos_embed`. Published weights: Scenic's projects/vivit
and huggingface.co/google/vivit-b-16x2-kinetics400. Keys have no bias here: it changes no attention weight.
"""

from functools import partial

import torch
from timm.layers import trunc_normal_
from torch import nn

from models.registry import Dropout, ModelDefaults, VideoInput, register_model
from models.vit import BASE, TINY, Size, VideoEncoder, build_blocks


class ViViT(VideoEncoder):
    """ViViT: (B, 3, T, H, W) normalised RGB -> (B, K) logits.

    Args:
        final_reduction: "cls" = norm, then the class token; "attentive" = norm, all tokens but the class token to an
            attentive head; "none" = norm, the same tokens (B, N, D).
        The others: as VideoViT's.

    Raises ValueError where sizes do not divide or final_reduction or gelu is unknown.
    """

    reductions = {"cls": "linear", "attentive": "attentive"}

    def __init__(
        self,
        size: Size,
        video: VideoInput,
        dropout: Dropout,
        *,
        num_classes: int = 2,
        gelu: str = "tanh",
        init_scale: float = 0.001,
        final_reduction: str = "cls",
    ):
        super().__init__(size, video, gelu=gelu, final_reduction=final_reduction, pos_embed_kind="learned")
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1] * self.grid[2], size.embed_dim))
        self.blocks = build_blocks(size, dropout, gelu)
        self.add_head(num_classes, fc_norm=None, drop_rate=dropout.fc_drop_rate)
        self.initialize(init_scale)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)

    def encode(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Map (B, n, D) to (B, n, D): any subset of the tokens, with the class token, through the blocks and `norm`."""
        return self._with_class_token(x)[:, 1:]

    def forward_features(self, video: torch.Tensor) -> torch.Tensor:
        """Map (B, 3, T, H, W) to (B, D), the class token, or to all others (B, N, D)."""
        x = self._with_class_token(self.embed(video))
        return x[:, 0] if self.final_reduction == "cls" else x[:, 1:]

    def _with_class_token(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, n, D) to (B, 1 + n, D) through the blocks and `norm`."""
        first = (self.cls_token + self.pos_embed[:, :1]).to(x.dtype)
        return self.norm(self.run_blocks(torch.cat([first.expand(x.shape[0], -1, -1), x], dim=1)))


_PIXELS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # -1 to 1
MODELS = {  # name: size, defaults; the tiny one is for tests, not published
    "vivit_tiny_patch16_64": (TINY, {"num_frames": 4, "view_fps": 5, "input_size": 64, "finetune_lr": 1e-3, **_PIXELS}),
    "vivit_base_patch16_224": (BASE, {"num_frames": 32, "view_fps": 12.5, **_PIXELS}),  # 89 M; every other of 25 fps
}
for _name, (_size, _defaults) in MODELS.items():
    register_model(_name, partial(ViViT, _size), ModelDefaults(**_defaults))
