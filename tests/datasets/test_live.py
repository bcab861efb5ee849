"""Live sources: every sound picture in order on an ascending clock, whatever breaks; nothing is waited for for ever."""

import gc
import logging
import os
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import av
import cv2
import numpy as np
import pytest

from datasets import live
from datasets.clips import DataError
from datasets.live import LiveSource
from datasets.live_clock import Clock
from datasets.tools.synthetic import write_video
from datasets.video import Video
from tests.datasets.video_files import SIZE, burned, number_of

FRAMES, FPS = 60, 30
LIMIT = 60  # seconds that anything here may take on a slow machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """a.mp4 and a.ts show the numbers from 0 on, one per key frame in ten."""
    path = tmp_path_factory.mktemp("live")
    for name in ("a.mp4", "a.ts"):
        write_video(path / name, map(burned, range(FRAMES)), size=SIZE, fps=FPS, g="10", bf="2", preset="veryfast")
    return path


def numbers(pictures):
    return [number_of(picture.pixels) for picture in pictures]


def times(pictures):
    found = [picture.time for picture in pictures]
    assert all(a <= b for a, b in pairwise(found))
    return found


def take(source, count):
    """The first pictures of a source, within LIMIT."""
    pictures, deadline = [], time.monotonic() + LIMIT
    for picture in source:
        pictures.append(picture)
        assert time.monotonic() < deadline
        if len(pictures) == count:
            source.stop()
    return pictures


@contextmanager
def working(function, *arguments):
    """Run a function in a thread beside the body."""
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    yield
    thread.join(LIMIT)
    assert not thread.is_alive()


# ----------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("name", ["a.mp4", "a.ts"])
def test_a_file_gives_what_the_recorded_path_reads(folder, name):
    source = LiveSource(str(folder / name))
    pictures = list(source)
    assert numbers(pictures) == list(range(FRAMES)) and times(pictures) == pytest.approx(np.arange(FRAMES) / FPS)
    reader = Video(str(folder / name))
    assert source.fps == reader.fps
    for picture, frame in zip(pictures, reader.frames(range(FRAMES)), strict=True):
        assert np.array_equal(picture.pixels, frame.numpy())
    assert (source.kind, source.live, source.about()) == ("file", False, {"reconnects": 0, "corrupt": 0, "early": 0})


def test_a_file_can_be_played_in_real_time(folder):
    source = LiveSource(str(folder / "a.mp4"), paced=True)
    began = time.monotonic()
    pictures = [(picture, time.monotonic()) for picture in source]
    assert source.live and len(pictures) == FRAMES and time.monotonic() - began >= (FRAMES - 1) / FPS
    first = pictures[0][0].arrived
    assert all(p.arrived - first >= p.time - 0.001 and came >= p.arrived for p, came in pictures)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_pictures_are_left_out_and_counted_with_what_refers_to_them(folder, tmp_path, seed):
    data, rng = bytearray((folder / "a.mp4").read_bytes()), np.random.default_rng(seed)
    place = int(rng.integers(len(data) // 4, len(data) // 2))
    data[place : place + 200] = rng.bytes(200)
    (tmp_path / "broken.mp4").write_bytes(data)
    source = LiveSource(str(tmp_path / "broken.mp4"))
    pictures = list(source)
    found = numbers(pictures)
    assert source.counts.corrupt > 0 and 30 < len(found) < FRAMES
    assert found[0] == 0 and found[-1] == FRAMES - 1
    assert [p.time for p in pictures] == pytest.approx([n / FPS for n in found])  # none under another's time


def test_lost_packets_of_a_stream_are_damage(folder, tmp_path):
    data = bytearray((folder / "a.ts").read_bytes())
    del data[20 * 188 : 24 * 188]
    (tmp_path / "broken.ts").write_bytes(data)
    source = LiveSource(str(tmp_path / "broken.ts"))
    pictures = list(source)
    assert source.counts.corrupt > 0 and [p.time for p in pictures] == pytest.approx(
        [n / FPS for n in numbers(pictures)]
    )


def test_without_a_key_frame_pictures_come_again_after_some_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "_RECOVERY", 0.5)
    path = tmp_path / "a.mp4"
    write_video(path, map(burned, range(FRAMES)), size=SIZE, fps=FPS, g="1000", bf="0", preset="veryfast")
    source = LiveSource(str(path))
    pictures = iter(source)
    assert [number_of(next(pictures).pixels) for _ in range(20)] == list(range(20))
    source._damaged()
    rest = numbers(pictures)
    assert 30 < rest[0] <= 35 and rest == list(range(rest[0], FRAMES))


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent.mp4", "No such file"), ("text.mp4", "text.mp4"), ("", "Is a directory|not a readable video")],
)
def test_what_is_no_video_is_refused(tmp_path, name, message):
    (tmp_path / "text.mp4").write_text("hello\n" * 100)
    with pytest.raises(DataError, match=message) as e:
        LiveSource(str(tmp_path / name))
    assert "\n" not in str(e.value)


