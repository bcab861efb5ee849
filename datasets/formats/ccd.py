"""CCD, the Car Crash Dataset (github.com/Cogito2012/CarCrashDataset): 50 labels a clip -> clips.

ROOT/videos/Crash-1500/000001.mp4 ... 001500.mp4     ROOT/videos/Normal/000001.mp4 ... 003000.mp4
ROOT/videos/Crash-1500.txt              lines "000001,[0, 0, ..., 1],000285,1,Day,Normal,Yes": name, a label for each
                                        frame, first frame in the source video, its number, day or night, weather, ego
ROOT/vgg16_features/{train,test}.txt    lines "positive/000001.npz 1"; they are the splits train and val

Where: the Google Drive of the repository; on a bad day it serves a quota page of 2 kB in place of a zip. All clips are
split all, which needs no lists.

What is known to be wrong: crashes are from YouTube, normal clips from BDD100K, so the codec, bit rate and size of a
file tell them apart; a crash is in seconds 3.0 to 4.9 of 5, so its place alone is a strong baseline; most labels stay 1
to the end of the clip; normal clips have no attributes; CAP-DATA contains the crashes. Clips of one source video share
the number `recording`.
"""

import logging
import re
from pathlib import Path

import numpy as np

from datasets.clips import Clip, ClipTable, DataError, Selection
from datasets.formats.shipped import Videos, refuse_split, require_constant, require_folder
from datasets.formats.text import first_repeated, read_lines, read_split
from datasets.scan import VideoScan

logger = logging.getLogger("tad")

LISTS = {"train": "train.txt", "val": "test.txt"}
FOLDERS = {"positive": "Crash-1500", "negative": "Normal"}
_LINE = re.compile(r"(\d+),\[([01](?:, ?[01])*)\],(\d+),([^,]+),([^,]+),([^,]+),([^,]+)")


def load_ccd(root: str, split: str, scan: VideoScan, selection: Selection) -> ClipTable:
    """Return the clips of a split: train, val or all. They are called "Crash-1500/000001" and "Normal/000001".

    Raises DataError: unknown split, a file missing or malformed, another number of labels than frames.
    """
    refuse_split("CCD", split, (*LISTS, "all"))
    folder = require_folder(root, "CCD", "videos")
    rows = _read_lines(folder / "Crash-1500.txt")
    if split == "all":
        names = [f"{FOLDERS['positive']}/{name}" for name in rows]
        names += [f"{FOLDERS['negative']}/{path.stem}" for path in sorted(folder.glob("Normal/*.mp4"))]
        if len(names) == len(rows):
            logger.warning(f"{folder / FOLDERS['negative']}: no .mp4 in it, so all clips are of crashes")
    else:
        names = _read_list(Path(root, "vgg16_features", LISTS[split]))
    sources = {name: folder / f"{name}.mp4" for name in names}
    videos = Videos(f"CCD {split}", sources, scan, leave_out=selection.leave_out, elsewhere=_known(folder, rows))

    def clip(name: str) -> Clip:
        kind, number = name.split("/")
        if kind == FOLDERS["negative"]:
            info = videos.require(name)
            labels = np.zeros(info.frames, dtype=np.uint8)
            return Clip(name, videos.sources[name], info.frames, info.fps, labels=labels, positive=False)
        if number not in rows:
            raise DataError(f"{folder / 'Crash-1500.txt'}: no line of clip {number}, which a list names")
        return _crash(folder / "Crash-1500.txt", name, rows[number], videos)

    return selection.table("CCD", split, names, clip)


def _known(folder: Path, rows: dict[str, re.Match]) -> list[Path]:
    """Return the files that CCD knows: the crashes in its annotation, and every normal clip, which needs no line."""
    crashes = [folder / FOLDERS["positive"] / f"{name}.mp4" for name in rows]
    return [*crashes, *folder.glob(f"{FOLDERS['negative']}/*.mp4")]


def _read_lines(path: Path) -> dict[str, re.Match]:
    if not path.is_file():
        raise DataError(f"{path}: not found; it is beside the videos in the Google Drive of CCD's repository")
    rows: dict[str, re.Match] = {}
    for number, line in enumerate(read_lines(path), start=1):
        match = _LINE.fullmatch(line)
        if not match:
            expected = "000001,[0, ..., 1],000285,1,Day,Normal,Yes"
            raise DataError(
                f"{path}: line {number} is not of the form {expected}; take the file from the archive again"
            )
        if match[1] in rows:
            raise DataError(f"{path}: line {number}: clip {match[1]} is listed twice")
        rows[match[1]] = match
    if not rows:
        raise DataError(f"{path}: no lines")
    return rows


def _read_list(path: Path) -> list[str]:
    names = []
    for line in read_split(path, "CCD's features (vgg16_features/); split all needs no list"):
        match = re.fullmatch(r"(positive|negative)/(\d+)\.npz ([01])", line)
        if not match or (match[1] == "positive") != (match[3] == "1"):
            raise DataError(f"{path}: {line!r} is not as 'positive/000001.npz 1' or 'negative/000001.npz 0'")
        names.append(f"{FOLDERS[match[1]]}/{match[2]}")
    if repeated := first_repeated(names):
        raise DataError(f"{path}: clip {repeated} is listed twice")
    return names


def _crash(path: Path, name: str, row: re.Match, videos: Videos) -> Clip:
    info, where = videos.require(name), f"{path}: clip {row[1]}"
    require_constant(videos.sources[name], info)
    labels = np.array([int(label) for label in row[2].split(",")], dtype=np.uint8)
    if len(labels) != info.frames:
        raise DataError(f"{where}: {len(labels)} labels, but {videos.sources[name]} has {info.frames} frames")
    if not labels.any():
        raise DataError(f"{where}: no label is 1, in a clip of a crash; take the file from the archive again")
    timing, ego = row[5].strip().lower(), row[7].strip().lower()
    if timing not in ("day", "night") or ego not in ("yes", "no"):
        raise DataError(f"{where}: {row[5]!r} is not Day or Night, or {row[7]!r} not Yes or No")
    return Clip(
        name=name,
        source=videos.sources[name],
        num_frames=info.frames,
        fps=info.fps,
        labels=labels,
        ego=ego == "yes",
        night=timing == "night",
        recording=f"YouTube {row[4].strip()}",
        positive=True,
        event_time=float(labels.argmax() / info.fps),
        groups={"weather": row[6].strip()},
    )
