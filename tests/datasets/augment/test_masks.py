import numpy as np
import pytest
from helpers import golden

from datasets.augment.masks import tube_mask


@pytest.mark.parametrize("case", golden("augment")["tube_mask"], ids=lambda c: f"{c['window']}-{c['ratio']}")
def test_counts_are_the_reference_s(case):
    slots, height, width = case["window"]
    mask = tube_mask((slots, height, width), case["ratio"], np.random.default_rng(0))
    assert mask.dtype == bool and list(mask.shape) == case["shape"]
    per_slot = mask.reshape(slots, -1)
    assert (per_slot.sum(axis=1) == case["masked_per_frame"]).all() and (per_slot == per_slot[0]).all()
    assert (~mask).sum() == case["total_visible"]


def test_masks_come_from_the_generator_and_reach_every_place():
    draws = [tube_mask((2, 4, 4), 0.75, np.random.default_rng(seed)) for seed in range(40)]
    assert np.array_equal(draws[3], tube_mask((2, 4, 4), 0.75, np.random.default_rng(3)))
    share = np.mean(draws, axis=0)
    assert share.min() > 0.4 and share.max() < 1.0 and share.mean() == 0.75


@pytest.mark.parametrize("ratio", [0.0, 0.01, 1.0, 1.5, -0.5, float("nan")])
def test_a_mask_hides_something_and_shows_something(ratio):
    with pytest.raises(ValueError, match="some must be masked and some not"):
        tube_mask((2, 4, 4), ratio, np.random.default_rng(0))