# ----------------------------------------------------------------------------------------------------------------------
# Pipes


@pytest.fixture
def fifo(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def feed(path, data, *, wait=0.0):
    """Write bytes into a named pipe, as a writer that comes late and leaves."""
    time.sleep(wait)
    with path.open("wb") as f:
        f.write(data)


def test_the_writers_of_a_named_pipe_come_and_go(folder, fifo, caplog):
    data = (folder / "a.ts").read_bytes()
    caplog.set_level(logging.INFO, "tad")

    def writers():
        feed(fifo, data[: len(data) * 2 // 3], wait=0.3)  # as where it is killed
        feed(fifo, data, wait=0.5)
        feed(fifo, data, wait=0.5)

    with working(writers):
        source = LiveSource(str(fifo), reconnect=0.1)
        assert (source.kind, source.live, source.fps) == ("pipe", False, FPS)
        pictures = take(source, 130)
    found = numbers(pictures)
    starts = [i for i, number in enumerate(found) if number == 0]
    assert len(starts) == 3 and 20 <= starts[1] < FRAMES and starts[2] == starts[1] + FRAMES
    assert sorted(found[: starts[1]]) == found[: starts[1]] and found[: starts[1] - 3] == list(range(starts[1] - 3))
    assert found[starts[1] :] == [*range(FRAMES), *range(len(found) - starts[2])]
    at = times(pictures)
    assert source.counts.reconnects >= 2 and at[starts[1]] - at[starts[1] - 1] >= 0.5
    assert sum("opened again" in r.message for r in caplog.records) == 2
    assert sum("come again" in r.message for r in caplog.records) == 2


def test_the_end_of_a_named_pipe_without_reconnecting(folder, fifo):
    with working(feed, fifo, (folder / "a.ts").read_bytes()):
        assert numbers(LiveSource(str(fifo), reconnect=0)) == list(range(FRAMES))


def test_a_pipe_without_a_writer_is_waited_for_so_long(fifo):
    with pytest.raises(DataError, match=r"pipe cannot be opened \(nothing came for 0.5 s\); it must carry"):
        LiveSource(str(fifo), timeout=0.5)


@pytest.mark.parametrize("reconnect", [0, 0.1])
def test_a_silent_writer_is_given_up_after_the_outage(folder, fifo, reconnect):
    done = threading.Event()

    def silent():
        with fifo.open("wb") as f:
            f.write((folder / "a.ts").read_bytes())
            f.flush()
            done.wait(LIMIT)

    with working(silent):
        source, pictures = LiveSource(str(fifo), reconnect=reconnect, outage=1), []
        with pytest.raises(DataError, match="nothing came for 1 s"):
            pictures += source
        done.set()
    assert 40 < len(pictures) < FRAMES  # the decoder holds the last ones back


def test_standard_input(folder, monkeypatch):
    data = (folder / "a.ts").read_bytes()
    read, write = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(read))

    def writer():
        with os.fdopen(write, "wb") as f:
            f.write(data)

    with working(writer):
        source = LiveSource("-")
        assert numbers(source) == list(range(FRAMES)) and source.counts.reconnects == 0


@pytest.mark.parametrize(("given", "fps"), [(None, FPS), (12, 12)])
def test_a_raw_stream_has_the_times_of_its_rate(tmp_path, fifo, given, fps):
    """FFmpeg makes up times of 25 per second for it."""
    path = tmp_path / "a.h264"
    write_video(path, map(burned, range(FRAMES)), size=SIZE, fps=FPS, g="10", bf="2", preset="veryfast")
    with working(feed, fifo, path.read_bytes()):
        source = LiveSource(str(fifo), fps=given, reconnect=0)
        pictures = list(source)
    assert numbers(pictures) == list(range(FRAMES)) and source.fps == fps
    assert Video(str(path)).fps == FPS and times(pictures) == pytest.approx(np.arange(FRAMES) / fps)
    paced = take(LiveSource(str(path), paced=True), 10)
    assert times(paced) == pytest.approx(np.arange(10) / FPS)


def jpegs(count):
    """The bytes of pictures that show the numbers from 0 on."""
    return [cv2.imencode(".jpg", burned(i)[..., ::-1])[1].tobytes() for i in range(count)]


def test_a_rate_that_nobody_states_is_said_to_be_assumed(fifo, caplog):
    for given in (None, FPS):
        with working(feed, fifo, b"".join(jpegs(20))):
            pictures = list(LiveSource(str(fifo), fps=given, reconnect=0))
        assert numbers(pictures) == list(range(20))
        assert times(pictures) == pytest.approx(np.arange(20) / (given or 25))
    (message,) = (record.message for record in caplog.records)
    assert "25 pictures per second are assumed; give the right rate (--stream_fps)" in message


def test_stopping_ends_the_wait_for_a_silent_pipe(folder, monkeypatch):
    read, write = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(read))
    os.write(write, (folder / "a.ts").read_bytes()[:60000])  # a pipe holds as much
    source = LiveSource("-")
    with working(lambda: (time.sleep(0.5), source.stop())):
        assert len(list(source)) > 10
    os.close(write)


def test_a_terminal_is_no_video(monkeypatch):
    main, side = os.openpty()
    monkeypatch.setattr(sys, "stdin", os.fdopen(side))
    with pytest.raises(DataError, match="terminal; pipe a video"):
        LiveSource("-")
    os.close(main)


# ----------------------------------------------------------------------------------------------------------------------
# Addresses


@contextmanager
def server(data, *, length=False, fail=0, kind="video/mp2t"):
    """Serve bytes by HTTP at any path: a stream, or with its length a file; the first `fail` requests break it off.

    data: the bytes, or a function that yields them.
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", kind)
            if length:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            parts = data() if callable(data) else [data[: len(data) // 2] if len(requests) <= fail else data]
            with suppress(OSError):  # the client has had enough
                for part in parts:
                    self.wfile.write(part)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://user:secret@127.0.0.1:{http.server_port}/a", requests
    finally:
        http.shutdown()
        http.server_close()


def test_a_stream_that_breaks_off_is_opened_again(folder):
    with server((folder / "a.ts").read_bytes(), fail=1) as (url, requests):
        source = LiveSource(url, reconnect=0.1)
        assert (source.kind, source.live) == ("url", True) and "secret" not in source.name
        pictures = take(source, 80)
        assert len(requests) > 1
    found = numbers(pictures)
    again = found.index(0, 1)
    assert found[again : again + 40] == list(range(40)) and source.counts.reconnects >= 1
    times(pictures)
    assert not [o for o in gc.get_objects() if type(o) is av.container.InputContainer]  # each holds 20 to 60 MB


def test_pictures_without_times_that_came_while_a_stream_was_opened_are_counted(monkeypatch):
    """Cameras send JPEGs without a time each; those that FFmpeg has read to see what they are come at once."""
    monkeypatch.setattr(live, "_AT_ONCE", 0.5)

    def body():
        for i, picture in enumerate(jpegs(25)):
            time.sleep(1.0 if i == 20 else 0.05 if i > 20 else 0)
            yield b"--next\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(picture) + picture + b"\r\n"

    with server(body, kind="multipart/x-mixed-replace; boundary=next") as (url, _):
        source = LiveSource(url)
        pictures = take(source, 5)
    assert source.fps is None and source.about() == {"reconnects": 0, "corrupt": 0, "early": 20}
    assert numbers(pictures) == list(range(20, 25)) and times(pictures)[-1] >= 0.19


def test_a_recording_on_a_server_ends(folder):
    with server((folder / "a.mp4").read_bytes(), length=True) as (url, _):
        source = LiveSource(url)
        assert not source.live and numbers(source) == list(range(FRAMES))


def test_a_server_that_is_gone_is_given_up(folder, caplog):
    with server((folder / "a.ts").read_bytes()) as (url, _):
        source = LiveSource(url, reconnect=0.05, outage=1.0)
        stream = iter(source)
        next(stream)
    with pytest.raises(DataError, match=r"no picture for \d+ s"):
        for _ in stream:
            pass
    assert sum("opened again" in r.message for r in caplog.records) == 1 and "secret" not in caplog.text


def test_a_server_that_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(DataError, match=r"this url cannot be opened \(nothing came for 1 s\)"):
            LiveSource(f"http://127.0.0.1:{silent.getsockname()[1]}/", timeout=1)
        assert time.monotonic() - began < LIMIT


def test_stopping_ends_a_wait(folder):
    with server((folder / "a.ts").read_bytes()) as (url, _):
        source = LiveSource(url, reconnect=0.05)
        stream = iter(source)
        next(stream)
    with working(lambda: (time.sleep(0.5), source.stop())):
        for _ in stream:  # it is away for up to 600 seconds
            pass


def test_what_ffmpeg_is_told():
    words = live._ffmpeg_words("device:/dev/video2?framerate=30&video_size=1280x720", "camera", 5)
    assert words == (
        "/dev/video2",
        {"timeout": (5, 5), "format": "v4l2", "options": {"framerate": "30", "video_size": "1280x720"}},
    )
    url, words = live._ffmpeg_words("rtsp://cam/1", "url", 2.5)
    assert (url, words["timeout"], words["options"]["timeout"]) == ("rtsp://cam/1", (2.5, 2.5), "2500000")
    assert av.format.ContainerFormat("v4l2", "r")
    kinds = {"/dev/video0": "camera", "device:/x": "camera", "rtsp://a/b": "url", "-": "pipe", "a.mp4": "file"}
    assert {name: live._kind(name) for name in kinds} == kinds


# ----------------------------------------------------------------------------------------------------------------------
# Time


def clock(*pictures, live_source=True, fps=10, broke=()):
    """Times of pictures (stamp, arrived); before those of `broke` the connection broke."""
    made, found = Clock(fps, live=live_source), []
    for i, (stamp, arrived) in enumerate(pictures):
        if i in broke:
            made.broke()
        found.append(round(made.time(stamp, arrived), 6))
    return found


def test_the_clock_follows_the_timestamps():
    assert clock((7.0, 100), (7.1, 100.3), (7.3, 100.31), (7.4, 101)) == [0, 0.1, 0.3, 0.4]
    assert clock((7.0, 0), (99.0, 0.1), live_source=False) == [0, 92]


def test_the_clock_goes_on_where_the_timestamps_jump():
    assert clock((7.0, 0), (7.1, 0.1), (0.0, 0.4), (0.1, 0.5)) == [0, 0.1, 0.4, 0.5]
    assert clock((7.0, 0), (7.1, 0.1), (5e4, 0.2), (5e4 + 0.1, 0.3)) == [0, 0.1, 0.2, 0.3]
    assert clock((7.0, 0), (7.1, 0.1), (0.0, 9.4), live_source=False) == [0, 0.1, 0.2]  # the model took that long


def test_the_clock_goes_on_after_a_break():
    for live_source in (True, False):
        assert clock((7.0, 0), (7.1, 0.1), (0.0, 5.1), (0.1, 5.2), live_source=live_source, broke=[2]) == [
            0,
            0.1,
            5.1,
            5.2,
        ]
    assert clock((7.0, 0), (7.1, 0.1), (9.0, 0.12), broke=[2]) == [0, 0.1, 0.2]


def test_the_clock_without_timestamps():
    assert clock((None, 5), (None, 5.3), (None, 5.35)) == [0, 0.3, 0.4]
    assert clock((None, 5), (None, 5.3), (None, 9), live_source=False) == [0, 0.1, 0.2]
    assert clock((None, 5), (3.0, 5.3), (3.2, 5.4)) == [0, 0.3, 0.5]


def test_the_clock_without_timestamps_stays_with_ours():
    """Where some come late, and in spite of a rate that is given: what is late does not add up."""
    rng = np.random.default_rng(0)
    late = rng.uniform(0, 0.06, 1000)
    found = clock(*((None, 5 + 0.1 * i + late[i]) for i in range(1000)))
    assert all(a < b for a, b in pairwise(found)) and 99.9 <= found[-1] <= 99.9 + 0.06
    at_once = clock(*((None, 5 + 0.1 * max(i - 20, 0)) for i in range(1000)))  # the first were held up
    assert at_once == pytest.approx(0.1 * np.arange(1000))
