"""What a live run tells others: events as lines of JSON, commands that are run, addresses that are posted to."""

import json
import logging
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from typing import TextIO
from urllib.parse import urlsplit

from engine.events import Event, EventRule, EventTracker
from engine.stream import Score
from utils.signals import SIGNALS
from utils.text import short_reason

logger = logging.getLogger("tad")

_WAITING = 100  # messages that may wait for a slow receiver
_LIMIT = 10.0  # seconds for a delivery


class Notifier:
    """Delivers messages one after another in a thread of its own; whoever sends one never waits.

    Failures are logged and counted, and so are messages that came while `waiting` others did.

    Args:
        name: what the log calls it.
        deliver: delivers a line of JSON, or raises.
        waiting: messages that may wait.
        abandon: ends the delivery that is on its way, where `close` waits for it no longer.

    Attributes: delivered, failed, dropped: how many.
    """

    def __init__(
        self,
        name: str,
        deliver: Callable[[str], None],
        *,
        waiting: int = _WAITING,
        abandon: Callable[[], None] = lambda: None,
    ):
        self.name, self._deliver, self._abandon = name, deliver, abandon
        self.delivered = self.failed = self.dropped = 0
        self._sent, self._given_up = 0, False
        self._queue: queue.Queue[str | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._run, name=f"tad-notify-{name[:20]}", daemon=True)
        self._thread.start()

    def send(self, line: str) -> None:
        """Have a line of JSON delivered; returns at once."""
        self._sent += 1
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                logger.warning(f"{self.name} is slower than the events: some are not told to it, and counted")

    def close(self, timeout: float = _LIMIT) -> None:
        """Wait for what is on its way, so many seconds at most; what is left then counts as dropped."""
        deadline = time.monotonic() + timeout
        with suppress(queue.Full):
            self._queue.put(None, timeout=timeout)
        self._thread.join(max(deadline - time.monotonic(), 0))
        if self._thread.is_alive():
            self._given_up = True
            self.dropped = self._sent - self.delivered - self.failed
            logger.warning(f"{self.name}: the last events were not delivered within {timeout:g} s")
            self._abandon()

    def _run(self) -> None:
        # A command would inherit that they are blocked, and could not be ended; here the handlers note them as well.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        while (line := self._queue.get()) is not None and not self._given_up:
            try:
                self._deliver(line)
                self.delivered += 1
            except Exception as e:  # whatever it is, the next event is told again
                if self._given_up:  # and counted
                    return
                self.failed += 1
                logger.warning(f"{self.name}: an event was not delivered ({short_reason(e)})")


def command_notifier(command: str, *, timeout: float = _LIMIT) -> Notifier:
    """Return a Notifier that runs a command for each event, with the event's JSON on its standard input.

    It is run without a shell; what it prints goes to stderr, and after `timeout` seconds it is killed, with what it
    started. Raises ValueError where the command cannot be split or its program is not found.
    """
    try:
        words = shlex.split(command)
    except ValueError as e:
        raise ValueError(f"the command {command!r} cannot be split into words ({e}): quote it as for a shell") from e
    if not words or not shutil.which(words[0]):
        raise ValueError(f"the command {command!r}: there is no program {words[0] if words else ''!r} to run")

    running: list[subprocess.Popen] = []

    def deliver(line: str) -> None:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=2, start_new_session=True)
        running.append(process)
        try:
            process.communicate(line.encode() + b"\n", timeout=timeout)
        except subprocess.TimeoutExpired as e:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise ValueError(f"it took more than {timeout:g} s and was ended") from e
        finally:
            running.clear()
        if process.returncode:
            raise ValueError(f"it ended with code {process.returncode}")

    def abandon() -> None:
        for process in running:
            with suppress(ProcessLookupError):  # it has ended just now
                os.killpg(process.pid, signal.SIGKILL)

    return Notifier(f"command {words[0]}", deliver, abandon=abandon)


def webhook_notifier(url: str, *, timeout: float = _LIMIT) -> Notifier:
    """Return a Notifier that posts the JSON of each event to a URL; each step of it may take `timeout` seconds.

    Raises ValueError for a URL that is not http or https.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"the address {url!r} is not of the form http://HOST/PATH or https://HOST/PATH")
    opener = urllib.request.build_opener(_NoRedirect)

    def deliver(line: str) -> None:
        headers = {"Content-Type": "application/json", "User-Agent": "tad"}
        request = urllib.request.Request(url, line.encode(), headers, method="POST")
        with opener.open(request, timeout=timeout):
            pass

    return Notifier(f"webhook {parts.hostname}", deliver)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would follow with a GET, which loses the event and looks like success."""

    def redirect_request(self, request, file, code, message, headers, new):
        return None


class Alerts:
    """Tells of events when they begin and when they are over, each as a line of JSON.

    When the rule is met: {"type": "alert", "source": "rtsp://cam/1", "time": 12.4, "wall_time":
    "2026-01-31T12:00:00.000Z", "threshold": 0.8, "score": 0.93, "start": 11.9}. When it is known that the event is
    over: {"type": "end", ..., "score": 0.97, "start": 11.9, "end": 14.2, "peak": 13.0}, where the score is that of the
    peak. Times are seconds of the stream; "time" is that of the score that the line is due to, "wall_time" when it was
    written. An event does not go on from one stretch of a stream to the next.

    Args:
        source: its name.
        rule: that makes events of the scores.
        out: where lines are written, each at once; None: standard output.
        notifiers: that are told as well; they are closed with this.
    """

    def __init__(self, source: str, rule: EventRule, *, out: TextIO | None = None, notifiers: Sequence[Notifier] = ()):
        self.source, self.rule, self.notifiers = source, rule, tuple(notifiers)
        self.out = sys.stdout if out is None else out
        self.raised = 0
        self._tracker, self._last = EventTracker(rule), Score(0.0, 0, 0.0)

    def push(self, score: Score) -> None:
        """Take a score, and tell what it changes. Raises OSError where a line cannot be written."""
        if score.stretch != self._last.stretch:
            self._end(self._tracker.close(), self._last.time)
        self._last = score
        change = self._tracker.push(score.time, score.score)
        self._end(change.ended, score.time)
        if change.raised:
            self.raised += 1
            self._tell("alert", score.time, {"score": score.score, "start": change.raised.start})

    def close(self) -> dict[str, int]:
        """Tell the end of an event that goes on; return {"alerts", "undelivered"}: how many, and how many messages."""
        try:
            self._end(self._tracker.close(), self._last.time)
        finally:
            for notifier in self.notifiers:
                notifier.close()
        undelivered = sum(notifier.failed + notifier.dropped for notifier in self.notifiers)
        return {"alerts": self.raised, "undelivered": undelivered}

    def _end(self, event: Event | None, time: float) -> None:
        if event:
            values = {"score": event.peak_score, "start": event.start, "end": event.end, "peak": event.peak}
            self._tell("end", time, values)

    def _tell(self, kind: str, time: float, values: Mapping[str, float]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        head = {"type": kind, "source": self.source, "time": time, "wall_time": now, "threshold": self.rule.threshold}
        line = json.dumps(
            {name: float(f"{v:.9g}") if isinstance(v, float) else v for name, v in (head | values).items()}
        )
        try:
            print(line, file=self.out, flush=True)
        except OSError as e:
            raise OSError(e.errno, f"{e.strerror}; is what reads the alerts still there?", "standard output") from e
        for notifier in self.notifiers:
            notifier.send(line)
