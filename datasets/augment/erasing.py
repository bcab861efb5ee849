"""Random erasing (arXiv:1708.04896): the boxes are drawn in the worker and filled on the device."""

import math

import numpy as np
import torch
from torch import Tensor

MIN_AREA = 0.02  # of the boxes together, as a share of the picture
MAX_ASPECT = 100.0


def draw_erasing(size: int, rng: np.random.Generator, *, prob: float, count: int, max_area: float) -> Tensor:
    """Draw boxes to erase of a picture of size x size pixels: int64 (count, 4), each top, left, height, width.

    With probability prob between 1 and count boxes are drawn, else none; a box of height 0 is none. Their areas,
    shared among them, are uniform in [MIN_AREA, max_area] of the picture, their aspect ratio log-uniform up to
    MAX_ASPECT either way.
    """
    boxes = torch.zeros(count, 4, dtype=torch.int64)
    if rng.random() >= prob:
        return boxes
    drawn = int(rng.integers(1, count + 1))
    for i in range(drawn):
        for _ in range(100):
            area = rng.uniform(MIN_AREA, max_area) * size * size / drawn
            aspect = math.exp(rng.uniform(-math.log(MAX_ASPECT), math.log(MAX_ASPECT)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < height < size and 0 < width < size:
                top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
                boxes[i] = torch.tensor([top, left, height, width])
                break
    return boxes
