"""engine.linear_probe: held to the equations it solves, and to data whose answer is known."""

import numpy as np
import pytest
import torch

from engine.linear_probe import PENALTIES, effective_rank, fit_and_score, parts_by_unit
from engine.metrics import auroc_and_ap


def drawn(n=240, dims=12, units=40, strength=1.0, share=0.5, seed=0):
    """Features of which the first tells the class, labels, units of which half have both classes."""
    rng = np.random.default_rng(seed)
    label = (rng.random(n) < share).astype(np.int64)
    unit = rng.integers(0, units, n)
    features = rng.standard_normal((n, dims))
    features[:, 0] += strength * label
    return features, label, unit


def held(unit, label):
    return parts_by_unit(unit, label, 3) == 0


def test_parts_keep_units_whole_and_share_out_both_kinds():
    unit = np.repeat(np.arange(30) * 7, 4)
    label = np.where(unit < 15 * 7, np.arange(120) % 2, 0)  # of 15 units; the others are safe
    part = parts_by_unit(unit, label, 3)
    for u in np.unique(unit):
        assert len(set(part[unit == u])) == 1
    for anomalous in (unit < 15 * 7, unit >= 15 * 7):
        assert np.bincount(part[anomalous]).tolist() == [20, 20, 20]
    order = np.random.default_rng(1).permutation(120)
    np.testing.assert_array_equal(parts_by_unit(unit[order], label[order], 3), part[order])


@pytest.mark.parametrize("dims", [5, 400], ids=["tall", "wide"])
def test_the_scores_solve_the_weighted_ridge_equations(dims):
    """Both classes weigh a half, whatever their numbers; the intercept goes free of the penalty."""
    features, label, unit = drawn(dims=dims, share=0.15)
    out = held(unit, label)
    scores, penalty = fit_and_score(features, label, unit, out)
    assert penalty in PENALTIES
    x, y = features[~out], np.where(label[~out] == 1, 1.0, -1.0)
    weight = np.where(y > 0, 0.5 / (y > 0).sum(), 0.5 / (y < 0).sum())
    mean = weight @ x
    deviation = np.sqrt(weight @ (x - mean) ** 2)
    z = np.c_[(x - mean) / deviation, np.ones(len(x))]
    ridge = penalty * np.diag(np.r_[np.ones(dims), 0])
    solution = np.linalg.solve(z.T @ (weight[:, None] * z) + ridge, z.T @ (weight * y))
    value = np.c_[(features[out] - mean) / deviation, np.ones(out.sum())] @ solution
    np.testing.assert_allclose(np.log(scores / (1 - scores)), value, rtol=1e-6, atol=1e-8)


def test_scores_do_not_depend_on_units_of_measurement_or_order():
    features, label, unit = drawn()
    out = held(unit, label)
    scores, penalty = fit_and_score(features, label, unit, out)
    scale, shift = np.geomspace(1e-3, 1e3, 12), np.linspace(-5, 5, 12)
    again, same = fit_and_score(features * scale + shift, label, unit, out)
    assert same == penalty
    np.testing.assert_allclose(again, scores, rtol=1e-6)
    order = np.argsort(features[:, 1])
    shuffled, _ = fit_and_score(features[order], label[order], unit[order], out[order])
    np.testing.assert_allclose(shuffled, scores[np.searchsorted(np.flatnonzero(out), order[out[order]])], rtol=1e-6)


def test_features_that_say_nothing():
    features, label, unit = drawn(dims=3)
    out = held(unit, label)
    dead = np.c_[features, np.full(len(features), 1 / 3), np.zeros(len(features))]  # constant ones add nothing
    np.testing.assert_allclose(
        fit_and_score(dead, label, unit, out)[0], fit_and_score(features, label, unit, out)[0], rtol=1e-9
    )
    collapsed, _ = fit_and_score(np.full((len(label), 4), 0.1), label, unit, out)
    assert len(set(collapsed)) == 1 and auroc_and_ap(collapsed, label[out])[0] == 0.5


def test_what_can_be_told_is_told_and_noise_is_not():
    def auroc(**options):
        features, label, unit = drawn(n=1200, units=200, **options)
        out = held(unit, label)
        return auroc_and_ap(fit_and_score(features, label, unit, out)[0], label[out])[0]

    assert auroc(strength=50) == 1
    assert auroc(strength=1, share=0.05) > 0.65 < auroc(strength=1)
    assert 0.4 < auroc(strength=0, dims=300) < 0.6


def test_what_marks_a_recording_alone_does_not_count():
    """A feature that names the recording fits the training part, and is worth nothing on others."""
    rng = np.random.default_rng(0)
    unit = np.repeat(np.arange(60), 10)
    label = np.repeat(np.arange(60) % 2, 10)
    features = rng.standard_normal((60, 40))[unit] + 0.01 * rng.standard_normal((600, 40))
    out = held(unit, label)
    assert auroc_and_ap(fit_and_score(features, label, unit, out)[0], label[out])[0] < 0.75


def test_one_class_to_fit_on_is_refused():
    features, label, unit = drawn(n=20)
    with pytest.raises(ValueError, match="all of one class"):
        fit_and_score(features, label, unit, label == 1)


def test_few_windows_take_the_middle_penalty():
    features, label = np.eye(4), np.array([0, 1, 0, 1])
    scores, penalty = fit_and_score(features, label, np.array([0, 0, 1, 1]), np.array([False, False, True, True]))
    assert penalty == PENALTIES[len(PENALTIES) // 2] and np.isfinite(scores).all()


@pytest.mark.parametrize("dims", [1, 4, 7])
def test_effective_rank_counts_equal_directions(dims):
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((30, 30)))[0][:, :dims]
    assert effective_rank(basis @ np.random.default_rng(1).permutation(np.eye(9))[:dims]) == pytest.approx(dims)


def test_effective_rank_is_rankme():
    features = torch.randn(50, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    singular = torch.linalg.svdvals(features)
    share = singular / singular.sum() + 1e-7
    assert effective_rank(features.numpy()) == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-4)
    assert effective_rank(np.zeros((5, 3))) == 0 and effective_rank(np.ones((5, 3))) == pytest.approx(1)
    assert effective_rank(3 * features.numpy()) == pytest.approx(effective_rank(features.numpy()))
