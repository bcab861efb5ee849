"""The flags of run_finetune.py for heads, a frozen encoder and its features on disk."""

from typing import Any

from utils.cli import natural


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
