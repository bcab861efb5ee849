"""A user's own data, as data set "csv": videos, folders or zips of pictures, with a row for each anomaly or frame.

ROOT/train.csv, ROOT/val.csv, ROOT/<split>.csv; or one csv file in place of ROOT, which is split "all" alone.

path            video file, folder of pictures or zip of pictures; absolute, or relative to the csv's folder
clip            name of the clip (default: its path); a clip with several anomalies has several rows
fps             frames per second of the source; videos know it themselves
step            of the numbers of pictures where every step-th was kept (default: 1)
start_frame     first and last anomalous frame, counted from 0, both included; empty: none
end_frame
category, ego, night        of the clip, optional; ego and night: 1 or 0

Or a row for each frame: frame (from 0, each frame of a clip once) and label (1 anomalous, 0 safe) in place of
start_frame and end_frame. Without either pair clips are unlabelled, for DAPT.

Pictures are one numbered sequence, as in img_0001.png, img_0002.png; the first is frame 0, whatever its number. A gap
is refused; where every third picture of a recording at 30 fps was kept (img_0001.png, img_0004.png, ...), step 3 says
that none is missing: fps is then 10, and frames 0, 1, ... are the pictures there are. Hidden files do not count.
"""

import logging
import math
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np

from datasets.clips import BeyondEnd, Clip, ClipTable, DataError, Selection, Unreadable
from datasets.formats.numbered import SteppedClip, find_numbered
from datasets.formats.text import read_csv, whole_number
from datasets.readers import OTHER_PICTURE_SUFFIXES, PICTURE_SUFFIXES, UNREADABLE
from datasets.scan import VideoScan, log_notes
from datasets.video import VIDEO_SUFFIXES, VideoInfo
from utils.text import first_few

logger = logging.getLogger("tad")

INTERVAL, PER_FRAME = ("start_frame", "end_frame"), ("frame", "label")
OF_CLIP = ("path", "fps", "step", "category", "ego", "night")
_YES_NO = {"1": True, "0": False, "true": True, "false": False, "yes": True, "no": False}


@dataclass
class _Entry:
    """What the rows of a clip say."""

    row: int  # number of the first of them
    values: dict[str, str]  # {column of OF_CLIP: cell}
    intervals: list[tuple[int, int, int]] = field(default_factory=list)  # first frame, last frame, row
    labels: dict[int, int] = field(default_factory=dict)  # {frame: label}


@dataclass(frozen=True)
class _Frames:
    """What the source of a clip holds."""

    count: int = 0
    fps: float = 0.0  # 0 for pictures, which do not know it
    name: str = "{:06d}.jpg"  # format of the names of pictures
    first: int = 0  # number of the first picture
    step: int = 1  # from one picture's number to the next one's
    problem: str = ""  # why all that is unknown


def load_csv(root: str, split: str, scan: VideoScan, selection: Selection, fps: float | None = None) -> ClipTable:
    """Return the clips of ROOT/<split>.csv, or, split "all", of a csv file; fps: of pictures whose row has none.

    Clips whose frames cannot be counted are named in the log and left to ClipTable.unreadable. Raises DataError naming
    row and column: a missing column, a value that is none, rows that contradict each other, labels beyond the clip.
    """
    path = Path(root) if Path(root).is_file() else Path(root, f"{split}.csv")
    if path == Path(root) and split != "all":
        raise DataError(f"{path} is one file, without splits: give the folder of {split}.csv, or take split all of it")
    if not path.is_file():
        raise DataError(
            f"{path}: not found; the data set csv has a table for each split, see datasets/formats/video_csv.py"
        )
    columns, entries = _read(path)
    frames = _count_frames(path, {k: v for k, v in entries.items() if k not in selection.leave_out}, scan)

    def clip(name: str) -> Clip:
        if frames[name].problem:
            raise Unreadable(f"{entries[name].values['path']}: {frames[name].problem}")
        return _clip(path, columns, name, entries[name], frames[name], fps)

    return selection.table("csv", split, entries, clip)


