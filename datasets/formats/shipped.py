"""What data sets of whole video files with an accident or without one have in common: files, rows and missing ones."""

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from datasets.clips import DataError, Unreadable
from datasets.formats.text import decimal, filled, read_csv
from datasets.labels import labels_of_times
from datasets.scan import VideoScan, log_notes
from datasets.video import VIDEO_SUFFIXES, VideoInfo
from utils.text import first_few

logger = logging.getLogger("tad")


class Videos:
    """The video files of a split, which are scanned together. info[name] tells of a clip's.

    Args:
        what: the split, for the log.
        sources: {clip: its file}.
        leave_out: clips not to use.
        elsewhere: files in the same folders that the annotation knows, but not in this split.
    """

    def __init__(
        self,
        what: str,
        sources: Mapping[str, Path],
        scan: VideoScan,
        *,
        leave_out: Collection[str] = (),
        elsewhere: Iterable[Path] = (),
    ):
        every = {name: str(path.absolute()) for name, path in sources.items()}
        self.sources = {name: path for name, path in every.items() if name not in leave_out}
        self.info: dict[str, VideoInfo] = dict(zip(self.sources, scan(list(self.sources.values())), strict=True))
        log_notes(what, self.info)
        self._say_unlisted(what, {*every.values(), *(str(path.absolute()) for path in elsewhere)})

    def require(self, name: str) -> VideoInfo:
        """Return what is known of a clip's file. Raises Unreadable where it cannot be used."""
        info = self.info[name]
        if info.problem:
            raise Unreadable(f"{self.sources[name]}: {info.problem}")
        return info

    def _say_unlisted(self, what: str, listed: set[str]) -> None:
        """Log the videos beside those of the annotation that it does not list."""
        folders = {os.path.dirname(source) for source in self.sources.values()}
        paths = (os.path.join(f, name) for f in sorted(folders) if os.path.isdir(f) for name in sorted(os.listdir(f)))
        if others := [path for path in paths if path.lower().endswith(VIDEO_SUFFIXES) and path not in listed]:
            logger.warning(f"{what}: {len(others)} videos are not annotated and go unused: {first_few(others, 3)}")


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (number, {column: cell}) of the rows of a csv with a header; what stands for nothing is "".

    Raises DataError where one of `columns` is absent, or a row is longer than the header.
    """
    if not path.is_file():
        raise DataError(f"{path}: not found; it comes with the data set")
    rows = read_csv(path)
    header = [cell.lower() for cell in next(rows, (0, []))[1]]
    if absent := [column for column in columns if column not in header]:
        raise DataError(f"{path}: no column {', '.join(absent)}; expected {', '.join(columns)}")
    for number, cells in rows:
        if len(cells) > len(header):
            raise DataError(f"{path}: row {number} has {len(cells)} cells, the header {len(header)}")
        cells = [cell if filled(cell) else "" for cell in cells] + [""] * (len(header) - len(cells))
        yield number, dict(zip(header, cells, strict=True))


def seconds(where: str, cell: str) -> float | None:
    """Return a time; None of an empty cell. where: file, row and column, for the DataError that says it is none."""
    if not cell:
        return None
    try:
        value = decimal(cell)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise DataError(f"{where}: {cell!r} is not a time in seconds, 0 or above; correct the row")
    return value


def require_constant(where: str, info: VideoInfo) -> None:
    """Raise DataError where frames, which are on a grid of the average rate, are not the pictures that labels count."""
    if not info.constant:
        raise DataError(
            f"{where}: its frame rate is variable, and its label is by the number of a picture: take the original, "
            "which has a constant rate"
        )


def event_labels(where: str, info: VideoInfo, event: float | None, alert: float | None) -> np.ndarray:
    """Return the `labels_of_times` of a video. where: file and row, for the DataError of times that contradict."""
    try:
        return labels_of_times(info.frames, info.fps, event=event, alert=alert)
    except ValueError as e:
        raise DataError(f"{where}: {e}; correct the row") from e


def require_folder(root: str, name: str, *expected: str) -> Path:
    """Return the first of the paths below root that exists.

    Raises DataError that names them all, and the folder above or below root that holds one of them.
    """
    found = next((path for path in (Path(root, part) for part in expected) if path.exists()), None)
    if found is None:
        what = f"{' nor '.join(expected)} is there" if len(expected) > 1 else f"{expected[0]} is not there"
        near = [path for path in _around(Path(root)) if any((path / part).exists() for part in expected)]
        remedy = f", which is {near[0]}" if near else ""
        raise DataError(f"{root}: {'neither ' * (len(expected) > 1)}{what}; give the folder of {name} that holds "
                        f"{'one of them' if len(expected) > 1 else 'it'}{remedy}")  # fmt: skip
    return found


def _around(root: Path) -> Iterator[Path]:
    """Yield the folders in a folder, then the three above it."""
    if root.is_dir():
        yield from sorted(path for path in root.iterdir() if path.is_dir())
    yield from root.absolute().parents[:3]


def refuse_split(name: str, split: str, known: Iterable[str], why: str = "") -> None:
    """Raise DataError for a split that a data set does not have."""
    if split not in known:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(known)}{why}")
