"""A user's own data, as data set "csv": videos, folders or zips of pictures, with a row for each anomaly or frame.

ROOT/train.csv, ROOT/val.csv, ROOT/<split>.csv; or one csv file in place of ROOT, which is split "all" alone. Commas,
semicolons or tabs separate the cells; a comma may stand for the point in seconds. Text is UTF-8, or UTF-16 as Excel's.

path            video file, folder of pictures or zip of pictures; absolute, or relative to the csv's folder. A video
                may be named without its suffix, and one called by a number without the zeros in front: 822
clip            name of the clip (default: its path); a clip with several anomalies has several rows
fps             frames per second of pictures; videos know theirs, and one stated instead is warned of
step            of the numbers of pictures where every step-th was kept (default: 1)
start_frame     first and last anomalous frame, counted from 0, both included; empty: none
end_frame
start_time      the same in seconds: what is shown from start_time on and before end_time is anomalous
end_time
event_time      the accident, and when a careful person could first tell, in seconds. Where the clip has no interval,
alert_time      frames are anomalous from the alert to the event, or without alert the last 1.5 s before the event;
                frames from the event on are ignored. An event may lie after the last frame
label           of a clip without times: 1, all of its frames are anomalous; 0, none is; empty, nobody knows. A 0 may
                stand beside an event that is in another stretch of the file
clip_start      the clip is a stretch of its file, from clip_start on and before clip_end, in seconds; empty: from the
clip_end        beginning, to the end. Two clips of one file need it
source          the recording the file was cut from (default: the file); clips of one belong into one split
category, ego, night        of the clip, optional; ego and night: 1 or 0

Other columns are groups to report by: weather, city, ... Frames and seconds count from the beginning of the file, also
where the clip is a stretch of it; frame i is shown at i / fps, the file's own rate. A clip of label 1 in a table with
columns of times, but without times of its own, has nothing but ignored frames: nobody knows which are anomalous.

Or a row for each frame: frame (from 0, each frame of a clip once) and label (1 anomalous, 0 safe, empty ignored) in
place of intervals. Without any of these columns clips are unlabelled, for DAPT.

Pictures are one numbered sequence, as in img_0001.png, img_0002.png; the first is frame 0, whatever its number. A gap
is refused; where every third picture of a recording at 30 fps was kept (img_0001.png, img_0004.png, ...), step 3 says
that none is missing: fps is then 10, and frames 0, 1, ... are the pictures there are. Hidden files do not count.
"""

import logging
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from datasets.clips import BeyondEnd, Clip, ClipTable, DataError, Selection, Unreadable
from datasets.formats.csv_rows import EVENT, INTERVAL, PER_FRAME, SPAN, STRETCH, Entry, Table, read_table
from datasets.formats.numbered import SteppedClip, find_numbered
from datasets.formats.text import whole_number
from datasets.labels import ANOMALOUS, BEFORE_EVENT, IGNORED, frame_at, labels_of_times
from datasets.readers import OTHER_PICTURE_SUFFIXES, PICTURE_SUFFIXES, UNREADABLE
from datasets.scan import VideoScan, log_notes
from datasets.video import VIDEO_SUFFIXES, VideoInfo
from utils.text import first_few

logger = logging.getLogger("tad")


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
        raise DataError(
            f"{path} is one file, without splits: give the folder of {split}.csv, or take split all of it, or make "
            f"train and val of it: python -m datasets.tools.prepare split csv {path}"
        )
    if not path.is_file():
        other = next((p for p in map(path.with_suffix, (".xlsx", ".xls", ".tsv", ".txt")) if p.is_file()), None)
        hint = f"; call {other} so, if it is the table" if other else ""
        if other and other.suffix.startswith(".xls"):
            hint = f"; python -m datasets.tools.prepare sheet {other} {path} makes it of the workbook"
        if split == "val" and not other and path.with_name("train.csv").is_file():
            hint = "; --select_split 0.1 chooses the best checkpoint on a part of train that it holds out"
        raise DataError(
            f"{path}: not found; the data set csv has a table for each split, see datasets/formats/video_csv.py{hint}"
        )
    table, rules = read_table(path), Counter()
    used = {name: entry for name, entry in table.entries.items() if name not in selection.leave_out}
    videos_of = cache(_videos_by_stem)
    sources = {name: _find_source(table, name, entry, videos_of) for name, entry in used.items()}
    _refuse_shared(table, sources)
    frames = _count_frames(table, used, sources, scan)

    def clip(name: str) -> Clip:
        if frames[name].problem:
            raise Unreadable(f"{used[name].values['path']}: {frames[name].problem}")
        made, rule = _clip(table, name, sources[name], frames[name], fps)
        rules[rule] += 1
        return made

    clips = selection.table("csv", split, table.entries, clip)
    if rules.keys() - {_AS_WRITTEN}:
        logger.info(f"{path}: labels of clips: " + ", ".join(f"{n} {rule}" for rule, n in rules.most_common()))
    if far := [c.name for c in clips if c.event_time is not None and c.labels is not None and not c.labels.any()]:
        problem = "end so long before their event that no frame is anomalous; are the times in seconds?"
        logger.warning(f"{path}: {len(far)} clips {problem} {first_few(far)}")
    _warn_of_rates(path, clips, frames)
    return clips


