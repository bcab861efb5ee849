"""Events are told as lines of JSON, to commands and to addresses; none of them holds up the scoring."""

import io
import json
import logging
import os
import sys
import threading
import time
from contextlib import contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from engine.alerts import Alerts, Notifier, command_notifier, webhook_notifier
from engine.events import EventRule, find_events
from engine.stream import Score

LIMIT = 180  # seconds that anything here may take on a slow machine
RULE = EventRule(threshold=0.5, alert_after=0.2, gap=0.3)


def until(condition):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def told(scores, *, stretches=None, notifiers=()):
    """The lines about scores at 10 per second, and what `close` returned."""
    out = io.StringIO()
    alerts = Alerts("cam", RULE, out=out, notifiers=notifiers)
    for i, score in enumerate(scores):
        alerts.push(Score(i / 10, i, score, stretch=stretches[i] if stretches else 0))
    counts = alerts.close()
    return [json.loads(line) for line in out.getvalue().splitlines()], counts


def test_an_event_is_told_when_it_begins_and_when_it_is_over():
    scores = np.float32([0.1, 0.6, 0.7, 0.9, 0.8, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.6, 0.1, 0.1, 0.7, 0.7, 0.75]).tolist()
    (alert, end, *last), counts = told(scores)
    (one, two) = find_events(np.arange(len(scores)) / 10, scores, RULE)
    assert (alert["type"], alert["source"], alert["threshold"]) == ("alert", "cam", 0.5)
    assert alert["time"] == pytest.approx(one.alert) == 0.3 and alert["score"] == pytest.approx(0.9, abs=1e-6)
    assert abs(datetime.fromisoformat(alert["wall_time"].replace("Z", "+00:00")).timestamp() - time.time()) < LIMIT
    assert (end["type"], end["start"], end["end"]) == ("end", pytest.approx(one.start), pytest.approx(one.end))
    assert (end["peak"], end["score"]) == (pytest.approx(one.peak), pytest.approx(one.peak_score, abs=1e-6))
    assert end["end"] < end["time"] <= 1.0
    assert [line["type"] for line in last] == ["alert", "end"] and last[1]["end"] == pytest.approx(two.end) == 1.6
    assert counts == {"alerts": 2, "undelivered": 0}


def test_an_event_ends_where_the_stream_begins_anew():
    lines, _ = told([0.9] * 12, stretches=[0] * 6 + [1] * 6)
    assert [(line["type"], line["time"]) for line in lines] == [
        ("alert", 0.2),
        ("end", 0.5),
        ("alert", 0.8),
        ("end", 1.1),
    ]


def test_a_line_is_out_as_soon_as_it_is_written(tmp_path):
    with (tmp_path / "out").open("w") as out:
        alerts = Alerts("cam", RULE, out=out)
        for i in range(3):
            alerts.push(Score(i / 10, i, 0.9))
        assert json.loads((tmp_path / "out").read_text())["type"] == "alert"


def test_a_line_that_cannot_be_written_is_an_error():
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    alerts = Alerts("cam", EventRule(0.5), out=Broken())
    with pytest.raises(BrokenPipeError, match="Broken pipe; is what reads the alerts still there.*standard output"):
        alerts.push(Score(0, 0, 0.9))


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def test_a_command_gets_each_event(tmp_path, caplog):
    script = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read()); print('said')"
    (tmp_path / "a file.py").write_text(script)
    notifier = command_notifier(f"'{sys.executable}' '{tmp_path}/a file.py' {tmp_path}/got", timeout=LIMIT)
    lines, counts = told([0.9] * 5, notifiers=[notifier])
    assert [json.loads(line) for line in (tmp_path / "got").read_text().splitlines()] == lines and len(lines) == 2
    assert notifier.delivered == 2 and counts["undelivered"] == 0 and not caplog.records


def test_a_command_that_fails_is_logged_and_counted(caplog):
    notifier = command_notifier(f"{sys.executable} -c 'import sys; sys.exit(3)'", timeout=LIMIT)
    _, counts = told([0.9] * 5, notifiers=[notifier])
    assert counts == {"alerts": 1, "undelivered": 2} and "ended with code 3" in caplog.text


