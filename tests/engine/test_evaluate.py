import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from datasets.clips import Clip, ClipTable
from datasets.faults import Fault
from datasets.stream import WindowBatch
from engine.evaluate import (
    EvaluationError,
    Predictions,
    coverage,
    gather_predictions,
    score_windows,
    write_metrics,
    write_predictions,
)
from engine.plots import evaluation_figures, save_figures

LABELS = {0: np.array([0, 1, 1]), 2: np.array([0, 0, 0, 0])}
CLIPS = ClipTable(
    "DoTA",
    "val",
    [
        Clip("a", "", 3, 10.0, labels=LABELS[0].astype(np.uint8)),
        Clip("short", "", 1, 10.0, labels=np.zeros(1, np.uint8)),
        Clip("1/001", "", 4, 10.0, frame_name="{:04d}.png", first_frame=1, labels=LABELS[2].astype(np.uint8)),
    ],
)
EXPECTED = np.array([0, 0, 2, 2]), np.array([1, 2, 2, 3])


def gathered(clip=(2, 0, 2, 0), frame=(3, 1, 2, 2), logits=((2, -2), (-1, 1), (0, 0), (0.1234567891, 3))):
    local = np.array(clip), np.array(frame), np.array(logits, np.float32)
    return gather_predictions(local, EXPECTED, LABELS.__getitem__)


def test_predictions_are_sorted_and_labelled():
    predictions = gathered()
    assert predictions.clip.tolist() == [0, 0, 2, 2] and predictions.frame.tolist() == [1, 2, 2, 3]
    assert predictions.label.tolist() == [1, 1, 0, 0]
    np.testing.assert_allclose(predictions.score, [0.880797, 0.946675, 0.5, 0.017986], atol=1e-6)


@pytest.mark.parametrize(
    ("clip", "frame", "odd"),
    [
        ((2, 0, 2), (3, 1, 2), "clip 0, frame 2"),
        ((2, 0, 2, 0, 0), (3, 1, 2, 2, 2), "clip 0, frame 2"),
        ((2, 0, 2, 1), (3, 1, 2, 0), "clip 0, frame 2"),
    ],
    ids=["missing", "double", "foreign"],
)
def test_other_windows_than_the_expected_are_refused(clip, frame, odd):
    with pytest.raises(EvaluationError, match=f"scored {len(clip)} windows for 4 expected; the first .* is {odd}"):
        gathered(clip, frame, [(0, 0)] * len(clip))


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(EvaluationError, match="1 of 4 windows have NaN"):
        gathered(logits=((2, -2), (np.nan, 1), (0, 0), (0, 3)))


def test_extreme_logits_do_not_overflow():
    predictions = gathered(logits=((1e30, -1e30), (-1e30, 1e30), (0, 0), (-50, 50)))
    assert predictions.score.tolist() == [1.0, 1.0, 0.5, 0.0]
    assert predictions.metrics()["loss"] == pytest.approx(np.log(2) / 4, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_is_deterministic_and_in_the_precision_asked_for(dtype):
    torch.manual_seed(0)
    model, seen = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 2)).train(), []
    model.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    video = torch.randint(256, (2, 3, 1, 2, 2), dtype=torch.uint8)
    batches = [WindowBatch(0, np.array([3, 4]), video)]
    first, second = (score_windows(model, batches, lambda v: v / 255, dtype=dtype)[2] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert seen == [dtype] * 2 and first.dtype == np.float32


def test_one_class_is_said_to_say_nothing(caplog):
    Predictions(np.zeros(2), np.arange(2), np.zeros(2, int), np.zeros((2, 2), np.float32)).metrics()
    assert "all evaluated frames are of one class" in caplog.text


def test_predictions_csv(tmp_path):
    write_predictions(tmp_path / "predictions.csv", gathered(), CLIPS)
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert list(rows[0]) == ["clip", "filename", "frame", "logits_safe", "logits_risk", "score", "label", "ttc"]
    assert [(r["clip"], r["filename"], r["frame"]) for r in rows] == [
        ("a", "000001.jpg", "1"),
        ("a", "000002.jpg", "2"),
        ("1/001", "0003.png", "2"),
        ("1/001", "0004.png", "3"),
    ]
    assert np.float32(rows[1]["logits_safe"]) == np.float32(0.1234567891)  # nothing lost on the way
    assert [r["label"] for r in rows] == ["1", "1", "0", "0"]
    assert [r["ttc"] for r in rows] == ["0", "0", "", ""]


def test_every_clip_that_is_not_scored_stands_in_a_list():
    clips = ClipTable("DoTA", "val", CLIPS.clips, unreadable={"u": "why"}, left_out=["l"])
    lists = ("unreadable", "left_out", "frame_mismatch", "too_short")
    own = coverage(gathered(), clips, iter([Fault(2, "1/001", "more", 4)]))
    assert [own[name] for name in lists] == [["u"], ["l"], ["1/001"], ["short"]] and own["coverage"] == "2 of 5 clips"
    without = Predictions(*(np.asarray(part)[:2] for part in vars(gathered()).values()))
    own = coverage(without, clips, [Fault(2, "1/001", "broken")])
    assert [own[name] for name in lists] == [["u", "1/001"], ["l"], [], ["short"]] and own["clips_scored"] == 1


def test_metrics_json_has_null_where_undefined(tmp_path):
    write_metrics(tmp_path / "metrics.json", {"auroc": float("nan"), "ap": 0.5, "checkpoint": None})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"auroc": None, "ap": 0.5, "checkpoint": None}


def test_plots(tmp_path):
    predictions = gathered()
    figures = evaluation_figures(predictions.score, predictions.label, predictions.metrics())
    save_figures(tmp_path / "plots", figures)
    for name in ("roc", "pr", "mcc", "confusion"):
        with Image.open(tmp_path / "plots" / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
    texts = [t.get_text() for t in figures["confusion"].axes[0].texts]
    assert texts == ["1\n50.0 %", "1\n50.0 %", "0\n0.0 %", "2\n100.0 %"]
