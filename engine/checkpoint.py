"""Checkpoints of a run.

    OUTPUT_DIR/
        checkpoint-last/                  everything needed to go on: model, optimizer, scaler, EMA, epoch, step in the
            state.pth                     epoch, best values, arguments; of every rank its random states, the sums of
                                          the epoch's statistics and the count of skipped samples
        checkpoint-last.new/              being written; never read
        checkpoint-last.old/              the one before, for the instant between two renames
        checkpoint-<epoch>.pth            weights alone: flat, published keys, loadable by the reference too
        checkpoint-best_auroc.pth         weights of the best evaluation so far by that metric
        checkpoint-best_auc_mcc.pth

A kill at any instant leaves a whole checkpoint-last/ or checkpoint-last.old/, and weights files are replaced in one
rename. Files hold tensors and plain types only, so `torch.load(..., weights_only=True)` reads all of them.
"""

import logging
import math
import os
import random
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from engine.guard import Progress
from engine.optim import Optimization
from utils.cli import ConfigError
from utils.distributed import gather
from utils.files import replaced, sync
from utils.logging import drop_records_from
from utils.record import differing, read_run_record, write_run_record

LAST = "checkpoint-last"
_STATE = "state.pth"
logger = logging.getLogger("tad")


class CheckpointWriteError(RuntimeError):
    """A checkpoint that could not be written; the message names it and why."""


class Part(Protocol):
    """Something of a rank's own that a checkpoint keeps: sums and counts."""

    def state_dict(self) -> dict[str, Any]:
        """Its state, in tensors and plain types."""

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the states of one or several ranks of the run to continue; from nothing if there are none."""


def find_last(output_dir: str | Path) -> Path | None:
    """The checkpoint-last folder of a run, or None."""
    for name in (LAST, f"{LAST}.old"):
        folder = Path(output_dir, name)
        if (folder / _STATE).is_file():
            return folder
    return None


def find_resume(
    output_dir: str | Path, *, auto_resume: bool, resume: str | None, record: Mapping[str, Any], free: Set[str]
) -> dict[str, Any] | None:
    """The state to continue from: output_dir's own if auto_resume, else that of the folder `resume`, else None.

    record: the arguments of this run. Those of the run that is continued, or that output_dir belongs to, must equal
    them but for the names in `free`; without auto_resume, output_dir must not hold a run. Raises ConfigError.
    """
    folder, origin = find_last(output_dir) if auto_resume else None, Path(output_dir, "args.json")
    if origin.exists() and not auto_resume:
        raise ConfigError(f"{output_dir} holds a run: choose another --output_dir, remove it, or leave auto_resume on")
    if folder is None and resume:
        folder = Path(resume)
        if not (folder / _STATE).is_file():
            raise ConfigError(f"--resume {resume}: no {_STATE} in it; it takes a checkpoint-last folder")
        state = load_last(folder)
        state["best"] = dict.fromkeys(state["best"], -math.inf)  # the files of those values stayed there
    else:
        state = load_last(folder) if folder else None
    if state or origin.exists():
        known = state["args"] if state else read_run_record(origin)
        if changes := differing(known, record, free):
            raise ConfigError(
                f"{folder or output_dir} belongs to a run with other arguments ({'; '.join(changes)}): "
                "use those or another --output_dir"
            )
    if origin.exists() and not state:
        logger.info(f"{output_dir} holds a run that ended before a state was saved: starting from the beginning")
    return state


def claim(output_dir: str | Path, progress: Progress, *, record: Mapping[str, Any], world_size: int) -> None:
    """Make output_dir this run's, from where progress stands: args.json, and nothing left of what comes after.

    Called by rank 0. Raises ConfigError where it cannot be written.
    """
    folder = Path(output_dir)
    write_run_record(folder / "args.json", record, world_size)
    drop_records_from(folder / "log.txt", progress.epoch)
    drop_records_from(folder / "nonfinite.jsonl", progress.epoch, progress.step)
    shutil.rmtree(folder / f"{LAST}.new", ignore_errors=True)  # what a killed process was writing
    if (folder / LAST / _STATE).is_file():
        shutil.rmtree(folder / f"{LAST}.old", ignore_errors=True)
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def save_last(
    output_dir: str | Path,
    model: nn.Module,
    optimization: Optimization,
    progress: Progress,
    *,
    parts: Mapping[str, Part],
    record: Mapping[str, Any],
) -> None:
    """Replace checkpoint-last/ by the present state; every rank calls it.

    Args:
        model: unwrapped. parts: by name, kept for each rank. record: the run's arguments, plain types, under "args".

    Raises CheckpointWriteError where it cannot be written; the one before stays.
    """
    ranks = gather({"rng": _rng_state()} | {name: part.state_dict() for name, part in parts.items()})
    if ranks is None:
        return
    state = {
        "model": model.state_dict(),
        "optimizer": optimization.optimizer.state_dict(),
        "scaler": optimization.scaler.state_dict() if optimization.scaler else None,
        "model_ema": optimization.ema.module.state_dict() if optimization.ema else None,
        **asdict(progress),
        "ranks": ranks,
        "args": dict(record),
    }
    last, new, old = (Path(output_dir, LAST + suffix) for suffix in ("", ".new", ".old"))
    shutil.rmtree(new, ignore_errors=True)
    try:
        with _explained(last):
            new.mkdir(parents=True)
            torch.save(state, new / _STATE)
            sync(new / _STATE)
            sync(new)
    except CheckpointWriteError:
        shutil.rmtree(new, ignore_errors=True)  # the disk may be full of it
        raise
    if last.exists():
        shutil.rmtree(old, ignore_errors=True)  # `last` is whole, so nothing needs `old` yet
        os.rename(last, old)
    os.rename(new, last)
    sync(Path(output_dir))
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    """Turn what a full disk raises into a CheckpointWriteError."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch.save raises either
        reason = (str(e).splitlines() or [type(e).__name__])[0][:120]
        raise CheckpointWriteError(f"{path}: cannot be written ({reason}); what was there before is intact") from e


