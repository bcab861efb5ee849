"""Watching a live source: decoding in one thread, scoring in another; what comes late is counted, never hidden."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.alerts import Alerts
from engine.stream import RiskStream, Score
from utils.signals import stop_requested

logger = logging.getLogger("tad")

_POLL = 0.2  # seconds after which a wait looks whether to go on
_LATENCIES = 10_000  # of the last scores, that percentiles are of
_WAITING = 8  # pictures that wait to be scored where the source waits for the model
_WAITING_LIVE = 64  # where it does not; a window's span if that is more, so that none is lost that a window needs
_DRIFT = 1e-3  # seconds per second that the clock of a source may be slow; quartz is within a tenth of that
_MUCH_BEHIND = 5.0  # seconds
_TO_END = 5.0  # seconds that the reading thread may take to end


class Source(Protocol):
    """What is watched; `datasets.live.LiveSource` is one.

    name: what the log and the alerts call it.
    live: whether pictures come at a pace of their own, a camera's.
    """

    name: str
    live: bool

    def __iter__(self) -> Iterator[tuple[np.ndarray, float, float]]:
        """Yield (picture uint8 (H, W, 3) RGB, its time in seconds, when it arrived on time.monotonic())."""

    def stop(self) -> None:
        """Make the iteration end soon; called from another thread."""

    def check(self) -> None:
        """Raise an error where the thread that iterates hangs."""

    def about(self) -> dict[str, int]:
        """Return what was counted."""


@dataclass(frozen=True)
class LiveScore:
    """A score, and the seconds from the arrival of its picture to it, waiting and decoding included."""

    score: Score
    latency: float


class _Pictures:
    """The pictures between the thread that reads and the one that scores; a bounded number of them.

    drop: whether the oldest makes room for a new one; else the new one waits.
    """

    def __init__(self, capacity: int, *, drop: bool):
        self.capacity, self.drop = capacity, drop
        self.dropped = 0
        self._items: deque = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None

    def put(self, item: Any) -> bool:
        """Add a picture; False where nobody takes it any more."""
        with self._changed:
            if self.drop and len(self._items) == self.capacity:
                self._items.popleft()
                self.dropped += 1
            while len(self._items) >= self.capacity and not self._closed:
                self._changed.wait(_POLL)
            self._items.append(item)
            self._changed.notify_all()
            return not self._closed

    def end(self, error: BaseException | None) -> None:
        """Note that no more will come, and why."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def take(self) -> Any:
        """Return the oldest; None where none came for a moment. Raises the error of the reader after its last."""
        with self._changed:
            if not self._items and not self._ended:
                self._changed.wait(_POLL)
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            return None

    def close(self) -> None:
        """Let the reader go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """How many there are."""
        return len(self._items)

    @property
    def at_end(self) -> bool:
        """Whether all were taken, and no more will come."""
        with self._changed:
            return self._ended and not self._items and self._error is None


class Monitor:
    """Counts what becomes of a live source, and logs it every report_every seconds.

    Rates are per second since the report before, in the summary since the beginning. Latencies are those of the last
    10,000 scores. They say nothing of the time before a picture arrives: where decoding is slower than the source,
    pictures wait in the system's buffers. So "behind" says how many seconds later a picture arrived, by its own time,
    than the most punctual one of its stretch; the latter is forgotten at 1 ms per second, as clocks drift.
    """

    def __init__(self, source: Source, stream: RiskStream, *, report_every: float = 10.0):
        self.source, self.stream, self.report_every = source, stream, report_every
        self.dropped = 0
        self.behind = self.most_behind = 0.0
        self._stretch = 0
        self._punctual: tuple[float, float] | None = None  # least arrival less time so far, and when it was noted
        self.latest: Score | None = None
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        self._began = time.monotonic()
        self._before = self._began, 0, 0  # time, pictures and scores at the last report

    def scored(self, result: LiveScore) -> None:
        """Note a score."""
        self.latest = result.score
        self._latencies.append(result.latency)

    def arrived(self, time: float, arrival: float) -> None:
        """Note when a picture of a source with a pace of its own arrived, on time.monotonic()."""
        if self._stretch != self.stream.counts.stretches:  # a connection of its own, perhaps
            self._stretch, self._punctual = self.stream.counts.stretches, None
        least, noted = self._punctual or (arrival - time, arrival)
        least = min(arrival - time, least + _DRIFT * (arrival - noted))
        self._punctual = least, arrival
        self.behind = arrival - time - least
        if self.behind > _MUCH_BEHIND >= self.most_behind:
            logger.warning(
                f"{self.source.name}: pictures come {self.behind:.1f} s late: decoding them takes longer than they "
                "last, or the source holds them up; smaller pictures, or a machine with less to do, would help"
            )
        self.most_behind = max(self.most_behind, self.behind)

    def tick(self) -> None:
        """Log a line if it is time."""
        now, counts = time.monotonic(), self.stream.counts
        when, pictures, scores = self._before
        if now - when < self.report_every:
            return
        rates = (counts.pictures - pictures) / (now - when), (counts.scores - scores) / (now - when)
        self._before = now, counts.pictures, counts.scores
        latest = f"risk {self.latest.score:.3f} at {self.latest.time:.1f} s" if self.latest else "no score yet"
        logger.info(f"{self.source.name}: {latest}; {rates[0]:.1f} pictures/s, {rates[1]:.1f} scores/s; {self._text()}")

    def summary(self) -> dict[str, Any]:
        """Return all counts; latencies in milliseconds, null where nothing was scored."""
        seconds, counts = time.monotonic() - self._began, self.stream.counts
        return {
            "source": self.source.name,
            "seconds": round(seconds, 3),
            "fps": self.stream.fps,
            **asdict(counts),
            "dropped": self.dropped,
            **self.source.about(),
            "pictures_per_second": round(counts.pictures / max(seconds, 1e-9), 3),
            "scores_per_second": round(counts.scores / max(seconds, 1e-9), 3),
            "latency_ms": self.latencies(),
            "behind_s": {"end": round(self.behind, 2), "most": round(self.most_behind, 2)},
        }

    def latencies(self) -> dict[str, float | None]:
        """Return {"p50", "p95", "p99", "max"} in milliseconds, None where nothing was scored."""
        if not self._latencies:
            return dict.fromkeys(("p50", "p95", "p99", "max"))
        values = 1000 * np.percentile(np.array(self._latencies), (50, 95, 99, 100))
        return dict(zip(("p50", "p95", "p99", "max"), np.round(values, 2).tolist(), strict=True))

    def _text(self) -> str:
        counts = self.stream.counts
        numbers = {
            "skipped": counts.skipped,
            "dropped": self.dropped,
            "repeated": counts.repeated,
        } | self.source.about()
        latency = ", ".join(f"{name} {value:.0f}" for name, value in self.latencies().items() if value is not None)
        late = f"latency {latency or 'unknown'} ms, behind {self.behind:.1f} s"
        return f"{late}; " + ", ".join(f"{name} {value}" for name, value in numbers.items())


def follow(
    source: Source,
    stream: RiskStream,
    monitor: Monitor | None = None,
    *,
    realtime: bool | None = None,
    max_delay: float = 0.2,
    stop: Callable[[], bool] = stop_requested,
) -> Iterator[LiveScore]:
    """Yield the scores of a source as they come, until it ends or `stop` says so; the source is decoded in a thread.

    In real time, a picture that arrived more than max_delay seconds ago is not scored if a newer one waits: the
    windows get it, and the newest picture is scored. Where the model is slower still, the oldest of the pictures that
    wait are dropped. The stream counts the scores left out as skipped, the monitor the pictures as dropped, with those
    that wait where `stop` ends it. Otherwise the source waits for the model, and every score is made.

    Args:
        source: what is watched; it is stopped at the end.
        stream: that scores.
        monitor: counts, and logs.
        realtime: as above; None: whether the source has a pace of its own.
        max_delay: seconds.
        stop: asked between two pictures, and every 0.2 seconds of a wait.

    Raises what the source, the preprocessing or the model raises.
    """
    monitor = monitor or Monitor(source, stream)
    realtime = source.live if realtime is None else realtime
    pictures = _Pictures(max(_WAITING_LIVE, stream.span) if realtime else _WAITING, drop=realtime)
    thread = threading.Thread(target=_read, args=(source, stream, pictures), name="tad-live", daemon=True)
    thread.start()
    try:
        behind = False
        while not stop() and not pictures.at_end:
            item = pictures.take()
            monitor.dropped = pictures.dropped
            monitor.tick()
            if item is None:
                source.check()
                continue
            picture, at, arrived = item
            stream.add(picture, at)
            if realtime:
                monitor.arrived(at, arrived)
            behind = realtime and pictures.waiting > 0 and (behind or time.monotonic() - arrived > max_delay)
            if not behind and (score := stream.score()) is not None:
                result = LiveScore(score, time.monotonic() - arrived)
                monitor.scored(result)
                yield result
    finally:
        source.stop()
        pictures.close()
        thread.join(_TO_END)
        monitor.dropped = pictures.dropped + pictures.waiting
        stream.finish()


def _read(source: Source, stream: RiskStream, pictures: _Pictures) -> None:
    """Put the prepared pictures of a source into the queue, and at the end why there are no more."""
    error = None
    try:
        for pixels, at, arrived in source:
            if not pictures.put((stream.prepare(pixels), at, arrived)):
                break
    except BaseException as e:  # the thread that scores raises it
        error = e
    pictures.end(error)


class ScoreFile:
    """A file of scores that grows line by line; a kill loses the last one at most.

    Columns: time (seconds of the stream), frame, score, warming_up (0 or 1), latency_ms. Raises OSError, which names
    the file, where it cannot be written, FileExistsError where it is there.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = self.path.open("xb", buffering=0)
        self._write("time,frame,score,warming_up,latency_ms")

    def add(self, result: LiveScore) -> None:
        """Write a line."""
        score = result.score
        values = f"{score.time:.6f},{score.frame},{score.score:.9g},{int(score.warming_up)},{1000 * result.latency:.2f}"
        self._write(values)

    def close(self) -> None:
        """Close it."""
        self._file.close()

    def _write(self, line: str) -> None:
        left = line.encode() + b"\n"
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self.path)) from e


