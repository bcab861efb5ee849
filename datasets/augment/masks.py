"""Which tokens a masked autoencoder does not see."""

import numpy as np


def tube_mask(grid: tuple[int, int, int], ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a mask of a (t, h, w) grid: (t h w,) bool, True = masked; the same int(ratio h w) places in every slice t.

    A tube leaves nothing to copy from the frame before. The rule is VideoMAE's (arXiv:2203.12602). Raises what
    `masked_places` raises.
    """
    slots, height, width = grid
    mask = np.zeros(height * width, dtype=bool)
    mask[rng.permutation(height * width)[: masked_places(grid, ratio)]] = True
    return np.tile(mask, slots)


def masked_places(grid: tuple[int, int, int], ratio: float) -> int:
    """Return how many places of a slice are masked. Raises ValueError where that would be none or all of them."""
    places = grid[1] * grid[2]
    masked = int(ratio * places) if 0 < ratio < 1 else 0
    if not masked:
        raise ValueError(f"mask_ratio {ratio:g} of the {places} tokens of a frame: some must be masked and some not")
    return masked
