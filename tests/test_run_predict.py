"""run_predict.py: scores equal to --eval's, of frames up to their own alone; what it leaves, and how it goes on."""

import csv
import json
import shutil
import signal

import numpy as np
import pytest
import torch
from background import Run
from helpers import render_small, run, write_video

import run_finetune
import run_predict
from datasets.tools import synthetic
from engine.checkpoint import save_weights
from engine.evaluate import EvaluationError
from engine.overlay import OverlayError
from models import create_model
from run_predict import load_scorer
from utils.cli import ConfigError
from utils.flags import finetune_parser
from utils.predict_flags import predict_parser

QUICK = ["--device", "cpu", "--num_workers", 0]


def predict(*words):
    run_predict.main(predict_parser("").parse_args([str(word) for word in (*words, *QUICK)]))


def scores(folder):
    """{frame: score} of a scores.csv."""
    with (folder / "scores.csv").open() as f:
        return {int(row["frame"]): float(row["score"]) for row in csv.DictReader(f)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a tiny model whose scores are spread out."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    save_weights(path, create_model("vit_tiny_patch16_64", init_scale=30.0), data_set="DoTA", epoch=3)
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """a.mp4 at 30 fps, day/b.mp4 at 25, day/b.avi at 59.94, short.mp4 of half a second, broken.mp4."""
    root = tmp_path_factory.mktemp("videos")
    write_video(root / "a.mp4", frames=90, fps=30)
    write_video(root / "day" / "b.mp4", frames=60, fps=25)
    write_video(root / "short.mp4", frames=15, fps=30)
    (root / "broken.mp4").write_bytes(b"no video")
    return root


@pytest.fixture(scope="module")
def predicted(videos, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "run"
    predict(videos, "--weights", weights, "--output_dir", folder, "--threshold", 0.5)
    return folder


@pytest.mark.parametrize("stride", [1, 3])
def test_scores_are_those_of_an_evaluation(weights, tmp_path, stride):
    root = render_small(tmp_path / "dota")
    words = ["--eval", "--data_set", "DoTA", "--data_path", root, "--finetune", weights, "--output_dir"]
    words += [tmp_path / "eval", *QUICK, "--sampling_rate_val", stride]
    run_finetune.main(finetune_parser("").parse_args([str(word) for word in words]))
    evaluated = {}
    with (tmp_path / "eval" / "predictions.csv").open() as f:
        for row in csv.DictReader(f):
            evaluated.setdefault(row["clip"], {})[int(row["frame"])] = float(row["score"])
    flags = ["--weights", weights, "--assume_fps", 10, "--write", "scores"]
    predict(*sorted(root.glob("frames/*")), *flags, "--output_dir", tmp_path / "run")
    assert len(evaluated) == 5
    for clip, wanted in evaluated.items():
        (path,) = (tmp_path / "run").glob(f"{clip}*/**/scores.csv")
        found = scores(path.parent)
        assert wanted.keys() <= found.keys() and (stride > 1 or wanted.keys() == found.keys())
        assert max(abs(found[frame] - score) for frame, score in wanted.items()) < 1e-6


@pytest.mark.parametrize("fps", [7, 25, 59.94])
@pytest.mark.parametrize("options", [{}, {"stride": 3}, {"stride": 3, "warm_up": True}], ids=str)
def test_the_future_changes_no_score(weights, tmp_path, fps, options):
    """Of a folder of pictures, whose beginnings hold the very same pictures."""
    root = render_small(tmp_path / "dota")
    shutil.unpack_archive(next(root.glob("frames/*/images.zip")), tmp_path / "all")
    pictures = sorted((tmp_path / "all").glob("**/*.jpg")) * 3
    scorer = load_scorer(weights, device="cpu", assume_fps=fps, num_workers=0, **options)

    def curve(count):
        folder = tmp_path / f"first {count}"
        folder.mkdir()
        for i, picture in enumerate(pictures[:count]):
            shutil.copy(picture, folder / f"{i:04d}.jpg")
        return scorer(folder)

    whole = curve(len(pictures))
    assert whole.frame[0] == (0 if "warm_up" in options else round(3 * fps / 5))
    for count in (len(pictures) - n for n in (1, 2, 5, 17, len(pictures) // 4)):
        beginning = curve(count)
        assert np.array_equal(beginning.frame, whole.frame[whole.frame < count]) and len(beginning.frame)
        assert np.allclose(beginning.score, whole.score[: len(beginning.score)], atol=1e-6, rtol=0)
        assert np.array_equal(beginning.warming_up, whole.warming_up[: len(beginning.score)])


def test_what_is_left_of_videos(predicted, videos):
    assert {path.name for path in predicted.iterdir()} >= {"summary.csv", "report.html", "predict_args.json", "a.mp4"}
    assert not (predicted / ".lock").exists()
    for name, fps, frames in (("a.mp4", 30, 90), ("day/b.mp4", 25, 60)):
        known = json.loads((predicted / name / "events.json").read_text())
        assert (known["fps"], known["num_frames"], known["gaps"], known["problem"]) == (fps, frames, [], "")
        assert known["written"] == ["curve", "events", "overlay", "scores"]
        assert {path.name for path in (predicted / name).iterdir()} == {
            *("events.json", "scores.csv", "curve.png", "overlay.mp4")
        }
        assert max(scores(predicted / name)) == frames - 1
    short = json.loads((predicted / "short.mp4" / "events.json").read_text())
    assert "shorter than a window, which takes 0.633 s" in short["problem"] and "--warm_up repeat" in short["problem"]
    with (predicted / "summary.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert sorted(row["name"] for row in rows) == ["a.mp4", "broken.mp4", "day/b.mp4", "short.mp4"]


def test_what_is_there_is_not_scored_again(predicted, videos, weights, tmp_path, monkeypatch):
    folder = shutil.copytree(predicted, tmp_path / "run")
    shutil.rmtree(folder / "day" / "b.mp4")
    (folder / "a.mp4" / "overlay.mp4").touch()
    (folder / "a.mp4" / "curve.png").unlink()
    (folder / "a.mp4" / ".overlay.mp4.1.tmp").touch()  # of a run that was killed
    before = {path: path.stat().st_mtime_ns for path in folder.glob("a.mp4/*")}
    predict(videos, "--weights", weights, "--output_dir", folder, "--threshold", 0.5)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("a.mp4/*")}[folder / "a.mp4/scores.csv"] == before[
        folder / "a.mp4/scores.csv"
    ]
    assert scores(folder / "day" / "b.mp4") == scores(predicted / "day" / "b.mp4")
    assert {p.name for p in (folder / "a.mp4").iterdir()} == {p.name for p in (predicted / "a.mp4").iterdir()}


def test_other_settings_need_another_folder(predicted, videos, weights):
    with pytest.raises(ConfigError, match="stride: 1 -> 2"):
        predict(videos, "--weights", weights, "--output_dir", predicted, "--threshold", 0.5, "--stride", 2)


def test_another_threshold_draws_anew_and_scores_nothing(predicted, videos, weights, tmp_path, monkeypatch):
    folder = shutil.copytree(predicted, tmp_path / "run")
    monkeypatch.setattr("engine.evaluate.Scorer.by_clip", lambda *_: pytest.fail("it scores"))
    (folder / "short.mp4" / "events.json").unlink()
    predict(videos / "a.mp4", "--weights", weights, "--output_dir", folder, "--threshold", 0.01)
    (event,) = json.loads((folder / "a.mp4" / "events.json").read_text())["events"]
    assert event["end"] - event["start"] > 1
    (folder / "a.mp4" / "explain-7.png").touch()  # of an event that there is no more
    predict(videos / "a.mp4", "--weights", weights, "--output_dir", folder, "--threshold", 0.9, "--write", "scores")
    assert {path.name for path in (folder / "a.mp4").iterdir()} == {"events.json", "scores.csv"}


def test_the_same_weights_fed_otherwise_need_another_folder(predicted, videos, weights, tmp_path):
    content = torch.load(weights, weights_only=True)
    torch.save(content | {"spec": content["spec"] | {"operating_point": {"threshold": 0.3}}}, tmp_path / "point.pth")
    torch.save(content | {"spec": content["spec"] | {"view_fps": 10.0}}, tmp_path / "other.pth")
    words = [videos / "a.mp4", "--output_dir", predicted, "--threshold", 0.5, "--weights"]
    predict(*words, tmp_path / "point.pth")
    with pytest.raises(ConfigError, match="holds scores of other settings .weights_sha256: "):
        predict(*words, tmp_path / "other.pth")


def test_outputs_do_not_come_among_the_videos(videos, weights, tmp_path):
    """Of which the folder would be passed over afterwards, as one of predictions."""
    root = shutil.copytree(videos, tmp_path / "trips")
    shutil.unpack_archive(next(render_small(tmp_path / "dota").glob("frames/*/images.zip")), root / "day" / "pictures")
    (tmp_path / "link").symlink_to(root)
    before = set(root.rglob("*"))
    pictures = next(path.parent for path in root.rglob("*.jpg"))
    for inputs, folder in ((root, root), (root, root / "day"), (tmp_path / "link", root), (pictures, pictures)):
        with pytest.raises(ConfigError, match=f"--output_dir {folder}: .* is in it, which is to be scored"):
            predict(inputs, "--weights", weights, "--output_dir", folder)
    assert {path.name for path in root.rglob("*") if path not in before} <= {"videos.json", ".lock"}
    predict(root / "a.mp4", "--weights", weights, "--output_dir", root / "risk", "--write", "scores")
    assert scores(root / "risk" / "a.mp4")


@pytest.mark.parametrize(
    ("what", "error", "flags", "drawn"),
    [
        ("engine.prediction.write_overlay", OverlayError, [], []),
        ("run_predict.saliency", EvaluationError, ["--explain"], ["explain"]),
    ],
)
def test_a_video_that_cannot_be_drawn_stops_no_other(
    videos, weights, tmp_path, monkeypatch, capsys, what, error, flags, drawn
):
    def fail(*_):
        raise error("for a test")

    words = [videos / "a.mp4", videos / "day", "--weights", weights, "--output_dir", tmp_path / "run", *flags]
    with monkeypatch.context() as patch:
        patch.setattr(what, fail)
        predict(*words, "--threshold", 0.5)
    assert capsys.readouterr().out.count("scored, but not drawn: for a test") == 2
    for name in ("a.mp4", "b.mp4"):
        assert json.loads((tmp_path / "run" / name / "events.json").read_text())["written"] == ["events", "scores"]
    predict(*words, "--threshold", 0.5)
    for name in ("a.mp4", "b.mp4"):
        known = json.loads((tmp_path / "run" / name / "events.json").read_text())
        assert known["written"] == sorted(["curve", "events", "overlay", "scores", *drawn])


def test_three_lines(predicted, videos, weights, tmp_path):
    scorer = load_scorer(weights, device="cpu")
    curve = scorer(videos / "a.mp4")
    curve.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
    assert np.allclose(list(scores(predicted / "a.mp4").values()), curve.score, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("stride", 0), ("stride", 1.5), ("batch_size", 0), ("num_workers", -1), ("assume_fps", 0), ("read_timeout", -1)],
)
def test_a_number_that_cannot_be_is_refused_by_name(weights, name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: expected is a .*number"):
        load_scorer(weights, device="cpu", **{name: value})


def test_a_stream_gets_the_same_scores(predicted, videos, weights, tmp_path):
    words = ["--stream", videos / "a.mp4", "--weights", weights, "--output_dir", tmp_path / "live", "--threshold", 0.5]
    done = run("run_predict.py", *words, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    first, *_, last = map(json.loads, done.stdout.splitlines())
    (event, *_) = json.loads((predicted / "a.mp4" / "events.json").read_text())["events"]
    assert (first["type"], last["type"]) == ("alert", "end") and first["time"] == pytest.approx(
        event["alert"], abs=1e-6
    )
    (path,) = (tmp_path / "live").glob("scores-*.csv")
    path.rename(tmp_path / "scores.csv")
    assert scores(tmp_path) == pytest.approx(scores(predicted / "a.mp4"), abs=1e-6)


def test_a_damaged_stretch_is_a_gap_and_shifts_nothing(weights, tmp_path):
    write_long(tmp_path / "whole.mp4")
    data = bytearray((tmp_path / "whole.mp4").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    (tmp_path / "damaged.mp4").write_bytes(data)
    scorer = load_scorer(weights, device="cpu")
    whole, damaged = scorer(tmp_path / "whole.mp4"), scorer(tmp_path / "damaged.mp4")
    (gap,) = damaged.gaps
    assert 1 < gap.start < gap.end < 9 and gap.reason and not whole.gaps
    known = dict(zip(whole.frame.tolist(), whole.score.tolist(), strict=True))
    assert 50 < len(damaged.frame) < len(whole.frame) and damaged.frame[-1] == whole.frame[-1]
    assert not ((damaged.time >= gap.start) & (damaged.time < gap.end)).any()
    assert all(
        known[f] == pytest.approx(s, abs=1e-6) for f, s in zip(damaged.frame.tolist(), damaged.score, strict=True)
    )


def write_long(path):
    """10 seconds with a key frame every second."""
    rng = np.random.default_rng(0)
    pictures = (np.roll(rng.integers(0, 255, (48, 64, 3), np.uint8), i, 1) for i in range(200))
    synthetic.write_video(path, pictures, size=(64, 48), fps=20, g="20", keyint_min="20")


def test_an_exported_model_scores_alike(predicted, videos, weights, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert run("-m", "models.export", weights, "--to", "onnx", "--output", tmp_path / "w.onnx").returncode == 0
    predict(videos / "a.mp4", "--weights", tmp_path / "w.onnx", "--output_dir", tmp_path / "run", "--write", "scores")
    assert scores(tmp_path / "run" / "a.mp4") == pytest.approx(scores(predicted / "a.mp4"), abs=1e-4)


@pytest.mark.slow
def test_many_videos_over_two_processes_killed_twice_and_stopped(weights, tmp_path):
    write_video(tmp_path / "videos" / "000.mp4", frames=40, fps=20)
    for i in range(1, 200):
        shutil.copy(tmp_path / "videos" / "000.mp4", tmp_path / "videos" / f"{i:03d}.mp4")
    words = ["run_predict.py", tmp_path / "videos", "--weights", weights, "--device", "cpu", "--write", "scores,report"]
    folder, done = tmp_path / "run", []

    def complete():
        return list(folder.glob("*.mp4/events.json"))

    for least, number in ((30, signal.SIGKILL), (80, signal.SIGKILL), (120, signal.SIGTERM)):
        started = Run([*words, "--num_workers", 1], folder)
        assert started.until(lambda least=least: len(complete()) >= least)
        if number == signal.SIGKILL:
            started.kill(started.tree())
        else:
            started.process.send_signal(number)
            assert started.end(120) and "the same command goes on" in started.output
        assert (folder / "REQUEUE").exists() == (number == signal.SIGTERM)
        done.append({path: path.stat().st_mtime_ns for path in (p.with_name("scores.csv") for p in complete())})
    last = Run([*words, "--num_workers", 1], folder)
    assert last.end(300) == 0, last.output
    assert len(complete()) == 200 and not (folder / "REQUEUE").exists()
    for before in done:  # whole when it was killed, so not made again
        assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert len({(folder / f"{i:03d}.mp4" / "scores.csv").read_bytes() for i in range(200)}) == 1
    with (folder / "summary.csv").open() as f:
        assert sorted(row["name"] for row in csv.DictReader(f)) == [f"{i:03d}.mp4" for i in range(200)]
