"""Fixed position tables, and how a table is fitted to another grid of tokens. Positions are in (t h w) order."""

import math

import torch
from einops import rearrange
from torch.nn import functional as F

Grid = tuple[int, int, int]  # tokens in time, height, width


def sinusoid_1d(num_positions: int, dim: int) -> torch.Tensor:
    """Return (num_positions, dim) float32: sine at even, cosine at odd channels, over the flattened (t h w) positions.

    angle(p, j) = p / 10000^(2 floor(j/2) / dim), computed in float64: the table of "Attention is all you need"
    (arXiv:1706.03762, section 3.5), which VideoMAE (arXiv:2203.12602) uses over all tokens of a clip.
    """
    channel = torch.arange(dim, dtype=torch.float64)
    position = torch.arange(num_positions, dtype=torch.float64)
    angle = position[:, None] / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def sincos_3d(grid: Grid, dim: int) -> torch.Tensor:
    """Return (t h w, dim) float32: dim / 4 channels code the slot, 3 dim / 8 the column, 3 dim / 8 the row.

    Each code is the sines, then the cosines, of position / 10000^(i / (d / 2)) over its d channels, in float64. Source:
    MVD (arXiv:2212.04500) and InternVideo2 (arXiv:2403.15377). Raises ValueError where dim does not divide by 16.
    """
    if dim % 16:
        raise ValueError(f"a 3-D sin-cos table needs a width that divides by 16, not {dim}")

    def code(length: int, channels: int) -> torch.Tensor:
        frequency = 10000 ** -(torch.arange(channels // 2, dtype=torch.float64) / (channels / 2))
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    t, h, w = grid
    slot = code(t, dim // 4)[:, None, None].expand(t, h, w, -1)
    column = code(w, 3 * dim // 8)[None, None].expand(t, h, w, -1)
    row = code(h, 3 * dim // 8)[None, :, None].expand(t, h, w, -1)
    return torch.cat([slot, column, row], dim=-1).flatten(0, 2).float()


def resampled(table: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    """Map (old t h w, dim) to (new t h w, dim): bicubic over each frame, then linear over time.

    Source: UMT (arXiv:2303.16058) and InternVideo2.
    """
    if old == new:
        return table
    planes = rearrange(table, "(t h w) d -> t d h w", t=old[0], h=old[1])
    if old[1:] != new[1:]:
        planes = F.interpolate(planes, size=new[1:], mode="bicubic", align_corners=False)
    if old[0] != new[0]:
        lines = rearrange(planes, "t d h w -> (h w) d t")
        lines = F.interpolate(lines, size=new[0], mode="linear", align_corners=False)
        planes = rearrange(lines, "(h w) d t -> t d h w", h=new[1])
    return rearrange(planes, "t d h w -> (t h w) d")


def likely_grid(positions: int, wanted: Grid) -> Grid | None:
    """Return the grid that a table of so many positions is for: the wanted one if it may be, else square frames of 7 x
    7 or more in 8 slots, as published tables have, or in as many as wanted, else the wanted frames. None if none fits.
    """
    if positions == math.prod(wanted):
        return wanted
    for slots in (8, wanted[0]):
        side = math.isqrt(max(positions, 0) // slots)
        if side >= 7 and slots * side * side == positions:
            return slots, side, side
    _, h, w = wanted
    return (positions // (h * w), h, w) if positions > 0 and positions % (h * w) == 0 else None


def position_table(kind: str, grid: Grid, dim: int) -> torch.Tensor:
    """Return (t h w, dim) float32 by kind: "sinusoid" (`sinusoid_1d`), "sincos_3d", or "umt": the sinusoid of 8 x 14 x
    14 tokens, `resampled` to the grid. Raises ValueError for another kind.
    """
    if kind == "sinusoid":
        return sinusoid_1d(math.prod(grid), dim)
    if kind == "sincos_3d":
        return sincos_3d(grid, dim)
    if kind == "umt":
        return resampled(sinusoid_1d(8 * 14 * 14, dim), (8, 14, 14), grid)
    raise ValueError(f"pos_embed must be sinusoid, sincos_3d or umt, not {kind!r}")
