"""Data sets by name: `build_clips(name, root, split)` reads annotations and returns a ClipTable, nothing heavier."""

from collections.abc import Callable
from functools import partial

from datasets.clips import Clip, ClipTable, DataError
from datasets.dota import load_dota

_DATA_SETS: dict[str, Callable[[str, str], ClipTable]] = {
    "DoTA": partial(load_dota, "DoTA"),
    "DoTA_half": partial(load_dota, "DoTA_half"),
}


def list_data_sets() -> list[str]:
    """Names `build_clips` takes."""
    return sorted(_DATA_SETS)


def build_clips(name: str, root: str, split: str) -> ClipTable:
    """The clips of a split of a data set on disk.

    Raises DataError: unknown name (with the list of known ones) or split, missing or malformed annotation.
    """
    if name not in _DATA_SETS:
        raise DataError(f"unknown data set {name!r}; known: {', '.join(list_data_sets())}")
    return _DATA_SETS[name](root, split)


__all__ = ["Clip", "ClipTable", "DataError", "build_clips", "list_data_sets"]
