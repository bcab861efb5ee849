"""Checkpoints of a run.

    OUTPUT_DIR/
        args.json                         the run's arguments, what it ran on and with
        checkpoint-last/                  everything needed to go on: model, optimizer, scaler, EMA, progress and
            state.pth                     arguments; of every rank its random states, the sums of the epoch's statistics
                                          and the counts of samples
        checkpoint-last.new/              being written; never read
        checkpoint-last.old/              the one before, for the instant between two renames
        checkpoint-<epoch>.pth            weights and their spec, as the next two
        checkpoint-best_auroc.pth         those of the best evaluation so far by that metric
        checkpoint-best_auc_mcc.pth
        checkpoint-best_probe.pth         those of the best linear probe during DAPT
        .lock                             of the run that is in the folder now; see utils/lock.py

A kill at any instant leaves a whole checkpoint-last/ or checkpoint-last.old/, and weights files are replaced in one
rename. Files hold tensors and plain types only, so `torch.load(..., weights_only=True)` reads all of them, and the
CRC-32 of each part, by which damage is found when they are read.
"""

import logging
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from engine.averages import Averages
from engine.optim import Optimization
from utils.cli import ConfigError
from utils.damage import zip_damage
from utils.distributed import Process, gather
from utils.files import check_writable, disk_error, replaced, sync
from utils.logging import drop_records_from
from utils.pickles import refused_code
from utils.record import write_run_record
from utils.text import not_utf8, short_reason

LAST = "checkpoint-last"
STATE = "state.pth"
# Of an optimizer's groups: what arguments say, and how it computes, which is up to the device. The rest is its state.
_OWN_SETTINGS = ("lr", "lr_scale", "weight_decay", "betas", "eps", "fused", "foreach", "capturable", "differentiable")
logger = logging.getLogger("tad")


class CheckpointWriteError(RuntimeError):
    """A checkpoint that could not be written; the message names it and why."""


class NotAmended(ValueError):
    """A weights file whose spec is left as it was; the message names the file and why."""


