"""RandAugment over the operations that leave a street scene one, alike on all frames of a clip."""

import random
import re
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# No solarise, posterise or translate: a street scene stays one.
DRIVING_OPS = ["AutoContrast", "Equalize", "Invert", "Rotate", "Color"]
DRIVING_OPS += ["Contrast", "Brightness", "Sharpness", "ShearX", "ShearY"]
INTERPOLATIONS = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}


class RandAugment:
    """timm's RandAugment over DRIVING_OPS by a policy such as "rand-m6-n3-mstd0.5-inc1", alike on all frames of a clip.

    `inc` is accepted because published commands carry it; as in the reference it changes nothing, since the list of
    operations is fixed. Raises ValueError where the policy does not parse.
    """

    def __init__(self, policy: str, interpolation: str):
        self.augment = timm_policy(policy, interpolation)

    def __call__(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        """Turn uint8 (T, H, W, 3) into uint8 (T, H, W, 3)."""
        seed, augmented = int(rng.integers(2**32)), []
        python, numpy = random.getstate(), np.random.get_state()
        try:
            for frame in clip.numpy():
                random.seed(seed)  # timm draws from the global generators: replay them for each frame
                np.random.seed(seed)
                augmented.append(np.asarray(self.augment(Image.fromarray(frame))))
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
        return torch.from_numpy(np.stack(augmented))


def timm_policy(policy: str, interpolation: str) -> Callable[[Image.Image], Image.Image]:
    """Return the PIL image -> PIL image of `RandAugment`, which draws from Python's and NumPy's global generators."""
    from timm.data import auto_augment

    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, not {interpolation!r}")
    head, *parts = policy.split("-")
    pairs = [re.fullmatch(r"(m|n|mstd|inc)(\d+(?:\.\d+)?)", part) for part in parts]
    if head != "rand" or not all(pairs):
        raise ValueError(f"--aa {policy!r}: expected none or rand-m<0..10>-n<ops>-mstd<std>, e.g. rand-m6-n3-mstd0.5")
    values = {pair.group(1): float(pair.group(2)) for pair in pairs}
    magnitude, layers = values.get("m", 10.0), int(values.get("n", 2))
    if magnitude > 10 or layers < 1:
        raise ValueError(f"--aa {policy!r}: the magnitude goes from 0 to 10 and at least one operation is drawn")
    hparams = {
        "img_mean": (128, 128, 128),  # fills the corners of rotations and shears
        "interpolation": INTERPOLATIONS[interpolation],
        "magnitude_std": values.get("mstd", 0.0),
    }
    ops = auto_augment.rand_augment_ops(magnitude=magnitude, hparams=hparams, transforms=DRIVING_OPS)
    return auto_augment.RandAugment(ops, layers)
