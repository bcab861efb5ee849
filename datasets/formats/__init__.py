"""Data sets by name. Each module here reads one kind of annotation files into a ClipTable, and does nothing else.

To add a data set, write load_x(root, split, selection) in a module here, add a line to DATA_SETS, and its name to
utils/names.py. dota.py is an example: it makes a Clip of each name in a split file, and `selection.table` the table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from datasets.clips import ClipTable, DataError
from datasets.formats.a3d import load_a3d
from datasets.formats.ccd import load_ccd
from datasets.formats.dad import load_dad
from datasets.formats.dada import load_dada
from datasets.formats.dota import load_dota
from datasets.formats.nexar import load_nexar
from datasets.formats.video_csv import load_csv
from datasets.formats.videos import load_bdd100k, load_kinetics, load_videos
from utils.text import closest


@dataclass(frozen=True)
class DataSet:
    """A data set that `build_clips` knows.

    load: load(root, split, selection=...) reads a split; it takes scan=... and fps=... too, as the next two say.
    of_videos: it has video files, whose frames `scan` counts.
    assumes_fps: its annotations leave the frame rate open, which is `fps`.
    labelled: it can be fine-tuned and evaluated on.
    val_stride: published step between the windows evaluated during training, in source frames.
    splits: those to check and to pack, unless others are named.
    published: {split: (clips, frames)}, frames None where nobody has said.
    dapt_split: split that DAPT uses by default.
    dapt_stride: its step between windows in source frames, for Kinetics between the frames of a clip.
    dapt_aligned: whether it crops clips as fine-tuning sees them.
    dapt_enlarge: whether it enlarges small frames.
    home: where to get it; "" for one's own.
    """

    load: Callable[..., ClipTable]
    of_videos: bool = False
    assumes_fps: bool = False
    labelled: bool = True
    val_stride: int = 1
    splits: tuple[str, ...] = ("train", "val")
    published: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    dapt_split: str = "train"
    dapt_stride: int = 1
    dapt_aligned: bool = True
    dapt_enlarge: bool = True
    home: str = ""


_VIDEOS = partial(DataSet, of_videos=True, labelled=False)
_DOTA = {"train": (3275, 334_903), "val": (1402, 142_747)}
_DOTA_HOME, _MM_AU_HOME = (
    "github.com/MoonBlvd/Detection-of-Traffic-Anomaly",
    "huggingface.co/datasets/JeffreyChou/MM-AU",
)
_DADA = {"assumes_fps": True, "home": _MM_AU_HOME}
DATA_SETS = {
    "DoTA": DataSet(partial(load_dota, "DoTA"), published=_DOTA, home=_DOTA_HOME),
    "DoTA_half": DataSet(partial(load_dota, "DoTA_half"), published={"val": _DOTA["val"]}, home=_DOTA_HOME),
    "DADA2K": DataSet(partial(load_dada, "DADA2K"), val_stride=3, **_DADA),
    "DADA2K_half": DataSet(partial(load_dada, "DADA2K_half"), val_stride=3, **_DADA),
    "CAP-DATA": DataSet(partial(load_dada, "CAP-DATA"), dapt_enlarge=False, **_DADA),
    "Nexar": DataSet(
        load_nexar,
        of_videos=True,
        published={"train": (1500, None), "val": (667, None)},
        home="huggingface.co/datasets/nexar-ai/nexar_collision_prediction",
    ),
    "CCD": DataSet(load_ccd, of_videos=True, home="github.com/Cogito2012/CarCrashDataset"),
    "DAD": DataSet(
        load_dad,
        of_videos=True,
        published={"train": (1284, 128_400), "val": (466, 46_600)},
        home="aliensunmin.github.io/project/dashcam",
    ),
    "A3D": DataSet(
        load_a3d, splits=("all",), published={"all": (1500, 128_175)}, home="github.com/MoonBlvd/tad-IROS2019"
    ),
    "csv": DataSet(load_csv, of_videos=True, assumes_fps=True),
    "BDD100K": _VIDEOS(
        load_bdd100k,
        splits=("train", "val", "test"),
        dapt_split="all",
        dapt_stride=16,
        home="bdd-data.berkeley.edu",
    ),
    "Kinetics": _VIDEOS(
        load_kinetics,
        splits=("train",),
        dapt_stride=4,
        dapt_aligned=False,
        home="github.com/cvdfoundation/kinetics-dataset",
    ),
    "videos": _VIDEOS(load_videos, splits=("all",), dapt_split="all", dapt_stride=16),
}


def find_data_set(name: str) -> DataSet:
    """Return a data set by name. Raises DataError with the list of known ones."""
    if name not in DATA_SETS:
        raise DataError(f"unknown data set {name!r}; known: {', '.join(sorted(DATA_SETS))}{closest(name, DATA_SETS)}")
    return DATA_SETS[name]


def find_data_sets(names: Sequence[str], assume_fps: float | None) -> list[DataSet]:
    """Return the data sets of a run. Raises DataError for an unknown name, and for a rate where all are known."""
    data_sets = [find_data_set(name) for name in names]
    if assume_fps is not None and not any(data_set.assumes_fps for data_set in data_sets):
        without_rate = ", ".join(name for name, data_set in DATA_SETS.items() if data_set.assumes_fps)
        raise DataError(f"the frame rate of {' and '.join(names)} is known; --assume_fps is for {without_rate}")
    return data_sets
