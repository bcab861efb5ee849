"""Work in child processes that are killed where they give no sign of life: no read is without a time limit.

A decoder that hangs or crashes in native code takes its process with it, not the run. A child is forked where it is
first needed, serves one item after another, and is replaced after it had to be killed. It dies with its parent, even
with one that was killed, and heeds no signal but KILL. The parent waits for nothing longer than the limit.
"""

import ctypes
import os
import pickle
import signal
import socket
import struct
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from io import BytesIO
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, TypeVar

import cv2
import torch

from datasets.clips import DataError
from utils.logging import progress_bar
from utils.signals import SIGNALS

Item, Result = TypeVar("Item"), TypeVar("Result")
READ_TIMEOUT = 60.0  # seconds without a picture read
_ALIVE_EVERY = 1.0  # seconds between two signs of life
_LONGEST = 1e6  # seconds that the system can wait, or so
_TO_END = 5.0  # seconds that the system may take to end a process
_PIPE, _OVERHEAD = 1 << 16, 1 << 10  # bytes that a pipe holds for sure, and what a message takes of them besides
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
        self.function, self.limit, self.deadline = function, min(limit, _LONGEST), 0.0
        self._pid: int | None = None
        self._waiting: deque[bytes] = deque()  # items that are not done
        self._sent = 0  # how many of them are with the process, or on the way
        self.connection: Connection | None = None

    def send(self, item: Any) -> None:
        """Start the work on an item, after that on those sent before. Raises DataError where no process can start."""
        if not self._waiting:
            self.deadline = time.monotonic() + self.limit
        self._waiting.append(_dumps(item))
        if self._pid is None:
            self._start()
        else:
            self._pass_on()

    def receive(self) -> tuple[str, Any]:
        """Wait for the next message: ("result", value), ("alive", None), or ("done", None) after an item's last result.

        Raises ReadFailure where none comes in time or the process has died, which ends the work on the item; and what
        function raised. The work goes on with the items after it.
        """
        try:
            if not self.connection.poll(max(self.deadline - time.monotonic(), 0)):
                raise BlockingIOError
            kind, value = pickle.loads(self.connection.recv_bytes())
        except BlockingIOError as e:  # of a message, too, that breaks off
            self._signal()
            self._replace()
            raise ReadFailure(f"nothing could be read of it for {self.limit:g} seconds") from e
        except (EOFError, OSError) as e:
            if not self._sent and time.monotonic() < self.deadline:  # it died while it had nothing to do
                self._end()
                self._start()
                return "alive", None
            raise ReadFailure(f"the process that read it {self._replace()}") from e
        self.deadline = time.monotonic() + self.limit
        if kind in ("error", "done"):
            self._waiting.popleft()
            self._sent -= 1
            self._pass_on()
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
            self._signal()
            self._end()

    def _signal(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    def _replace(self) -> str:
        """Leave the present item to its fate and go on with the others in another process; say how this one ended."""
        how = self._end()
        self._waiting.popleft()
        if self._waiting:
            self.deadline = time.monotonic() + self.limit
            self._start()
        return how

    def _start(self) -> None:
        parent, ends = os.getpid(), ()
        try:
            self.connection, other = ends = Pipe()
            _limit_waits(self.connection, self.limit)
            pid = os.fork()
        except OSError as e:
            for end in ends:
                end.close()
            remedy = "use fewer workers (--num_workers), or allow more processes and open files (ulimit -u, -n)"
            raise DataError(f"a reading process cannot start ({e.strerror}): {remedy}") from e
        if pid == 0:
            _live(*ends, self.function, parent)
        other.close()
        self._pid, self._sent = pid, 0
        self._pass_on()

    def _pass_on(self) -> None:
        """Send of what is waiting as much as the pipe holds, so that nobody waits here while the process works."""
        on_the_way = sum(len(message) + _OVERHEAD for message in islice(self._waiting, self._sent))
        for message in list(islice(self._waiting, self._sent, None)):
            on_the_way += len(message) + _OVERHEAD
            if self._sent and on_the_way > _PIPE:
                break
            try:
                self.connection.send_bytes(message)
            except OSError:  # it has died, or takes nothing and has got a part of the message; `receive` sees its end
                self._signal()
                break
            self._sent += 1

    def _end(self) -> str:
        """Say how the process, which has ended or is about to, has ended."""
        self.connection.close()
        status = _status(self._pid)
        if status is None:  # it has closed the connection and lives on
            self._signal()
            status = _status(self._pid)
        self._pid = None
        if status is None:
            return "cannot be killed: it waits for a device or a network file system"
        if not os.WIFSIGNALED(status):
            return f"ended with code {os.waitstatus_to_exitcode(status)}"
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"was killed by {name}" + " (of too little memory?)" * (name == "SIGKILL")


def _limit_waits(connection: Connection, seconds: float) -> None:
    """Let reading and writing at this end raise BlockingIOError where nothing moves for so long."""
    span = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6) or 1)  # 0 stands for no limit
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            end.setsockopt(socket.SOL_SOCKET, direction, span)


def _status(pid: int) -> int | None:
    """Return the status of a child process that is about to end; None where it does not within _TO_END seconds."""
    deadline, pause = time.monotonic() + _TO_END, 1e-4
    while time.monotonic() < deadline:
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # signals of ended children are ignored, as some launchers leave it
            return 0
        if ended:
            return status
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return None


def _live(theirs: Connection, ours: Connection, function: Callable[[Any], Iterable[Any]], parent: int) -> NoReturn:
    """Be the child, and end with code 0 once the parent has closed its end of the pipe."""
    code = 1
    try:
        theirs.close()
        _serve(ours, function, parent)
        code = 0
    except OSError:  # of the connection: the parent is gone
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


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
            message = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            for result in function(pickle.loads(message)):
                connection.send_bytes(_dumps(("result", result)))
            answer = ("done", None)
        except BaseException as e:
            answer = ("error", (_sendable(e), traceback.format_exc()))
        connection.send_bytes(_dumps(answer))


def _sendable(error: BaseException) -> Exception:
    """Return an exception, or what has its text where it cannot be pickled, or would end the parent unheard."""
    if isinstance(error, Exception):
        with suppress(Exception):
            pickle.loads(_dumps(error))
            return error
    return RuntimeError(traceback.format_exception_only(error)[-1].strip())


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
    an item raises ReadFailure. Video decoders are used in such processes alone, since they must not live through a
    fork.

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
