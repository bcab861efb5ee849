"""What flags stand for that were left open: by the weights file, by the run to continue, by the machine."""

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from utils.cli import ConfigError

ORIGIN = ("finetune", "from_ckpt", "model_key", "model_prefix")  # what the weights came from
logger = logging.getLogger("tad")


def fill_unset(args: argparse.Namespace, values: Mapping[str, Any], names: Sequence[str]) -> None:
    """Give each of the named arguments that is None the value of that name, if there is one, in place."""
    for name in names:
        if getattr(args, name) is None:
            setattr(args, name, values.get(name))


def refuse_contradictions(
    args: argparse.Namespace, spec: Mapping[str, Any], names: Sequence[str], weights: str
) -> None:
    """Compare the named arguments that are given with what a weights file says of itself.

    Raises ConfigError naming both values where they differ, unless --override_spec is given.
    """
    for name in names:
        value = getattr(args, name)
        if value is None or name not in spec or value == spec[name]:
            continue
        what = f"--{name} {value} contradicts {weights}, which was made with {spec[name]}"
        if not args.override_spec:
            raise ConfigError(f"{what}: leave the flag out, or add --override_spec if you mean it")
        logger.warning(f"{what}; --override_spec is given")


def keep_origin(args: argparse.Namespace, resumed: Mapping[str, Any] | None) -> None:
    """Set the arguments that say what the weights came from to those of a state to continue from; log what changes."""
    saved = resumed["args"] if resumed else {}
    for name in (name for name in ORIGIN if name in saved and getattr(args, name) != saved[name]):
        logger.info(f"--{name} {getattr(args, name)} is not used: the run to continue started from {saved[name]}")
        setattr(args, name, saved[name])


def resolve_runtime(args: argparse.Namespace, *, cuda: bool) -> None:
    """Fill device, precision, log_dir and pin_mem in place. cuda: whether there is a GPU.

    Raises ConfigError where --save_every_minutes has nothing to save.
    """
    if args.save_every_minutes and not args.save_ckpt:
        raise ConfigError("--save_every_minutes needs checkpoints: leave out --no_save_ckpt")
    args.device = args.device or ("cuda" if cuda else "cpu")
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    args.log_dir = args.log_dir or args.output_dir
    args.pin_mem = args.pin_mem and args.device == "cuda"


def resolve_schedule(args: argparse.Namespace) -> None:
    """Fill stop_epoch and weight_decay_end in place. Raises ConfigError where start, stop and end are out of order."""
    args.weight_decay_end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    args.stop_epoch = args.epochs if args.stop_epoch is None else args.stop_epoch
    if not args.start_epoch < args.stop_epoch <= args.epochs:
        raise ConfigError(
            f"--start_epoch {args.start_epoch} < --stop_epoch {args.stop_epoch} <= --epochs {args.epochs} must hold"
        )


def split_batch(
    total: int | None, per_process: int | None, *, default: int, world_size: int, update_freq: int
) -> tuple[int, int]:
    """Return (windows per process and forward pass, windows per step) from whichever is given, else from `default`.

    Raises ConfigError where both are given or the total does not divide, naming the nearest totals that do.
    """
    parts = world_size * update_freq
    if total is not None and per_process is not None:
        raise ConfigError("give --batch_size (per process) or --total_batch_size, not both")
    if per_process is not None:
        return per_process, per_process * parts
    total = default if total is None else total
    if total % parts:
        below, above = total // parts * parts, -(-total // parts) * parts
        raise ConfigError(
            f"a total batch of {total} does not divide over {world_size} processes x {update_freq} passes: "
            f"use --total_batch_size {' or '.join(str(n) for n in (below, above) if n)}"
        )
    return total // parts, total
