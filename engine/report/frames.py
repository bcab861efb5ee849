"""predictions.csv as a report reads it: scores and labels of frames in arrays, what is known of clips beside them."""

import csv
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from engine.anticipation import ScoredClip
from engine.baselines import LabelTable
from utils.damage import parse_json

FRAME_COLUMNS = {"clip", "filename", "frame", "time", "logits_safe", "logits_risk", "score", "label", "ttc"}
CLIP_COLUMNS = ("source", "is_positive", "event_time", "alert_time")  # what the report knows of them; others are groups
FAR = -100.0  # ttc of a frame that is far from any anomaly
_MOST = 10**13  # number of a frame, and seconds; pictures may be called by the milliseconds since 1970
_ROWS = 500  # that are read at a time: more fall out of the processor's cache
_OF_DOTA = re.compile(r".+_\d{6}")  # <YouTube video>_<number>: the video is what a clip was cut from


class ScoresError(RuntimeError):
    """A file of scores that cannot be read; the message says where and what to do."""


@dataclass(frozen=True)
class ScoredFrames:
    """The scored frames of some clips, sorted by clip and frame.

    path: of the file.
    names: of the clips, in the order of the file.
    clip: (n,) number of the clip. frame: (n,) number in the clip. score: (n,) float32. label: (n,) 0 or 1.
    time: (n,) float64 seconds in the clip, NaN where they cannot be known.
    ttc: (n,) float64 seconds as in predictions.csv; NaN where the file has none.
    columns: {name: a value for each clip}, what the file has beside FRAME_COLUMNS.
    unlabelled: rows without a label, which are left out.
    notes: what a reader of the figures should know of the file.
    """

    path: str
    names: list[str]
    clip: np.ndarray
    frame: np.ndarray
    score: np.ndarray
    label: np.ndarray
    time: np.ndarray
    ttc: np.ndarray
    columns: dict[str, list[str]] = field(default_factory=dict)
    unlabelled: int = 0
    notes: tuple[str, ...] = ()

    @cached_property
    def table(self) -> LabelTable:
        """The labels, for the baselines."""
        return LabelTable(self.clip, self.frame, self.label)

    @cached_property
    def bounds(self) -> np.ndarray:
        """(number of clips + 1,) first row of each clip."""
        return np.searchsorted(self.clip, np.arange(len(self.names) + 1))

    @cached_property
    def sources(self) -> tuple[np.ndarray | None, str]:
        """(number of the recording of each clip, where that is from); None where recordings are not known."""
        if any(self.columns.get("source", ())):
            values, how = self.columns["source"], "the column source"
            values = [value or name for value, name in zip(values, self.names, strict=True)]
        elif all(_OF_DOTA.fullmatch(name) for name in self.names):
            values, how = [name.rpartition("_")[0] for name in self.names], "the clips' names, as in DoTA"
        else:
            return None, "no column source, or nothing in it: clips of one recording count as independent"
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(value, len(numbers)) for value in values]), how

    def where(self, rows: np.ndarray) -> "ScoredFrames":
        """Return the frames of a mask (n,); clips without any are gone."""
        kept, clip = np.unique(self.clip[rows], return_inverse=True)
        arrays = {name: getattr(self, name)[rows] for name in ("frame", "score", "label", "time", "ttc")}
        columns = {name: [values[i] for i in kept] for name, values in self.columns.items()}
        return replace(self, names=[self.names[i] for i in kept], clip=clip, columns=columns, **arrays)

    def scored_clips(self) -> list[ScoredClip]:
        """Return the clips for anticipation metrics, those whose times, and the time between frames, are known.

        A clip holds an event as is_positive says, else where it has an event_time or a ttc or a frame is anomalous. Its
        time E is the event_time; else that of the first anomalous frame, or of the first frame before it minus its ttc;
        in a clip that begins in its anomaly, or after it, that of the first scored frame: it is missed. E is unknown
        where the file says no more than is_positive. A column time_to_accident, as Nexar's test clips have, says how
        long before its event a clip was cut.
        """
        clips = []
        stated, known = self.stated("is_positive"), self.stated("event_time")
        cut = [_seconds(cell) for cell in self.columns.get("time_to_accident", [""] * len(self.names))]
        for number, name in enumerate(self.names):
            rows = slice(self.bounds[number], self.bounds[number + 1])
            time, label, ttc = self.time[rows], self.label[rows], self.ttc[rows]
            if not len(time) or np.isnan(time).any():
                continue
            step = float(np.median(np.diff(time))) if len(time) > 1 else self.frame_seconds
            if np.isnan(step):  # nobody knows how long a frame stands for
                continue
            event, traced = known[number], bool(label.any() or not np.isnan(ttc).all())
            positive = traced or event is not None if stated[number] is None else bool(stated[number])
            if event is None and positive and traced:
                event = _event(time, label, ttc)
            edges = np.diff(np.r_[0, label, 0])
            runs = zip(time[np.flatnonzero(edges == 1)], time[np.flatnonzero(edges == -1) - 1] + step, strict=True)
            intervals = tuple((float(start), float(end)) for start, end in runs)
            event = event if positive else None
            clips.append(ScoredClip(name, time, self.score[rows], step, positive, event, intervals, cut[number]))
        return clips

    def stated(self, column: str) -> list[float | None]:
        """Return what is_positive, event_time or alert_time says of each clip; None where it says nothing."""
        return [float(value) if value else None for value in self.columns.get(column, [""] * len(self.names))]

    @cached_property
    def frame_seconds(self) -> float:
        """Median time between scored frames of a clip; NaN where times are not known."""
        steps = np.diff(self.time)[np.diff(self.clip) == 0]
        return float(np.median(steps)) if len(steps) else float("nan")


