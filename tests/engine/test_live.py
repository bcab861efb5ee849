"""A live source is scored as it comes; what is late is counted, errors come through, and nothing grows."""

import csv
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, write_video
from torch import nn

from datasets.augment.frames import EvalTransform
from datasets.clips import Clip, ClipTable, DataError
from datasets.live import LiveSource
from datasets.stream import SplitWindows
from datasets.windows import WindowIndex
from engine.evaluate import Scorer
from engine.live import Monitor, ScoreFile, follow, watch
from engine.stream import RiskStream
from models import create_model

LIMIT = 180  # seconds that anything here may take on a slow machine


class Risk(nn.Module):
    """The logits of a window: its mean grey level is the margin. `hold` is awaited before each."""

    def __init__(self, hold=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.hold, self.called = hold, threading.Event()

    def normalize(self, video):
        return video.float() / 255

    def forward(self, video):
        self.called.set()
        if self.hold:
            assert self.hold.wait(LIMIT)
        margin = 8 * video.mean((1, 2, 3, 4)) - 4
        return torch.stack([torch.zeros_like(margin), margin], 1)


class Fake:
    """A source of grey pictures at 10 per second of its clock, handed out as fast as they are taken.

    after_two: awaited after two pictures.
    """

    name = "fake"

    def __init__(self, count, *, live=False, error=None, level=lambda i: i % 256, after_two=None):
        self.count, self.live, self.error, self.level, self.after_two = count, live, error, level, after_two
        self.given, self.stopped, self.ended = 0, threading.Event(), threading.Event()

    def __iter__(self):
        try:
            for i in range(self.count):
                if self.stopped.is_set():
                    return
                if i == 2 and self.after_two:
                    assert self.after_two.wait(LIMIT)
                self.given += 1
                yield np.full((8, 8, 3), self.level(i), np.uint8), i / 10, time.monotonic()
            if self.error:
                raise self.error
        finally:
            self.ended.set()

    def stop(self):
        self.stopped.set()

    def check(self):
        pass

    def about(self):
        return {"corrupt": 0}


def make_stream(model=None, **options):
    options = {"num_frames": 2, "view_fps": 10, "fps": 10} | options
    return RiskStream(model or Risk(), lambda frame: EvalTransform(8)([frame])[0], **options)


def never():
    return False


def until(condition):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ----------------------------------------------------------------------------------------------------------------------
# Following


def test_a_file_gets_the_scores_of_the_recorded_path(tmp_path):
    write_video(tmp_path / "a.mp4", frames=60, fps=25)
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_64", num_classes=2)
    nn.init.normal_(model.head.weight, std=1.0)
    source = LiveSource(str(tmp_path / "a.mp4"))
    options = {"num_frames": 4, "view_fps": 5, "fps": source.fps}
    stream = RiskStream(model, lambda frame: EvalTransform(64)([frame])[0], **options)
    scores = [result.score for result in follow(source, stream, stop=never)]
    clips = ClipTable("videos", "all", [Clip("a", str(tmp_path / "a.mp4"), 60, 25.0)])
    index = WindowIndex([60], src_fps=25, num_frames=4, view_fps=5)
    recorded = Scorer(SplitWindows(clips, index, EvalTransform(64))).score(model)
    assert [s.frame for s in scores] == recorded.frame.tolist() and np.ptp(recorded.score) > 0.01
    assert np.abs(np.array([s.score for s in scores]) - recorded.score).max() <= 1e-6


def test_a_source_that_waits_loses_nothing_however_slow_the_model_is():
    hold, source = threading.Event(), Fake(100)
    stream = make_stream(Risk(hold))
    results = follow(source, stream, stop=never)
    with pytest.raises(StopIteration), release_after(hold, lambda: source.given >= 9):
        scores = [next(results)]
        assert source.given < 20  # it was not read on while the model was busy
        while True:
            scores.append(next(results))
    assert [result.score.frame for result in scores] == list(range(1, 100)) and not stream.counts.skipped


class release_after:
    """Set an event once a condition holds, in a thread beside the body."""

    def __init__(self, event, condition):
        self.thread = threading.Thread(target=lambda: (until(condition), event.set()))

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.thread.join()


@pytest.mark.parametrize(("count", "dropped"), [(50, 0), (200, 200 - 2 - 64)])
def test_in_real_time_only_the_newest_is_scored_and_all_others_are_counted(count, dropped):
    hold = threading.Event()
    stream = make_stream(Risk(hold), max_gap=60)
    source = Fake(count, live=True, after_two=stream.model.called)
    monitor = Monitor(source, stream)
    with release_after(hold, source.ended.is_set):  # the model is busy with frame 1 while the others come
        scores = [result.score for result in follow(source, stream, monitor, max_delay=0, stop=never)]
    assert [score.frame for score in scores] == [1, count - 1]
    assert (monitor.dropped, stream.counts.pictures, stream.counts.repeated) == (dropped, count - dropped, dropped)
    assert (stream.counts.scores, stream.counts.skipped) == (2, count - 3)
    levels = [(count - 2) / 255, (count - 1) / 255]  # the picture that was not scored is in the window
    assert scores[-1].score == pytest.approx(1 / (1 + np.exp(4 - 4 * sum(levels))), abs=1e-5)


@pytest.mark.parametrize("live", [True, False])
def test_where_it_is_stopped_every_picture_is_accounted_for(live):
    hold, scores = threading.Event(), []
    stream = make_stream(Risk(hold), max_gap=60)
    source = Fake(300, live=live, after_two=stream.model.called)
    monitor = Monitor(source, stream)
    with release_after(hold, source.ended.is_set if live else lambda: source.given >= 9):
        scores += follow(source, stream, monitor, max_delay=0, stop=lambda: stream.counts.pictures >= 5)
    counts = stream.counts
    assert source.ended.wait(LIMIT) and source.given == counts.pictures + monitor.dropped
    assert monitor.dropped > 3 and counts.pictures >= 5
    assert counts.pictures + counts.repeated == 1 + counts.scores + counts.skipped  # a window takes two frames
    assert len(scores) == counts.scores and bool(counts.skipped) == live


def test_pictures_that_come_together_are_all_scored_where_that_is_quick():
    source = Fake(60, live=True)
    stream = make_stream()
    assert len(list(follow(source, stream, max_delay=LIMIT, stop=never))) == 59 and not stream.counts.skipped


@pytest.mark.parametrize("live", [True, False])
def test_the_error_of_a_source_comes_through(live):
    source, scores = Fake(5, live=live, error=DataError("the cable is out")), []
    with pytest.raises(DataError, match="the cable is out"):
        scores += follow(source, make_stream(), stop=never, max_delay=LIMIT)
    assert len(scores) == 4


def test_an_error_of_the_model_or_of_a_picture_ends_the_reading():
    class Broken(Risk):
        def forward(self, video):
            raise RuntimeError("out of memory")

    for stream, level, message in (
        (make_stream(Broken()), lambda i: 0, "out of memory"),
        (make_stream(), lambda i: [0], "broadcast|sequence|shape"),
    ):
        source = Fake(10**9, level=level)
        if message != "out of memory":
            stream.prepare = lambda frame: (_ for _ in ()).throw(ValueError("a shape"))
        with pytest.raises((RuntimeError, ValueError), match=message):
            list(follow(source, stream, stop=never))
        assert source.ended.wait(LIMIT)


def test_a_source_that_hangs_is_an_error():
    class Hanging(Fake):
        def __iter__(self):
            self.stopped.wait(LIMIT)
            return iter(())

        def check(self):
            raise DataError("reading it has hung for 50 s")

    with pytest.raises(DataError, match="has hung"):
        list(follow(Hanging(0), make_stream(), stop=never))


def test_it_ends_where_it_is_asked_to():
    source, seen = Fake(10**9), []
    for result in follow(source, make_stream(), stop=lambda: len(seen) >= 5):
        seen.append(result)
    assert len(seen) == 5 and source.ended.wait(LIMIT)


def test_memory_does_not_grow():
    source, monitor = Fake(4000), None
    stream = make_stream(fps=30)
    monitor = Monitor(source, stream)
    results = follow(source, stream, monitor, stop=never)
    tracemalloc.start()
    for _ in islice(results, 1000):
        pass
    before = tracemalloc.get_traced_memory()[0]
    count = sum(1 for _ in results)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert count > 300 and grown < 10**6


# ----------------------------------------------------------------------------------------------------------------------
# Watching


def test_watch_writes_scores_and_says_what_came_of_it(tmp_path, caplog):
    caplog.set_level(logging.INFO, "tad")
    stream = make_stream(warm_up=True)
    summary = watch(Fake(40), stream, scores=ScoreFile(tmp_path / "scores.csv"), report_every=0, stop=never)
    with (tmp_path / "scores.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert [int(row["frame"]) for row in rows] == list(range(40)) and list(rows[0]) == [
        "time", "frame", "score", "warming_up", "latency_ms",
    ]  # fmt: skip
    assert [row["warming_up"] for row in rows] == ["1"] + ["0"] * 39
    assert [float(row["time"]) for row in rows] == pytest.approx(np.arange(40) / 10)
    levels = (np.maximum(np.arange(40) - 1, 0) + np.arange(40)) / 510
    assert [float(row["score"]) for row in rows] == pytest.approx((1 / (1 + np.exp(4 - 8 * levels))).tolist())
    late = np.array([float(row["latency_ms"]) for row in rows])
    assert summary["latency_ms"]["max"] == pytest.approx(late.max(), abs=0.01)
    assert summary["latency_ms"]["p50"] == pytest.approx(np.percentile(late, 50), abs=0.01)
    assert (summary["pictures"], summary["scores"], summary["skipped"], summary["dropped"]) == (40, 40, 0, 0)
    assert summary["scores_per_second"] == pytest.approx(40 / summary["seconds"], rel=0.05)
    assert "fake: over; source fake" in caplog.records[-1].message
    assert any("pictures/s" in r.message and "latency p50" in r.message for r in caplog.records)


def test_the_summary_comes_in_spite_of_an_error(tmp_path, caplog):
    caplog.set_level(logging.INFO, "tad")
    with pytest.raises(DataError):
        watch(Fake(40, error=DataError("gone")), make_stream(), stop=never)
    assert "scores 39" in caplog.records[-1].message


def test_scores_are_not_written_over(tmp_path):
    ScoreFile(tmp_path / "scores.csv").close()
    with pytest.raises(FileExistsError):
        ScoreFile(tmp_path / "scores.csv")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    scores = ScoreFile(tmp_path / "scores.csv")
    scores._file.close()
    with Path("/dev/full").open("wb", buffering=0) as scores._file, pytest.raises(OSError, match="scores.csv"):
        watch(Fake(40), make_stream(), scores=scores, stop=never)


COMMAND = """
import logging, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from tests.engine.test_live import *
from utils.signals import catch_signals
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
source = LiveSource(sys.argv[1], reconnect=0.1)
catch_signals()
summary = watch(source, make_stream(fps=30), scores=ScoreFile(sys.argv[2]))
print(summary["scores"], summary["reconnects"])
"""
WRITER = """
import sys, time
data = open(sys.argv[1], "rb").read()
with open(sys.argv[2], "wb", buffering=0) as f:
    while True:
        for i in range(0, len(data), 188):
            f.write(data[i : i + 188])
            time.sleep(0.002)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_source_may_be_killed_and_so_may_the_command(tmp_path, number):
    write_video(tmp_path / "a.ts", frames=90, fps=30)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "run.py").write_text(COMMAND.format(root=str(ROOT)))
    scores = tmp_path / "scores.csv"

    def lines():
        return scores.read_text().splitlines() if scores.exists() else []

    def writer():
        words = [sys.executable, "-c", WRITER, tmp_path / "a.ts", tmp_path / "pipe"]
        return subprocess.Popen(words, stderr=subprocess.DEVNULL)

    writing = writer()
    with (tmp_path / "log").open("w") as log:
        words = [sys.executable, tmp_path / "run.py", tmp_path / "pipe", scores]
        command = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
    try:
        until(lambda: len(lines()) > 60 or command.poll() is not None)
        writing.kill()
        writing.wait()
        until(lambda: "opened again" in (tmp_path / "log").read_text() or command.poll() is not None)
        count, writing = len(lines()), writer()
        until(lambda: len(lines()) > count + 60 or command.poll() is not None)
        command.send_signal(number)
        out, _ = command.communicate(timeout=LIMIT)
    finally:
        for process in (writing, command):
            with suppress(OSError):
                process.kill()
            process.wait()
    rows = [line.split(",") for line in lines()]
    assert all(len(row) == 5 for row in rows[:-1]) and len(rows) > count + 60, (tmp_path / "log").read_text()
    frames = [int(row[1]) for row in rows[1:-1]]
    assert frames == sorted(set(frames))
    if number == signal.SIGTERM:
        made, reconnects = map(int, out.split())
        assert command.returncode == 0 and made == len(rows) - 1 and reconnects >= 1
        assert "over; source" in (tmp_path / "log").read_text()


def test_pictures_that_the_decoder_is_late_with_are_noticed(caplog):
    caplog.set_level(logging.WARNING, "tad")
    monitor = Monitor(Fake(0), make_stream())
    for i in range(100):  # the source's clock is slow, as clocks are
        monitor.arrived(i, 50 + 1.0001 * i)
    assert monitor.behind < 0.01 and not caplog.records
    for i in range(100, 130):
        monitor.arrived(i, 50 + 1.0001 * i + 0.3 * (i - 99))
    assert monitor.behind == pytest.approx(9, abs=0.1) and monitor.summary()["behind_s"]["most"] == pytest.approx(
        9, abs=0.1
    )
    assert len(caplog.records) == 1 and "late" in caplog.text
    monitor.stream.counts.stretches += 1  # another connection brings nothing of that
    monitor.arrived(200, 300)
    assert monitor.behind == 0 and monitor.most_behind > 8
