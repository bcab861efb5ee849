"""Whatever a person wants scored -> clips: videos, folders, lists, and zips or folders of pictures.

A video file             is a clip, whatever its suffix
A zip                    of numbered pictures is a clip (see numbered.py); missing pictures are gaps
A folder                 is searched for all of these, and is a clip itself where it holds numbered pictures
A text file              lists any of these, one path per line, absolute or relative to the file's folder
A pack                   gives its clips, if it holds every frame

Each clip is called by its path below the argument that led to it, "day1/0004.mp4", which is good for a folder of its
outputs: relative, within it, in UTF-8 and of no clip else.
"""

import logging
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from datasets.clips import Clip, ClipTable, DataError, Selection, Unreadable, data_errors
from datasets.formats.numbered import Numbered, SteppedClip, find_numbered
from datasets.formats.packed import INDEX, MANIFEST, read_manifest, refuse_outdated
from datasets.formats.text import read_lines
from datasets.formats.videos import is_video, walk
from datasets.parallel import in_processes
from datasets.readers import OTHER_PICTURE_SUFFIXES, PICTURE_SUFFIXES, UNREADABLE, is_hidden
from datasets.scan import VideoScan, log_notes
from datasets.video import VIDEO_SUFFIXES
from utils.text import first_few, one_line

logger = logging.getLogger("tad")

OUTPUT_MARK = "predict_args.json"  # in a folder of predictions, whose videos are none to score
RESERVED = (OUTPUT_MARK, "summary.csv", "report.html", "videos.json", "log.txt", ".lock")  # files beside the outputs
_KINDS = "a video, a zip or folder of pictures, a folder of them, or a text file that lists them"
_PICTURES = PICTURE_SUFFIXES + OTHER_PICTURE_SUFFIXES
_LONGEST_PART, _LONGEST = 255, 1024  # bytes of a name, between slashes and in all, that file systems take for sure


@dataclass(frozen=True)
class _Found:
    """Something to score.

    path: absolute. depth: how many of its last parts are its name.
    kind: "video", "zip", "folder" or "packed".
    problem: why it is none.
    clip: of a pack.
    """

    path: str
    depth: int
    kind: str
    problem: str = ""
    clip: Clip | None = None


def load_inputs(paths: Sequence[str], scan: VideoScan, fps: float) -> ClipTable:
    """Return unlabelled clips of what paths name, in their order, those of a folder sorted.

    Args:
        paths: of videos, zips and folders of pictures, folders of these, lists, packs.
        scan: counts the frames of videos.
        fps: frames per second of pictures, which do not know it.

    What cannot be read is named in the log and left to ClipTable.unreadable. Raises DataError where a path leads to
    nothing, and where nothing can be read.
    """
    if not 0 < fps < 1000:
        raise DataError(f"{fps:g} is not a frame rate of pictures, above 0 and below 1000 (--assume_fps)")
    found = _once([item for path in paths for item in _below(path)])
    names = _names(found)
    infos = _scanned(found, names, scan)
    numbered = _numbered([item.path for item in found if item.kind in ("zip", "folder") and not item.problem], scan)
    if pictures := sum(isinstance(sequence, Numbered) for sequence in numbered.values()):
        logger.info(f"{pictures} zips and folders of pictures do not know their rate: {fps:g} per second is assumed")
    by_name = dict(zip(names, found, strict=True))

    def clip(name: str) -> Clip:
        item = by_name[name]
        if item.problem:
            raise Unreadable(f"{item.path}: {item.problem}")
        if item.clip:
            return replace(item.clip, name=name, labels=None)
        if item.kind == "video":
            info = infos[item.path]
            if info.problem:
                raise Unreadable(f"{item.path}: {info.problem}")
            return Clip(name=name, source=item.path, num_frames=info.frames, fps=info.fps)
        return _of_pictures(name, item.path, numbered[item.path], fps)

    return Selection().table("videos", "all", by_name, clip)


# ----------------------------------------------------------------------------------------------------------------------
# What paths lead to