def _warn_of_rates(path: Path, clips: ClipTable, frames: dict[str, _Frames]) -> None:
    """Name the videos whose row states another rate than theirs, by more than the 30 that stand for 29.97."""
    own = {clip.name: frames[clip.name].fps or clip.fps for clip in clips}
    if far := [clip for clip in clips if abs(clip.fps - own[clip.name]) > 0.01 * own[clip.name]]:
        named = first_few([f"{clip.name} (fps {clip.fps:.5g}, shown at {own[clip.name]:.5g})" for clip in far])
        logger.warning(
            f"{path}: column fps contradicts {len(far)} videos, and windows are laid out by it: {named}; empty cells "
            "take the videos' own rates"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Sources


def _find_source(table: Table, name: str, entry: Entry, videos_of: Callable[[str], dict[str, set[str]]]) -> str:
    """Return the absolute path of a clip's source, which the table may name as a bare id."""
    if "path" not in entry.values:
        table.fail(entry.row, "path", f"empty, in every row of clip {name}")
    written = os.path.normpath(os.path.join(table.path.parent.absolute(), entry.values["path"]))
    if os.path.exists(written) or os.path.exists(f"{written}.zip"):
        return written
    if "\\" in written and os.path.exists(of_windows := written.replace("\\", "/")):
        return of_windows
    folder, last = os.path.split(written)
    stem, suffix = os.path.splitext(last)
    stem, suffix = (stem, suffix.lower()) if suffix.lower() in (*VIDEO_SUFFIXES, ".0") else (last, "")
    found = videos_of(folder).get(stem, ()) or videos_of(folder).get(stem.lstrip("0") or "0", ())
    found = [file for file in found if suffix in ("", ".0") or file.lower().endswith(suffix)]
    if len(found) > 1:
        table.fail(entry.row, "path", f"{entry.values['path']!r} may be {' or '.join(sorted(found)[:3])}: name one")
    return os.path.join(folder, found[0]) if found else written


def _videos_by_stem(folder: str) -> dict[str, set[str]]:
    """Return {name without suffix, and of a number without zeros in front: videos} of a folder."""
    found: dict[str, set[str]] = {}
    for file in os.listdir(folder) if os.path.isdir(folder) else ():
        stem, suffix = os.path.splitext(file)
        if suffix.lower() in VIDEO_SUFFIXES:
            for key in {stem, (stem.lstrip("0") or "0") if stem.isdecimal() else stem}:
                found.setdefault(key, set()).add(file)
    return found


def _refuse_shared(table: Table, sources: dict[str, str]) -> None:
    """Raise DataError where two clips are of one source, and not each a stretch of it."""
    owners: dict[str, str] = {}
    for name, absolute in sources.items():
        entry, source = table.entries[name], absolute.removesuffix(".zip")
        if source == absolute and os.path.isfile(f"{source}.zip"):  # which would be read in its place
            table.fail(entry.row, "path", f"{entry.values['path']}.zip is there too; name that, or move it away")
        other = owners.setdefault(source, name)
        if other != name and not all(table.entries[clip].values.keys() & set(STRETCH) for clip in (name, other)):
            problem = f"{entry.values['path']!r} belongs to clip {other} already"
            table.fail(entry.row, "path", f"{problem}; clip_start and clip_end make a stretch of it of each")


def _count_frames(
    table: Table, entries: dict[str, Entry], sources: dict[str, str], scan: VideoScan
) -> dict[str, _Frames]:
    """Return {clip: its frames}; videos go through the scan."""
    videos = list(dict.fromkeys(source for source in sources.values() if _is_video(source)))
    found = dict(zip(videos, scan(videos), strict=True))
    of_clips = {name: found[source] for name, source in sources.items() if source in found}
    log_notes(str(table.path), of_clips)
    frames = {
        name: _Frames(info.frames, info.fps, problem=_why(entries[name].values["path"], info))
        for name, info in of_clips.items()
    }
    pictures = [name for name in entries if name not in frames]
    return frames | {name: _of_pictures(sources[name], entries[name]) for name in pictures}


def _why(name: str, info: VideoInfo) -> str:
    """Say why a video cannot be used; one that is not called so may have been meant as something else."""
    other = info.problem and not name.lower().endswith(VIDEO_SUFFIXES)
    return info.problem + "; no zip by its suffix, .zip, and no folder either" * bool(other)


def _is_video(path: str) -> bool:
    """Tell whether a source is left to the video decoder: any file but a zip or a picture, and what is called so."""
    no_video = path.lower().endswith((".zip", *PICTURE_SUFFIXES, *OTHER_PICTURE_SUFFIXES))
    return not no_video and not os.path.isdir(path) and (path.lower().endswith(VIDEO_SUFFIXES) or os.path.exists(path))


def _of_pictures(source: str, entry: Entry) -> _Frames:
    """Find the numbered pictures of a zip or folder."""
    try:
        found = find_numbered(source, whole_number(entry.values.get("step", "1")))
    except UNREADABLE as e:
        return _Frames(problem="no such file" if isinstance(e, FileNotFoundError) else str(e))
    return _Frames(found.count, name=found.name, first=found.first, step=found.step)


# ----------------------------------------------------------------------------------------------------------------------
# Clips

_AS_WRITTEN = "as the table has them"


def _clip(table: Table, name: str, source: str, frames: _Frames, assumed_fps: float | None) -> tuple[Clip, str]:
    """Return the clip, and by which rule it is labelled."""
    entry = table.entries[name]
    values = entry.values
    stated = values.get("fps") or frames.fps or assumed_fps or math.nan
    try:
        fps = float(stated)
    except ValueError:
        fps = -1.0
    if math.isnan(fps):
        problem = "empty; pictures do not know their frame rate: fill it in or give --assume_fps"
        table.fail(entry.row, "fps", problem)
    if not 0 < fps < 1000:
        table.fail(entry.row, "fps", f"{stated!r} is not a frame rate, above 0 and below 1000")
    if frames.fps and "step" in values:
        table.fail(entry.row, "step", "a video has no numbered pictures; leave it empty")
    clock = frames.fps or fps  # of the file's seconds
    first, end = _stretch(table, name, entry, frames.count, clock)
    event, alert = (table.time(entry, column) for column in EVENT)
    labels, rule = _labels(table, name, frames.count, clock, (first, end))
    positive = table.flag(entry, "label")
    if event is not None and (event < first / clock or positive is False):
        event = alert = None  # it is not of this stretch of the file
    make = Clip if frames.step == 1 else partial(SteppedClip, number_step=frames.step)
    clip = make(
        name=name,
        source=source.removesuffix(".zip"),
        num_frames=end - first,
        fps=fps,
        frame_name=frames.name,
        first_frame=frames.first,
        labels=None if labels is None else labels[first:end],
        category=values.get("category"),
        ego=table.flag(entry, "ego"),
        night=table.flag(entry, "night"),
        offset=first if values.keys() & set(STRETCH) else None,
        recording=values.get("source") or (values["path"] if values.keys() & set(STRETCH) else None),
        positive=positive,
        event_time=None if event is None else event - first / clock,
        alert_time=None if alert is None else alert - first / clock,
        groups=entry.groups,
    )
    return clip, rule


def _stretch(table: Table, name: str, entry: Entry, count: int, clock: float) -> tuple[int, int]:
    """Return the first frame of the clip in its file, and one past its last."""
    start, end = (table.time(entry, column) for column in STRETCH)
    first, past = 0 if start is None else frame_at(start, clock), count if end is None else frame_at(end, clock)
    length = f"clip {name} is of a file of {count / clock:.6g} s"
    if past > count:
        table.fail(entry.row, "clip_end", f"{end:g} s, but {length}; empty means its end", BeyondEnd)
    if first >= past:
        limit = f"clip_end is {end:g} s" if end is not None else length
        table.fail(entry.row, "clip_start", f"{start or 0:g} s leaves nothing of the clip; {limit}")
    return first, past


def _labels(
    table: Table, name: str, count: int, clock: float, stretch: tuple[int, int]
) -> tuple[np.ndarray | None, str]:
    """Return (count,) uint8 labels of the file's frames, or None where there are none, and the rule."""
    entry, label = table.entries[name], table.flag(table.entries[name], "label")
    event, alert = (table.time(entry, column) for column in EVENT)
    if alert is not None and (event is None or alert > event):
        other = "event_time is empty" if event is None else f"event_time is {event:g} s"
        table.fail(entry.row, "alert_time", f"{alert:g} s, but {other}; the alert comes first")
    if "frame" in table.columns:
        return _frame_labels(table, name, entry, count, stretch), _AS_WRITTEN
    if label is False and (entry.intervals or entry.spans or event is not None):
        return _labels_beside(table, name, count, clock, stretch), _AS_WRITTEN
    if entry.intervals or entry.spans:
        return _interval_labels(table, name, entry, count, clock), _AS_WRITTEN
    if event is not None:
        labels = labels_of_times(count, clock, event=event, alert=alert)
        return labels, _event_rule(labels[slice(*stretch)], alert)
    has_times = table.columns & {*INTERVAL, *SPAN, *EVENT}
    if label and has_times:
        return np.full(count, IGNORED, dtype=np.uint8), "positive without a time, so that all frames are ignored"
    if label is None and ("label" in table.columns or not has_times):
        return None, _AS_WRITTEN
    return np.full(count, ANOMALOUS if label else 0, dtype=np.uint8), _AS_WRITTEN


def _event_rule(labels: np.ndarray, alert: float | None) -> str:
    """Say by which rule the labels of a clip come of its event."""
    if (labels == IGNORED).all():
        return "after their event, so that all frames are ignored"
    return "from alert to event" if alert is not None else f"from {BEFORE_EVENT:g} s before the event"


def _labels_beside(table: Table, name: str, count: int, clock: float, stretch: tuple[int, int]) -> np.ndarray:
    """Return the labels of a clip of label 0 whose rows say when something happens, which must be in another stretch of
    its file.
    """
    entry = table.entries[name]
    event, alert = (table.time(entry, column) for column in EVENT)
    labels = _interval_labels(table, name, entry, count, clock)
    if event is not None:
        labels = np.maximum(labels, labels_of_times(count, clock, event=event, alert=alert))
    if labels[slice(*stretch)].any() or not entry.values.keys() & set(STRETCH):
        problem = f"0, but the rows of clip {name} say when something happens"
        table.fail(entry.row, "label", f"{problem}; a stretch of the file is clip_start to clip_end")
    return np.zeros(count, dtype=np.uint8)


def _interval_labels(table: Table, name: str, entry: Entry, count: int, clock: float) -> np.ndarray:
    labels = labels_of_times(count, clock, intervals=[span[:2] for span in entry.spans])
    for _, end, row in entry.spans:
        if frame_at(end, clock) > count:
            problem = f"{end:g} s, but clip {name} is of a file of {count / clock:.6g} s"
            table.fail(row, "end_time", problem, BeyondEnd)
    for start, end, row in entry.intervals:
        if end >= count:
            problem = f"{end}, but clip {name} has {count} frames, 0 to {count - 1}"
            table.fail(row, "end_frame", problem, BeyondEnd)
        labels[start : end + 1] = ANOMALOUS
    return labels


def _frame_labels(table: Table, name: str, entry: Entry, count: int, stretch: tuple[int, int]) -> np.ndarray:
    if odd := entry.labels.keys() ^ set(range(*stretch)):
        missing = stretch[0] <= min(odd) < stretch[1]
        held = (
            f"there are {count} frames"
            if stretch == (0, count)
            else f"the clip is frames {stretch[0]} to {stretch[1] - 1}"
        )
        problem = "has no label; frames count from 0" if missing else f"has a label, but {held}"
        error = DataError if missing else BeyondEnd
        table.fail(entry.row, PER_FRAME[0], f"frame {min(odd)} of clip {name} {problem}", error)
    labels = np.zeros(count, dtype=np.uint8)
    labels[list(entry.labels)] = list(entry.labels.values())
    return labels
