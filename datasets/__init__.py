"""Data sets by name: `build_clips(name, root, split)` reads annotations and returns a ClipTable, nothing heavier.

`load_inputs(paths, scan, fps)` makes one of any videos, for prediction.
"""

import logging
import os
import sys
from collections.abc import Collection
from typing import Any

from utils.exits import report_uncaught

if sys.argv[:1] == ["-m"]:  # one of its commands starts, of which this is the first file
    report_uncaught()

from datasets.clips import Clip, ClipTable, DataError, Selection
from datasets.formats import find_data_set, find_data_sets
from datasets.formats.consensus import OWN, with_consensus
from datasets.formats.inputs import load_inputs
from datasets.formats.lists import base_of, of_list
from datasets.formats.packed import is_packed, load_packed
from datasets.readers import open_clip
from datasets.scan import VideoScan
from utils.names import LABELS
from utils.text import first_few

__all__ = [
    "Clip",
    "ClipTable",
    "DataError",
    "VideoScan",
    "build_clips",
    "find_data_set",
    "find_data_sets",
    "load_inputs",
    "open_clip",
]

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
    labels: str = OWN,
) -> ClipTable:
    """Return the clips of a split of a data set on disk, one's own included (formats/lists.py), or of a pack of it.

    Args:
        scan: counts the frames of data sets of video files.
        assume_fps: frame rate of clips whose annotation has none, not of packed ones.
        leave_out: names of clips not to use, logged.
        problems: where not None, collects {clip: error} of what is raised for a single clip otherwise.
        labels: of frames: "own", those of the data set, or "consensus" or "consensus_ego", see formats/consensus.py.

    Raises DataError: unknown name (with the list of known ones) or split, missing or malformed annotation, video files
    without a scan, assume_fps for a pack, a file or folder that may not be read.
    """
    selection, data_set = Selection(leave_out, problems), find_data_set(name)
    if labels not in LABELS:
        raise DataError(f"unknown labels {labels!r}; known: {', '.join(LABELS)}")
    options: dict[str, Any] = {"fps": assume_fps} if data_set.assumes_fps else {}
    try:
        if is_packed(root):
            if options.get("fps") is not None:
                raise DataError(f"{root}: the pack keeps its frame rates; leave out --assume_fps")
            table = load_packed(name, root, split, data_set.splits, selection)
        else:
            if data_set.of_videos:
                if scan is None:
                    scan_option = 'build_clips(..., scan=VideoScan("videos.json", workers=4))'
                    raise DataError(f"{name} has video files, whose frames are to be counted: {scan_option}")
                options["scan"] = scan
            base = base_of(root, split)
            table = data_set.load(root, base or split, selection=selection, **options)
            table = of_list(table, root, split) if base else table
        if labels != OWN:
            table = with_consensus(table, root, labels)
    except OSError as e:
        raise DataError(f"{root}: cannot be read ({e})") from e
    except DataError as e:
        if os.path.exists(root) or not data_set.home:
            raise
        raise DataError(f"{e}. There is no {root}; {name} is from {data_set.home}, see docs/data.md") from e
    if table.left_out:
        clips = first_few(table.left_out)
        logger.warning(f"{table}: {len(table.left_out)} of {table.listed} clips are left out: {clips}")
    return table
