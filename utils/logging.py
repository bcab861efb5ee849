"""What a run writes: console lines, log.txt, TensorBoard, progress bars."""

import atexit
import io
import json
import logging
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from utils.cli import ConfigError
from utils.damage import parse_json
from utils.files import replaced
from utils.text import first_few

logger = logging.getLogger("tad")


def setup_logging(rank: int) -> None:
    """Set up the logger "tad": everything of rank 0, errors of the others, which name their rank.

    What the others would warn of, rank 0 warns of too.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no Unicode
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    handler = _AboveBar() if sys.stdout.isatty() else logging.StreamHandler(sys.stdout)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    logger.propagate = False


class _AboveBar(logging.Handler):
    """Lines that do not tear the progress bar of the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stdout)


def append_json_line(path: str | Path, record: Mapping[str, Any]) -> None:
    """Add a line of JSON to a file; NaN becomes null."""
    with Path(path).open("a") as f:
        f.write(json.dumps(jsonable(record)) + "\n")


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
    """Scalars and figures by optimizer step; silent where folder is None. Raises ConfigError where it cannot write.

    steps_done: of the run that is continued, 0 for one that begins; what stands there of later steps is written again.
    """

    def __init__(self, folder: str | Path | None, steps_done: int = 0):
        self._writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            try:
                self._writer = SummaryWriter(log_dir=str(folder), purge_step=steps_done + 1)
            except OSError as e:
                raise ConfigError(f"--log_dir {folder}: cannot be written ({e.strerror})") from e
            atexit.register(self._writer.close)  # for a run that does not come to its end

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Write values under "<group>/<name>"."""
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def figures(self, group: str, figures: Mapping[str, Any], step: int) -> None:
        """Write matplotlib figures under "<group>/<name>"."""
        if self._writer:
            for name, figure in figures.items():
                self._writer.add_figure(f"{group}/{name}", figure, step)

    def picture(self, name: str, pixels: Any, step: int) -> None:
        """Write a picture, uint8 (H, W, 3)."""
        if self._writer:
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        if self._writer:
            self._writer.close()


def progress_bar(iterable: Iterable, *, description: str, total: int | None = None, enabled: bool = True) -> Iterable:
    """Return tqdm on a terminal, the plain iterable elsewhere (a log file gets lines instead)."""
    if not (enabled and sys.stdout.isatty()):
        return iterable
    from tqdm import tqdm

    return tqdm(iterable, total=total, desc=description, file=sys.stdout, dynamic_ncols=True, leave=False)
