"""Data sets by name: `build_clips(name, root, split)` reads annotations and returns a ClipTable, nothing heavier."""

import logging
from collections.abc import Collection
from typing import Any

from datasets.clips import Clip, ClipTable, DataError, Selection
from datasets.faults import read_bad_clips
from datasets.formats import DATA_SETS, find_data_set, find_data_sets
from datasets.formats.packed import is_packed, load_packed
from datasets.readers import open_clip
from datasets.scan import VideoScan

logger = logging.getLogger("tad")


def build_clips(
    name: str,
    root: str,
    split: str,
    scan: VideoScan | None = None,
    assume_fps: float | None = None,
    *,
    leave_out: Collection[str] = frozenset(),
    problems: dict[str, DataError] | None = None,
) -> ClipTable:
    """The clips of a split of a data set on disk, or of a pack of it.

    Args:
        scan: counts the frames of data sets of video files. assume_fps: frame rate of clips whose annotation has none,
            not of packed ones. leave_out: names of clips not to use, logged.
        problems: where not None, collects {clip: error} of what is raised for a single clip otherwise.

    Raises DataError: unknown name (with the list of known ones) or split, missing or malformed annotation, video files
    without a scan, assume_fps for a pack, a file or folder that may not be read.
    """
    selection = Selection(leave_out, problems)
    try:
        table = _load(name, root, split, scan, assume_fps, selection)
    except OSError as e:
        raise DataError(f"{root}: cannot be read ({e})") from e
    if table.left_out:
        shown = ", ".join(table.left_out[:5]) + ", ..." * (len(table.left_out) > 5)
        logger.warning(f"{name} {split}: {len(table.left_out)} of {table.listed} clips are left out: {shown}")
    return table


def _load(
    name: str, root: str, split: str, scan: VideoScan | None, assume_fps: float | None, selection: Selection
) -> ClipTable:
    data_set = find_data_set(name)
    if is_packed(root):
        if data_set.assumes_fps and assume_fps is not None:
            raise DataError(f"{root}: the pack keeps its frame rates; leave out --assume_fps")
        return load_packed(name, root, split, data_set.splits, selection)
    options: dict[str, Any] = {"fps": assume_fps} if data_set.assumes_fps else {}
    if data_set.of_videos:
        if scan is None:
            raise DataError(
                f"{name} has video files, whose frames are to be counted: build_clips(..., scan=VideoScan())"
            )
        options["scan"] = scan
    return data_set.load(root, split, selection=selection, **options)


__all__ = [
    "Clip",
    "ClipTable",
    "DATA_SETS",
    "DataError",
    "VideoScan",
    "build_clips",
    "find_data_set",
    "find_data_sets",
    "open_clip",
    "read_bad_clips",
]
