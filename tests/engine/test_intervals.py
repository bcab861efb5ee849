from statistics import NormalDist

import numpy as np
import pytest
from golden_clips import CLIPS, GOLDEN, labels_of, scored

from engine import intervals as iv
from engine.anticipation import clip_level, reduced
from engine.intervals import ScoreTable, interval, mean_of, multiplicities, replicate
from engine.metrics import frame_metrics

EXPECTED = GOLDEN["expected"]["bootstrap"]
SCORED = [i for i, c in enumerate(CLIPS) if len(c.time)]


def units_of(kind):
    names = [GOLDEN["clips"][i]["name" if kind == "clip" else "source"] for i in SCORED]
    return [list(dict.fromkeys(names)).index(n) for n in names]


def frames(unit, key):
    score = [scored(GOLDEN["clips"][i], key).score for i in SCORED]
    label = [labels_of(GOLDEN["clips"][i]) for i in SCORED]
    return np.concatenate(score), np.concatenate(label), np.repeat(unit, [len(s) for s in score])


@pytest.mark.parametrize("case", EXPECTED)
def test_golden(case):
    expected = EXPECTED[case]["formula"]
    metric, _, kind = case.partition("__by_")
    unit = units_of(kind)
    draws = multiplicities(max(unit) + 1, 400, GOLDEN["seed"] + 1)
    if metric == "clip_auc_max_before":
        values = np.array([reduced(CLIPS[i], "max_before") for i in SCORED])
        known = ~np.isnan(values)
        labels = np.array([CLIPS[i].positive for i in SCORED], int)
        sample = replicate(ScoreTable.of(values[known], labels[known], np.array(unit)[known], max(unit) + 1), draws)
        assert sample.estimate[0] == pytest.approx(clip_level(CLIPS, "max_before")["auc"])
    else:
        sample = replicate(ScoreTable.of(*frames(unit, "scores_1024")), draws)
        if metric.startswith("paired"):
            sample = sample.minus(replicate(ScoreTable.of(*frames(unit, "scores_b_1024")), draws))
    got = interval(sample.estimate[0], sample.replicates[0], sample.left_out[0])
    assert got.estimate == pytest.approx(expected["estimate"], abs=1e-9)
    assert got.percentile == pytest.approx(expected["percentile_95"], abs=1e-9)
    assert got.bca == pytest.approx(expected["bca_95"], abs=1e-9)
    assert (got.bias, got.acceleration) == pytest.approx((expected["z0"], expected["acceleration"]), abs=1e-9)
    assert got.standard_error == pytest.approx(expected["standard_error"], abs=1e-9)
    assert (got.units, got.undefined) == (expected["units"], expected["undefined"])


def clustered(rng, units, frames, *, spread=1.0, decimals=None):
    """Frames of units, each with a level of its own: (score, label, unit)."""
    unit = np.repeat(np.arange(units), frames)
    label = (rng.random(units * frames) < 0.4).astype(int)
    z = 1.2 * label + spread * rng.standard_normal(units)[unit] + rng.standard_normal(units * frames)
    score = 1 / (1 + np.exp(-z))
    return (score if decimals is None else np.round(score, decimals)), label, unit


def test_metrics_are_those_of_frame_metrics_with_every_multiplicity():
    score, label, unit = clustered(np.random.default_rng(1), 12, 60)
    table = ScoreTable.of(score, label, unit, 15)
    draws = multiplicities(15, 5, seed=3)
    sample = replicate(table, draws)
    assert table.exact and sample.left_out.shape == (4, 15)
    for row, times in enumerate(draws.astype(int)):
        chosen = np.concatenate([np.flatnonzero(unit == u) for u in range(15) for _ in range(times[u])])
        expected = frame_metrics(score[chosen], label[chosen])
        assert sample.replicates[:, row] == pytest.approx([expected[m] for m in iv.METRICS], abs=1e-12)
    left = frame_metrics(score[unit != 4], label[unit != 4])
    assert sample.left_out[:, 4] == pytest.approx([left[m] for m in iv.METRICS], abs=1e-12)


def test_the_order_of_frames_makes_no_difference_and_binning_next_to_none():
    score, label, unit = clustered(np.random.default_rng(2), 50, 800)
    table = ScoreTable.of(score, label, unit)
    exact = frame_metrics(score, label)
    assert not table.exact
    draws = multiplicities(50, 20, seed=0)
    sample = replicate(table, draws)
    assert sample.estimate == pytest.approx([exact[m] for m in iv.METRICS], abs=3e-5)
    assert sample.estimate[2] == pytest.approx(exact["auc_mcc"], abs=1e-12)
    mixed = np.random.default_rng(3).permutation(len(score))
    again = replicate(ScoreTable.of(score[mixed], label[mixed], unit[mixed]), draws)
    assert np.array_equal(sample.replicates, again.replicates)


def test_identical_files_differ_by_exactly_0():
    score, label, unit = clustered(np.random.default_rng(4), 40, 100)
    a, b = (replicate(ScoreTable.of(score, label, unit), multiplicities(40, 200, 1)) for _ in range(2))
    for metric in iv.METRICS:
        got = a.minus(b).interval(metric)
        assert (got.estimate, got.percentile, got.bca, got.excludes_0()) == (0, (0, 0), (0, 0), False)
    assert np.array_equal(mean_of([a, b]).replicates, a.replicates)


def test_what_has_no_interval_says_why():
    score, label, unit = clustered(np.random.default_rng(5), 9, 30)
    draws = multiplicities(9, 50)
    assert "10 are needed" in replicate(ScoreTable.of(score, label, unit), draws).interval("auroc").reason
    one_class = replicate(ScoreTable.of(score, np.zeros_like(label), unit), draws)
    assert "undefined" in one_class.interval("auroc").reason and np.isnan(one_class.interval("ap").estimate)
    half = np.where(np.arange(100) % 2, np.nan, np.arange(100))
    assert "50 of 100 replicates" in interval(0.5, half, half).reason
    some = np.where(np.arange(100) < 4, np.nan, np.arange(100))
    assert interval(50.0, some, np.arange(9.0)).undefined == 4 and interval(50.0, some, np.arange(9.0)).bca[0] > 0
    with pytest.raises(ValueError, match="probabilities"):
        ScoreTable.of([1.5], [0], [0])


def coverage(sets, clustered_by, truth):
    hits, widths = 0, []
    for seed in range(sets):
        score, label, unit = clustered(np.random.default_rng(seed), 100, 20, decimals=2)
        if clustered_by == "frame":
            unit = np.arange(len(score))
        draws = multiplicities(unit.max() + 1, 400, 10_000 + seed)
        low, high = replicate(ScoreTable.of(score, label, unit), draws).interval("auroc").percentile
        hits, widths = hits + (low <= truth <= high), [*widths, high - low]
    return hits / sets, np.mean(widths)


def test_coverage():
    """A 95 % interval over clustered units holds the truth as often as it says; one over frames does not."""
    truth = NormalDist().cdf(0.6)  # of two frames of different units: 1.2 apart, with a variance of 2 each
    by_unit, width = coverage(300, "unit", truth)
    by_frame, narrow = coverage(40, "frame", truth)
    assert 0.92 <= by_unit <= 0.97
    assert by_frame < 0.92 and narrow < width
