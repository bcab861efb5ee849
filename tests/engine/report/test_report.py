import csv
import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from golden_clips import CLIPS, GOLDEN, labels_of
from helpers import ROOT, SHARED

from datasets import Clip, ClipTable
from engine.anticipation import first_crossing
from engine.baselines import LabelTable, prior
from engine.evaluate import Predictions, write_predictions
from engine.metrics import frame_metrics
from engine.report import (
    Options,
    ScoresError,
    clip_hash,
    clip_list,
    make_report,
    read_frames,
    save_report,
    write_report,
)
from engine.report.clips import auc_of_clips
from engine.report.lists import KNOWN
from engine.report.text import report_text

HEADER = [
    "clip",
    "filename",
    "frame",
    "time",
    "logits_safe",
    "logits_risk",
    "score",
    "label",
    "ttc",
    "category",
    "ego",
    "night",
]


def write(path, rows, header=HEADER, sep=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as f:
        writer = csv.writer(f, delimiter=sep)
        writer.writerow(header)
        writer.writerows([row[name] for name in header] for row in rows)
    return path


def rows_of(seed=0, clips=40, frames=60, skill=1.5, video="vid"):
    """Rows of made-up clips: every fourth is safe, the others are anomalous from a frame on; 10 fps, 4 a video."""
    rng = np.random.default_rng(7)  # of the clips
    noise = np.random.default_rng(seed)  # of the model
    rows = []
    for c in range(clips):
        begin = int(rng.integers(20, 50)) if c % 4 else frames
        level = rng.standard_normal() / 2
        for f in range(15, frames):
            label = int(begin <= f < begin + 12)
            z = skill * label + level + noise.standard_normal() - 0.5
            ahead = (f - begin) / 10
            near = ahead if -2 <= ahead < 0 else 0.0 if label else -100.0
            rows.append(
                {
                    "clip": f"{video}{c // 4}_{c:06d}",
                    "filename": f"{f:06d}.jpg",
                    "frame": f,
                    "time": f / 10,
                    "logits_safe": -z / 2,
                    "logits_risk": z / 2,
                    "score": f"{1 / (1 + np.exp(-z)):.9g}",
                    "label": label,
                    "ttc": near if c % 4 else "",
                    "category": ("turning", "", "lateral")[c % 3],
                    "ego": c % 2,
                    "night": int(c % 4 == 0),
                }
            )
    return rows


def run(*words):
    command = [sys.executable, "-m", "engine.report", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(report of one file, its frames)."""
    frames = read_frames(write(tmp_path_factory.mktemp("one") / "predictions.csv", rows_of()))
    return make_report({"one": [frames]}, Options(replicates=200)), frames


def test_totals_and_groups_are_those_of_frame_metrics(report):
    made, frames = report
    model = made["models"][0]
    assert model["total"]["metrics"] == pytest.approx(frame_metrics(frames.score, frames.label))
    ego = np.array([v == "1" for v in frames.columns["ego"]])[frames.clip]
    expected = frame_metrics(frames.score[ego], frames.label[ego])
    assert model["groups"]["ego"]["1"]["metrics"]["auroc"] == expected["auroc"]
    assert set(model["groups"]["category"]) == {"turning", "lateral", "unknown"}
    safe = model["groups"]["night"]["1"]
    assert np.isnan(safe["metrics"]["auroc"]) and "no frame is anomalous" in safe["why_undefined"]
    assert sum(g["clips"] for g in model["groups"]["ego"].values()) == model["data"]["clips"] == 40


def test_intervals_are_by_clip_and_by_source(report):
    total = report[0]["models"][0]["total"]
    for kind, units in (("clip", 40), ("source", 10)):
        found = total["intervals"][kind]["auroc"]
        low, high = found["percentile"]
        assert low < total["metrics"]["auroc"] < high and found["units"] <= units
    assert total["honest_unit"] == "source"
    assert all(abs(error) < 1e-4 for error in total["binning_error"].values())


def test_a_model_no_better_than_the_position_prior_is_told_so(report, tmp_path):
    good = report[0]["models"][0]["baselines"]["verdict"]
    assert good.startswith("The model beats a prior that knows nothing but where in its clip a frame stands")
    frames = read_frames(write(tmp_path / "blind.csv", rows_of(skill=0.0)))
    blind = make_report({"blind": [frames]}, Options(replicates=100))["models"][0]["baselines"]["verdict"]
    assert "does NOT beat" in blind


def test_baselines_are_learned_on_the_training_labels_where_there_are_some(report):
    _, frames = report
    rng = np.random.default_rng(1)
    train = LabelTable(np.repeat(np.arange(30), 45), np.tile(np.arange(15, 60), 30), rng.integers(0, 2, 30 * 45))
    made = make_report({"one": [frames]}, Options(replicates=100, train=train))["models"][0]["baselines"]
    expected = frame_metrics(prior("position", train, frames.table), frames.label)
    assert made["of"]["position"]["metrics"]["auroc"] == pytest.approx(expected["auroc"])
    assert made["of"]["position"]["how"] == "learned on the training labels"
    assert "no training labels" in report[0]["models"][0]["baselines"]["of"]["position"]["how"]
    for labels, said in ((train, "learned on DoTA train"), (None, "each tenth from the others: DoTA train")):
        made = make_report({"one": [frames]}, Options(100, train=labels, train_words="DoTA train"))["models"][0]
        assert made["baselines"]["of"]["position"]["how"].endswith(said)


def test_anticipation_of_the_golden_clips(tmp_path):
    """The file says of a clip's event what the golden file does, where its start is an anomalous scored frame."""
    rows = []
    for i, c in enumerate(GOLDEN["clips"]):
        for frame, label in zip(range(15, c["n_frames"]), labels_of(c), strict=True):
            row = dict.fromkeys(HEADER, "") | {"clip": c["name"], "frame": frame, "label": label, "source": c["source"]}
            rows.append(row | {"time": repr(frame / c["fps"]), "score": c["scores_1024"][frame] / 1024, "night": i % 2})
    frames = read_frames(write(tmp_path / "golden.csv", rows, [*HEADER, "source"]))
    clips = {c.name: c for c in frames.scored_clips()}
    assert len(clips) == 38 and frames.sources[0].max() + 1 == 14
    for name, c, ours in ((c["name"], c, clips.get(c["name"])) for c in GOLDEN["clips"]):
        if ours is not None and c["intervals"] and c["intervals"][0][0] > 15:
            assert ours.event == pytest.approx(c["intervals"][0][0] / c["fps"]), name
            assert ours.score == pytest.approx(np.array(c["scores_1024"][15:]) / 1024)
    assert first_crossing(list(clips.values()), 0.5)["n_neg"] >= first_crossing(CLIPS, 0.5)["n_neg"]


def test_nexar_s_map_stands_beside_its_groups_of_clips(tmp_path):
    """The golden clips by their time_to_accident; a group of that name which is no number counts for nothing."""
    header, tables = ["clip", "frame", "time", "score", "label", "is_positive", "event_time", "time_to_accident"], {}
    for name, cut in (("nexar", "{:.1f}".format), ("own", "by the {:.0f}th".format)):
        tables[name] = [
            {"clip": c.name, "frame": frame, "time": time, "score": score, "label": 0, "is_positive": int(c.positive)}
            | {"time_to_accident": cut(c.time_to_accident), "event_time": "" if c.event is None else c.event}
            for c in CLIPS
            for frame, (time, score) in enumerate(zip(c.time, c.score, strict=True))
        ]
    made = {name: make_report({name: [read_frames(write(tmp_path / f"{name}.csv", rows, header))]}, Options(20))
            for name, rows in tables.items()}  # fmt: skip
    expected = GOLDEN["expected"]["nexar_map_grouped"]["formula"]["last_all"]
    assert made["nexar"]["models"][0]["anticipation"]["model"]["nexar_map"] == pytest.approx(expected)
    assert "Nexar's mAP, clips cut 0.5, 1, 1.5 s before the event" in report_text(made["nexar"])
    assert made["own"]["models"][0]["anticipation"]["model"]["nexar_map"] is None
    assert "Nexar's mAP" not in report_text(made["own"])


def test_an_event_is_where_ttc_or_the_labels_say(tmp_path):
    def clip(name, labels, ttc):
        columns = zip(labels, ttc, strict=True)
        return [
            {"clip": name, "frame": i, "time": i / 10, "score": 0.5, "label": y, "ttc": t}
            for i, (y, t) in enumerate(columns)
        ]

    rows = clip("ahead", [0, 0, 0], [-100, -0.7, -0.6]) + clip("inside", [1, 1, 0], [0, 0, 0.1])
    rows += clip("safe", [0, 0, 0], ["", "", ""]) + clip("start", [0, 1, 1], ["", "", ""])
    header = ["clip", "frame", "time", "score", "label", "ttc"]
    clips = {c.name: c for c in read_frames(write(tmp_path / "x.csv", rows, header)).scored_clips()}
    assert clips["ahead"].event == pytest.approx(0.8) and clips["ahead"].positive
    assert (clips["inside"].event, clips["inside"].before, clips["start"].event) == (0, 0, 0.1)
    assert not clips["safe"].positive and clips["start"].intervals == ((0.1, pytest.approx(0.3)),)


def test_what_a_file_says_of_an_event_goes_before_its_labels(tmp_path):
    """As where the accident comes after the anomaly begins, or after the clip was cut."""
    header = ["clip", "frame", "time", "score", "label", "is_positive", "event_time", "alert_time", "source"]
    said = {
        "cut": (1, "2.5", "1.0", [0, 0, 0]),
        "late": (1, "0.2", "", [0, 1, 1]),
        "traced": ("", "", "", [0, 1, 1]),
        "untold": (1, "", "", [0, 0, 0]),
        "told": ("", "0.1", "", [0, 0, 0]),
        "safe": (0, "", "", [0, 0, 0]),
    }
    rows = [
        dict(zip(header, (name, i, i / 10, i / 10, y, positive, event, alert, ""), strict=True))
        for name, (positive, event, alert, labels) in said.items()
        for i, y in enumerate(labels)
    ]
    frames = read_frames(write(tmp_path / "x.csv", rows, header))
    clips = {c.name: c for c in frames.scored_clips()}
    assert {name: c.event for name, c in clips.items()} == {
        "cut": 2.5,
        "late": 0.2,
        "traced": 0.1,
        "untold": None,
        "told": 0.1,
        "safe": None,
    }
    assert [c.positive for c in clips.values()] == [True] * 5 + [False] and clips["late"].before == 2
    assert frames.sources[0] is None and "nothing in it" in frames.sources[1]
    made = make_report({"x": [frames]}, Options(100))["models"][0]
    assert made["groups"] == {}  # none of these columns makes groups
    assert made["anticipation"]["event"].startswith("event_time of the file; where it has none, the start of the anom")
    assert made["anticipation"]["counts"]["no_event_time"] == 1
    for change, why in (
        ({"event_time": "soon"}, "line 3: could not convert string to float: 'soon'"),
        ({"event_time": "inf"}, "line 3: event_time 'inf', which is no time in seconds"),
        ({"is_positive": "maybe"}, "line 3: is_positive 'maybe', which is not 0, 1 or empty"),
    ):
        with pytest.raises(ScoresError, match=why):
            read_frames(write(tmp_path / "y.csv", [rows[0], rows[3] | change], header))


def test_a_column_that_is_there_twice_is_read_once(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("clip,frame,score,label,city,city\na,0,0.5,1,Rome,Paris\nb,0,0.5,0,Rome,Bonn\n")
    assert read_frames(path).columns == {"city": ["Paris", "Bonn"]}


def test_pictures_of_what_is_scored_most_right_and_most_wrong(report, tmp_path):
    made, frames = report
    model = made["models"][0]
    score = {(frames.names[c], f): s for c, f, s in zip(frames.clip, frames.frame.tolist(), frames.score, strict=True)}
    label = {(frames.names[c], f): y for c, f, y in zip(frames.clip, frames.frame.tolist(), frames.label, strict=True)}
    for kind, wrong in (("best", 0), ("worst", 1)):
        for clip in model["clips"][kind]:
            for point in clip["shown"]:
                place = (clip["clip"], point["frame"])
                own = [s for p, s in score.items() if p[0] == place[0] and label[p] == point["label"]]
                assert label[place] == point["label"] and point["x"] == point["frame"] / 10
                assert score[place] == pytest.approx(max(own) if point["label"] != wrong else min(own))
            assert sorted(point["label"] for point in clip["shown"]) == [0, 1]
    assert all(alarm["shown"][0]["score"] == alarm["peak"] for alarm in model["false_alarms"])
    asked = {}

    def pictures(wanted):
        asked.update(wanted)
        missing = next(iter(wanted))
        shape = (90, 160, 3)
        return {(c, f): np.full(shape, f, np.uint8) for c, frames in wanted.items() if c != missing for f in frames}

    save_report(made, tmp_path, pictures)
    page = (tmp_path / "report.html").read_text()
    shown = [*model["clips"]["best"], *model["clips"]["worst"], *model["false_alarms"]]
    assert asked.keys() == {c["clip"] for c in shown}
    points = sum(len(c["shown"]) for c in shown if c["clip"] != next(iter(asked)))
    assert page.count('<img src="data:image/jpeg;base64,') == points > 20
    assert not re.search(r'(src|href)="(?!data:)|url\(|<script', page)


def test_files_without_time_and_group_columns_and_in_other_forms_are_read(report, tmp_path):
    rows = rows_of()
    old = ["clip", "filename", "frame", "logits_safe", "logits_risk", "score", "label", "ttc"]
    frames = read_frames(write(tmp_path / "old.csv", rows, old))
    assert "no column time" in frames.notes[0] and not frames.columns
    assert frames.time == pytest.approx(report[1].time, abs=1e-4)
    bare = ["clip", "filename", "logits_safe", "logits_risk", "label"]
    frames = read_frames(write(tmp_path / "bare.csv", rows[::-1], bare, sep=";"))
    assert np.isnan(frames.time).all()
    assert frames.score == pytest.approx(by_name(report[1], frames), abs=1e-6)
    made = make_report({"bare": [frames]}, Options(replicates=100))["models"][0]
    assert "column time" in made["anticipation"]["why_undefined"] and np.isnan(made["data"]["hours"])


def by_name(frames, other):
    """The scores of `frames` in the order of the clips of `other`."""
    parts = [frames.score[frames.bounds[i] : frames.bounds[i + 1]] for i in map(frames.names.index, other.names)]
    return np.concatenate(parts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": "1.5"}, r"line 3: a score that is not in \[0, 1\]"),
        ({"score": "high"}, "line 3: .*'high'"),
        ({"label": "2"}, "line 3: label '2', which is not 0, 1 or empty"),
        ({"frame": "15"}, "frame 15 of clip .* is there twice"),
        ({"frame": "9" * 30}, "line 3: a frame beyond 10000000000000"),
        ({"time": "1e308"}, "line 3: a time of more than 10000000000000 seconds"),
        ({"time": "-1"}, r"the column time goes back from frame 15 to 16 of clip vid0_000000"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, change, said):
    rows = rows_of(clips=1)
    rows[1] |= change
    with pytest.raises(ScoresError, match=said):
        read_frames(write(tmp_path / "x.csv", rows))


def test_other_files_are_refused_in_one_line(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("nothing of the kind\n")
    for path, said in ((text, "no column clip"), (tmp_path / "absent.csv", "No such file"), (tmp_path, "No such file")):
        got = run(path)
        assert got.returncode == 1 and said in got.stderr and got.stderr.count("\n") == 1, got.stderr
    unlabelled = write(tmp_path / "u.csv", [row | {"label": ""} for row in rows_of(clips=2)])
    with pytest.raises(ScoresError, match="no labelled row"):
        read_frames(unlabelled)


def test_two_lists_are_compared_on_what_they_share(tmp_path):
    a = write(tmp_path / "a" / "predictions.csv", rows_of(seed=1, clips=64))
    kept = [row for row in rows_of(seed=2, clips=64, skill=0.3) if int(row["clip"][-6:]) < 48]
    b = write(tmp_path / "b" / "predictions.csv", kept[::-1])
    got = run(a.parent, f"other={b}", "--replicates", 200, "--out", tmp_path / "out")
    assert not got.returncode, got.stderr
    made = json.loads((tmp_path / "out" / "report.json").read_text())
    shared, alone = made["comparison"], made["models"][0]["data"]
    assert (shared["clips"], alone["clips"], shared["same_frames"]) == (48, 64, False)
    assert "other is worse than a" in got.stdout and "The files are of different frames" in got.stdout
    assert shared["clip_list"]["sha256"] == clip_hash({row["clip"] for row in kept})
    difference = shared["differences"]["other"]["source"]["auroc"]
    runs = shared["runs"]
    expected = runs["other"][0]["metrics"]["auroc"] - runs["a"][0]["metrics"]["auroc"]
    assert difference["estimate"] == pytest.approx(expected, abs=1e-4)
    both = run(a, f"other={b}", "--same_clips", "--replicates", 100, "--out", tmp_path / "same")
    assert json.loads((tmp_path / "same" / "report.json").read_text())["models"][0]["data"]["clips"] == 48, both.stderr


def test_identical_files_differ_by_exactly_0_and_seeds_have_a_deviation(tmp_path):
    paths = [write(tmp_path / f"{i}.csv", rows_of(seed=i)) for i in range(3)]
    text, _ = write_report({"a": [paths[0]], "b": [paths[0]]}, tmp_path, Options(replicates=100))
    made = json.loads((tmp_path / "report.json").read_text())["comparison"]
    for metric in made["differences"]["b"]["clip"].values():
        assert (metric["estimate"], metric["percentile"]) == (0, [0, 0])
    assert "b is not shown to differ from a" in text
    models = {"a": [read_frames(p) for p in paths[:2]], "b": [read_frames(paths[2])]}
    made = make_report(models, Options(replicates=100))["comparison"]
    values = [row["metrics"]["ap"] for row in made["runs"]["a"]]
    assert made["mean"]["a"]["ap"]["mean"] == pytest.approx(np.mean(values))
    assert made["mean"]["a"]["ap"]["std"] == pytest.approx(np.std(values, ddof=1)) and len(values) == 2
    assert np.isnan(made["mean"]["b"]["ap"]["std"]) and "seeds" not in made


def test_no_common_clip_is_said(tmp_path):
    a, b = (write(tmp_path / f"{v}.csv", rows_of(clips=4, video=v)) for v in ("x", "y"))
    got = run(a, b)
    assert got.returncode == 1 and "no frame of a clip of one name in common" in got.stderr


def test_the_page_is_whole_and_follows_the_system(tmp_path):
    rows = [row | {"category": "<b>&</b>"} for row in rows_of()]
    write_report({"<one>": [write(tmp_path / "x.csv", rows)]}, tmp_path, Options(replicates=100))
    page = (tmp_path / "report.html").read_text()
    assert "By category" in page and "for every clip" in page
    assert "prefers-color-scheme: dark" in page and "<svg" in page
    assert not re.search(r'(src|href)="|url\(|<script', page)  # it needs nothing else
    assert "<b>&</b>" not in page and "&lt;b&gt;&amp;&lt;/b&gt;" in page and "&lt;one&gt;" in page
    assert ">nan<" not in page and json.loads((tmp_path / "report.json").read_text())


def test_auc_within_clips_is_that_of_each_clip(report):
    coarse = replace(report[1], score=report[1].score.round(1))  # with ties
    for number, value in enumerate(auc_of_clips(coarse)):
        rows = coarse.clip == number
        expected = frame_metrics(coarse.score[rows], coarse.label[rows])["auroc"]
        assert value == pytest.approx(expected, nan_ok=True)


def test_columns_that_make_no_groups_are_said(tmp_path):
    rows = [row | {"ego": "", "category": row["clip"]} for row in rows_of()]
    frames = read_frames(write(tmp_path / "x.csv", rows))
    groups = make_report({"x": [frames]}, Options(replicates=100))["models"][0]["groups"]
    assert groups["ego"] == {"left_out": "unknown for every clip"}
    assert groups["category"] == {"left_out": "40 distinct values make no groups"} and len(groups["night"]) == 2


def test_known_lists_have_names():
    folder = SHARED / "data" / "dota"
    if not folder.is_dir():
        pytest.skip("the lists of DoTA are absent")
    names = (folder / "val_split.txt").read_text().split()
    assert clip_list(names[::-1])["name"] == "DoTA val, 1402 clips"
    assert clip_list(names[:1250], names)["name"] == "1250 of the 1402 clips of DoTA val"
    assert clip_list(names[:3])["name"] == "a list of 3 clips"


def test_the_scored_clips_are_named_by_what_was_to_be_scored(report, monkeypatch):
    listed = [*report[1].names, "gone"]
    monkeypatch.setitem(KNOWN, clip_hash(listed), "DoTA val")
    made = make_report({"one": [report[1]]}, Options(100, listed=listed))["models"][0]["data"]["clip_list"]
    assert made == {"clips": 40, "sha256": clip_hash(report[1].names), "name": "40 of the 41 clips of DoTA val"}


def test_what_an_evaluation_writes_is_read(tmp_path):
    labels = np.repeat([0, 1, 0], 10).astype(np.uint8)
    clips = [
        Clip(f"c{i}", "", 30, 10.0, labels=labels * (i > 0), category="turning", ego=bool(i % 2)) for i in range(3)
    ]
    clip, frame = np.repeat(np.arange(3), 15), np.tile(np.arange(15, 30), 3)
    logits = np.random.default_rng(0).standard_normal((45, 2)).astype(np.float32)
    label = np.concatenate([c.labels[15:] for c in clips]).astype(np.int64)
    predictions = Predictions(clip, frame, label, logits, time=frame / 10)
    write_predictions(tmp_path / "predictions.csv", predictions, ClipTable("DoTA", "val", clips))
    frames = read_frames(tmp_path / "predictions.csv")
    assert np.array_equal(frames.score, predictions.score) and np.array_equal(frames.label, label)
    assert np.array_equal(frames.time, frame / 10) and frames.columns["ego"] == ["0", "1", "0"]
    assert frames.columns["night"] == ["", "", ""] and not frames.notes and frames.sources[0] is None
    assert [c.positive for c in frames.scored_clips()] == [False, True, True]
    page, text = tmp_path / "report.html", run(tmp_path, "--replicates", 100).stdout
    assert "needed" in text and page.exists()  # three clips have no interval


@pytest.mark.parametrize("labels", [[[0, 0, 1]], [[1]], [[0]], [[1, 1], [0]], [[0], [1], [0]], [[0, 1] * 12]], ids=str)
def test_few_frames_have_a_report(tmp_path, labels):
    rows = [
        {"clip": f"c{c}", "frame": i, "time": i / 10, "score": 0.3 + 0.01 * i, "label": y}
        for c, clip in enumerate(labels)
        for i, y in enumerate(clip)
    ]
    frames = read_frames(write(tmp_path / "x.csv", rows, ["clip", "frame", "time", "score", "label"]))
    made = make_report({"x": [frames]}, Options(replicates=100))
    save_report(made, tmp_path)
    assert made["models"][0]["data"]["frames"] == len(rows) and "x" in report_text(made)
