"""Work in child processes that are killed where they give no sign of life: no read is without a time limit.

A decoder that hangs or crashes in native code takes its process with it, not the run. A child is forked where it is
first needed, serves one item after another, and is replaced after it had to be killed. It dies with its parent, even
with one that was killed, and heeds no signal but KILL.
"""

import ctypes
import os
import pickle
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import cv2
import torch
from torch.utils.data import get_worker_info

from datasets.clips import DataError
from utils.logging import progress_bar
from utils.signals import SIGNALS

Item, Result = TypeVar("Item"), TypeVar("Result")
READ_TIMEOUT = 60.0  # seconds without a picture read
_ALIVE_EVERY = 1.0  # seconds between two signs of life
_PR_SET_PDEATHSIG = 1  # prctl(2)
_to_parent: Connection | None = None  # in a child: where signs of life go
_last_sign = 0.0


class ReadFailure(DataError):
    """A reading process hung or died; the message says which."""


def available_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0))


def alive() -> None:
    """Tell the process that waits for this one, if any does, that the work goes on; call it for each picture read."""
    global _last_sign
    if _to_parent is not None and time.monotonic() - _last_sign > _ALIVE_EVERY:
        _last_sign = time.monotonic()
        _to_parent.send_bytes(_dumps(("alive", None)))


class Child:
    """A process that runs function(item), which yields results, for each item it is sent.

    function: need not pickle; items, results and what it raises must.
    limit: seconds without a result or a sign of life after which the process is killed.
    """

    def __init__(self, function: Callable[[Any], Iterable[Any]], limit: float):
        self.function, self.limit, self.deadline = function, limit, 0.0
        self._pid: int | None = None
        self._waiting: deque[bytes] = deque()  # items that are not done
        self.connection: Connection | None = None

    def send(self, item: Any) -> None:
        """Start the work on an item, after that on those sent before."""
        if not self._waiting:
            self.deadline = time.monotonic() + self.limit
        self._waiting.append(_dumps(item))
        if self._pid is None:
            self._start()
            return
        try:
            self.connection.send_bytes(self._waiting[-1])
        except OSError:  # it was killed
            if len(self._waiting) == 1:
                self._end()
                self._start()

    def receive(self) -> tuple[str, Any]:
        """Wait for the next message: ("result", value), ("alive", None), or ("done", None) after an item's last result.

        Raises ReadFailure where none comes in time or the process has died, which ends the work on the item; and what
        function raised. The work goes on with the items after it.
        """
        if not self.connection.poll(max(self.deadline - time.monotonic(), 0)):
            os.kill(self._pid, signal.SIGKILL)
            self._replace()
            raise ReadFailure(f"nothing could be read of it for {self.limit:g} seconds")
        try:
            kind, value = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as e:
            raise ReadFailure(f"the process that read it {self._replace()}") from e
        self.deadline = time.monotonic() + self.limit
        if kind in ("error", "done"):
            self._waiting.popleft()
        if kind == "error":
            error, trace = value
            raise error from RuntimeError(f"in the reading process:\n{trace}")
        return kind, value

    def results(self, item: Any) -> Iterator[Any]:
        """Yield the results of function(item). Raises as `receive` does."""
        self.send(item)
        while (message := self.receive())[0] != "done":
            if message[0] == "result":
                yield message[1]

    def kill(self) -> None:
        """End the process, if there is one, and the work on all items."""
        self._waiting.clear()
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            self._end()

    def _replace(self) -> str:
        """Leave the present item to its fate and go on with the others in another process; say how this one ended."""
        how = self._end()
        self._waiting.popleft()
        if self._waiting:
            self.deadline = time.monotonic() + self.limit
            self._start()
        return how

    def _start(self) -> None:
        self.connection, other = Pipe()
        parent, self._pid = os.getpid(), os.fork()
        if self._pid == 0:
            try:
                self.connection.close()
                _serve(other, self.function, parent)
            finally:
                os._exit(0)
        other.close()
        for message in self._waiting:
            self.connection.send_bytes(message)

    def _end(self) -> str:
        """Say how the process, which has ended or is about to, has ended."""
        _, status = os.waitpid(self._pid, 0)
        self.connection.close()
        self._pid = None
        if not os.WIFSIGNALED(status):
            return f"ended with code {os.waitstatus_to_exitcode(status)}"
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"was killed by {name}" + " (of too little memory?)" * (name == "SIGKILL")


def _serve(connection: Connection, function: Callable[[Any], Iterable[Any]], parent: int) -> None:
    """Work on items until the parent closes its end. Runs in the child."""
    global _to_parent
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)  # the parent's threads do not live through the fork
    cv2.setNumThreads(0)
    if os.getppid() != parent:  # it died before that
        return
    _to_parent = connection
    while True:
        try:
            item = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            for result in function(item):
                connection.send_bytes(_dumps(("result", result)))
            connection.send_bytes(_dumps(("done", None)))
        except Exception as e:
            connection.send_bytes(_dumps(("error", (e, traceback.format_exc()))))


def limited_results(child: Child, item: Any) -> Iterable[Any]:
    """Return the results of child.function(item), from the child in a loading process of a DataLoader.

    In the process that loads for itself (--num_workers 0) they are made right here, without a limit.
    """
    return child.results(item) if get_worker_info() else child.function(item)


class _Pickler(pickle.Pickler):
    """Sends tensors by value: PyTorch's way through shared memory needs a server in the child."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def _dumps(value: Any) -> bytes:
    buffer = BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return buffer.getbuffer()


def in_processes(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    description: str,
    failed: Callable[[Item, ReadFailure], Result] | None = None,
    limit: float = READ_TIMEOUT,
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, function(item)) of every item, as they finish, with a progress bar.

    failed(item, error) stands for the result of an item whose process hung for `limit` seconds or died; without it such
    an item raises ReadFailure. Video decoders are used in such processes alone, since they must not live through the
    forks of a data loader.

    Raises what function raises.
    """
    items = list(items)
    children = [Child(lambda item: [function(item)], limit) for _ in range(max(1, min(workers, len(items))))]
    results = _results(children, iter(items), failed)
    yield from progress_bar(results, description=description, total=len(items))


def ready(busy: list[Child]) -> list[Child]:
    """Wait until a child has a message or is overdue; return those of which `receive` returns at once."""
    patience = min(child.deadline for child in busy) - time.monotonic()
    spoken = wait([child.connection for child in busy], max(patience, 0))
    return [c for c in busy if c.connection in spoken or c.deadline <= time.monotonic()]


def _results(children: list[Child], items: Iterator, failed: Callable | None) -> Iterator[tuple]:
    idle, busy = list(children), {}
    try:
        while True:
            while idle and (item := next(items, _NOTHING)) is not _NOTHING:
                child = idle.pop()
                child.send(item)
                busy[child] = item
            if not busy:
                return
            for child in ready(list(busy)):
                try:
                    kind, value = child.receive()
                except ReadFailure as e:
                    if failed is None:
                        raise ReadFailure(f"{busy[child]}: {e}") from e
                    kind, value = "done", None
                    yield busy[child], failed(busy[child], e)
                if kind == "result":
                    yield busy[child], value
                if kind == "done":
                    del busy[child]
                    idle.append(child)
    finally:
        for child in children:
            child.kill()


_NOTHING = object()
