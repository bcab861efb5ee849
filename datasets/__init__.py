"""Data sets by name: `build_clips(name, root, split)` reads annotations and returns a ClipTable, nothing heavier."""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial

from datasets.clips import Clip, ClipTable, DataError, Selection, read_bad_clips
from datasets.dada import load_dada
from datasets.dota import load_dota, video_of
from datasets.packed import is_packed, load_packed
from datasets.scan import VideoScan
from datasets.videos import load_bdd100k, load_kinetics, load_videos

logger = logging.getLogger("tad")


@dataclass(frozen=True)
class DataSet:
    """A data set that `build_clips` knows: load(root, split, selection), or (root, split, scan, selection) of videos.

    splits: those to check and to pack. published: {split: (clips, frames)}. video_of: what tells from a clip's name
    which video it was cut from.

    The rest is how DAPT uses it by default: split, step between windows in source frames (between the frames of a clip
    for Kinetics), whether clips are cropped as fine-tuning sees them, whether small frames are enlarged.
    """

    load: Callable[..., ClipTable]
    of_videos: bool = False
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
    "DADA2K": DataSet(partial(load_dada, "DADA2K")),
    "DADA2K_half": DataSet(partial(load_dada, "DADA2K_half")),
    "CAP-DATA": DataSet(partial(load_dada, "CAP-DATA"), dapt_enlarge=False),
    "BDD100K": DataSet(load_bdd100k, of_videos=True, splits=("train", "val", "test"), dapt_split="all", dapt_stride=16),
    "Kinetics": DataSet(load_kinetics, of_videos=True, splits=("train",), dapt_stride=4, dapt_aligned=False),
    "videos": DataSet(load_videos, of_videos=True, splits=("all",), dapt_split="all", dapt_stride=16),
}


def find_data_set(name: str) -> DataSet:
    """A data set by name. Raises DataError with the list of known ones."""
    if name not in DATA_SETS:
        raise DataError(f"unknown data set {name!r}; known: {', '.join(sorted(DATA_SETS))}")
    return DATA_SETS[name]


def build_clips(
    name: str,
    root: str,
    split: str,
    scan: VideoScan | None = None,
    *,
    leave_out: Collection[str] = frozenset(),
    problems: dict[str, str] | None = None,
) -> ClipTable:
    """The clips of a split of a data set on disk, or of a pack of it.

    Args:
        scan: counts the frames of data sets of video files. leave_out: names of clips not to use, logged.
        problems: collects {clip: message} of what is raised for a single clip where it is None.

    Raises DataError: unknown name (with the list of known ones) or split, missing or malformed annotation, video files
    without a scan.
    """
    data_set, selection = find_data_set(name), Selection(leave_out, problems)
    if data_set.of_videos and scan is None:
        raise DataError(f"{name} has no labels to fine-tune on; it is for run_dapt.py")
    if is_packed(root):
        table = load_packed(name, root, split, selection)
    elif data_set.of_videos:
        table = data_set.load(root, split, scan, selection)
    else:
        table = data_set.load(root, split, selection)
    if table.left_out:
        shown = ", ".join(table.left_out[:5]) + ", ..." * (len(table.left_out) > 5)
        logger.warning(f"{name} {split}: {len(table.left_out)} of {table.listed} clips are left out: {shown}")
    return table


__all__ = ["Clip", "ClipTable", "DATA_SETS", "DataError", "VideoScan", "build_clips", "find_data_set", "read_bad_clips"]
