"""One state for all ranks: rank 0 chooses which one is continued, and no rank starts without it."""

import hashlib
import os
import socket
import time
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from engine.checkpoint import STATE, Progress, find_resume, load_last, state_folder
from utils.cli import ConfigError
from utils.distributed import broadcast, from_main, gather

_LATE = 10.0  # seconds for which a network file system may not show what another node has written


@dataclass(frozen=True)
class _Choice:
    """What rank 0 continues: whose folder it is in, the sums of what is in it, and what of it is no tensor."""

    place: str
    digest: str | None = None
    plain: dict[str, Any] = field(default_factory=dict)


def agreed_state(
    output_dir: str | Path, *, auto_resume: bool, resume: str | None, **compared: Any
) -> dict[str, Any] | None:
    """Return, on every rank, the state that `find_resume` chooses on rank 0; every rank calls it.

    compared: further arguments of find_resume.

    Raises ConfigError, on every rank, where one of them does not find the same within seconds.
    """
    where = {"output_dir": output_dir, "auto_resume": auto_resume, "resume": resume}
    state: dict[str, Any] | None = None

    def choose() -> _Choice:
        nonlocal state
        folder, digest = _find(where)
        state = find_resume(**where, **compared)
        if state is None:
            return _Choice(f"rank 0 on {socket.gethostname()} finds none")
        plain = {name: state[name] for name in (*(item.name for item in fields(Progress)), "args")}
        return _Choice(f"rank 0 on {socket.gethostname()} continues {folder.absolute()}", digest, plain)

    choice = from_main(choose)
    problem = None
    if state is None:
        try:
            state = _same_state(where, choice)
        except (ConfigError, OSError) as e:
            problem = f"{socket.gethostname()} {e}"
    problems = gather(problem) or []
    if first := broadcast(next((f"rank {rank} on {text}" for rank, text in enumerate(problems) if text), None)):
        raise ConfigError(first)
    return state


def _same_state(where: Mapping[str, Any], choice: _Choice) -> dict[str, Any] | None:
    """Return the state that rank 0 has chosen, once it is here. Raises ConfigError where it is not."""
    deadline = time.monotonic() + _LATE
    while True:
        folder, digest = _find(where)
        if digest == choice.digest:
            return load_last(folder) | choice.plain if digest else None
        if time.monotonic() > deadline or not choice.digest:
            found = f"another state in {folder.absolute()}" if folder else f"no state in {where['output_dir']}"
            flags = " and ".join(f"--{name}" for name in ("output_dir", "resume") if where[name])
            raise ConfigError(f"finds {found}, {choice.place}: {flags} must be a folder that all nodes share")
        time.sleep(0.5)


def _find(where: Mapping[str, Any]) -> tuple[Path | None, str | None]:
    """Return the folder of the state to continue and the sums of its contents, which the file lists; None if absent."""
    with suppress(OSError):  # asked for the listing: it may remember for a while that there was no such file
        os.listdir(where["output_dir"])
    if (folder := state_folder(**where)) is None:
        return None, None
    try:
        with zipfile.ZipFile(folder / STATE) as z:
            sums = [(item.filename, item.file_size, item.CRC) for item in z.infolist()]
    except (OSError, zipfile.BadZipFile):  # not all of it is here yet, or it is damaged
        return folder, None
    return folder, hashlib.sha256(repr(sums).encode()).hexdigest()
