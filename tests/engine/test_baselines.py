import json

import numpy as np
import pytest
from helpers import SHARED, golden

from engine.baselines import LabelTable, clip_oracle, cross_fitted_prior, prior
from engine.metrics import frame_metrics

DOTA = SHARED / "data" / "dota"
GOLDEN = golden("anticipation")
NAMES = {"frame_index": "frame_index", "relative_position": "position", "length": "length"} | {
    "position_x_length": "position_x_length"
}


def dota(split):
    """(names, table) of windows of 16 frames on every frame from 15 on, as the golden file has them."""
    names = (DOTA / f"{split}_split.txt").read_text().split()
    metadata = json.loads((DOTA / f"metadata_{split}.json").read_text())
    lengths = np.array([int(metadata[n]["num_frames"]) for n in names])
    spans = [(int(metadata[n]["anomaly_start"]), int(metadata[n]["anomaly_end"])) for n in names]
    frames = [np.arange(15, n) for n in lengths]
    labels = [((f >= s) & (f < e)).astype(int) for f, (s, e) in zip(frames, spans, strict=True)]
    clip = np.repeat(np.arange(len(names)), [len(f) for f in frames])
    return names, LabelTable(clip, np.concatenate(frames), np.concatenate(labels), lengths - 1)


@pytest.mark.skipif(not DOTA.is_dir(), reason="the lists of DoTA are absent")
def test_dota():
    """What the cutting of DoTA's clips gives away: 77.5 / 23.1 by position, 78.0 / 25.4 with the length."""
    (_, train), (names, val) = dota("train"), dota("val")
    expected = GOLDEN["dota_val_trivial_baselines"]
    for theirs, ours in NAMES.items():
        got = frame_metrics(prior(ours, train, val), val.label)
        for key in ("auroc", "ap", "auc_mcc", "n", "n_pos"):
            assert got[key] == pytest.approx(expected[theirs][key], abs=1e-7), (ours, key)
    position = frame_metrics(prior("position", train, val), val.label)
    assert 100 * position["auroc"] == pytest.approx(77.5, abs=0.1)
    assert 100 * position["auc_mcc"] == pytest.approx(23.1, abs=0.1)
    oracle = frame_metrics(clip_oracle(val), val.label)
    assert oracle["auroc"] == pytest.approx(expected["clip_oracle"]["auroc"], abs=1e-7)
    sources = {}
    source = np.array([sources.setdefault(n[:-7], len(sources)) for n in names])
    without_train = frame_metrics(cross_fitted_prior("position", val, source), val.label)["auroc"]
    assert without_train == pytest.approx(position["auroc"], abs=0.01)


def test_clip_oracle_of_the_golden_clips():
    clips, label, number = GOLDEN["clips"], [], []
    for i, c in enumerate(clips):
        frames = np.arange(15, c["n_frames"])
        label.append([any(s <= f <= e for s, e in c["intervals"]) for f in frames])
        number.append(np.full(len(frames), i))
    label, number = np.concatenate([np.array(x, int) for x in label]), np.concatenate(number)
    got = frame_metrics(clip_oracle(LabelTable(number, number, label)), label)
    expected = GOLDEN["expected"]["clip_oracle"]["formula"]
    assert got["auroc"] == pytest.approx(expected["auroc"], abs=1e-9)
    assert got["ap"] == pytest.approx(expected["ap"], abs=1e-9)
    constant = frame_metrics(np.full(len(label), 0.51), label)
    assert constant["auroc"] == 0.5
    assert constant["ap"] == pytest.approx(GOLDEN["expected"]["constant_0.51"]["formula"]["frame_ap"], abs=1e-9)


def test_a_cross_fitted_prior_does_not_see_its_own_labels():
    """Labels that follow no rule: a prior that saw them would be better than chance."""
    rng = np.random.default_rng(0)
    clip, frame = np.repeat(np.arange(40), 50), np.tile(np.arange(50), 40)
    table = LabelTable(clip, frame, rng.integers(0, 2, len(clip)))
    changed = table.label.copy()
    changed[clip == 3] = 1 - changed[clip == 3]
    source = np.arange(40) // 2
    for name in ("position", "frame_index", "position_x_length"):
        before = cross_fitted_prior(name, table, source)
        after = cross_fitted_prior(name, LabelTable(clip, frame, changed), source)
        assert np.array_equal(before[clip == 3], after[clip == 3]) and not np.array_equal(before, after)
        assert abs(frame_metrics(before, table.label)["auroc"] - 0.5) < 0.05
    with pytest.raises(ValueError, match="one recording"):
        cross_fitted_prior("position", table, np.zeros(40, int))


def test_clips_of_one_frame_and_labels_of_one_kind():
    table = LabelTable(np.arange(3), np.zeros(3, int), np.array([1, 1, 1]))
    assert prior("position", table, table).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="no labels"):
        empty = np.zeros(0, int)
        prior("position", LabelTable(empty, empty, empty), table)
