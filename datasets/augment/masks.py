"""Which tokens a masked autoencoder does not see."""

import numpy as np


def tube_mask(grid: tuple[int, int, int], ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a mask of a (t, h, w) grid: (t h w,) bool, True = masked; the same int(ratio h w) places in every slice t.

    A tube leaves nothing to copy from the frame before. The rule is VideoMAE's (arXiv:2203.12602). Raises ValueError
    where no token would be masked or none visible.
    """
    slots, height, width = grid
    places = height * width
    masked = int(ratio * places) if 0 < ratio < 1 else 0
    if not masked:
        raise ValueError(f"mask ratio {ratio} of {places} places: some must be masked and some not")
    mask = np.zeros(places, dtype=bool)
    mask[rng.permutation(places)[:masked]] = True
    return np.tile(mask, slots)
