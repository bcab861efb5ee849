import csv
import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import session
from PIL import Image
from torch import nn

from datasets import build_clips
from datasets.augment.frames import EvalTransform
from datasets.clips import Clip, ClipTable
from datasets.faults import Fault
from datasets.stream import SplitWindows, WindowBatch
from datasets.windows import index_clips
from engine.checkpoint import Progress
from engine.evaluate import (
    COLUMNS,
    EvaluationError,
    Predictions,
    Scorer,
    coverage,
    gather_predictions,
    read_predictions,
    write_metrics,
    write_predictions,
)
from engine.plots import evaluation_figures, save_figures
from engine.report import clip_hash, read_frames
from engine.report.lists import KNOWN
from models import create_model
from utils.signals import Preempted

LABELS = {0: np.array([0, 1, 1]), 2: np.array([0, 0, 0, 0])}
CLIPS = ClipTable(
    "DoTA",
    "val",
    [
        Clip("a", "", 3, 10.0, labels=LABELS[0].astype(np.uint8), category="turning, left", ego=True, night=False),
        Clip("short", "", 1, 10.0, labels=np.zeros(1, np.uint8)),
        Clip("1/001", "", 4, 10.0, frame_name="{:04d}.png", first_frame=1, labels=LABELS[2].astype(np.uint8)),
    ],
)
EXPECTED = np.array([0, 0, 2, 2]), np.array([1, 2, 2, 3])


def gathered(
    clip=(2, 0, 2, 0),
    frame=(3, 1, 2, 2),
    logits=((2, -2), (-1, 1), (0, 0), (0.1234567891, 3)),
    *,
    clips=CLIPS,
    faults=(),
    dtype=torch.float32,
):
    scored = np.array(clip), np.array(frame), np.array(logits, np.float32)
    return gather_predictions(scored, EXPECTED, clips, faults, dtype)


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
    broken = {"logits": ((2, -2), (np.nan, 1), (0, 0), (0, 3))}
    with pytest.raises(EvaluationError, match="1 of 4 windows have NaN.*have diverged, as at too high a rate$"):
        gathered(**broken)  # in float32, which is no remedy then
    with pytest.raises(EvaluationError, match="or torch.bfloat16 overflows, where --precision fp32 does not"):
        gathered(**broken, dtype=torch.bfloat16)


def test_extreme_logits_do_not_overflow():
    predictions = gathered(logits=((1e30, -1e30), (-1e30, 1e30), (0, 0), (-50, 50)))
    assert predictions.score.tolist() == [1.0, 1.0, 0.5, 0.0]
    assert predictions.metrics()["loss"] == pytest.approx(np.log(2) / 4, abs=1e-6)


class Listed:
    """The windows of CLIPS without files: batches and faults from a list."""

    def __init__(self, items, expected=EXPECTED):
        self.items, self.expected, self.clips, self.device = items, expected, CLIPS, torch.device("cpu")

    def batches(self, normalize):
        return (replace(i, video=normalize(i.video)) if hasattr(i, "video") else i for i in self.items)

    def locations(self):
        return self.expected

    def agree(self, faults):
        return faults


def batch(clip, *last):
    generator = torch.Generator().manual_seed(clip)
    video = torch.randint(256, (len(last), 3, 1, 2, 2), generator=generator, dtype=torch.uint8)
    return WindowBatch(np.full(len(last), clip), np.array(last), video)