class SampleCounts(Protocol):
    """What a rank counts of the samples it reads; `datasets.faults.CountedBatches` does."""

    def state_dict(self) -> dict[str, Any]:
        """Return the counts in plain types."""

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the counts of one or several ranks of the run to continue; from nothing if there are none."""


@dataclass
class Progress:
    """Where a run stands.

    epoch: the epoch in progress.
    step: optimizer steps done in it.
    best: the best value of each metric so far.
    means: the statistics of the last epoch trained, for a run that is killed between training and evaluation.
    num_windows: windows of each data set; a resumed run must find the same.
    steps_per_epoch: what data and batch make of an epoch; a resumed run must find the same.
    left_out: steps in a row, up to the last, whose loss or gradient was not finite.
    health: what `engine.health` has found so far.
    """

    epoch: int = 0
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)
    num_windows: list[int] = field(default_factory=list)
    steps_per_epoch: int = 0
    left_out: int = 0
    health: dict[str, Any] = field(default_factory=dict)

    @property
    def steps_done(self) -> int:
        """Optimizer steps since the start of the schedule."""
        return self.epoch * self.steps_per_epoch + self.step

    def __str__(self) -> str:
        return f"epoch {self.epoch}, {self.step} of {self.steps_per_epoch} steps"


@dataclass
class RunState:
    """What checkpoint-last/ keeps of a run.

    model: the model as it is, not wrapped.
    optimization: optimizer, scaler and average of the weights.
    progress: where the run stands.
    record: the run's arguments, in plain types.
    samples: the counts of this rank, if anything counts.
    statistics: the sums of the epoch in progress, of this rank.
    """

    model: nn.Module
    optimization: Optimization
    progress: Progress
    record: Mapping[str, Any] = field(default_factory=dict)
    samples: SampleCounts | None = None
    statistics: Averages = field(default_factory=Averages)

    @property
    def parts(self) -> dict[str, Any]:
        """What each rank has of its own, by name."""
        return {"statistics": self.statistics} | ({"samples": self.samples} if self.samples else {})


def find_last(output_dir: str | Path) -> Path | None:
    """Return the checkpoint-last folder of a run, or None."""
    for name in (LAST, f"{LAST}.old"):
        folder = Path(output_dir, name)
        if (folder / STATE).is_file():
            return folder
    return None


def rewind_folder(output_dir: str | Path, state: RunState, *, world_size: int) -> None:
    """Make output_dir the folder of a run that stands where state.progress says; rank 0 calls it.

    It writes args.json and removes what a later stretch of the run, or a killed process, has left behind. Raises
    ConfigError where the folder cannot be written.
    """
    folder, progress = Path(output_dir), state.progress
    write_run_record(folder / "args.json", state.record, world_size)
    drop_records_from(folder / "log.txt", progress.epoch)
    drop_records_from(folder / "nonfinite.jsonl", progress.epoch, progress.step)
    shutil.rmtree(folder / f"{LAST}.new", ignore_errors=True)  # what a killed process was writing
    if (folder / LAST / STATE).is_file():
        shutil.rmtree(folder / f"{LAST}.old", ignore_errors=True)
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def check_room(output_dir: str | Path, state: RunState) -> None:
    """Find out whether a folder takes the state of a run, beside the one that is there. Raises ConfigError."""
    optimization = state.optimization
    weights = sum(tensor.nbytes for tensor in state.model.state_dict().values())
    moments = 2 if isinstance(optimization.optimizer, torch.optim.Adam) else 0  # AdamW is one
    shutil.rmtree(Path(output_dir, f"{LAST}.new"), ignore_errors=True)  # its room counts
    try:
        check_writable(output_dir, weights * (1 + moments + bool(optimization.ema)))
    except OSError as e:
        raise ConfigError(f"{output_dir}: cannot be written ({e.strerror}); choose another --output_dir") from e


def save_last(output_dir: str | Path, state: RunState) -> None:
    """Replace checkpoint-last/ by the present state; every rank calls it.

    Raises CheckpointWriteError where it cannot be written; the one before stays.
    """
    ranks = gather({"rng": _rng_state()} | {name: part.state_dict() for name, part in state.parts.items()})
    if ranks is None:
        return
    optimization = state.optimization
    content = {
        "model": state.model.state_dict(),
        "spec": state.model.spec,
        "optimizer": optimization.optimizer.state_dict(),
        "scaler": optimization.scaler.state_dict() if optimization.scaler else None,
        "model_ema": optimization.ema.module.state_dict() if optimization.ema else None,
        **asdict(state.progress),
        "ranks": ranks,
        "args": dict(state.record),
    }
    last, new, old = (Path(output_dir, LAST + suffix) for suffix in ("", ".new", ".old"))
    shutil.rmtree(new, ignore_errors=True)
    try:
        with explained(last, writing=new / STATE):
            new.mkdir(parents=True)
            _write(content, new / STATE)
            sync(new / STATE)
            sync(new)
    except CheckpointWriteError:
        shutil.rmtree(new, ignore_errors=True)  # the disk may be full of it
        raise
    with explained(last):
        if last.exists():
            shutil.rmtree(old, ignore_errors=True)  # `last` is whole, so nothing needs `old` yet
            os.rename(last, old)
        os.rename(new, last)
        sync(Path(output_dir))
    shutil.rmtree(old, ignore_errors=True)


def _write(content: Mapping[str, Any], path: Path) -> None:
    torch.serialization.set_crc32_options(True)  # whatever the program around us has set: readers look for damage
    torch.save(content, path)


@contextmanager
def explained(path: str | Path, writing: Path | None = None) -> Iterator[None]:
    """Turn what a full disk raises into a CheckpointWriteError. writing: the file that is half-written by then."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch.save raises either
        known = e if isinstance(e, OSError) else writing and disk_error(writing)
        reason = (known and known.strerror) or short_reason(e)
        raise CheckpointWriteError(f"{path}: cannot be written ({reason}); what was there before is intact") from e


