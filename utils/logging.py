"""What a run writes: console lines, log.txt, TensorBoard, progress bars."""

import atexit
import io
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from utils.cli import ConfigError
from utils.damage import parse_json
from utils.files import replaced
from utils.text import first_few, one_line, short_reason

logger = logging.getLogger("tad")


def setup_logging(rank: int, stream: TextIO | None = None) -> None:
    """Set up the logger "tad": everything of rank 0, errors of the others, which name their rank.

    What the others would warn of, rank 0 warns of too. Lines that cannot be written, to a full disk say, are missed.

    stream: where the lines go; None: standard output.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no Unicode
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    handler = _Console(sys.stdout if stream is None else stream)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    logger.propagate = False
    atexit.register(_give_up_output)


class _Console(logging.Handler):
    """Lines on a stream, which do not tear the progress bar of a terminal."""

    def __init__(self, stream: TextIO):
        super().__init__()
        self.stream, self._missed = stream, False

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        try:
            if self.stream.isatty():
                from tqdm import tqdm

                tqdm.write(line, file=self.stream)
            else:
                print(line, file=self.stream, flush=True)
        except (OSError, ValueError) as e:  # ValueError: closed
            if not self._missed:
                self._missed = True
                with suppress(OSError, ValueError):
                    print(f"lines of the log are missing: they cannot be written ({e})", file=sys.stderr, flush=True)


def _give_up_output() -> None:
    """Drop what of stdout cannot be written, for which Python would end with code 120."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)


def append_json_line(path: str | Path, record: Mapping[str, Any]) -> None:
    """Add a line of JSON to a file; NaN becomes null. Raises OSError, which names the file, and leaves no half line."""
    line = (json.dumps(jsonable(record)) + "\n").encode()
    with Path(path).open("ab", buffering=0) as f:
        start = f.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[f.write(line) :]
        except OSError as e:
            with suppress(OSError):
                f.truncate(start)
            raise OSError(e.errno, e.strerror, str(path)) from e


def drop_records_from(path: str | Path, epoch: int, step: int = 0) -> None:
    """Remove the records of (epoch, step) and later ones from a file of JSON lines: a resumed run writes them again.

    Records without a step are of the end of their epoch. A line that is no record is left out, and logged unless it is
    the last, as where the kill came in the middle of it.
    """
    path = Path(path)
    if not path.exists():
        return
    kept, damaged = [], []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        place = _place(line)
        if place is None and line.endswith(b"\n"):
            damaged.append(number)
        elif place is not None and place < (epoch, step):
            kept.append(line.rstrip() + b"\n")
    if damaged:
        logger.warning(f"{path}: lines that are damaged are left out: {first_few(damaged)}")
    with replaced(path) as temporary:
        temporary.write_bytes(b"".join(kept))


def _place(line: bytes) -> tuple[int, float] | None:
    """Return (epoch, step) of a record, infinity for a step that it does not say; None where it is none."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    place = record.get("epoch"), record.get("step", math.inf)
    are_numbers = type(place[0]) is int and (type(place[1]) is int or place[1] == math.inf)
    return place if are_numbers and min(place) >= 0 else None


def jsonable(value: Any) -> Any:
    """Return plain JSON types: numbers that are not finite become None, tuples lists, paths strings."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


class TensorBoard:
    """Scalars and figures by optimizer step; silent where folder is None.

    What cannot be written is warned of once, and nothing is written any more: it is no reason to end a run. Raises
    ConfigError where nothing can be written at the start.

    steps_done: of the run that is continued, 0 for one that begins; what stands there of later steps is written again.
    """

    def __init__(self, folder: str | Path | None, steps_done: int = 0):
        self._folder, self._writer = folder, None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _no_trace_of_tensorboard
            try:
                self._writer = SummaryWriter(log_dir=str(folder), purge_step=steps_done + 1)
            except (OSError, UnicodeError) as e:  # TensorBoard takes names in UTF-8 alone
                reason = e.strerror if isinstance(e, OSError) else "its name is not in UTF-8; give another --log_dir"
                raise ConfigError(f"--log_dir {one_line(str(folder))}: cannot be written ({reason})") from e
            atexit.register(self.close)  # for a run that does not come to its end

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Write values under "<group>/<name>"."""
        for name, value in values.items():
            self._call("add_scalar", f"{group}/{name}", value, step)

    def figures(self, group: str, figures: Mapping[str, Any], step: int) -> None:
        """Write matplotlib figures under "<group>/<name>"."""
        for name, figure in figures.items():
            self._call("add_figure", f"{group}/{name}", figure, step)

    def picture(self, name: str, pixels: Any, step: int) -> None:
        """Write a picture, uint8 (H, W, 3)."""
        self._call("add_image", name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        self._call("close")

    def _call(self, method: str, *values: Any, **options: Any) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*values, **options)
        except Exception as e:  # of this call, or of the writer's thread at an earlier one
            self._writer = None
            logging.getLogger("tad").warning(
                f"TensorBoard: {self._folder} cannot be written ({getattr(e, 'strerror', None) or short_reason(e)}); "
                "the run goes on without it"
            )


def _no_trace_of_tensorboard(problem: threading.ExceptHookArgs) -> None:
    """Take the place of threading.excepthook: what TensorBoard's thread raises, its next call raises too."""
    if not type(problem.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(problem)


def progress_bar(iterable: Iterable, *, description: str, total: int | None = None, enabled: bool = True) -> Iterable:
    """Return tqdm on a terminal, the plain iterable elsewhere (a log file gets lines instead)."""
    if not (enabled and sys.stdout.isatty()):
        return iterable
    from tqdm import tqdm

    return tqdm(iterable, total=total, desc=description, file=sys.stdout, dynamic_ncols=True, leave=False)