def _fail(path: Path, row: int, column: str, problem: str, error: type[DataError] = DataError) -> NoReturn:
    raise error(f"{path}: row {row}, column {column}: {problem}")


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def _read(path: Path) -> tuple[set[str], dict[str, _Entry]]:
    """Return the known columns there are, and what the rows say: {clip: entry}."""
    rows = read_csv(path)
    header = [cell.lower() for cell in next(rows, (0, []))[1]]
    columns = _check_header(path, header)
    entries: dict[str, _Entry] = {}
    for number, cells in rows:
        if len(cells) > len(header):
            raise DataError(f"{path}: row {number} has {len(cells)} cells, the header {len(header)}")
        _add_row(path, entries, dict(zip(header, cells, strict=False)), number)
    if not entries:
        raise DataError(f"{path}: no rows")
    return columns, entries


def _check_header(path: Path, header: list[str]) -> set[str]:
    known = {"clip", *OF_CLIP, *INTERVAL, *PER_FRAME}
    columns = known & set(header)
    if "path" not in columns:
        raise DataError(f"{path}: row 1 has no column path; it names the columns: path, clip, fps, start_frame, ...")
    if twice := [c for c in columns if header.count(c) > 1]:
        raise DataError(f"{path}: row 1 has the column {twice[0]} twice")
    for pair in (INTERVAL, PER_FRAME):
        if len(columns & set(pair)) == 1:
            raise DataError(f"{path}: row 1 has one of the columns {' and '.join(pair)}; both are needed")
    if columns >= {*INTERVAL, *PER_FRAME}:
        raise DataError(f"{path}: row 1 has {' and '.join(INTERVAL)} and {' and '.join(PER_FRAME)}; use one pair")
    if unknown := [c for c in header if c and c not in known]:
        logger.warning(f"{path}: columns that are not used: {first_few(unknown)}")
    return columns


def _add_row(path: Path, entries: dict[str, _Entry], row: dict[str, str], number: int) -> None:
    def whole(column: str) -> int:
        try:
            value = whole_number(row.get(column, ""))
        except ValueError:
            value = -1
        if value < 0:
            _fail(path, number, column, f"{row.get(column, '')!r} is not a whole number, 0 or above")
        return value

    name = row.get("clip") or row.get("path") or _fail(path, number, "path", "empty")
    values = {column: row[column] for column in OF_CLIP if row.get(column)}
    entry = entries.setdefault(name, _Entry(number, values))
    for column, value in values.items():
        if entry.values.setdefault(column, value) != value:
            other = entry.values[column]
            _fail(path, number, column, f"{value!r} for clip {name}, {other!r} in row {entry.row} or after")
    if row.get("step") and whole("step") == 0:
        _fail(path, number, "step", "0 is below 1")
    if row.get("start_frame") or row.get("end_frame"):
        start, end = whole("start_frame"), whole("end_frame")
        if end < start:
            _fail(path, number, "end_frame", f"{end} is before start_frame {start}; both are part of the anomaly")
        entry.intervals.append((start, end, number))
    if "frame" in row:
        frame, label = whole("frame"), whole("label")
        if label > 1:
            _fail(path, number, "label", f"{label} is neither 0 nor 1")
        if frame in entry.labels:
            _fail(path, number, "frame", f"frame {frame} of clip {name} has a label already")
        entry.labels[frame] = label


# ----------------------------------------------------------------------------------------------------------------------
# Sources


def _absolute(path: Path, entry: _Entry) -> str:
    return os.path.normpath(os.path.join(path.parent.absolute(), entry.values["path"]))


def _count_frames(path: Path, entries: dict[str, _Entry], scan: VideoScan) -> dict[str, _Frames]:
    """Return {clip: its frames}; videos go through the scan."""
    sources: dict[str, str] = {}  # {source of a Clip: its name}
    for name, entry in entries.items():
        if "path" not in entry.values:
            _fail(path, entry.row, "path", f"empty, in every row of clip {name}")
        absolute = _absolute(path, entry)
        source = absolute.removesuffix(".zip")
        if source == absolute and os.path.isfile(f"{source}.zip"):  # which would be read in its place
            _fail(path, entry.row, "path", f"{entry.values['path']}.zip is there too; name that, or move it away")
        if other := sources.get(source):
            _fail(path, entry.row, "path", f"{entry.values['path']!r} belongs to clip {other} already")
        sources[source] = name
    videos = [source for source, name in sources.items() if _is_video(_absolute(path, entries[name]))]
    found = dict(zip((sources[video] for video in videos), scan(videos), strict=True))
    log_notes(str(path), found)
    frames = {
        name: _Frames(info.frames, info.fps, problem=_why(entries[name].values["path"], info))
        for name, info in found.items()
    }
    pictures = [name for name in entries if name not in frames]
    return frames | {name: _of_pictures(path, entries[name]) for name in pictures}


