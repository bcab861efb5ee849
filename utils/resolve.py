"""Fill in the flags that were left open, and refuse flags that do not go together."""

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from utils.cli import ConfigError
from utils.text import not_utf8

INPUT = ("num_frames", "view_fps", "input_size", "tubelet_size")  # flags that say how a model is fed
OVERRIDABLE = ("num_frames", "view_fps", "input_size", "gelu", "pos_embed", "normalize_target")  # see --override_spec
WEIGHTS_SOURCE = ("finetune", "from_ckpt", "model_key", "model_prefix", "table_grid")  # what weights came from
LOCAL = ("output_dir", "log_dir", "scan_cache", "num_workers", "read_timeout", "pin_mem")  # see common_flags
logger = logging.getLogger("tad")


def common_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return {"--name": value} of the arguments that must be equal in all processes of a run."""
    return {f"--{name}": value for name, value in vars(args).items() if name not in LOCAL}


def leave_gpus_alone(device: str | None) -> None:
    """Hide the GPUs of this machine from a run with --device cpu: an optimizer would make a context on one, to ask
    whether its steps are being captured. To be called before torch is imported.
    """
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def fill_unset(args: argparse.Namespace, values: Mapping[str, Any], names: Sequence[str]) -> None:
    """Give each of the named arguments that is None, or absent, the value of that name, if there is one, in place."""
    for name in names:
        if getattr(args, name, None) is None:
            setattr(args, name, values.get(name))


def fill_from_config(args: argparse.Namespace, hints: Mapping[str, Any], names: Sequence[str], weights: str) -> None:
    """Fill in what was left open of the named arguments from the files beside weights, in place, and log it."""
    taken = {name: value for name, value in hints.items() if name in names and getattr(args, name, None) is None}
    fill_unset(args, hints, names)
    if taken:
        logger.info(f"by the files beside {weights}: {', '.join(f'{name} {value}' for name, value in taken.items())}")


def refuse_contradictions(
    args: argparse.Namespace, spec: Mapping[str, Any], names: Sequence[str], weights: str
) -> None:
    """Compare the named arguments that are given with what a weights file says of itself.

    Raises ConfigError naming both values where they differ, unless it is one of OVERRIDABLE and --override_spec is
    given: the others are in the shapes of the weights.
    """
    for name in names:
        value = getattr(args, name)
        if value is None or name not in spec or value == spec[name]:
            continue
        what = f"--{name} {value} contradicts {weights}, which was made with {spec[name]}"
        if name not in OVERRIDABLE:
            raise ConfigError(f"{what}: leave the flag out, or give another file")
        if not args.override_spec:
            raise ConfigError(f"{what}: leave the flag out, or add --override_spec if you mean it")
        logger.warning(f"{what}; going on with {value}")


def keep_history(args: argparse.Namespace, resumed: Mapping[str, Any] | None) -> None:
    """Set the arguments that say what the weights came from to those of a state to continue from; log what changes.

    What --override has changed is added to args, too, as `overridden`: {name: [before, now]}.
    """
    saved = resumed["args"] if resumed else {}
    if "overridden" in saved:
        args.overridden = saved["overridden"]
    for name in (name for name in WEIGHTS_SOURCE if name in saved and getattr(args, name) != saved[name]):
        logger.info(f"--{name} {getattr(args, name)} is not used: the run to continue started from {saved[name]}")
        setattr(args, name, saved[name])


def resolve_runtime(args: argparse.Namespace, *, cuda: bool) -> None:
    """Fill device, precision, log_dir, pin_mem and augment_on in place. cuda: whether there is a GPU.

    Raises ConfigError where --save_every_minutes has nothing to save, --select_split nothing to choose by, weights are
    an empty name, or the name of a folder is not in UTF-8.
    """
    if empty := [name for name in ("finetune", "from_ckpt") if getattr(args, name, None) == ""]:
        raise ConfigError(f"--{empty[0]} is empty: give a path or URL, or leave it out")
    for name in ("output_dir", "cache_features"):
        if odd := not_utf8(getattr(args, name, None) or ""):
            raise ConfigError(f"--{name} {odd}, or give another")
    if args.save_every_minutes and not args.save_ckpt:
        raise ConfigError("--save_every_minutes needs checkpoints: leave out --no_save_ckpt")
    if getattr(args, "select_split", None) is not None and args.disable_eval_during_finetuning:
        raise ConfigError("--select_split is to choose by evaluation: leave out --disable_eval_during_finetuning")
    args.device = args.device or ("cuda" if cuda else "cpu")
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    args.log_dir = args.log_dir or args.output_dir
    args.pin_mem = args.pin_mem and args.device == "cuda"
    if args.augment_on == "auto":
        args.augment_on = "device" if args.device == "cuda" else "worker"


def resolve_probe(args: argparse.Namespace) -> None:
    """Fill probe_every in place. Raises ConfigError where there is nothing to fit a probe on."""
    if args.probe_every is None:
        args.probe_every = 1 if args.probe_data_path else 0
    if args.probe_every and not args.probe_data_path:
        raise ConfigError("--probe_every needs labelled data: give --probe_data_path, and --probe_data_set if not DoTA")


def resolve_schedule(args: argparse.Namespace) -> None:
    """Fill stop_epoch and weight_decay_end in place. Raises ConfigError where start, stop and end are out of order, the
    warm-up is no shorter than the schedule, or the final rate is above the first.
    """
    args.weight_decay_end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    if args.min_lr > args.lr:
        raise ConfigError(f"--min_lr {args.min_lr:g}, the final rate, must not be above --lr {args.lr:g}")
    if args.warmup_steps <= 0 and args.warmup_epochs >= args.epochs:
        raise ConfigError(f"--warmup_epochs {args.warmup_epochs} must be below --epochs {args.epochs}")
    args.stop_epoch = args.epochs if args.stop_epoch is None else args.stop_epoch
    if not args.start_epoch < args.stop_epoch <= args.epochs:
        raise ConfigError(
            f"--start_epoch {args.start_epoch} < --stop_epoch {args.stop_epoch} <= --epochs {args.epochs} must hold"
        )


def resolve_head(args: argparse.Namespace) -> None:
    """Fill `augment` in place, and say what has no effect then. Raises ConfigError for flags that contradict."""
    if args.freeze_encoder and args.freeze_layers is not None:
        raise ConfigError("give --freeze_encoder, which freezes all layers, or --freeze_layers, not both")
    if args.cache_features is not None and not args.freeze_encoder:
        raise ConfigError("--cache_features keeps what a frozen encoder makes of windows: add --freeze_encoder")
    if args.cache_features is not None and args.augment:
        raise ConfigError(
            "--cache_features keeps one view of each window: leave out --augment, or train without a cache"
        )
    args.augment = args.cache_features is None if args.augment is None else args.augment
    if not args.augment and args.num_sample > 1:
        raise ConfigError(f"--num_sample {args.num_sample}: windows that are not augmented have one view")
    if not args.augment:
        logger.info("training windows are not augmented: they are made as in evaluation, --aa, --reprob, --short_side, "
                    "--decoding and their like have no effect")  # fmt: skip
    if args.freeze_encoder and not args.finetune:
        logger.warning("--freeze_encoder without --finetune: the encoder keeps its random weights")


def without_other_head(args: argparse.Namespace, said: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what is said of a classifier that training starts from, less its head where a flag asks for another."""
    flags = {"head": args.head, "final_reduction": args.final_reduction}
    its = {"head": "linear"} | said
    if all(value in (None, its.get(name)) for name, value in flags.items()):
        return said
    return {name: value for name, value in said.items() if name not in flags}


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
