"""What a run tells: console lines, averages that do not stall the device, log.txt, TensorBoard, progress bars."""

import atexit
import json
import logging
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from utils.config import ConfigError
from utils.distributed import all_sum, world_size
from utils.files import replaced


def setup_logging(rank: int) -> None:
    """Set up the logger "tad": everything of rank 0, errors of the others, which name their rank.

    What the others would warn of, rank 0 warns of too.
    """
    logger = logging.getLogger("tad")
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


class Averages:
    """Running means of scalars that stay on their device until they are asked for.

    `window` covers the updates since it was last read, `total` all of them. Both are sums, the count in the last place.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.names: list[str] = []
        self._window = self._total = torch.zeros(0, dtype=torch.float64)

    def update(self, values: Mapping[str, torch.Tensor], leave_out: torch.Tensor | None = None) -> None:
        """Add one value of each name; no synchronisation. The names are those of the first call.

        leave_out: bool () on the values' device: whether to leave these out.
        """
        row = torch.stack([value.detach().to(torch.float64) for value in self._ordered(values)])
        row = torch.cat([row, torch.ones_like(row[:1])])
        if leave_out is not None:
            row = torch.where(leave_out, 0.0, row)
        self._window = self._window.to(row.device) + row
        self._total = self._total.to(row.device) + row

    def _ordered(self, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        if not self.names:
            self.names = list(values)
            self._window = self._total = torch.zeros(len(values) + 1, dtype=torch.float64)
        return [values[name] for name in self.names]

    def read_window(self) -> dict[str, float]:
        """Means since the last call, of this rank, NaN where there was nothing; waits for the device."""
        sums, self._window = self._window.tolist(), torch.zeros_like(self._window)
        return self._means(sums)

    def read_total(self) -> dict[str, float]:
        """Means since the start, over all ranks; waits for the device. Empty before the first update."""
        return self._means(all_sum(self._total.clone()).tolist()) if self.names else {}

    def _means(self, sums: list[float]) -> dict[str, float]:
        return {n: value / sums[-1] if sums[-1] else math.nan for n, value in zip(self.names, sums, strict=False)}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, on the CPU."""
        sums = {"window": self._window.cpu(), "total": self._total.cpu()}
        return {"names": self.names, "world_size": world_size(), **sums}

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the sums of one or several ranks; from nothing if there are none.

        Each step keeps its weight where the ranks were more or fewer.
        """
        self.reset()
        for state in (state for state in states if state["names"]):
            parts = [state[name] * (world_size() / state["world_size"]) for name in ("window", "total")]
            if self.names:
                parts = [self._window + parts[0], self._total + parts[1]]
            self.names, (self._window, self._total) = list(state["names"]), parts


def append_json_line(path: str | Path, record: Mapping[str, Any]) -> None:
    """Add a line of JSON to a file; NaN becomes null."""
    with Path(path).open("a") as f:
        f.write(json.dumps(jsonable(record)) + "\n")


def drop_records_from(path: str | Path, epoch: int, step: int = 0) -> None:
    """Remove the records of (epoch, step) and later ones from a file of JSON lines: a resumed run writes them again.

    Records without a step are of the end of their epoch.
    """
    path = Path(path)
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
            if (record["epoch"], record.get("step", math.inf)) < (epoch, step):
                kept.append(line + "\n")
        except ValueError:  # the kill came in the middle of the line
            continue
    with replaced(path) as temporary:
        temporary.write_text("".join(kept))


def jsonable(value: Any) -> Any:
    """Plain JSON types: numbers that are not finite become None, tuples lists, paths strings."""
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
    """tqdm on a terminal, the plain iterable elsewhere (a log file gets lines instead)."""
    if not (enabled and sys.stdout.isatty()):
        return iterable
    from tqdm import tqdm

    return tqdm(iterable, total=total, desc=description, file=sys.stdout, dynamic_ncols=True, leave=False)