def watch(
    source: Source,
    stream: RiskStream,
    *,
    alerts: Alerts | None = None,
    scores: ScoreFile | None = None,
    report_every: float = 10.0,
    realtime: bool | None = None,
    max_delay: float = 0.2,
    stop: Callable[[], bool] = stop_requested,
) -> dict[str, Any]:
    """Score a source until it ends or a signal comes; return what came of it, which is logged as well, errors or not.

    That is `Monitor.summary`, with "alerts" and "undelivered" of `Alerts.close`, and "stopped", whether a signal came.

    Args:
        source, stream, realtime, max_delay, stop: as for `follow`.
        alerts: tells of events.
        scores: keeps the scores.
        report_every: seconds between two lines in the log.

    Raises what `follow` raises, and OSError where an alert or a score cannot be written.
    """
    monitor = Monitor(source, stream, report_every=report_every)
    how = "in real time" if (source.live if realtime is None else realtime) else "as fast as it is scored"
    logger.info(f"{source.name}: watched {how}, {stream.fps or 'an unknown number of'} frames per second")
    results = follow(source, stream, monitor, realtime=realtime, max_delay=max_delay, stop=stop)
    told = {}
    try:
        with closing(results):  # whose thread would go on after an error here
            for result in results:
                if scores:
                    scores.add(result)
                if alerts:
                    alerts.push(result.score)
    finally:
        try:
            if scores:
                scores.close()
            told = alerts.close() if alerts else {}
        finally:
            summary = monitor.summary() | told | {"stopped": stop()}
            logger.info(f"{source.name}: over; " + ", ".join(f"{name} {value}" for name, value in summary.items()))
    return summary
