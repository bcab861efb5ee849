"""What the flags of the run scripts stand for: values that were left open, and which may change when a run resumes."""

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from utils.cli import ConfigError

# Arguments that may differ when a run is resumed: where, how fast, how far it runs, and what it started from.
FREE_ON_RESUME = frozenset(
    (
        *("auto_resume", "resume", "start_epoch", "stop_epoch", "output_dir", "log_dir", "print_freq", "save_ckpt"),
        *("save_ckpt_freq", "data_path", "finetune", "model_key", "model_prefix", "device", "num_workers", "pin_mem"),
        *("compile", "no_flash_attn", "use_checkpoint", "batch_size", "update_freq", "eval", "eval_batch_size"),
        *("disable_eval_during_finetuning", "allow_missing", "max_bad_samples", "from_ckpt", "scan_cache"),
        *("save_every_minutes", "dist_timeout", "max_nonfinite"),
    )
)

ORIGIN = ("finetune", "from_ckpt", "model_key", "model_prefix")  # what the weights came from
SCHEDULE = ("epochs", "lr", "min_lr", "warmup_epochs", "warmup_steps", "weight_decay", "weight_decay_end")
OPTIMIZER = ("opt", "opt_eps", "opt_betas", "clip_grad")
SESSION = ("log_dir", "auto_resume", "save_ckpt", "save_every_minutes", "max_nonfinite")
logger = logging.getLogger("tad")


def picked(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """{name: value} of some of the arguments."""
    return {name: getattr(args, name) for name in names}


def fill(args: argparse.Namespace, defaults: Any, names: Sequence[str]) -> None:
    """Give the arguments that are None the value of the attribute of `defaults` of that name, in place."""
    for name in names:
        if getattr(args, name) is None:
            setattr(args, name, getattr(defaults, name))


def given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """{name: value} of those of the arguments that are not None."""
    return {name: value for name, value in picked(args, names).items() if value is not None}


def keep_origin(args: argparse.Namespace, resumed: Mapping[str, Any] | None) -> None:
    """Set what the weights came from to what the arguments in a state to continue from say; log what changes."""
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
