"""Fixed position tables."""

import torch


def sinusoid_1d(num_positions: int, dim: int) -> torch.Tensor:
    """(num_positions, dim) float32: sine at even, cosine at odd channels, over the flattened (t h w) positions.

    angle(p, j) = p / 10000^(2 floor(j/2) / dim), computed in float64: the table of "Attention is all you need"
    (arXiv:1706.03762, section 3.5), which VideoMAE (arXiv:2203.12602) uses over all tokens of a clip.
    """
    channel = torch.arange(dim, dtype=torch.float64)
    position = torch.arange(num_positions, dtype=torch.float64)
    angle = position[:, None] / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()