def _below(path: str) -> list[_Found]:
    """Return what an argument leads to. Raises DataError where that is nothing."""
    absolute = os.path.abspath(path)
    with data_errors(path):
        if os.path.isdir(path):
            found = _searched(absolute)
            if not found:
                suffixes = " ".join(VIDEO_SUFFIXES)
                raise DataError(f"{path}: no video and no numbered pictures in it or below; videos end in {suffixes}")
            return found
        if not os.path.isfile(path):
            if os.path.exists(path) or "://" in path:
                raise DataError(f"{path}: neither a file nor a folder; --stream takes a camera, a pipe or a URL")
            raise DataError(f"{path}: no such file or folder; expected is {_KINDS}")
        if absolute.lower().endswith((*VIDEO_SUFFIXES, ".zip", *_PICTURES)) or is_video(Path(path)):
            return [_of_file(absolute, depth=1)]
    return _listed(path)


def _of_file(path: str, depth: int) -> _Found:
    """Return what a file is, by its name alone; a video where that does not tell."""
    name = path.lower()
    if name.endswith(".zip"):
        return _Found(path, depth, "zip")
    if name.endswith(_PICTURES):
        return _Found(path, depth, "video", "a single picture; a clip is a folder or zip of them")
    if not os.path.isfile(path):  # opened, a pipe would wait
        nowhere = "a link to a file that is not there, or that may not be read"
        return _Found(path, depth, "video", "neither a file nor a folder" if os.path.exists(path) else nowhere)
    if os.path.exists(f"{path}.zip"):  # which a reader would take for its pack
        return _Found(path, depth, "video", f"{os.path.basename(path)}.zip is there too; move one of them away")
    return _Found(path, depth, "video")


def _listed(path: str) -> list[_Found]:
    """Return what the lines of a text file name. Raises DataError where it is no list."""
    lines = read_lines(Path(path))
    folder, found = os.path.dirname(os.path.abspath(path)), []
    for line in lines:
        target = os.path.normpath(os.path.join(folder, line))
        if os.path.isdir(target):
            nothing = _Found(target, 1, "folder", "no video and no numbered pictures in it or below")
            found += _searched(target) or [nothing]
        elif os.path.isfile(target):
            found.append(_of_file(target, 1))  # the decoder says what it is not
        else:
            found.append(_Found(target, 1, "video", "no such file or folder"))
    if not any(os.path.exists(item.path) for item in found):
        what = f"none of its lines names a file, the first is {one_line(lines[0][:80])!r}" if lines else "empty"
        raise DataError(f"{path}: a text file, {what}; expected is {_KINDS}")
    inside = os.path.join(folder, "")
    return [
        replace(item, depth=len(Path(item.path).parts) - len(Path(folder).parts))
        if item.path.startswith(inside)
        else item
        for item in found
    ]


def _packed(root: str, above: int) -> list[_Found]:
    """Return the clips of a pack. above: parts of its path that are in no name. Raises DataError: outdated, damaged."""
    entries = list(read_manifest(Path(root)))
    refuse_outdated(root, entries)
    found = []
    for entry in entries:
        clip, path = entry.to_clip(Path(root)), os.path.join(root, entry.file)
        thinned = f"a pack of 1 frame in {clip.pack_step}; score the original, {entry.original['path']}"
        problem = thinned if (clip.pack_step or 1) > 1 else ""
        found.append(_Found(path, len(Path(path).parts) - above, "packed", problem, clip))
    return found


def _searched(root: str) -> list[_Found]:
    """Return the videos, zips and folders of pictures in a folder and below, sorted; hidden ones are passed over."""
    found, outputs = [], []
    above = len(Path(root).parts)
    for where, folders, names in walk(Path(root)):
        if OUTPUT_MARK in names:
            outputs.append(where)
            folders.clear()
            continue
        if INDEX in names or MANIFEST in names:
            found += _packed(where, above)
            folders.clear()
            continue
        folders[:] = [name for name in folders if not is_hidden(name)]
        names = [name for name in names if not is_hidden(name)]
        depth = len(Path(where).parts) - above
        for name in names:
            if name.lower().endswith((*VIDEO_SUFFIXES, ".zip")):
                found.append(_of_file(os.path.join(where, name), depth + 1))
        if _holds_pictures(names):
            packed = os.path.isfile(f"{where}.zip")  # which a reader prefers, and the search finds
            problem = f"{os.path.basename(where)}.zip beside it is read in its place: name that" if packed else ""
            if not (problem and depth):
                found.append(_Found(where, max(depth, 1), "folder", problem))
    if outputs:
        logger.info(f"{len(outputs)} folders of predictions are passed over: {first_few(outputs, 3)}")
    return sorted(found, key=lambda item: item.path)


