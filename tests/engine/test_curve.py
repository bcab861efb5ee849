"""A risk curve as a table, read back, as a figure, and its figures in numbers."""

import csv
import io
from dataclasses import dataclass, replace

import numpy as np
import pytest
from curves import RULE, bumpy
from PIL import Image

from engine.curve import Gap, RiskCurve, Thumbnail, envelope, read_scores
from engine.evaluate import EvaluationError
from engine.summary import clock, peak_frames, summary_row, write_summary
from utils.files import temporary_beside

GAPS = (Gap(4.0, 4.8, "12 pictures cannot be decoded"),)
ODD = "ü$x^2$_" + "very_long_name_" * 20 + "\udcff\n中.mp4"


@dataclass(frozen=True)
class Scored:
    name: str
    curve: RiskCurve | None
    problem: str = ""


def thumbnails(curve):
    return [Thumbnail(frame, np.full((45, 80, 3), 40 * i, np.uint8)) for i, frame in enumerate(peak_frames(curve))]


@pytest.mark.parametrize("fps", [25, 30000 / 1001, 7])
def test_csv_holds_all_of_a_score(tmp_path, fps):
    curve = bumpy(200, fps=fps, step=3, warming_up=True, gaps=GAPS)
    rng = np.random.default_rng(0)
    curve = replace(curve, score=rng.random(len(curve.frame), np.float32) ** 9)
    curve.write_csv(tmp_path / "scores.csv")
    for got, expected in zip(
        read_scores(tmp_path / "scores.csv"), (curve.frame, curve.score, curve.warming_up), strict=True
    ):
        assert got.dtype == expected.dtype and np.array_equal(got, expected)
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert list(rows[0]) == ["time", "frame", "score", "warming_up"]
    assert all(row["time"] == f"{int(row['frame']) / fps:.6f}" for row in rows)
    assert {row["warming_up"] for row in rows} == {"0", "1"}