def _event(time: np.ndarray, label: np.ndarray, ttc: np.ndarray) -> float:
    inside = np.flatnonzero(label)
    first = inside[0] if len(inside) else len(label)
    ahead = np.flatnonzero((ttc[:first] > FAR) & (ttc[:first] < 0))
    if len(ahead):
        return float(time[ahead[0]] - ttc[ahead[0]])
    return float(time[first % len(label)])


def read_frames(path: str | Path, *, scores: bool = True) -> ScoredFrames:
    """Read predictions.csv, or a table like it.

    It needs the columns clip, label, frame (or filename, whose digits are the frame), and score (or logits_safe and
    logits_risk). time, ttc and CLIP_COLUMNS are used where they are there; what they and further columns say of a clip
    is that of its first row. Rows without a label are left out. Separators are commas, semicolons or tabs.

    scores: False = labels are enough; scores are 0 then.

    Raises ScoresError, which names the file, the line and the remedy.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as f:
            first = f.readline()
            separator = max(",;\t", key=first.count)
            header = [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]
            _check_header(path, header, scores)
            parts = _Parts(header, scores)
            for line, rows in _chunks(csv.reader(f, delimiter=separator)):
                try:
                    parts.add(rows)
                except (ValueError, KeyError, IndexError):
                    raise ScoresError(_why(path, line, rows, header, scores)) from None
    except (OSError, csv.Error) as e:
        raise ScoresError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})") from e
    frames = parts.whole(path)
    return replace(frames, notes=(*frames.notes, *_changed(path)))


def _changed(path: Path) -> tuple[str, ...]:
    """Note that scores are others than the evaluation in their folder wrote, by the sum in its eval_args.json."""
    try:
        written = parse_json((path.parent / "eval_args.json").read_bytes())["scores"]["crc32"]
    except (OSError, ValueError, KeyError, TypeError):  # of another code, or of before there was a sum
        return ()
    if path.name != "predictions.csv" or zlib.crc32(path.read_bytes()) == written:
        return ()
    return (f"{path} is not as the evaluation wrote it: it was changed or is damaged, copy it again or score anew",)


def _check_header(path: Path, header: Sequence[str], scores: bool) -> None:
    has = set(header)
    missing = [name for name in ("clip", "label") if name not in has]
    missing += [] if has & {"frame", "filename"} else ["frame"]
    missing += ["score"] if scores and not ("score" in has or {"logits_safe", "logits_risk"} <= has) else []
    if missing:
        remedy = "give the predictions.csv that run_finetune.py --eval writes"
        raise ScoresError(f"{path}: the first line has no column {' or '.join(missing)}: {remedy}")


def _chunks(reader: Iterator[list[str]]) -> Iterator[tuple[int, list[list[str]]]]:
    """Yield (line of the first row, rows), without empty rows."""
    while rows := list(islice(reader, _ROWS)):
        line = reader.line_num - len(rows) + 2  # of the file, whose first line is the header
        if rows := [row for row in rows if row]:
            yield line, rows


class _Parts:
    """Arrays of rows, as they come."""

    def __init__(self, header: Sequence[str], scores: bool):
        self.header, self.scores = header, scores
        self.at = {name: i for i, name in enumerate(header)}
        self.free = [name for name in self.at if name not in FRAME_COLUMNS and name]
        self.numbers: dict[str, int] = {}
        self.columns: dict[str, list[str]] = {name: [] for name in self.free}
        self.arrays: list[tuple[np.ndarray, ...]] = []
        self.unlabelled = 0

    def add(self, rows: Sequence[Sequence[str]]) -> None:
        """Raises ValueError, KeyError or IndexError where a row is wrong."""
        column = dict(zip(self.header, zip(*rows, strict=True), strict=True))
        numbers, known = self.numbers, len(self.numbers)
        clip = np.array([numbers.setdefault(name, len(numbers)) for name in column["clip"]], np.int64)
        new, first = np.unique(clip, return_index=True)
        for name in self.free:
            cells = [column[name][i].strip() for i in first[new >= known]]
            _check_of_clips(name, cells)
            self.columns[name] += cells
        label = np.array([_LABELS[text] for text in column["label"]], np.int8)
        score = _scores(column) if self.scores else np.zeros(len(clip), np.float32)
        if not ((score >= 0) & (score <= 1)).all():
            raise ValueError("a score that is not in [0, 1]")
        time, ttc = (_optional(column.get(name), len(clip)) for name in ("time", "ttc"))
        if (np.abs(time) > _MOST).any():
            raise ValueError(f"a time of more than {_MOST} seconds")
        kept = label >= 0
        self.unlabelled += int((~kept).sum())
        self.arrays.append(tuple(a[kept] for a in (clip, _frames(column), score, label, time, ttc)))

    def whole(self, path: Path) -> ScoredFrames:
        """Return all of them, sorted. Raises ScoresError: there are none, a frame twice, a time before the last."""
        if not sum(len(part[0]) for part in self.arrays):
            raise ScoresError(f"{path}: no labelled row: figures need labels")
        clip, frame, score, label, time, ttc = (np.concatenate(part) for part in zip(*self.arrays, strict=True))
        self.arrays.clear()
        names = list(self.numbers)
        key = clip * (int(frame.max()) + 1) + frame
        if (np.diff(key) <= 0).any():
            order = np.argsort(key, kind="stable")
            clip, frame, score, label, time, ttc, key = (a[order] for a in (clip, frame, score, label, time, ttc, key))
            if len(twice := np.flatnonzero(np.diff(key) == 0)):
                row = twice[0]
                raise ScoresError(f"{path}: frame {frame[row]} of clip {names[clip[row]]} is there twice: keep one row")
        if len(back := np.flatnonzero((np.diff(time) < 0) & (np.diff(clip) == 0))):
            where = f"from frame {frame[back[0]]} to {frame[back[0] + 1]} of clip {names[clip[back[0]]]}"
            raise ScoresError(f"{path}: the column time goes back {where}: correct it, or leave the column out")
        notes: tuple[str, ...] = ()
        if np.isnan(time).any():
            time, notes = _times(clip, frame, ttc)
        frames = ScoredFrames(str(path), names, clip, frame, score, label, time, ttc, self.columns, self.unlabelled)
        frames = frames if len(np.unique(clip)) == len(names) else frames.where(np.ones(len(clip), bool))
        return replace(frames, notes=notes)


_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "": -1}


def _check_of_clips(column: str, cells: Sequence[str]) -> None:
    """Raise ValueError where a cell is none that `ScoredFrames.stated` can read."""
    if column == "is_positive" and (odd := next((c for c in cells if c not in _LABELS), None)):
        raise ValueError(f"is_positive {odd!r}, which is not 0, 1 or empty")
    if column in ("event_time", "alert_time"):
        for cell in filter(None, cells):
            if not np.isfinite(float(cell)):
                raise ValueError(f"{column} {cell!r}, which is no time in seconds")


def _seconds(cell: str) -> float | None:
    """Return a number of seconds; None of anything else, since a user's group may have any name."""
    try:
        return float(cell) if np.isfinite(float(cell)) else None
    except ValueError:
        return None