def test_a_command_that_hangs_is_ended_with_what_it_started(tmp_path, caplog):
    child = f"import time; time.sleep(2); open('{tmp_path}/alive', 'w')"
    script = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep({LIMIT})"
    (tmp_path / "a.py").write_text(script)
    notifier = command_notifier(f'{sys.executable} {tmp_path}/a.py "{child}"', timeout=0.7)
    began = time.monotonic()
    notifier.send("{}")
    assert notifier.failed == 0  # nobody waits for it
    notifier.close(LIMIT)
    assert notifier.failed == 1 and "took more than 0.7 s" in caplog.text and time.monotonic() - began < LIMIT
    time.sleep(2)
    assert not (tmp_path / "alive").exists()


def test_a_command_that_is_given_up_at_the_end_is_ended(tmp_path):
    script = f"import os, time; open('{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep({LIMIT})"
    notifier = command_notifier(f'{sys.executable} -c "{script}"', timeout=LIMIT)
    for _ in range(3):
        notifier.send("{}")
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    notifier.close(0.1)
    assert (notifier.dropped, notifier.failed) == (3, 0)
    until(lambda: not os.path.exists(f"/proc/{(tmp_path / 'pid').read_text()}"))
    notifier._thread.join(LIMIT)
    assert (notifier.dropped, notifier.failed, notifier._thread.is_alive()) == (3, 0, False)


@pytest.mark.parametrize(
    ("command", "message"), [("no-such-program-here", "no program"), ("'", "cannot be split"), ("", "no program")]
)
def test_a_command_that_cannot_be_run_is_refused_at_once(command, message):
    with pytest.raises(ValueError, match=message):
        command_notifier(command)


# ----------------------------------------------------------------------------------------------------------------------
# Addresses


@contextmanager
def server(answer=200):
    """A server that answers a POST so, and what it got."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.headers["Content-Type"], self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(answer)
            if answer == 302:
                self.send_header("Location", "/elsewhere")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/hook", got
    finally:
        http.shutdown()
        http.server_close()


def test_an_address_gets_each_event():
    with server() as (url, got):
        lines, counts = told([0.9] * 5, notifiers=[webhook_notifier(url)])
    assert [(kind, json.loads(body)) for kind, body in got] == [("application/json", line) for line in lines]
    assert counts["undelivered"] == 0 and len(got) == 2


@pytest.mark.parametrize(("answer", "message"), [(500, "500"), (302, "302"), (404, "404")])
def test_an_answer_that_is_no_success_is_logged_and_counted(answer, message, caplog):
    with server(answer) as (url, got):
        _, counts = told([0.9] * 5, notifiers=[webhook_notifier(url)])
    assert counts["undelivered"] == 2 == len(got) and message in caplog.text


def test_a_server_that_is_not_there_is_logged(caplog):
    with server() as (url, _):
        pass
    _, counts = told([0.9] * 5, notifiers=[webhook_notifier(url)])
    assert counts["undelivered"] == 2 and "refused" in caplog.text


@pytest.mark.parametrize("url", ["ftp://a/b", "file:///etc/passwd", "host/path", "http://"])
def test_what_is_no_address_of_the_web_is_refused(url):
    with pytest.raises(ValueError, match="http://HOST/PATH"):
        webhook_notifier(url)


def test_a_slow_receiver_holds_nobody_up(caplog):
    caplog.set_level(logging.WARNING, "tad")
    hold, got = threading.Event(), []
    notifier = Notifier("slow", lambda line: (hold.wait(LIMIT), got.append(line)), waiting=3)
    notifier.send("0")
    while notifier._queue.qsize():  # until it is being delivered
        time.sleep(0.005)
    for i in range(1, 10):
        notifier.send(str(i))
    assert notifier.dropped == 6 and sum("slower than the events" in r.message for r in caplog.records) == 1
    hold.set()
    notifier.close(LIMIT)
    assert got == ["0", "1", "2", "3"] and notifier.delivered == 4


@pytest.mark.parametrize("waiting", [100, 2])
def test_what_is_not_delivered_in_time_is_counted(waiting):
    hold, called = threading.Event(), threading.Event()
    notifier = Notifier("stuck", lambda line: (called.set(), hold.wait(LIMIT)), waiting=waiting)
    notifier.send("0")
    assert called.wait(LIMIT)
    for i in range(1, 5):
        notifier.send(str(i))
    notifier.close(0.3)
    assert notifier.dropped == 5
    hold.set()
