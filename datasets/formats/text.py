"""Reading the text files that annotations come in: csv tables, lists of clips, whole numbers."""

import codecs
import csv
import io
import re
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path

from datasets.clips import DataError, data_errors
from utils.damage import stand_in

_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # what .xlsx and .ods, and .xls, begin with
_SEPARATOR = re.compile(r'"?sep=([,;\t])"?\r?\n')
_NOTHING = ("", "nan", "none", "null", "na", "n/a", "nat")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without byte-order mark. Raises DataError where it cannot be read as such."""
    with data_errors(path):
        data = path.read_bytes()
    if other := stand_in(data[:512]):
        raise DataError(f"{path}: {other}")
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

    Cells are separated by commas, semicolons or tabs, whichever the first row has most of, or as a line "sep=;" before
    it says, which spreadsheets write. Text is UTF-8, or what a mark at its beginning says. Raises DataError where the
    file cannot be read, is a workbook, or a quote is not closed, or has something behind it.
    """
    text = _text_of_table(path)
    stated = _SEPARATOR.match(text)
    if stated:
        text = "\n" + text[stated.end() :]
    first = re.sub(r'"[^"]*"', "", next((line for line in text.splitlines() if line.strip()), ""))
    separator = stated[1] if stated else max(",;\t", key=first.count)
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
        head = f.read(4)
    if head in _WORKBOOKS:
        remedy = f"python -m datasets.tools.prepare sheet {path} {path.with_suffix('.csv').name}"
        raise DataError(f"{path}: a workbook, not a csv file; {remedy} makes one of it")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as Excel saves "Unicode text"
        with data_errors(path):
            return path.read_bytes().decode("utf-16")
    return read_text(path)


def filled(cell: str) -> bool:
    """Tell whether a cell says something: it is not empty, and none of the words that programs write in its place."""
    return cell.lower() not in _NOTHING


def decimal(text: str) -> float:
    """Return a number, also where a comma stands for the point. Raises ValueError."""
    return float(text.replace(",", ".") if "." not in text else text)


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
