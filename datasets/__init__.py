"""Data sets by name: `build_clips(name, root, split)` reads annotations and returns a ClipTable, nothing heavier."""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets.clips import Clip, ClipTable, DataError, Selection, read_bad_clips
from datasets.dada import load_dada
from datasets.dota import load_dota, video_of
from datasets.packed import is_packed, load_packed
from datasets.scan import VideoScan
from datasets.video_csv import load_csv
from datasets.videos import load_bdd100k, load_kinetics, load_videos

logger = logging.getLogger("tad")


@dataclass(frozen=True)
class DataSet:
    """A data set that `build_clips` knows: load(root, split, selection=...), with scan=... where it has video files and
    fps=... where its annotations leave the frame rate open.

    splits: those to check and to pack. published: {split: (clips, frames)}. video_of: what tells from a clip's name
    which video it was cut from.

    labelled: can be fine-tuned and evaluated on. val_stride: published step between the windows evaluated during
    training, in source frames. The rest is how DAPT uses it by default: split, step between windows in source frames
    (between the frames of a clip for Kinetics), whether clips are cropped as fine-tuning sees them, whether small
    frames are enlarged.
    """

    load: Callable[..., ClipTable]
    of_videos: bool = False
    assumes_fps: bool = False
    labelled: bool = True
    val_stride: int = 1
    splits: tuple[str, ...] = ("train", "val")
    published: dict[str, tuple[int, int]] = field(default_factory=dict)
    video_of: Callable[[str], str] | None = None
    dapt_split: str = "train"
    dapt_stride: int = 1
    dapt_aligned: bool = True
    dapt_enlarge: bool = True


DATA_SETS = {
    "DoTA": DataSet(
        partial(load_dota, "DoTA"), published={"train": (3275, 334_903), "val": (1402, 142_747)}, video_of=video_of
    ),
    "DoTA_half": DataSet(partial(load_dota, "DoTA_half"), published={"val": (1402, 142_747)}, video_of=video_of),
    "DADA2K": DataSet(partial(load_dada, "DADA2K"), assumes_fps=True, val_stride=3),
    "DADA2K_half": DataSet(partial(load_dada, "DADA2K_half"), assumes_fps=True, val_stride=3),
    "CAP-DATA": DataSet(partial(load_dada, "CAP-DATA"), assumes_fps=True, dapt_enlarge=False),
    "csv": DataSet(load_csv, of_videos=True, assumes_fps=True),
    "BDD100K": DataSet(
        load_bdd100k,
        of_videos=True,
        labelled=False,
        splits=("train", "val", "test"),
        dapt_split="all",
        dapt_stride=16,
    ),
    "Kinetics": DataSet(
        load_kinetics, of_videos=True, labelled=False, splits=("train",), dapt_stride=4, dapt_aligned=False
    ),
    "videos": DataSet(load_videos, of_videos=True, labelled=False, splits=("all",), dapt_split="all", dapt_stride=16),
}


def find_data_set(name: str) -> DataSet:
    """A data set by name. Raises DataError with the list of known ones."""
    if name not in DATA_SETS:
        raise DataError(f"unknown data set {name!r}; known: {', '.join(sorted(DATA_SETS))}")
    return DATA_SETS[name]


def find_data_sets(names: Sequence[str], assume_fps: float | None) -> list[DataSet]:
    """The data sets of a run. Raises DataError for an unknown name, and where assume_fps is given to sets that know."""
    data_sets = [find_data_set(name) for name in names]
    if assume_fps is not None and not any(data_set.assumes_fps for data_set in data_sets):
        open_ = ", ".join(name for name, data_set in DATA_SETS.items() if data_set.assumes_fps)
        raise DataError(f"the frame rate of {' and '.join(names)} is known; --assume_fps is for {open_}")
    return data_sets


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
    "read_bad_clips",
]