def test_csv_of_no_score(tmp_path):
    nothing = np.zeros(0)
    curve = RiskCurve("a.mp4", 30, 5, nothing.astype(np.int64), nothing.astype(np.float32), nothing.astype(bool))
    curve.write_csv(tmp_path / "scores.csv")
    assert [len(column) for column in read_scores(tmp_path / "scores.csv")] == [0, 0, 0]
    assert curve.plot() and peak_frames(curve) == [] and summary_row(curve).highest is None


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "empty"),
        ("clip,frame\n", "first line"),
        ("time,frame,score,warming_up\n0.1,1,0.5\n", ""),
        ("time,frame,score,warming_up\n0.1,1,0.5,0\n0.1,1,0.5,0\n", "ascend"),
        ("time,frame,score,warming_up\n0.1,1,nan,0\n", "not in"),
        ("time,frame,score,warming_up\n0.1,1,1.5,0\n", "not in"),
        ("time,frame,score,warming_up\n0.1,1,0.5,2\n", ""),
        ("time,frame,score,warming_up\n0.1,99999999999999999999,0.5,0\n", ""),
        (b"\xff\xfe\x00", ""),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content, why):
    path = tmp_path / "scores.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(EvaluationError, match=rf"{path}: not the scores of a video \(.*{why}.*remove it") as error:
        read_scores(path)
    assert "\n" not in str(error.value)
    with pytest.raises(EvaluationError, match="absent.csv.*No such file"):
        read_scores(tmp_path / "absent.csv")


def test_full_disk_names_the_file(tmp_path):
    for name, write in (("s.csv", bumpy(200).write_csv), ("c.png", bumpy(50).plot)):
        temporary_beside(tmp_path / name).symlink_to("/dev/full")
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/{name}'"):
            write(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_pieces_end_at_gaps():
    curve = bumpy(200, step=3, gaps=GAPS)
    first, second = curve.pieces()
    assert curve.time[first].max() < 4.0 and curve.time[second].min() > 4.8
    assert first.stop == second.start and second.stop == len(curve.frame)
    assert len(bumpy(200, step=3).pieces()) == 1


def test_filling():
    curve = bumpy(200, step=3, gaps=GAPS)
    assert curve.filling() == [(0.0, 1.5), (4.8, pytest.approx(curve.time[curve.pieces()[1]][0]))]
    assert bumpy(200, warming_up=True).filling() == [(0.0, 1.5)] and bumpy(200, first=0).filling() == []
    late = bumpy(200, gaps=(Gap(19.0, 19.5, "the end"), Gap(19.8, 20.0, "again")))
    assert late.filling() == [(0.0, 1.5), (19.5, 19.8)]


@pytest.mark.parametrize(("count", "fps"), [(3, 30), (200, 7), (20_001, 30000 / 1001)])
def test_envelope_loses_no_peak(count, fps):
    curve = bumpy(count, fps=fps, first=0, peaks=())
    score = np.random.default_rng(0).random(count).astype(np.float32) * 0.5 + 0.2
    peak, low = count // 3, 2 * count // 3
    score[peak], score[low] = 0.99, 0.01
    curve = replace(curve, score=score)
    ((time, kept),) = envelope(curve, 50)
    frame = np.rint(time * fps).astype(int)
    assert len(kept) <= 200 and (np.diff(frame) > 0).all() and (frame[0], frame[-1]) == (0, count - 1)
    assert {peak, low} <= set(frame.tolist()) and np.array_equal(score[frame], kept)
    assert len(kept) == 3 if count == 3 else len(kept) <= 102
    assert len(envelope(bumpy(200, gaps=GAPS), 50)) == 2


def test_peak_frames():
    curve = bumpy(600, peaks=np.linspace(0.1, 0.9, 8))
    peaks, events = peak_frames(curve), curve.events()
    assert len(events) == 8 and len(peaks) == 6 and peaks == sorted(peaks)
    highest = sorted(events, key=lambda event: event.peak_score)[2:]
    assert {frame / 10 for frame in peaks} == {event.peak for event in highest}
    quiet = bumpy(600, rule=replace(RULE, threshold=0.99), peaks=(0.3, 0.7))
    assert quiet.events() == [] and {180, 420} <= set(peak_frames(quiet)) and len(peak_frames(quiet)) == 6
    assert min(np.diff(peak_frames(quiet))) >= 50


# ----------------------------------------------------------------------------------------------------------------------
# Figure


def texts(figure):
    axes = figure.axes
    said = [t.get_text() for ax in axes for t in (ax.title, ax._left_title, ax.xaxis.label, *ax.texts)]
    return said + [t.get_text() for legend in figure.legends for t in legend.get_texts()]


def test_figure_says_what_it_shows(tmp_path):
    curve = bumpy(200, warming_up=True, gaps=GAPS, name=ODD)
    figure = curve.plot(tmp_path / "curve.png", thumbnails(curve))
    said = "\n".join(texts(figure))
    for words in (
        "threshold 0.6, best MCC on DoTA val",
        "event",
        "alert",
        "no full window yet; at first the",
        "12 pictures",
        "4.00 s",
    ):
        assert words in said
    (event,) = curve.events()
    assert f"frame {round(event.peak * 10)}" in said and f"{event.peak_score:.3f}" in said
    assert all(len(line) < 130 for line in said.split("\n"))
    with Image.open(tmp_path / "curve.png") as image:
        assert image.format == "PNG" and image.width == 1100


def test_figure_of_two_hours_is_small_and_keeps_its_peaks():
    score = np.full(216_000, 0.2, np.float32)
    score[100_000], score[150_001] = 0.97, 0.01
    frame = np.arange(216_000)
    curve = RiskCurve("long.mp4", 30, 216_000, frame, score, np.zeros(216_000, bool))
    (line,) = [line for line in curve.plot().axes[0].lines if len(line.get_xdata()) > 50]
    assert len(line.get_ydata()) <= 2002
    assert line.get_ydata().max() == np.float32(0.97) and line.get_ydata().min() == np.float32(0.01)


# ----------------------------------------------------------------------------------------------------------------------
# Figures in numbers


def test_summary_row():
    curve = bumpy(200, step=2, warming_up=True, gaps=GAPS)
    row = summary_row(curve)
    assert row.duration == 20 and row.events == 1 and row.gaps == 1 and row.gap_seconds == pytest.approx(0.8)
    assert row.highest == pytest.approx(0.9, abs=1e-6) and row.highest_time == 14.0
    assert row.seconds_at_risk == pytest.approx(sum(s >= 0.6 for s in curve.score.tolist()) * 0.2)
    assert row.scored == len(curve.frame) and row.warming_up == 8
    without = summary_row(replace(curve, rule=None))
    assert without.events is None and without.seconds_at_risk is None
    early = bumpy(200, warming_up=True, peaks=(0.02,))
    assert summary_row(early).highest_warming_up and not row.highest_warming_up


@pytest.mark.parametrize("threshold", [0.1, 0.7, 0.9])
def test_a_score_at_the_threshold_is_risky(threshold):
    """In float32, as events are found: float32(0.7) is below 0.7."""
    curve = bumpy(50, rule=replace(RULE, threshold=threshold))
    curve = replace(curve, score=np.full(len(curve.frame), threshold, np.float32))
    assert summary_row(curve).seconds_at_risk == pytest.approx(len(curve.frame) / 10) and len(curve.events()) == 1


def test_summary_csv(tmp_path):
    results = [
        Scored("b.mp4", bumpy(100, peaks=(0.5,), name="b.mp4")),
        Scored("z\udcff.mp4", None, "z.mp4: not a readable video"),
        Scored("a.mp4", bumpy(100, peaks=(0.4, 0.5), name="a.mp4")),
        Scored("low.mp4", bumpy(100, peaks=(), rule=None, name="low.mp4")),
    ]
    write_summary(tmp_path / "summary.csv", results)
    text = (tmp_path / "summary.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["name"] for row in rows] == ["a.mp4", "b.mp4", "low.mp4", "z\\udcff.mp4"]
    assert rows[0]["highest"] == "0.9" or float(rows[0]["highest"]) == pytest.approx(0.9)
    assert rows[2]["events"] == "" and rows[2]["scored"] == "85"
    assert rows[3]["problem"].startswith("z.mp4: not") and rows[3]["highest"] == ""


@pytest.mark.parametrize(
    ("seconds", "span", "said"),
    [
        (3.4, 5, "3.40 s"),
        (59.96, 300, "1:00.0"),
        (123.44, 300, "2:03.4"),
        (3723, 7200, "1:02:03.0"),
        (0, 7200, "0:00:00.0"),
    ],
)
def test_clock(seconds, span, said):
    assert clock(seconds, span) == said
