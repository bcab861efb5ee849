"""What the benchmarks share: measuring in turns, and printing tables and JSON."""

import json
import multiprocessing
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import torch

from utils.cli import Parser, pixels, positive

Way = Callable[[int], int]  # loads the item of this number, or those of this clip; returns how many
Ways = Mapping[str, Way]


def single_thread() -> None:
    """Have PyTorch and OpenCV work in this thread alone, as in a reading process."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def in_turns(make: Callable[[], Ways], rounds: Iterable[Sequence[int]]) -> dict[str, list[float]]:
    """Return the CPU seconds per item of each way in each round, after a call of each that does not count.

    Each works in a fresh process of its own: what one way, or the making of its data, leaves in the memory of a process
    makes another twice as fast or slow, for the arrays of full-size pictures.

    make: returns the ways by name; called in each process, so it must pickle.
    rounds: of each round what the ways are called with, in turns: first each with the first number, and so on.
    """
    rounds = list(rounds)
    with ExitStack() as stack:
        calls = {name: stack.enter_context(_process(make, name)) for name in make()}
        for call in calls.values():
            call(rounds[0][0])
        result: dict[str, list[float]] = {name: [] for name in calls}
        for numbers in rounds:
            spent: dict[str, list[tuple[int, float]]] = {name: [] for name in calls}
            for number in numbers:
                for name, call in calls.items():
                    spent[name].append(call(number))
            for name, pairs in spent.items():
                result[name].append(sum(seconds for _, seconds in pairs) / sum(items for items, _ in pairs))
    return result


@contextmanager
def _process(make: Callable[[], Ways], name: str) -> Iterator[Callable[[int], tuple[int, float]]]:
    """Start a process for a way; yield what calls it and returns how many items it loaded and the CPU seconds."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, name), daemon=True)
    process.start()
    there.close()

    def call(number: int) -> tuple[int, float]:
        here.send(number)
        return here.recv()  # EOFError where the process died; it has said why

    yield call
    process.terminate()
    process.join()


def _serve(connection: Connection, make: Callable[[], Ways], name: str) -> None:
    single_thread()
    way = make()[name]
    while True:
        number = connection.recv()
        started = time.process_time()
        items = way(number)
        connection.send((items, time.process_time() - started))


def against(seconds: Sequence[float], yardstick: Sequence[float]) -> dict[str, Any]:
    """Compare seconds per item, round by round: items per second of both, their ratio, its range over the rounds."""
    ratios = [slow / fast for fast, slow in zip(seconds, yardstick, strict=True)]
    rates = {"ours": round(1 / median(seconds), 2), "yardstick": round(1 / median(yardstick), 2)}
    return rates | {"ratio": round(median(ratios), 2), "spread": [round(min(ratios), 2), round(max(ratios), 2)]}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of the same keys as a table in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(_text, row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " .. ".join(map(_text, value))
    return "n/a" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def comparison(results: Mapping[str, Any]) -> str:
    """Return a table of what `against` returned, by name."""
    return table([{"": name} | result for name, result in results.items()])


def about() -> dict[str, str]:
    """Return when, where and by which command something is measured."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    module = Path(sys.argv[0]).stem
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{len(os.sched_getaffinity(0))} x {cpu.group(1) if cpu else platform.processor()}{gpu}",
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, OpenCV {cv2.__version__}",
        "command": shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]]),
    }


def parser_of(description: str) -> Parser:
    """Return a parser of the command line with --json."""
    parser = Parser(description)
    parser.add_argument("--json", action="store_true", help="print the results as a last line of JSON, too")
    return parser


def add_data_flags(parser: Parser) -> None:
    """Add the flags of the benchmarks that load data."""
    parser.add_argument("--data", help="folder for the data, which is kept and used again (default: a temporary one)")
    parser.add_argument("--video", default="", help="video to make the data of, enlarged (default: rendered roads)")
    parser.add_argument("--rounds", type=positive, default=7, help="rounds to take the median of (default: 7)")
    parser.add_argument("--windows", type=positive, default=8, help="windows of a round (default: 8)")
    parser.add_argument("--size", type=pixels, nargs=2, default=(1280, 720), help="of pictures (default: 1280 720)")


def print_results(text: str, results: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what is to be read, where it was measured, and all of it as a last line of JSON if asked."""
    where = about()
    print(text + "\n\n" + "\n".join(f"{name}: {value}  " for name, value in where.items()))
    if as_json:
        print(json.dumps(dict(results) | where))