def _floats(texts: Sequence[str]) -> np.ndarray:
    return np.fromiter(map(float, texts), np.float64, len(texts))


def _optional(texts: Sequence[str] | None, n: int) -> np.ndarray:
    if texts is None:
        return np.full(n, np.nan)
    return np.fromiter((float(text) if text else np.nan for text in texts), np.float64, n)


def _scores(column: Mapping[str, Sequence[str]]) -> np.ndarray:
    if "score" in column:
        return _floats(column["score"]).astype(np.float32)
    margin = _floats(column["logits_safe"]) - _floats(column["logits_risk"])
    return (1 / (1 + np.exp(np.clip(margin, -700, 700)))).astype(np.float32)


def _frames(column: Mapping[str, Sequence[str]]) -> np.ndarray:
    if "frame" not in column:
        column = {"frame": [re.findall(r"\d+", name)[-1] for name in column["filename"]]}
    frame = list(map(int, column["frame"]))
    if min(frame) < 0:
        raise ValueError("a frame below 0")
    if max(frame) > _MOST:
        raise ValueError(f"a frame beyond {_MOST}")
    return np.array(frame, np.int64)


def _why(path: Path, line: int, rows: Sequence[Sequence[str]], header: Sequence[str], scores: bool) -> str:
    """Return what is wrong with the first row that is wrong."""
    parts = _Parts(header, scores)
    for number, row in enumerate(rows, line):
        try:
            parts.add([row])
        except (ValueError, KeyError, IndexError) as e:
            if len(row) != len(header):
                return f"{path}, line {number}: {len(row)} cells for {len(header)} columns: write the file again"
            reason = f"label {e}, which is not 0, 1 or empty" if isinstance(e, KeyError) else str(e)
            return f"{path}, line {number}: {reason}: correct the row"
    raise AssertionError("every row is right")


def _times(clip: np.ndarray, frame: np.ndarray, ttc: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return seconds (n,) by the steps of ttc before an anomaly, for a file without the column time, and a note."""
    counts_down = (ttc > FAR) & (ttc < 0)
    pairs = np.flatnonzero(counts_down[1:] & counts_down[:-1] & (np.diff(clip) == 0) & (np.diff(ttc) > 0))
    if not len(pairs):
        return np.full(len(clip), np.nan), ("no column time, and no ttc to infer it from: seconds are not known",)
    rate = np.diff(ttc)[pairs] / np.diff(frame)[pairs]
    seconds = np.full(int(clip.max()) + 1, np.median(rate))
    order = np.argsort(clip[pairs], kind="stable")
    own, first = np.unique(clip[pairs][order], return_index=True)
    for number, values in zip(own, np.split(rate[order], first[1:]), strict=True):
        seconds[number] = np.median(values)
    note = "no column time: seconds are those of the steps of ttc; a clip without any has the median rate of the others"
    return frame * seconds[clip], (note,)
