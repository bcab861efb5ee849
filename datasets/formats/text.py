"""Reading the text files that annotations come in: csv tables, lists of clips, whole numbers."""

import csv
import io
import re
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path

from datasets.clips import DataError, data_errors

_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # what .xlsx and .ods, and .xls, begin with
_NOTHING = ("", "nan", "none", "null", "na", "n/a", "nat")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without byte-order mark. Raises DataError where it cannot be read as such."""
    with data_errors(path):
        data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not a text file in UTF-8 ({e.reason}); save it as UTF-8") from e
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}: line {line} has a NUL character, as no text has; write it anew, as UTF-8")
    return text


def read_csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its last line, cells without the white space around them) of each row that is not empty.

    Cells are separated by commas, semicolons or tabs, whichever the first row has most of. Raises DataError where the
    file cannot be read, is a workbook, or a quote is not closed, or has something behind it.
    """
    text = _text_of_table(path)
    first = re.sub(r'"[^"]*"', "", next((line for line in text.splitlines() if line.strip()), ""))
    separator = max(",;\t", key=first.count)
    with io.StringIO(text, newline="") as f:
        reader, line = csv.reader(f, strict=True, delimiter=separator), 0
        try:
            for cells in reader:
                line, cells = reader.line_num, [cell.strip() for cell in cells]
                if any(cells):
                    yield line, cells
        except csv.Error as e:  # a quote that is not closed takes in the lines that follow
            raise DataError(f"{path}: in the row that begins in line {line + 1}: {e}; check its quotes") from e


def _text_of_table(path: Path) -> str:
    with data_errors(path), path.open("rb") as f:
        if f.read(4) in _WORKBOOKS:
            remedy = f"python -m datasets.tools.prepare sheet {path} {path.with_suffix('.csv').name}"
            raise DataError(f"{path}: a workbook, not a csv file; {remedy} makes one of it")
    return read_text(path)


def filled(cell: str) -> bool:
    """Tell whether a cell says something: it is not empty, and none of the words that programs write in its place."""
    return cell.lower() not in _NOTHING


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, stripped, without empty ones."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_split(path: Path, hint: str) -> list[str]:
    """Return the clip names of a split file, in its order. hint: where the file comes from.

    Raises DataError where it is missing, empty or repeats a clip.
    """
    if not path.is_file():
        raise DataError(f"{path}: split file not found; it comes with {hint}")
    names = read_lines(path)
    if not names:
        raise DataError(f"{path}: the split file is empty")
    if repeated := first_repeated(names):
        raise DataError(f"{path}: clip {repeated} is listed twice")
    return names


def whole_number(text: str) -> int:
    """Return an integer, also where a spreadsheet wrote it as 12.0. Raises ValueError."""
    try:
        return int(text)
    except ValueError:
        if not (value := float(text)).is_integer():
            raise
        return int(value)


def first_repeated(names: Iterable[Hashable]) -> Hashable | None:
    """Return the first name that comes a second time, or None."""
    seen: set[Hashable] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)
