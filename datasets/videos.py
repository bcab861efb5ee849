"""Unlabelled video files -> clips: BDD100K, Kinetics, and any folder of videos.

BDD100K    ROOT/{train,val,test}/*.mov              ROOT is .../bdd100k/videos (bdd-data.berkeley.edu)
Kinetics   ROOT/annotations/<split>.csv             label,youtube_id,time_start,time_end,split
           ROOT/<split>/<label>/<youtube_id>_<start>_<end>.mp4, both in six digits
videos     ROOT/**/*                                 every file with a video's suffix

For BDD100K and videos, a text file may stand in place of ROOT: one path per line, relative to the file's folder.
"""

import csv
import os
from pathlib import Path

from datasets.clips import ClipTable, DataError
from datasets.scan import VideoScan, video_table

SUFFIXES = frozenset((".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts"))
BDD100K_FOLDERS = {"train": ("train",), "val": ("val",), "test": ("test",), "all": ("train", "val", "test")}
KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")


def load_videos(root: str, split: str, scan: VideoScan) -> ClipTable:
    """Every video below a folder or in a list file, sorted; there are no splits but "all"."""
    if split != "all":
        raise DataError(f"a folder of videos has no split {split!r}; it has all")
    folder, videos = _listed(root, [""])
    return video_table("videos", split, folder, videos, scan)


def load_bdd100k(root: str, split: str, scan: VideoScan) -> ClipTable:
    """Videos of a split of BDD100K: train, val, test or all of them; a list file replaces the search, not the split.

    Raises DataError: unknown split, none of its folders, no video.
    """
    if split not in BDD100K_FOLDERS:
        raise DataError(f"BDD100K has no split {split!r}; it has {', '.join(BDD100K_FOLDERS)}")
    folder, videos = _listed(root, BDD100K_FOLDERS[split])
    return video_table("BDD100K", split, folder, videos, scan)


def _listed(root: str, folders: list[str] | tuple[str, ...]) -> tuple[Path, list[str]]:
    """(folder, paths relative to it) of the videos below root's `folders`, or of those a list file names."""
    path = Path(root)
    if path.is_file():
        lines = [line.strip() for line in path.read_text().splitlines()]
        videos = [line for line in lines if line and (folders[0] == "" or line.split("/")[0] in folders)]
        if not videos:
            raise DataError(f"{path}: no line names a video of {', '.join(folders) or 'any folder'}")
        return path.parent, videos
    if not path.is_dir():
        raise DataError(f"{path}: no such folder or list file; a folder of videos is expected")
    videos = [video for folder in folders for video in _find(path, folder)]
    if not videos:
        raise DataError(
            f"{path}: no video below {', '.join(folders) or 'it'}; known suffixes: {' '.join(sorted(SUFFIXES))}"
        )
    return path, videos


def _find(root: Path, folder: str) -> list[str]:
    """Paths relative to root of the videos below root/folder, sorted."""
    found = []
    for where, _, names in os.walk(root / folder, followlinks=True):
        below = os.path.relpath(where, root)
        videos = [name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]
        found += videos if below == "." else [f"{below}/{name}" for name in videos]
    return sorted(found)


def load_kinetics(root: str, split: str, scan: VideoScan) -> ClipTable:
    """Videos of ROOT/annotations/<split>.csv; of each, training draws one random clip per epoch, as published.

    Raises DataError: annotation missing or without the columns.
    """
    path = Path(root, "annotations", f"{split}.csv")
    if not path.is_file():
        raise DataError(f"{path}: Kinetics annotation not found; it comes with the data set")
    with path.open(newline="") as f:
        rows = csv.DictReader(f)
        if absent := [c for c in KINETICS_COLUMNS if c not in (rows.fieldnames or ())]:
            raise DataError(f"{path}: no column {', '.join(absent)}; expected {', '.join(KINETICS_COLUMNS)}")
        try:
            videos = [
                f"{split}/{row['label']}/{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}.mp4"
                for row in rows
            ]
        except ValueError as e:
            raise DataError(f"{path}: line {rows.line_num}: {e}") from e
    return video_table("Kinetics", split, Path(root), videos, scan, one_clip_per_video=True)