def tiny():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 2)).train()
    model.normalize = lambda video: video / 255
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_is_deterministic_and_in_the_precision_asked_for(dtype):
    model, seen = tiny(), []
    model.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    scorer = Scorer(Listed([batch(2, 2, 3), batch(0, 1, 2)]), dtype)
    first, second = (scorer.score(model).logits for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert seen == [dtype] * 4 and first.dtype == np.float32


def split(root, model, **options):
    clips = build_clips("DoTA", str(root), "val")
    index = index_clips(clips, num_frames=model.input_shape[1], view_fps=5, stride=5)
    return SplitWindows(clips, index, EvalTransform(model.input_shape[-1]), **{"batch_size": 32} | options)


def spread(name):
    """A model whose logits differ: its head is not scaled down."""
    torch.manual_seed(0)
    return create_model(name, init_scale=1).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_64", "internvideo2_tiny_patch14_56"])
def test_logits_are_those_of_windows_normalised_one_by_one(dota_root, name, dtype):
    model, expected = spread(name), []
    windows = split(dota_root, model)
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for batch in windows.batches(lambda frames: frames):
            expected.append(model(model.normalize(batch.video)).float().numpy())
    expected = np.concatenate(expected)  # without workers in the order of the clips
    scored = Scorer(windows, dtype).score(model).logits
    np.testing.assert_array_equal(scored, expected)
    assert len(np.unique(scored[:, 1])) > len(scored) // 2
    filled = Scorer(split(dota_root, model, across_clips=True), dtype).score(model).logits
    np.testing.assert_allclose(filled, expected, atol=1e-5 if dtype == torch.float32 else 0.02)


def test_scores_do_not_depend_on_workers(dota_root):
    """A class token makes rows depend on their place in a batch, in several threads: clips keep theirs."""
    model = spread("internvideo2_tiny_patch14_56")
    first, second = (Scorer(split(dota_root, model, num_workers=n)).score(model).logits for n in (0, 3))
    np.testing.assert_array_equal(first, second)


def test_padding_is_not_scored():
    full = batch(2, 2, 3)
    video = torch.cat([full.video, torch.full_like(full.video, 255)])
    scorers = [Scorer(Listed([part, batch(0, 1, 2)])) for part in (full, replace(full, video=video))]
    np.testing.assert_allclose(*(scorer.score(tiny()).logits for scorer in scorers), rtol=1e-6)


def test_frames_that_are_not_there_are_neither_expected_nor_scored():
    fault = Fault(2, "1/001", "ends after 3 of 4 frames", 3)
    predictions = Scorer(Listed([batch(0, 1, 2), fault, batch(2, 2)])).score(tiny())
    assert predictions.clip.tolist() == [0, 0, 2] and predictions.faults == [fault]
    fault = Fault(2, "1/001", "broken")
    assert Scorer(Listed([batch(2, 2), batch(0, 1, 2), fault])).score(tiny()).clip.tolist() == [0, 0]
    with pytest.raises(EvaluationError, match="no window can be scored"):
        Scorer(Listed([fault], (np.array([2]), np.array([3])))).score(tiny())


def test_clips_without_labels_are_scored_too():
    bare = ClipTable("videos", "all", [replace(clip, labels=None) for clip in CLIPS])
    predictions = gathered(clips=bare)
    assert predictions.label is None
    np.testing.assert_array_equal(predictions.score, gathered().score)


def test_a_signal_leaves_an_evaluation_unfinished(tmp_path, monkeypatch):
    """The batch after the signal is not scored, and nothing partial is returned."""
    arrivals, model = [], tiny()
    monkeypatch.setattr("utils.signals._arrivals", arrivals)
    model.register_forward_hook(lambda *call: arrivals.append((0.0, signal.SIGTERM)))
    run = session(None, Progress(), output_dir=tmp_path)
    with pytest.raises(Preempted):
        Scorer(Listed([batch(0, 1, 2), batch(2, 2, 3)])).score(model, run)
    assert len(arrivals) == 1


def test_one_class_is_said_to_say_nothing(caplog):
    Predictions(np.zeros(2), np.arange(2), np.zeros(2, int), np.zeros((2, 2), np.float32)).metrics()
    assert "all evaluated frames are of one class" in caplog.text


def test_predictions_csv(tmp_path):
    write_predictions(tmp_path / "predictions.csv", gathered(), CLIPS)
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    first, last = ["clip", "filename", "frame", "time"], ["label", "ttc", "category", "ego", "night"]
    more = ["source", "is_positive", "event_time", "alert_time"]
    assert list(rows[0]) == [*first, "logits_safe", "logits_risk", "score", *last, *more]
    assert [(r["clip"], r["filename"], r["frame"]) for r in rows] == [
        ("a", "000001.jpg", "1"),
        ("a", "000002.jpg", "2"),
        ("1/001", "0003.png", "2"),
        ("1/001", "0004.png", "3"),
    ]
    assert np.float32(rows[1]["logits_safe"]) == np.float32(0.1234567891)  # nothing lost on the way
    assert [r["label"] for r in rows] == ["1", "1", "0", "0"]
    assert [r["ttc"] for r in rows] == ["0", "0", "", ""]
    assert [r["time"] for r in rows] == ["0.1", "0.2", "0.2", "0.3"]
    assert [(r["category"], r["ego"], r["night"]) for r in rows] == [("turning, left", "1", "0")] * 2 + [
        ("", "", "")
    ] * 2


def test_predictions_csv_says_of_each_clip_what_a_report_needs(tmp_path):
    """Groups of any name, also that of another column, of some clips alone, or not Unicode."""
    known = {"recording": "drive, 7", "positive": True, "event_time": np.float64(1.25), "alert_time": 1 / 3}
    of_first = {"weather": "rain; fog", "time": "noon", "source": "phone", "odd\udcff": "x\udcff"}
    a, short, other = CLIPS.clips
    clips = [replace(a, **known, groups=of_first), short, replace(other, groups={"weather": "sun", "city": "Zürich"})]
    path = tmp_path / "predictions.csv"
    write_predictions(path, gathered(), replace(CLIPS, clips=clips))
    rows = list(csv.DictReader(path.open(encoding="utf-8", errors="surrogateescape", newline="")))
    of_clip = ["source", "is_positive", "event_time", "alert_time"]
    groups = ["weather", "group_time", "group_source", "odd\udcff", "city"]
    assert list(rows[0]) == [*COLUMNS, *groups] and list(COLUMNS[-4:]) == of_clip
    assert [rows[1][c] for c in (*of_clip, *groups)] == [
        *("drive, 7", "1", "1.25", "0.333333333"),
        *("rain; fog", "noon", "phone", "x\udcff", ""),
    ]
    assert [rows[2][c] for c in (*of_clip, *groups)] == ["", "0", "", "", "sun", "", "", "", "Zürich"]
    assert [r["time"] for r in rows] == ["0.1", "0.2", "0.2", "0.3"]
    frames = read_frames(path)
    assert frames.columns["weather"] == ["rain; fog", "sun"] and frames.sources[0].tolist() == [0, 1]
    (first, second) = frames.scored_clips()
    assert (first.positive, first.event, second.positive, second.event) == (True, 1.25, False, None)
    assert (read_predictions(path).logits == gathered().logits).all()


def test_predictions_are_read_as_they_were_written(tmp_path):
    """With the times of a rate that is no whole number; files from before there were times have none."""
    labels = np.zeros(400, np.uint8)
    clips = ClipTable("DoTA", "val", [Clip("a", "", 400, 30000 / 1001, labels=labels)])
    scored = np.zeros(400, int), np.arange(400), np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32)
    written = gather_predictions(scored, scored[:2], clips)
    path = tmp_path / "predictions.csv"
    write_predictions(path, written, clips)
    read = read_predictions(path)
    for name in ("clip", "frame", "label", "logits", "score"):
        assert (getattr(read, name) == getattr(written, name)).all()
    assert np.abs(read.time - written.time).max() < 1e-9 and np.allclose(written.time, np.arange(400) * 1001 / 30000)
    lines = [line.split(",") for line in path.read_text().splitlines()]
    path.write_text("\n".join(",".join([*line[:3], *line[4:9]]) for line in lines) + "\n")
    old = read_predictions(path)
    assert old.time is None and (old.logits == written.logits).all()
    path.write_text(
        "\n".join(",".join([*line[:3], "soon", *line[4:]]) if i else ",".join(line) for i, line in enumerate(lines))
    )
    with pytest.raises(EvaluationError, match="not the scores of an evaluation"):
        read_predictions(path)


