"""The rows of a user's own table (see video_csv.py): what they say of each clip, as far as the table alone tells."""

import logging
import math
import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from datasets.clips import DataError
from datasets.formats.text import decimal, filled, read_csv, whole_number
from datasets.labels import IGNORED
from utils.text import first_few, one_line

logger = logging.getLogger("tad")

INTERVAL, SPAN, STRETCH = ("start_frame", "end_frame"), ("start_time", "end_time"), ("clip_start", "clip_end")
EVENT, PER_FRAME = ("event_time", "alert_time"), ("frame", "label")
OF_CLIP = ("path", "fps", "step", "category", "ego", "night", "source", "label", *EVENT, *STRETCH)
KNOWN = {"clip", "frame", *OF_CLIP, *INTERVAL, *SPAN}
_TWO_CLIPS = "; two clips of one file have a name each, in column clip, and clip_start or clip_end"
YES_NO = {"1": True, "0": False, "1.0": True, "0.0": False, "true": True, "false": False, "yes": True, "no": False}
LONGEST = 1e6  # seconds: eleven days; a time beyond is no time


@dataclass
class Entry:
    """What the rows of a clip say.

    row: number of the first of them.
    values: {column of OF_CLIP: cell}.
    intervals: (first frame, last frame, row) that are anomalous.
    spans: (from, until, row) that are anomalous, in seconds, the end not included.
    labels: {frame: label}.
    groups: {other column: cell}.
    """

    row: int
    values: dict[str, str] = field(default_factory=dict)
    intervals: list[tuple[int, int, int]] = field(default_factory=list)
    spans: list[tuple[float, float, int]] = field(default_factory=list)
    labels: dict[int, int] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table as it is read.

    columns: those of KNOWN that there are.
    entries: {name of a clip: what its rows say}, in the order of the table.
    """

    path: Path
    columns: set[str]
    entries: dict[str, Entry]

    def fail(self, row: int, column: str, problem: str, error: type[DataError] = DataError) -> NoReturn:
        """Raise an error that names the place."""
        raise error(f"{self.path}: row {row}, column {column}: {problem}")

    def seconds(self, row: int, column: str, text: str) -> float:
        """Return a time in seconds; where a comma stands for the point, too."""
        try:
            value = decimal(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < LONGEST:
            self.fail(row, column, f"{text!r} is not a time in seconds from the file's beginning, as 17.25 is")
        return value

    def time(self, entry: Entry, column: str) -> float | None:
        """Return a time that the rows of a clip state, or None."""
        text = entry.values.get(column)
        return None if text is None else self.seconds(entry.row, column, text)

    def flag(self, entry: Entry, column: str) -> bool | None:
        """Return a 1 or 0 that the rows of a clip state, or None."""
        text = entry.values.get(column)
        if text is not None and text.lower() not in YES_NO:
            self.fail(entry.row, column, f"{text!r} is neither 1 nor 0")
        return None if text is None else YES_NO[text.lower()]


def read_table(path: Path) -> Table:
    """Return what a table says. Raises DataError naming row and column."""
    rows = read_csv(path)
    header = [_column(cell) for cell in next(rows, (0, []))[1]]
    table, mixed = Table(path, _check_header(path, header), {}), set()
    for number, cells in rows:
        if len(cells) > len(header):
            remedy = "a cell that holds the separator itself stands in quotes"
            raise DataError(f"{path}: row {number} has {len(cells)} cells, the header {len(header)}; {remedy}")
        _add_row(table, dict(zip(header, cells, strict=False)), number, mixed)
    if not table.entries:
        raise DataError(f"{path}: no rows")
    for entry in table.entries.values():
        entry.groups = {column: cell for column, cell in entry.groups.items() if column not in mixed}
    _say_groups(path, header, mixed)
    return table


def _column(cell: str) -> str:
    """Return the name of a column as it is known: "Event Time" is event_time."""
    name = re.sub(r"[\s-]+", "_", cell.lower())
    return name if name in KNOWN else cell.lower()


def _check_header(path: Path, header: list[str]) -> set[str]:
    columns = KNOWN & set(header)
    if "path" not in columns:
        there = first_few(cell for cell in header if cell) or "none"
        raise DataError(f"{path}: row 1 has no column path, which says where the video is; its columns are: {there}")
    if twice := [c for c in columns if header.count(c) > 1]:
        raise DataError(f"{path}: row 1 has the column {twice[0]} twice")
    for pair in (INTERVAL, SPAN, *([PER_FRAME] if "frame" in columns else [])):
        if len(columns & set(pair)) == 1:
            raise DataError(f"{path}: row 1 has one of the columns {' and '.join(pair)}; both are needed")
    if "alert_time" in columns and "event_time" not in columns:
        raise DataError(f"{path}: row 1 has a column alert_time and no event_time; an alert needs its event")
    for pair in (INTERVAL, SPAN):
        if columns >= {*pair, *PER_FRAME}:
            raise DataError(f"{path}: row 1 has {' and '.join(pair)} and {' and '.join(PER_FRAME)}; use one pair")
    return columns


def _say_groups(path: Path, header: list[str], mixed: set[str]) -> None:
    """Say what becomes of the columns that are not known."""
    free = [c for c in dict.fromkeys(header) if c and c not in KNOWN]
    if close := {c: near[0] for c in free[:100] if (near := get_close_matches(c, KNOWN, 1, 0.8))}:
        meant = first_few(f"{c} (is {known} meant?)" for c, known in close.items())
        logger.warning(f"{path}: columns that are taken for groups: {meant}")
    if groups := [c for c in free if c not in mixed and c not in close]:
        logger.info(f"{path}: other columns are groups to report by: {first_few(groups)}")
    if mixed:
        logger.info(f"{path}: columns that are not used, since they differ within a clip: {first_few(sorted(mixed))}")


def _add_row(table: Table, row: dict[str, str], number: int, mixed: set[str]) -> None:
    def whole(column: str) -> int:
        try:
            value = whole_number(row.get(column, ""))
        except ValueError:
            value = -1
        if value < 0:
            table.fail(number, column, f"{row.get(column, '')!r} is not a whole number, 0 or above")
        return value

    def has(*columns: str) -> bool:
        return any(filled(row.get(column, "")) for column in columns)

    name = row.get("clip") or row.get("path") or table.fail(number, "path", "empty")
    if one_line(name) != name:
        problem = f"{name!r} has a line break or another control character in it, which no name has"
        table.fail(number, "clip" if row.get("clip") else "path", problem)
    per_frame = "frame" in row
    values = {c: row[c] for c in OF_CLIP if filled(row.get(c, "")) and not (c == "label" and per_frame)}
    entry = table.entries.setdefault(name, Entry(number))
    for column, value in values.items():
        if entry.values.setdefault(column, value) != value:
            problem = f"{value!r} for clip {name}, {entry.values[column]!r} in row {entry.row} or after"
            table.fail(number, column, problem + _TWO_CLIPS * (column in ("label", *EVENT, *STRETCH)))
    for column, cell in row.items():
        if column and column not in KNOWN and filled(cell) and entry.groups.setdefault(column, cell) != cell:
            mixed.add(column)
    if has("step") and whole("step") == 0:
        table.fail(number, "step", "0 is below 1")
    if has(*INTERVAL) and has(*SPAN):
        table.fail(number, "start_time", "filled in beside start_frame; an interval is in frames or in seconds")
    if has(*INTERVAL):
        start, end = whole("start_frame"), whole("end_frame")
        if end < start:
            table.fail(number, "end_frame", f"{end} is before start_frame {start}; both are part of the anomaly")
        entry.intervals.append((start, end, number))
    if has(*SPAN):
        start, end = (table.seconds(number, column, row.get(column, "")) for column in SPAN)
        if end <= start:
            table.fail(number, "end_time", f"{end:g} s is not after start_time, {start:g} s")
        entry.spans.append((start, end, number))
    if per_frame:
        frame, label = whole("frame"), whole("label") if has("label") else IGNORED
        if has("label") and label > 1:
            table.fail(number, "label", f"{label} is neither 0 nor 1; it is empty where a frame is to be ignored")
        if frame in entry.labels:
            table.fail(number, "frame", f"frame {frame} of clip {name} has a label already")
        entry.labels[frame] = label
