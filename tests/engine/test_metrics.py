import hashlib

import numpy as np
import pytest
from helpers import golden

from engine.metrics import THRESHOLDS, frame_metrics, precision_recall_curve, roc_curve, threshold_curve

CASES = golden("metrics")["cases"]


def inputs(case):
    spec = case["input"]
    if spec["kind"] == "inline":
        p, y = np.array(spec["p"]), np.array(spec["y"])
    else:
        rng = np.random.Generator(np.random.PCG64(spec["seed"]))
        y = (rng.random(spec["n"]) < spec["pos_rate"]).astype(np.int64)
        z = rng.standard_normal(spec["n"]) * spec["scale"] + spec["shift"] * (2 * y - 1) + spec["bias"]
        p = 1 / (1 + np.exp(-z))
        if "quant" in spec:
            p = np.round(p / spec["quant"]) * spec["quant"]
    p = p.astype(np.float32)
    assert hashlib.sha256(p.tobytes()).hexdigest() == case["sha256_p_float32"]
    return p, y


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    p, y = inputs(CASES[name])
    ours, expected = frame_metrics(p, y), CASES[name]["expected"]
    exact, binned = expected["reference_exact"], expected["reference_training_eval"]
    for key, value in {
        "auroc": exact["auroc"],
        "ap": exact["ap"],
        "accuracy": exact["acc"],
        "precision": exact["precision"],
        "recall": exact["recall"],
        "f1": exact["f1"],
        "auc_mcc": binned["mcc_auc"],
        "mcc_max": binned["mcc_max"],
        "mcc_max_threshold": binned["mcc_max_thresh"],
        "mcc_05": binned["mcc_05"],
    }.items():
        assert ours[key] == pytest.approx(value, abs=1e-6), key
    assert ours["auroc_binned101"] == pytest.approx(binned["auroc_binned101"], abs=1e-5)
    assert ours["ap_binned101"] == pytest.approx(binned["ap_binned101"], abs=1e-5)
    assert (ours["n"], ours["n_pos"]) == (CASES[name]["n"], CASES[name]["n_pos"])
    curve = threshold_curve(p, y)
    for threshold, value in expected["mcc_at"].items():
        assert curve.mcc[round(float(threshold) * 100)] == pytest.approx(value, abs=1e-6)
    assert [[curve.tn[50], curve.fp[50]], [curve.fn[50], curve.tp[50]]] == exact["confmat_rows_true"]


def test_golden_logits():
    case = golden("metrics")["logits_case_400"]
    rng = np.random.Generator(np.random.PCG64(21))
    y = (rng.random(400) < 0.4).astype(np.int64)
    logits = rng.standard_normal((400, 2))
    logits[:, 1] += 1.1 * y - 0.4
    logits = logits.astype(np.float32)
    assert hashlib.sha256(logits.tobytes()).hexdigest() == case["sha256_L"]
    from engine.evaluate import Predictions

    metrics = Predictions(np.zeros(400, int), np.arange(400), y, logits).metrics()
    expected = case["expected"]
    for key, name in {
        "auc_mcc": "mcc_auc",
        "mcc_max": "mcc_max",
        "mcc_05": "mcc_05",
        "accuracy": "acc",
        "f1": "f1",
    }.items():
        assert metrics[key] == pytest.approx(expected[name], abs=1e-6), key
    assert metrics["auroc"] == pytest.approx(expected["anaysis_scripts_float64"]["auroc_exact"], abs=1e-6)
    assert metrics["auroc_binned101"] == pytest.approx(expected["auroc_binned101"], abs=1e-5)
    assert metrics["ap_binned101"] == pytest.approx(expected["ap_binned101"], abs=1e-5)
    log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    assert metrics["loss"] == pytest.approx(-log_p[np.arange(400), y].mean(), abs=1e-6)


def test_against_brute_force_with_ties():
    rng = np.random.default_rng(3)
    y = rng.integers(0, 2, 200)
    p = (rng.integers(0, 12, 200) / 11).astype(np.float32)
    pairs = [(a > b) + 0.5 * (a == b) for a in p[y == 1] for b in p[y == 0]]
    assert frame_metrics(p, y)["auroc"] == pytest.approx(np.mean(pairs), abs=1e-9)
    ap, previous = 0.0, 0.0
    for threshold in np.unique(p)[::-1]:
        called = p >= threshold
        recall = (called & (y == 1)).sum() / (y == 1).sum()
        ap += (recall - previous) * (called & (y == 1)).sum() / called.sum()
        previous = recall
    assert frame_metrics(p, y)["ap"] == pytest.approx(ap, abs=1e-9)


def test_one_class_only_is_undefined_not_zero():
    safe = frame_metrics(np.array([0.1, 0.7]), np.array([0, 0]))
    assert np.isnan(safe["auroc"]) and np.isnan(safe["ap"]) and np.isnan(safe["auroc_binned101"])
    assert safe["accuracy"] == 0.5 and safe["recall"] == 0 and safe["auc_mcc"] == 0
    assert np.isnan(frame_metrics(np.array([0.1, 0.7]), np.array([1, 1]))["auroc"])


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, np.nan], [0, 1], "NaN"),
        ([0.1, 1.5], [0, 1], r"\[0, 1\]"),
        ([0.1, 0.5], [0, 2], "0 or 1"),
        ([0.1], [0, 1], "1 scores for 2 labels"),
        ([], [], "0 scores"),
    ],
)
def test_other_input_is_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        frame_metrics(np.array(scores), np.array(labels))


def test_curves_begin_and_end_where_they_should():
    p, y = np.array([0.9, 0.8, 0.8, 0.1], np.float32), np.array([1, 0, 1, 0])
    fpr, tpr = roc_curve(p, y)
    assert fpr.tolist() == [0, 0, 0.5, 1] and tpr.tolist() == [0, 0.5, 1, 1]
    precision, recall = precision_recall_curve(p, y)
    assert precision.tolist() == [1, 2 / 3, 0.5] and recall.tolist() == [0.5, 1, 1]
    assert THRESHOLDS[50] == 0.5 and THRESHOLDS[-1] == 1.0 and len(THRESHOLDS) == 101
