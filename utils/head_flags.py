"""The flags of run_finetune.py for heads, a frozen encoder and its features on disk."""

import argparse
import logging
from collections.abc import Mapping
from typing import Any

from utils.cli import ConfigError, natural

logger = logging.getLogger("tad")


def add_head_flags(group: Any) -> None:
    """Add --head, --freeze_layers, --freeze_encoder and --cache_features to a FlagGroup."""
    help = (
        "linear behind the pooled tokens, or V-JEPA's attentive probe on all of them (default: the weights file's, "
        "else linear; of V-JEPA attentive)"
    )
    group.fixed("head", None, help, choices=["linear", "attentive"])
    help = "freeze the embedding and the first N blocks, norms excepted"
    group.fixed("freeze_layers", None, help, metavar="N", type=natural)
    help = "train the head alone: the encoder, its final norm too, gets no gradient, and drops nothing out"
    group.fixed("freeze_encoder", False, help)
    help = (
        "folder that keeps what a frozen encoder makes of each window, so that video is read once: training windows "
        "are those of --no_augment"
    )
    group.free("cache_features", None, help, metavar="DIR")


def add_augment_flag(group: Any) -> None:
    """Add --augment and --no_augment to a FlagGroup."""
    help = "augment training windows (default, but with --cache_features)"
    opposite = "take training windows as evaluation does: whole frames, squashed; --aa, --reprob and the like are off"
    group.pair("augment", help, opposite, overridable=True)


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