def _holds_pictures(names: Sequence[str]) -> bool:
    """Tell whether two pictures or more are numbered; those that are called as a video beside them show that."""
    stems = {os.path.splitext(name)[0] for name in names if name.lower().endswith(VIDEO_SUFFIXES)}
    pictures = (os.path.splitext(name)[0] for name in names if name.lower().endswith(_PICTURES))
    return sum(stem[-1:].isdecimal() and stem not in stems for stem in pictures) > 1


def _once(found: list[_Found]) -> list[_Found]:
    """Return each file or folder once."""
    first: dict[object, _Found] = {}
    for item in found:
        try:
            status = os.stat(item.path)
            first.setdefault((status.st_dev, status.st_ino), item)
        except OSError:
            first.setdefault(item.path, item)
    if twice := len(found) - len(first):
        logger.info(f"{twice} of {len(found)} inputs are named twice, and used once")
    return list(first.values())


# ----------------------------------------------------------------------------------------------------------------------
# Names


def _names(found: Sequence[_Found]) -> list[str]:
    """Return a name for each item: as many last parts of its path as tell it from others, fit for a folder."""
    parts = [Path(item.path).parts[1:] for item in found]
    depths = [item.depth for item in found]
    while True:
        names = [_fit("/".join(path[-depth:])) for path, depth in zip(parts, depths, strict=True)]
        same: dict[str, list[int]] = {}
        for number, name in enumerate(names):
            same.setdefault(name, []).append(number)
        longer = [n for numbers in same.values() if len(numbers) > 1 for n in numbers if depths[n] < len(parts[n])]
        if not longer:
            break
        for number in longer:
            depths[number] += 1
    taken = set()
    for number, name in enumerate(names):
        while name in taken:  # made so by `_fit`
            name += "_"
        names[number] = name
        taken.add(name)
    above = {name[:place] for name in taken for place, letter in enumerate(name) if letter == "/"}
    return [_apart(name, taken) if name in above else name for name in names]


def _apart(name: str, taken: set[str]) -> str:
    """Return another name for a folder of pictures that has clips below it, whose outputs would be among its own."""
    name = f"{name}/pictures"
    while name in taken:
        name += "_"
    return name


def _fit(name: str) -> str:
    """Return a relative path as one that can be written below any folder."""
    name = one_line(name)
    if len(name.encode()) > _LONGEST:
        folder, _, name = name.rpartition("/")
        name = f"{zlib.crc32(folder.encode()):08x}/{name}"
    first, *rest = (_fit_part(part) for part in name.split("/"))
    return "/".join([first + "_" * (first.lower() in RESERVED), *rest])


def _fit_part(part: str) -> str:
    data = part.encode()
    if len(data) <= _LONGEST_PART:
        return part
    return f"{data[: _LONGEST_PART - 9].decode(errors='ignore')}~{zlib.crc32(data):08x}"


# ----------------------------------------------------------------------------------------------------------------------
# What they hold


def _scanned(found: Sequence[_Found], names: Sequence[str], scan: VideoScan) -> dict:
    """Return {path: VideoInfo} of the videos, and log what is to be known of them."""
    videos = {
        item.path: name for item, name in zip(found, names, strict=True) if item.kind == "video" and not item.problem
    }
    infos = dict(zip(videos, scan(list(videos)), strict=True))
    log_notes("videos", {videos[path]: info for path, info in infos.items()})
    return infos


def _numbered(paths: list[str], scan: VideoScan) -> dict[str, Numbered | str]:
    """Return {path: its pictures, or why there are none} of zips and folders."""
    if not paths:
        return {}
    options = {"workers": scan.workers, "limit": scan.read_timeout, "description": "pictures"}
    return dict(in_processes(_sequence, paths, failed=lambda path, error: str(error), **options))


def _sequence(path: str) -> Numbered | str:
    try:
        return find_numbered(path, step=None)
    except UNREADABLE as e:
        return str(e)


def _of_pictures(name: str, path: str, sequence: Numbered | str, fps: float) -> Clip:
    if isinstance(sequence, str):
        raise Unreadable(f"{path}: {sequence}")
    make = Clip if sequence.step == 1 else partial(SteppedClip, number_step=sequence.step)
    return make(
        name=name,
        source=path.removesuffix(".zip"),
        num_frames=sequence.count,
        fps=fps,
        frame_name=sequence.name,
        first_frame=sequence.first,
    )
