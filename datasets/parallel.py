"""Work on many files in worker processes, with a progress bar."""

import ctypes
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

from datasets.clips import DataError
from utils.logging import progress_bar
from utils.signals import shield_worker

Item, Result = TypeVar("Item"), TypeVar("Result")
_PR_SET_PDEATHSIG = 1  # prctl(2)


def available_cores() -> int:
    """Count the CPU cores this process may use."""
    return len(os.sched_getaffinity(0))


def in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, description: str
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, function(item)) of every item, as they finish. function and items must pickle.

    decord is used in such processes alone, since it must not live through the forks of a data loader. A process dies
    with its parent, even with one that was killed, and of signals heeds its parent's alone.

    Raises what function raises, and DataError naming the suspects where a process died.
    """
    items = list(items)
    workers = max(1, min(workers, len(items)))
    with ProcessPoolExecutor(workers, get_context("fork"), initializer=_start, initargs=(os.getpid(),)) as pool:
        results = _results(pool, function, items, ahead=2 * workers)
        yield from progress_bar(results, description=description, total=len(items))


def _results(pool: ProcessPoolExecutor, function: Callable, items: list, *, ahead: int) -> Iterator[tuple]:
    waiting, running = iter(items), {}
    try:
        while True:
            running |= {pool.submit(function, item): item for item in islice(waiting, ahead - len(running))}
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running[future], future.result()
                del running[future]
    except BrokenProcessPool as e:
        suspects = ", ".join(sorted(map(str, running.values())))
        raise DataError(
            f"a process died, of a file that crashes its decoder or of too little memory: {suspects}"
        ) from e
    finally:
        for future in running:
            future.cancel()


def _start(parent: int) -> None:
    shield_worker()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)