def test_every_clip_that_is_not_scored_stands_in_a_list():
    clips = ClipTable("DoTA", "val", CLIPS.clips, unreadable={"u": "why"}, left_out=["l"])
    lists = ("unreadable", "left_out", "frame_mismatch", "too_short")
    covered = coverage(gathered(faults=[Fault(2, "1/001", "more", 4)]), clips)
    assert [covered[name] for name in lists] == [["u"], ["l"], ["1/001"], ["short"]]
    assert covered["coverage"] == "2 of 5 clips"
    first = gathered()
    without = Predictions(*(part[:2] for part in (first.clip, first.frame, first.label, first.logits)),
                          [Fault(2, "1/001", "broken")])  # fmt: skip
    covered = coverage(without, clips)
    assert [covered[name] for name in lists] == [["u", "1/001"], ["l"], [], ["short"]] and covered["clips_scored"] == 1
    short = next(clip for clip in clips if clip.name == "short")
    ignored = replace(short, name="ignored", labels=np.full(short.num_frames, 2, dtype=np.uint8))
    covered = coverage(first, replace(clips, clips=[*clips.clips, ignored]))
    assert (covered["too_short"], covered["ignored"]) == (["short"], ["ignored"])
    names = ["a", "1/001"]
    assert covered["clip_list"] == {"clips": 2, "sha256": clip_hash(names), "name": "a list of 2 clips"}


def test_the_list_of_scored_clips_is_called_by_its_name(monkeypatch):
    clips = ClipTable("DoTA", "val", CLIPS.clips, unreadable={"u": "why"}, left_out=["l"])
    monkeypatch.setitem(KNOWN, clip_hash(["u", "l", "a", "short", "1/001"]), "DoTA val")
    assert coverage(gathered(), clips)["clip_list"]["name"] == "2 of the 5 clips of DoTA val"
    monkeypatch.setitem(KNOWN, clip_hash(["1/001", "a"]), "two")
    assert coverage(gathered(), clips)["clip_list"]["name"] == "two, 2 clips"


def test_metrics_json_has_null_where_undefined(tmp_path):
    write_metrics(tmp_path / "metrics.json", {"auroc": float("nan"), "ap": 0.5, "checkpoint": None})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"auroc": None, "ap": 0.5, "checkpoint": None}


def test_plots(tmp_path):
    predictions = gathered()
    figures = evaluation_figures(predictions.score, predictions.label, predictions.metrics(), "vit, of $5 val")
    save_figures(tmp_path / "plots", figures)
    for name in ("roc", "pr", "mcc", "confusion"):
        with Image.open(tmp_path / "plots" / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
    assert {figure.get_suptitle() for figure in figures.values()} == {"vit, of $5 val"}
    texts = [t.get_text() for t in figures["confusion"].axes[0].texts]
    assert texts == ["1\n50.0 %", "1\n50.0 %", "0\n0.0 %", "2\n100.0 %"]
