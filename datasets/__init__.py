"""Data sets by name: `build_clips(name, root, split)` reads annotations and returns a ClipTable, nothing heavier."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from datasets.clips import Clip, ClipTable, DataError
from datasets.dada import load_dada
from datasets.dota import load_dota
from datasets.scan import VideoScan
from datasets.videos import load_bdd100k, load_kinetics, load_videos


@dataclass(frozen=True)
class DataSet:
    """A data set that `build_clips` knows: load(root, split), or load(root, split, scan) for video files.

    The rest is how DAPT uses it by default: split, step between windows in source frames (between the frames of a clip
    for Kinetics), whether clips are cropped as fine-tuning sees them, whether small frames are enlarged.
    """

    load: Callable[..., ClipTable]
    of_videos: bool = False
    dapt_split: str = "train"
    dapt_stride: int = 1
    dapt_aligned: bool = True
    dapt_enlarge: bool = True


DATA_SETS = {
    "DoTA": DataSet(partial(load_dota, "DoTA")),
    "DoTA_half": DataSet(partial(load_dota, "DoTA_half")),
    "DADA2K": DataSet(partial(load_dada, "DADA2K")),
    "DADA2K_half": DataSet(partial(load_dada, "DADA2K_half")),
    "CAP-DATA": DataSet(partial(load_dada, "CAP-DATA"), dapt_enlarge=False),
    "BDD100K": DataSet(load_bdd100k, of_videos=True, dapt_split="all", dapt_stride=16),
    "Kinetics": DataSet(load_kinetics, of_videos=True, dapt_stride=4, dapt_aligned=False),
    "videos": DataSet(load_videos, of_videos=True, dapt_split="all", dapt_stride=16),
}


def find_data_set(name: str) -> DataSet:
    """A data set by name. Raises DataError with the list of known ones."""
    if name not in DATA_SETS:
        raise DataError(f"unknown data set {name!r}; known: {', '.join(sorted(DATA_SETS))}")
    return DATA_SETS[name]


def build_clips(name: str, root: str, split: str, scan: VideoScan | None = None) -> ClipTable:
    """The clips of a split of a data set on disk. scan: counts the frames of data sets of video files.

    Raises DataError: unknown name (with the list of known ones) or split, missing or malformed annotation, video files
    without a scan.
    """
    data_set = find_data_set(name)
    if not data_set.of_videos:
        return data_set.load(root, split)
    if scan is None:
        raise DataError(f"{name} has no labels to fine-tune on; it is for run_dapt.py")
    return data_set.load(root, split, scan)


__all__ = ["Clip", "ClipTable", "DATA_SETS", "DataError", "VideoScan", "build_clips", "find_data_set"]