def load_last(folder: str | Path) -> dict[str, Any]:
    """The state in a checkpoint-last/ folder, on the CPU. Raises ConfigError where it cannot be read."""
    path = Path(folder, _STATE)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises a dozen types, depending on where the bytes go wrong
        lines = [] if "weights_only" in str(e) else str(e).splitlines()  # no reason, but advice to unpickle all
        reason = (lines or [type(e).__name__])[0][:120]
        raise ConfigError(f"{path} is damaged ({reason}); remove its folder to start over") from e
    if not isinstance(state, dict) or not {"model", "optimizer", "args", "best"} <= state.keys():
        raise ConfigError(f"{path} is not the state of a run; weights alone are for --finetune or --from_ckpt")
    return state


def restore(
    state: Mapping[str, Any],
    model: nn.Module,
    optimization: Optimization,
    progress: Progress,
    *,
    parts: Mapping[str, Part],
    rank: int,
    world_size: int,
) -> None:
    """Set model, optimizer, scaler, EMA, progress, this rank's parts and random states to a loaded state, in place.

    On another number of ranks, parts are shared out anew and a rank that did not exist keeps its fresh random states.
    Raises ConfigError where there were other numbers of windows, or of steps in an epoch, than progress says there are.
    """
    for name, what in (("num_windows", "windows to draw from"), ("steps_per_epoch", "steps in an epoch")):
        before, now = state[name], getattr(progress, name)
        if now and now != before:
            raise ConfigError(
                f"the run to continue had {before} {what}, now there are {now}: the data has changed; restore it or "
                "start in another --output_dir"
            )
    model.load_state_dict(state["model"])
    optimization.optimizer.load_state_dict(state["optimizer"])
    if optimization.scaler:
        optimization.scaler.load_state_dict(state["scaler"])
    if optimization.ema:
        optimization.ema.module.load_state_dict(state["model_ema"])
    for field in fields(progress):
        setattr(progress, field.name, state[field.name])
    ranks = state["ranks"]
    for name, part in parts.items():
        part.load_state_dicts([ranks[r][name] for r in range(rank, len(ranks), world_size)])
    if rank < len(ranks):
        _restore_rng(ranks[rank]["rng"])
    best = f"; best so far: {progress.best}" if progress.best else ""
    logger.info(f"resuming at epoch {progress.epoch}, step {progress.step}{best}")
    if len(ranks) != world_size:
        logger.info(
            f"{len(ranks)} processes saved it, {world_size} go on: with the same batches in other shares, so rounding "
            "and dropout differ from a run that was not interrupted"
        )


def save_weights(path: str | Path, model: nn.Module) -> None:
    """Write the state dict of an unwrapped model, flat, on the CPU, in one rename."""
    state = model.state_dict()
    on_cpu = OrderedDict((key, tensor.detach().cpu()) for key, tensor in state.items())
    on_cpu._metadata = state._metadata  # which model it is
    with _explained(path), replaced(path) as temporary:
        torch.save(on_cpu, temporary)


def keep_epoch(folder: str | Path, model: nn.Module, epoch: int, *, stop_epoch: int, every: int) -> None:
    """Write checkpoint-<epoch>.pth if this is the last epoch before stop_epoch or one of `every` (0: of none)."""
    if epoch + 1 == stop_epoch or (every and (epoch + 1) % every == 0):
        save_weights(Path(folder, f"checkpoint-{epoch}.pth"), model)


def _rng_state() -> dict[str, Any]:
    """States of Python's, NumPy's and PyTorch's global generators, in plain types."""
    numpy = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {"key": numpy["state"]["key"].tolist(), "pos": int(numpy["state"]["pos"])}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore_rng(state: dict[str, Any]) -> None:
    """Undo everything drawn since `_rng_state`."""
    random.setstate(state["python"])
    numpy = state["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": np.array(numpy["state"]["key"], np.uint32)}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
