"""Which state a run continues, and with which of its arguments changed; one state for all ranks: rank 0 chooses it, and
no rank starts without it.
"""

import hashlib
import logging
import math
import os
import socket
import time
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from engine.checkpoint import STATE, Progress, find_last, load_last
from utils.cli import ConfigError
from utils.distributed import broadcast, from_main, gather
from utils.record import Changeable, in_words, read_run_record

_LATE = 10.0  # seconds for which a network file system may not show what another node has written
logger = logging.getLogger("tad")


def state_folder(output_dir: str | Path, *, auto_resume: bool, resume: str | None) -> Path | None:
    """Return the checkpoint-last folder that would be continued: output_dir's own, else `resume`; None without one."""
    folder = (find_last(output_dir) if auto_resume else None) or (Path(resume) if resume else None)
    return folder if folder and (folder / STATE).is_file() else None


def recorded_arguments(output_dir: str | Path, *, auto_resume: bool, resume: str | None) -> dict[str, Any]:
    """Return the arguments of the run whose state would be continued; {} where there is none.

    Raises ConfigError where the state is damaged.
    """
    folder = state_folder(output_dir, auto_resume=auto_resume, resume=resume)
    return load_last(folder)["args"] if folder else {}


def find_resume(
    output_dir: str | Path,
    *,
    auto_resume: bool,
    resume: str | None,
    record: Mapping[str, Any],
    changeable: Changeable,
) -> dict[str, Any] | None:
    """Return the state to continue from: output_dir's own if auto_resume, else that of the folder `resume`, else None.

    record: the arguments of this run. Those of the run that output_dir belongs to must equal them but for what is free,
    those of the run in `resume` but for what is free or overridden; without auto_resume, output_dir must not hold a
    run. What is overridden, now or before, stands in the arguments of the state as "overridden", {name: [before, now]};
    where windows come in another order then, its num_windows is empty and its steps_per_epoch 0.

    Raises ConfigError, also where the run in `resume` has nothing left to do.
    """
    changeable.check(resume)
    folder, record_file = find_last(output_dir) if auto_resume else None, Path(output_dir, "args.json")
    if record_file.exists() and not auto_resume:
        raise ConfigError(f"{output_dir} holds a run: choose another --output_dir, remove it, or leave auto_resume on")
    if folder is None and record_file.exists():
        changeable.same(output_dir, read_run_record(record_file), record, None)
    if folder:
        state = load_last(folder)
        changeable.same(folder, state["args"], record, folder)
    elif resume:
        state = _load_other(Path(resume), record, changeable)
    else:
        if record_file.exists():
            logger.info(f"{output_dir} holds a run that ended before a state was saved: starting from the beginning")
        return None
    before, now = ((run.get("device"), run.get("precision")) for run in (state["args"], record))
    if before[0] != now[0]:
        logger.info(f"the run goes on in {now[1]} on {now[0]}, after {before[1]} on {before[0]}")
    return state


def _load_other(folder: Path, record: Mapping[str, Any], changeable: Changeable) -> dict[str, Any]:
    """Return the state of a run to continue in another folder. Raises ConfigError."""
    if not (folder / STATE).is_file():
        raise ConfigError(f"--resume {folder}: no {STATE} in it; it takes a checkpoint-last folder")
    state = load_last(folder)
    changes = changeable.overridden(folder, state["args"], record)
    reordering, place = changeable.reorders(changes), Progress(**{f.name: state[f.name] for f in fields(Progress)})
    if reordering and 0 < place.step < place.steps_per_epoch:
        raise ConfigError(
            f"--override {' '.join(reordering)}: windows come in another order then, so only at the start of an epoch, "
            f"and {folder} stands at {place}: let that run end the epoch first, with --stop_epoch {place.epoch + 1}"
        )
    stop, epochs = (record.get(name, math.inf) for name in ("stop_epoch", "epochs"))
    if place.epoch >= stop:
        more = f"--stop_epoch up to {epochs}" if place.epoch < epochs else "--override epochs with larger --epochs"
        raise ConfigError(
            f"--resume {folder}: {place.epoch} epochs are done, and this command ends after {stop}: for more, {more}"
        )
    if changes:
        logger.info(f"{folder} goes on with other arguments: {'; '.join(in_words(changes))}")
    if reordering:
        state |= {"num_windows": [], "steps_per_epoch": 0}
    state["best"] = dict.fromkeys(state["best"], -math.inf)  # the files of those values stayed there
    overridden = state["args"].get("overridden", {}) | changes
    return state | {"args": state["args"] | ({"overridden": overridden} if overridden else {})}


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
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):  # it is not all here yet, or damaged
        return folder, None
    return folder, hashlib.sha256(repr(sums).encode()).hexdigest()


def require_same_selection(resumed: Mapping[str, Any] | None, selected_on: str) -> None:
    """Raise ConfigError where the run to continue has chosen its best checkpoint on other clips.

    resumed: its state, as `agreed_state` returns it; where windows come in another order, clips may be others, too.
    """
    before = resumed["args"].get("selected_on") if resumed and resumed["num_windows"] else None
    if before not in (None, selected_on):
        raise ConfigError(
            f"the run to continue chose its best checkpoint on {before}, now it would be on {selected_on}: the data "
            "has changed; restore it or start in another --output_dir"
        )
