import numpy as np
import pytest
import torch
from helpers import golden

from engine.losses import LOSSES, Targets

NAMES = {
    "crossentropy": "crossentropy",
    "focal": "focal(alpha=0.75,gamma=2)",
    "focal6x100": "focal6x100(alpha=.75,gamma=6,mult=100)",
    "focal2_6": "focal2_6(alpha=[.4,.6],gamma=6,mult=50)",
    "focal2_2": "focal2_2(alpha=[.4,.6],gamma=2,mult=10)",
    "smoothap": "smoothap(delta=0.01)",
    "2bce": "2bce",
    "exponential1": "exponential(alpha_pre=.1,alpha_post=.5)",
}


def batch():
    g = golden("losses")
    soft = torch.tensor(g["2bce_soft_targets"])[:, 1]
    return torch.tensor(g["logits"], requires_grad=True), Targets(
        torch.tensor(g["labels"]), soft, torch.tensor(g["ttc"])
    )


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    logits, targets = batch()
    loss = LOSSES[name](logits, targets)
    assert loss.item() == pytest.approx(golden("losses")[NAMES[name]], rel=1e-6)
    loss.backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


def test_clips_without_anomaly_count_fully():
    logits, targets = batch()
    safe = Targets(torch.zeros(3, dtype=torch.long), torch.zeros(3), torch.full((3,), float("nan")))
    torch.testing.assert_close(LOSSES["exponential1"](logits, safe), LOSSES["crossentropy"](logits, safe))


def test_pairs_need_both_classes():
    logits, targets = batch()
    for label in (0, 1):
        only = Targets(torch.full((3,), label), targets.soft_label, targets.ttc)
        assert LOSSES["smoothap"](logits, only).item() == 0


def test_far_frames_hardly_count():
    logits = torch.zeros(2, 2)
    targets = Targets(torch.zeros(2, dtype=torch.long), torch.zeros(2), torch.tensor([-100.0, 0.0]))
    expected = np.log(2) * (np.exp(-10) + 1) / 2
    assert LOSSES["exponential1"](logits, targets).item() == pytest.approx(expected, rel=1e-5)