def _why(name: str, info: VideoInfo) -> str:
    """Say why a video cannot be used; one that is not called so may have been meant as something else."""
    other = info.problem and not name.lower().endswith(VIDEO_SUFFIXES)
    return info.problem + "; no zip by its suffix, .zip, and no folder either" * bool(other)


def _is_video(path: str) -> bool:
    """Tell whether a source is left to the video decoder: any file but a zip or a picture, and what is called so."""
    no_video = path.lower().endswith((".zip", *PICTURE_SUFFIXES, *OTHER_PICTURE_SUFFIXES))
    return not no_video and not os.path.isdir(path) and (path.lower().endswith(VIDEO_SUFFIXES) or os.path.exists(path))


def _of_pictures(path: Path, entry: _Entry) -> _Frames:
    """Find the numbered pictures of a zip or folder."""
    try:
        found = find_numbered(_absolute(path, entry), whole_number(entry.values.get("step", "1")))
    except UNREADABLE as e:
        return _Frames(problem="no such file" if isinstance(e, FileNotFoundError) else str(e))
    return _Frames(found.count, name=found.name, first=found.first, step=found.step)


# ----------------------------------------------------------------------------------------------------------------------
# Clips


def _clip(path: Path, columns: set[str], name: str, entry: _Entry, frames: _Frames, assumed_fps: float | None) -> Clip:
    values = entry.values
    stated = values.get("fps") or frames.fps or assumed_fps or math.nan
    try:
        fps = float(stated)
    except ValueError:
        fps = -1.0
    if math.isnan(fps):
        _fail(path, entry.row, "fps", "empty; pictures do not know their frame rate: fill it in or give --assume_fps")
    if not 0 < fps < 1000:
        _fail(path, entry.row, "fps", f"{stated!r} is not a frame rate, above 0 and below 1000")
    flags: dict[str, bool | None] = {}
    for column in ("ego", "night"):
        flags[column] = _YES_NO.get(values.get(column, "").lower())
        if column in values and flags[column] is None:
            _fail(path, entry.row, column, f"{values[column]!r} is neither 1 nor 0")
    if frames.fps and "step" in values:
        _fail(path, entry.row, "step", "a video has no numbered pictures; leave it empty")
    make = Clip if frames.step == 1 else partial(SteppedClip, number_step=frames.step)
    return make(
        name=name,
        source=_absolute(path, entry).removesuffix(".zip"),
        num_frames=frames.count,
        fps=fps,
        frame_name=frames.name,
        first_frame=frames.first,
        labels=_labels(path, columns, name, entry, frames.count),
        category=values.get("category"),
        **flags,
    )


def _labels(path: Path, columns: set[str], name: str, entry: _Entry, count: int) -> np.ndarray | None:
    """Return (count,) uint8, or None where the csv has no labels."""
    labels = np.zeros(count, dtype=np.uint8)
    if columns.issuperset(INTERVAL):
        for start, end, row in entry.intervals:
            if end >= count:
                problem = f"{end}, but clip {name} has {count} frames, 0 to {count - 1}"
                _fail(path, row, "end_frame", problem, BeyondEnd)
            labels[start : end + 1] = 1
        return labels
    if columns.issuperset(PER_FRAME):
        if odd := entry.labels.keys() ^ set(range(count)):
            missing = min(odd) < count
            problem = "has no label" if missing else f"has a label, but there are {count} frames"
            error = DataError if missing else BeyondEnd
            _fail(path, entry.row, "frame", f"frame {min(odd)} of clip {name} {problem}", error)
        labels[list(entry.labels)] = list(entry.labels.values())
        return labels
    return None
