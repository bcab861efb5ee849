"""RandAugment over the operations that leave a street scene one: what is drawn for a clip, not how it is done."""

import random
import re
from typing import Any

import numpy as np

# No solarise, posterise or translate: a street scene stays one.
DRIVING_OPS = ["AutoContrast", "Equalize", "Invert", "Rotate", "Color"]
DRIVING_OPS += ["Contrast", "Brightness", "Sharpness", "ShearX", "ShearY"]
NO_OP = -1  # in the place of an operation that is left out


class RandAugment:
    """Draws by timm's RandAugment over DRIVING_OPS, with a policy such as "rand-m6-n3-mstd0.5-inc1".

    `inc` is accepted because published commands carry it; as in the reference it changes nothing, since the list of
    operations is fixed. Raises ValueError where the policy does not parse.
    """

    def __init__(self, policy: str):
        self.policy = timm_policy(policy)
        self.layers = self.policy.num_layers
        for number, op in enumerate(self.policy.ops):
            op.aug_fn = _recorder(number)  # timm then draws, and notes in place of doing

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw the operations of a clip, in order: their places in DRIVING_OPS, or NO_OP, int64 (n,), and levels (n,).

        A level is in the units of the operation (see operations.py), float64; 0 where it has none.
        """
        seed = int(rng.integers(2**32))
        python, numpy = random.getstate(), np.random.get_state()
        try:
            random.seed(seed)  # timm draws from the global generators
            np.random.seed(seed)
            drawn: list[tuple[int, float]] = self.policy([])
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
        drawn = drawn + [(NO_OP, 0.0)] * (self.layers - len(drawn))
        return np.array([op for op, _ in drawn]), np.array([level for _, level in drawn])


def _recorder(number: int):
    """Return what stands for an operation of timm's: it appends (number, level) to the list it is called with."""

    def record(drawn: list[tuple[int, float]], level: float = 0.0, **_: Any) -> list[tuple[int, float]]:
        return [*drawn, (number, level)]

    return record


def timm_policy(policy: str, **hparams: Any) -> Any:
    """Return timm's RandAugment of a policy; it draws from Python's and NumPy's global generators.

    hparams: of timm's operations. Raises ValueError where the policy does not parse.
    """
    from timm.data import auto_augment

    head, *parts = policy.split("-")
    pairs = [re.fullmatch(r"(m|n|mstd|inc)(\d+(?:\.\d+)?)", part) for part in parts]
    if head != "rand" or not all(pairs):
        raise ValueError(f"--aa {policy!r}: expected none or rand-m<0..10>-n<ops>-mstd<std>, e.g. rand-m6-n3-mstd0.5")
    values = {pair.group(1): float(pair.group(2)) for pair in pairs}
    magnitude, layers = values.get("m", 10.0), int(values.get("n", 2))
    if magnitude > 10 or not 1 <= layers <= 100:
        raise ValueError(f"--aa {policy!r}: the magnitude goes from 0 to 10, and 1 to 100 operations are drawn")
    hparams["magnitude_std"] = values.get("mstd", 0.0)
    ops = auto_augment.rand_augment_ops(magnitude=magnitude, hparams=hparams, transforms=DRIVING_OPS)
    return auto_augment.RandAugment(ops, layers)
