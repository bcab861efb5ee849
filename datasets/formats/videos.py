"""Unlabelled video files -> clips: BDD100K, Kinetics, and any folder of videos.

BDD100K    ROOT/{train,val,test}/*.mov              ROOT is .../bdd100k/videos (bdd-data.berkeley.edu)
Kinetics   ROOT/annotations/<split>.csv             label,youtube_id,time_start,time_end,split
           ROOT/<split>/<label>/<youtube_id>_<start>_<end>.mp4, both in six digits
videos     ROOT/**/*                                 every file with a video's suffix

For BDD100K and videos, a text file may stand in place of ROOT: one path per line, of a file with any suffix, absolute
or relative to the text file's folder; for videos, a video file may, too.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets.clips import Clip, ClipTable, DataError, Selection, Unreadable, data_errors
from datasets.formats.text import first_repeated, read_csv, read_lines
from datasets.scan import VideoScan, log_notes
from datasets.video import VIDEO_SUFFIXES
from utils.text import first_few, one_line

logger = logging.getLogger("tad")

BDD100K_FOLDERS = {"train": ("train",), "val": ("val",), "test": ("test",), "all": ("train", "val", "test")}
KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")


def load_videos(root: str, split: str, scan: VideoScan, selection: Selection) -> ClipTable:
    """Return every video below a folder, sorted, or in a list file; there are no splits but "all". Raises DataError."""
    if split != "all":
        raise DataError(f"a folder of videos has no split {split!r}; it has all")
    path = Path(root)
    folder, videos = (path.parent, [path.name]) if is_video(path) else _listed(root, search=[""], keep=[])
    return _table("videos", split, folder, videos, scan, selection)


def is_video(path: Path) -> bool:
    """Tell whether a path is that of a video, and not of a folder or a list: by its suffix or its first bytes."""
    if not path.is_file():
        return False
    with data_errors(path), path.open("rb") as f:
        return path.name.lower().endswith(VIDEO_SUFFIXES) or b"\0" in f.read(1024)


def load_bdd100k(root: str, split: str, scan: VideoScan, selection: Selection) -> ClipTable:
    """Return a split of BDD100K: train, val, test or all of them; a list file replaces the search, not the split.

    Raises DataError: unknown split, none of its folders, no video.
    """
    if split not in BDD100K_FOLDERS:
        raise DataError(f"BDD100K has no split {split!r}; it has {', '.join(BDD100K_FOLDERS)}")
    folders = BDD100K_FOLDERS[split]
    folder, videos = _listed(root, search=folders, keep=[] if split == "all" else folders)
    return _table("BDD100K", split, folder, videos, scan, selection)


def _listed(root: str, *, search: Sequence[str], keep: Sequence[str]) -> tuple[Path, list[str]]:
    """Return (folder, paths relative to it) of the videos below root's folders `search`, or of those in a list file.

    keep: first folders of the lines of a list file that are kept; if empty, all are.
    """
    path, every = Path(root), "; split all has every video there is (--split all)" if keep else ""
    if path.is_file():
        lines = [os.path.normpath(line) for line in read_lines(path)]
        videos = [line for line in lines if not keep or line.split("/")[0] in keep]
        if not videos:
            raise DataError(f"{path}: no line names a video below {' or '.join(keep) or 'any folder'}{every}")
        if repeated := first_repeated(videos):
            raise DataError(f"{path}: video {repeated} is listed twice")
        if len(videos) < len(lines):
            logger.warning(f"{path}: {len(lines) - len(videos)} of {len(lines)} lines are not of this split")
        return path.parent, videos
    if not path.is_dir():
        raise DataError(f"{path}: no such folder or list file; a folder of videos, a video or a text file is expected")
    videos = [video for folder in search for video in _find(path, folder)]
    if not videos:
        suffixes = " ".join(VIDEO_SUFFIXES)
        raise DataError(f"{path}: no video below {' or '.join(search) or 'it'}; known suffixes: {suffixes}{every}")
    return path, videos


def _find(root: Path, folder: str) -> list[str]:
    """Return the paths relative to root of the videos below root/folder, sorted."""
    if not (root / folder).is_dir():
        return []
    found = []
    for where, _, names in walk(root / folder):
        below = os.path.relpath(where, root)
        videos = [name for name in names if name.lower().endswith(VIDEO_SUFFIXES)]
        found += videos if below == "." else [f"{below}/{name}" for name in videos]
    return sorted(found)


def walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield (folder, its folders, its files) as os.walk does, through links, each folder once.

    Folders that cannot be read are named in the log.
    """
    visited: set[tuple[int, int]] = set()
    closed: list[OSError] = []
    for where, folders, names in os.walk(root, followlinks=True, onerror=closed.append):
        status = os.stat(where)
        if (status.st_dev, status.st_ino) in visited:  # a link back up
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        yield where, folders, names
    if closed:
        reasons = first_few((f"{error.filename} ({error.strerror})" for error in closed), 3)
        logger.warning(f"{root}: {len(closed)} folders cannot be read and are left out: {reasons}")


def load_kinetics(root: str, split: str, scan: VideoScan, selection: Selection) -> ClipTable:
    """Return the videos of ROOT/annotations/<split>.csv; training draws a random clip of each per epoch, as published.

    Raises DataError: annotation missing or malformed.
    """
    path = Path(root, "annotations", f"{split}.csv")
    if not path.is_file():
        raise DataError(f"{path}: Kinetics annotation not found; it comes with the data set")
    rows = read_csv(path)
    header = next(rows, (0, []))[1]
    if absent := [c for c in KINETICS_COLUMNS if c not in header]:
        raise DataError(f"{path}: no column {', '.join(absent)}; expected {', '.join(KINETICS_COLUMNS)}")
    videos = []
    for line, cells in rows:
        if len(cells) < len(header):
            raise DataError(f"{path}: line {line} has {len(cells)} cells, the header {len(header)}")
        try:
            label, video, start, end = (cells[header.index(c)] for c in KINETICS_COLUMNS)
            videos.append(f"{split}/{label}/{video}_{int(start):06d}_{int(end):06d}.mp4")
        except ValueError as e:
            raise DataError(f"{path}: line {line}: {e}") from e
    return _table("Kinetics", split, Path(root), videos, scan, selection, one_clip_per_video=True)


def _table(
    name: str, split: str, root: Path, videos: list[str], scan: VideoScan, selection: Selection, **options
) -> ClipTable:
    """Return the readable ones among videos, paths relative to root, as unlabelled clips named by those paths.

    The others are counted and named in the log. options: of ClipTable. Raises DataError where none is readable.
    """
    folder = os.path.abspath(root)
    sources = {one_line(video): os.path.join(folder, video) for video in videos}
    other_names = {one_line(video) for video in videos if one_line(video) != video}
    left_out = other_names.union(selection.leave_out)
    to_scan = [source for video, source in sources.items() if video not in left_out]
    found = dict(zip(to_scan, scan(to_scan), strict=True))
    log_notes(f"{name} {split}", {os.path.relpath(path, folder): info for path, info in found.items()})

    def clip(video: str) -> Clip:
        if video in other_names:
            reason = "its name is not in UTF-8, or has a line break or another control character in it"
            raise Unreadable(f"{video}: {reason}, so no list can hold it: rename the file")
        info = found[sources[video]]
        if info.problem:
            raise Unreadable(info.problem)
        return Clip(name=video, source=sources[video], num_frames=info.frames, fps=info.fps)

    return selection.table(name, split, sources, clip, **options)