def load_last(folder: str | Path) -> dict[str, Any]:
    """Return the state in a checkpoint-last/ folder, on the CPU. Raises ConfigError where it is damaged or none.

    The file is read once for its sums, 5 GB in some seconds. Its tensors stay in it until they are read again: the
    ranks of a node share what they read in memory.
    """
    path = Path(folder, STATE)
    if odd := not_utf8(str(path)):
        raise ConfigError(odd)
    if damage := zip_damage(path):
        refusal = refused_code(path, ValueError(damage))  # a pickle alone is no zip
        raise ConfigError(f"{path}: {refusal}" if refusal else f"{path} is damaged ({damage}); {_way_on(path.parent)}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # torch.load raises a dozen types, depending on where the bytes go wrong
        if refusal := refused_code(path, e):
            raise ConfigError(f"{path}: {refusal}") from e
        reason = type(e).__name__ if "weights_only" in str(e) else short_reason(e)  # not its advice to unpickle all
        raise ConfigError(f"{path} is damaged ({reason}); {_way_on(path.parent)}") from e
    expected = {"model", "optimizer", "scaler", "model_ema", "ranks", "args", *(item.name for item in fields(Progress))}
    if not isinstance(state, dict) or not {"model", "optimizer", "args"} <= state.keys():
        raise ConfigError(f"{path} is not the state of a run; weights alone are for --finetune or --from_ckpt")
    state.setdefault("health", {})  # states from before it go on
    if missing := sorted(expected - state.keys()):
        raise ConfigError(
            f"{path} is of another version of this code (no {', '.join(missing)}): continue it with that version, or "
            "give --finetune or --from_ckpt a checkpoint-<epoch>.pth of it and start in another --output_dir"
        )
    return state


def _way_on(damaged: Path) -> str:
    """Say what to do about a damaged folder of a run."""
    old = damaged.with_name(f"{LAST}.old")
    if damaged.name == LAST and (old / STATE).is_file():
        return f"remove its folder, and the same command goes on from {old}"
    weights = "; --finetune or --from_ckpt can start another run from its checkpoint-<epoch>.pth"
    return f"copy it again where it is a copy, or remove its folder to start over{weights}"


def restore(saved: Mapping[str, Any], state: RunState, process: Process) -> None:
    """Set a run's state, and the random states of this rank, to what `load_last` returned, in place.

    On another number of ranks, what ranks have of their own is shared out anew, and a rank that did not exist keeps its
    fresh random states. An average of the weights that the run did not keep starts from its weights. Raises ConfigError
    where the run had other numbers of windows, or of steps in an epoch.
    """
    progress, optimization = state.progress, state.optimization
    expected = progress.num_windows, progress.steps_per_epoch
    for name, what in (("num_windows", "windows to draw from"), ("steps_per_epoch", "steps in an epoch")):
        before, now = saved[name], getattr(progress, name)
        if now and before and now != before:
            raise ConfigError(
                f"the run to continue had {before} {what}, now there are {now}: the data has changed; restore it or "
                "start in another --output_dir"
            )
    state.model.load_state_dict(saved["model"])
    _restore_optimizer(saved["optimizer"], optimization.optimizer)
    if optimization.scaler and saved["scaler"]:
        optimization.scaler.load_state_dict(saved["scaler"])
    if optimization.ema:
        optimization.ema.module.load_state_dict(saved["model_ema"] or saved["model"])
    for item in fields(progress):
        setattr(progress, item.name, saved[item.name])
    if expected[1] and not progress.steps_per_epoch:  # windows come in another order
        progress.num_windows, progress.steps_per_epoch = expected
        progress.step = progress.step and progress.steps_per_epoch  # what is trained and not yet evaluated stays so
    ranks = saved["ranks"]
    for name, part in state.parts.items():
        part.load_state_dicts([ranks[r][name] for r in range(process.rank, len(ranks), process.world_size)])
    if process.rank < len(ranks):
        _restore_rng(ranks[process.rank]["rng"])
    best = ", ".join(f"{name} {100 * value:.2f}" for name, value in progress.best.items() if value > -math.inf)
    best = f"; best so far: {best or 'none yet'}" if progress.best else ""
    logger.info(f"resuming at epoch {progress.epoch}, step {progress.step}{best}")
    if len(ranks) != process.world_size:
        logger.info(
            f"{len(ranks)} processes saved it, {process.world_size} go on: with the same batches in other shares, so "
            "rounding and dropout differ from a run that was not interrupted"
        )


def _restore_optimizer(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Set an optimizer's state; its settings stay its own, and nothing stays in the file. Raises ConfigError."""
    groups = saved["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in optimizer.param_groups]:
        raise ConfigError(
            "the run to continue groups its parameters otherwise: --layer_decay changes from below 1 to below 1 alone"
        )
    pairs = zip(groups, optimizer.param_groups, strict=True)
    groups = [group | {k: own[k] for k in _OWN_SETTINGS if k in own} for group, own in pairs]
    optimizer.load_state_dict({**saved, "param_groups": groups})
    for values in optimizer.state.values():
        kept = {k: v for k, v in values.items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}
        values.update({k: v.clone() for k, v in kept.items()})  # a save replaces the file they are mapped from


def save_weights(path: str | Path, model: nn.Module, **about: Any) -> None:
    """Write the weights of an unwrapped model and its spec, in one rename: {"model": state dict, "spec": {...}}.

    about: what the spec says beside what the model knows, in plain types: the data set, the epoch. The published codes
    unwrap "model", so the file goes both ways. Raises CheckpointWriteError where it cannot be written.
    """
    weights = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    with explained(path), replaced(path) as temporary:
        _write({"model": weights, "spec": model.spec | about}, temporary)


def amend_spec(path: str | Path, *, replace: bool, ready: Callable[[Path], None], **about: Any) -> bool:
    """Write more into the spec of a weights file, in one rename; all else in it stays as it is.

    Args:
        path: the file, or a link to it.
        replace: whether what the spec says already is replaced.
        ready: called with the new file, whole but under another name, just before the rename; may raise.
        about: what the spec is to say, in plain types.

    Returns whether it says that now; not where it says something else and `replace` is false. Raises NotAmended where
    the file is not one of weights with their spec, damaged, or read-only; CheckpointWriteError where it cannot be
    written; what `ready` raises.
    """
    path = Path(path).resolve()
    content = _read_weights(path)
    spec = content["spec"]
    if all(spec.get(key) == value for key, value in about.items()):
        return True
    if not replace and about.keys() & spec.keys():
        return False
    if not (path.stat().st_mode & 0o222 and os.access(path, os.W_OK)):
        raise NotAmended(f"{path} is read-only")
    with explained(path), replaced(path) as temporary:
        _write({**content, "spec": {**spec, **about}}, temporary)
        shutil.copymode(path, temporary)
        ready(temporary)
    return True


def _read_weights(path: Path) -> dict[str, Any]:
    """Return the content of a weights file of ours. Its tensors stay in the file, whose sums are right."""
    if damage := zip_damage(path):
        raise NotAmended(f"{path} is damaged, or not as torch.save writes files ({damage})")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # torch.load raises a dozen types, depending on where the bytes go wrong
        raise NotAmended(f"{path} cannot be read again ({type(e).__name__})") from e
    if isinstance(content, dict) and "optimizer" in content:
        raise NotAmended(f"{path} is the state of a run")
    if not isinstance(content, dict) or not isinstance(content.get("spec"), dict) or "classes" not in content["spec"]:
        raise NotAmended(f"{path} has no spec")
    return content


def is_kept(epoch: int, *, stop_epoch: int, every: int) -> bool:
    """Return whether checkpoint-<epoch>.pth is due: the last epoch before stop_epoch, or one in `every` (0: none)."""
    return epoch + 1 == stop_epoch or (every > 0 and (epoch + 1) % every == 0)


def _rng_state() -> dict[str, Any]:
    """Return states of Python's, NumPy's and PyTorch's global generators, in plain types.

    CUDA's is left out where this process does not use it: asking for it would take memory of the GPU.
    """
    numpy = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {"key": numpy["state"]["key"].tolist(), "pos": int(numpy["state"]["pos"])}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def _restore_rng(state: dict[str, Any]) -> None:
    """Undo everything drawn since `_rng_state`."""
    random.setstate(state["python"])
    numpy = state["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": np.array(numpy["state"]["key"], np.uint32)}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
