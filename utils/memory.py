"""How much memory can be had: of the machine, and of the control groups (a container, a Slurm job) it is divided by."""

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Of each version of control groups: the files of the limit and of what is in use, and which fields of memory.stat,
# which is in use too, are given back when needed.
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", r"^total_(?:in)?active_file (\d+)")
_V2 = ("memory.max", "memory.current", r"^(?:in)?active_file (\d+)")


def available_memory() -> tuple[int, str]:
    """Return how many bytes can be had, swap left aside, and which file limits them; sys.maxsize where none tells."""
    return min([*_of_machine(), *_of_groups()], default=(sys.maxsize, ""))


def in_bytes(number: int) -> str:
    """Return a number of bytes for people: "135 MB", "2.41 GB"."""
    value, unit = float(number), 0
    while value >= 999.5 and unit < 5:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[unit]}"


def _of_machine() -> Iterator[tuple[int, str]]:
    file = _PROC / "meminfo"
    with suppress(OSError):
        if found := re.search(r"^MemAvailable:\s*(\d+) kB", file.read_text(), re.MULTILINE):
            yield 1024 * int(found[1]), str(file)


def _of_groups() -> Iterator[tuple[int, str]]:
    """Yield what is left of every limit on this process; a container may see its group as the root of all."""
    with suppress(OSError):
        for line in (_PROC / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                roots, files = (_GROUPS, _GROUPS / "unified"), _V2
            elif "memory" in controllers.split(","):
                roots, files = (_GROUPS / "memory",), _V1
            else:
                continue
            for root in roots:
                group = root / path.lstrip("/")
                while group.is_relative_to(root):
                    yield from _left_of(group, *files)
                    group = group.parent


def _left_of(group: Path, limit: str, used: str, freed: str) -> Iterator[tuple[int, str]]:
    with suppress(OSError, ValueError):  # no such group here; "max": no limit
        most = int((group / limit).read_text())
        spare = sum(map(int, re.findall(freed, (group / "memory.stat").read_text(), re.MULTILINE)))
        yield max(most - int((group / used).read_text()) + spare, 0), str(group / limit)
