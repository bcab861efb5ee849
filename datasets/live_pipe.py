"""Pipes as live sources: bytes with a time limit, where the system's own reading would wait for ever."""

import os
import select
import stat
import sys
import time
from collections.abc import Callable

from datasets.clips import DataError

_STEP = 0.2  # seconds after which a wait looks whether it shall go on


class Stopped(Exception):
    """A wait ended since it was asked to."""


class Pipe:
    """Standard input or a named pipe; `read` is what PyAV calls. It never waits beyond a limit.

    A named pipe stays open from one writer to the next: closing it would end a writer that has just begun.

    Args:
        path: of a named pipe, or "-" for standard input.
        limit: seconds without a byte, or without a writer, after which `read` raises TimeoutError. It may be changed.
        on_wait: called before each read and every 0.2 seconds of a wait; raises to end it.

    Raises DataError where standard input is a terminal or closed, OSError where the pipe cannot be opened.
    """

    def __init__(self, path: str, *, limit: float, on_wait: Callable[[], None]):
        self.path, self.limit, self._on_wait = path, limit, on_wait
        if path == "-":
            self._descriptor = _standard_input()
        else:  # without O_NONBLOCK it would wait for a writer
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLIN)
        self._waits_for_writer = path != "-"

    def begin(self) -> None:
        """Take what comes next for another stream: of a named pipe, its end is where the next writer leaves."""
        self._waits_for_writer = self.path != "-"

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes as soon as there are some; none at the end, when the last writer has left."""
        deadline = time.monotonic() + self.limit
        while True:
            self._on_wait()
            if self._poll.poll(1000 * _STEP) and (data := self._read(size)) is not None:
                return data
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing came for {self.limit:g} s")

    def _read(self, size: int) -> bytes | None:
        """Return bytes, none at the end; None where there is nothing yet."""
        try:
            data = os.read(self._descriptor, size)
        except BlockingIOError:  # another reader took them
            return None
        if not data and self._waits_for_writer:  # poll returns at once where the last writer has left
            time.sleep(_STEP)
            return None
        self._waits_for_writer = False
        return data

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)


def _standard_input() -> int:
    try:
        descriptor = os.dup(sys.stdin.fileno())
    except (AttributeError, OSError, ValueError) as e:
        raise DataError("-: standard input is closed; pipe a video into the command") from e
    if os.isatty(descriptor):
        os.close(descriptor)
        raise DataError("-: standard input is a terminal; pipe a video into the command")
    return descriptor


def is_pipe(path: str) -> bool:
    """Return whether a path is standard input, "-", or a named pipe."""
    try:
        return path == "-" or stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False
