"""Nexar's collision prediction data set: seconds of an event and an alert -> clips.

Hugging Face    ROOT/train/{positive,negative}/metadata.csv, NNNNN.mp4      the label of a clip is its folder
                ROOT/test-public/{positive,negative}/...  is split val, ROOT/test-private/... is split test
                ROOT/time_to_accident_test_map.csv        ids in a row are crops of one source video
Kaggle          ROOT/train.csv    id,time_of_event,time_of_alert,target       ROOT/train/NNNNN.mp4
                ROOT/test.csv     id                      ROOT/test/NNNNN.mp4, split test, without labels
There is no split val then: `prepare split Nexar ROOT --split train` makes train and val of train.

Where: huggingface.co/datasets/nexar-ai/nexar_collision_prediction (gated, granted at once; 31 GB), or the Kaggle
competition nexar-collision-prediction.

Frames are anomalous from the alert to the event, those from the event on are ignored (see datasets.labels). Test clips
are cut `time_to_accident` seconds before the event, and their times are most likely those of the uncut video: the
event is taken to be that long after the end, the alert as long before the event as the two times are apart.

What is known to be wrong: the nominal 30 fps are 23.6 to 30.6 in fact; a near collision counts as positive as a
collision, and no column tells them apart; a positive without time_of_event tells nothing of its frames, which are all
ignored; ids that a spreadsheet read as numbers have lost their zeros, which are put back.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.clips import Clip, ClipTable, DataError, Selection
from datasets.formats.shipped import Videos, event_labels, read_rows, refuse_split, require_folder, seconds
from datasets.formats.text import whole_number
from datasets.labels import IGNORED
from datasets.scan import VideoScan

logger = logging.getLogger("tad")

FOLDERS = {"train": ("train",), "val": ("test-public",), "test": ("test-private",)}  # {split: its folders}
FOLDERS["all"] = tuple(folder for (folder,) in FOLDERS.values())
METADATA = ("file_name", "time_of_event", "time_of_alert")
MAP = "time_to_accident_test_map.csv"
_KAGGLE_VAL = (
    "; python -m datasets.tools.prepare split Nexar ROOT --split train makes train and val of it, and --select_split "
    "chooses the best checkpoint within train"
)
GROUPS = ("light_conditions", "weather", "scene", "time_to_accident")


@dataclass(frozen=True)
class _Row:
    """What the annotation says of a clip; times in seconds."""

    where: str  # file and row
    path: Path
    positive: bool | None
    event: float | None = None
    alert: float | None = None
    before: float | None = None  # from the end of the clip to the event
    groups: dict[str, str] = field(default_factory=dict)


def load_nexar(root: str, split: str, scan: VideoScan, selection: Selection) -> ClipTable:
    """Return a split: of Hugging Face's layout train, val, test or all of them, of Kaggle's train or test.

    Raises DataError: unknown split, a file missing or malformed, a row that contradicts itself or its folder.
    """
    folders = [Path(root, folder) for folder in FOLDERS["all"]]
    if any((folder / "positive").is_dir() or (folder / "negative").is_dir() for folder in folders):
        refuse_split("Nexar", split, FOLDERS)
        rows = _read_folders(Path(root), FOLDERS[split])
    else:
        require_folder(root, "Nexar", "train.csv", "test.csv", *(f"{folder}/positive" for folder in FOLDERS["all"]))
        refuse_split("Nexar as Kaggle has it", split, ("train", "test"), _KAGGLE_VAL if split == "val" else "")
        rows = _read_kaggle(Path(root), split)
    sources = {name: row.path for name, row in rows.items()}
    videos = Videos(f"Nexar {split}", sources, scan, leave_out=selection.leave_out)
    recordings = _recordings(Path(root, MAP))
    table = selection.table(
        "Nexar", split, rows, lambda name: _clip(name, rows[name], videos, recordings.get(name, f"video {name}"))
    )
    if untimed := sum(clip.positive is True and clip.event_time is None for clip in table):
        logger.warning(f"{table}: {untimed} positive clips have no time_of_event; all of their frames are ignored")
    return table


def _read_folders(root: Path, folders: tuple[str, ...]) -> dict[str, _Row]:
    rows: dict[str, _Row] = {}
    for folder in folders:
        if not (root / folder).is_dir():
            raise DataError(f"{root / folder}: not there, and the split is in it: download it, or hold out a part of "
                            "train with --select_split, or python -m datasets.tools.prepare split")  # fmt: skip
        for label in ("positive", "negative"):
            path = root / folder / label / "metadata.csv"
            for number, row in read_rows(path, METADATA):
                where = f"{path}: row {number}"
                name = _id(where, "file_name", row["file_name"])
                groups = {column: row[column] for column in GROUPS if row.get(column)}
                times = _times(where, row if folder != "train" else row | {"time_to_accident": ""}, label == "positive")
                _add(rows, name, _Row(where, path.parent / f"{name}.mp4", label == "positive", *times, groups))
    return rows


def _read_kaggle(root: Path, split: str) -> dict[str, _Row]:
    rows: dict[str, _Row] = {}
    path = root / f"{split}.csv"
    for number, row in read_rows(path, ("id", *METADATA[1:], "target") if split == "train" else ("id",)):
        where = f"{path}: row {number}"
        name = _id(where, "id", row["id"])
        positive = {"1": True, "0": False, "1.0": True, "0.0": False}.get(row.get("target", ""))
        if split == "train" and positive is None:
            raise DataError(f"{where}, column target: {row['target']!r} is neither 1 nor 0")
        times = () if positive is None else _times(where, row, positive)
        _add(rows, name, _Row(where, root / split / f"{name}.mp4", positive, *times))
    return rows


def _id(where: str, column: str, cell: str) -> str:
    """Return the five digits of a clip."""
    try:
        number = whole_number(cell.lower().removesuffix(".mp4"))
    except ValueError:
        number = -1
    if not 0 <= number < 10**5:
        raise DataError(f"{where}, column {column}: {cell!r} is not the number of a clip, as 00822 or 00822.mp4 is")
    return f"{number:05d}"


def _add(rows: dict[str, _Row], name: str, row: _Row) -> None:
    if other := rows.get(name):
        raise DataError(f"{row.where}: clip {name} is in {other.where}, too; it must be in one place")
    rows[name] = row


def _times(where: str, row: dict[str, str], positive: bool) -> tuple[float | None, float | None, float | None]:
    """Return the event, the alert, and the time from the end of the clip to the event. Raises DataError."""
    columns = ("time_of_event", "time_of_alert", "time_to_accident")
    event, alert, before = (seconds(f"{where}, column {c}", row.get(c, "")) for c in columns)
    if not positive and (event is not None or alert is not None):
        raise DataError(f"{where}: a negative clip with a time of event or alert; correct the row or its label")
    if alert is not None and (event is None or alert > event):
        raise DataError(
            f"{where}, column time_of_alert: {alert:g} s, but time_of_event is {row[columns[0]] or 'empty'}; the alert "
            "comes first: correct the row"
        )
    return event, alert, before


def _recordings(path: Path) -> dict[str, str]:
    """Return {clip: name of the source video it was cropped from} of the test clips."""
    found: dict[str, str] = {}
    for number, row in read_rows(path, ()) if path.is_file() else ():
        for column, cell in row.items():
            if cell:
                found[_id(f"{path}: row {number}", column, cell)] = f"test video {number}"
    return found


def _clip(name: str, row: _Row, videos: Videos, recording: str) -> Clip:
    info = videos.require(name)
    event, alert = row.event, row.alert
    if row.positive and row.before is not None:  # the times are of the uncut video
        lead = None if event is None or alert is None else event - alert
        event = info.frames / info.fps + row.before
        alert = None if lead is None else max(event - lead, 0.0)
    elif event is not None and event > info.frames / info.fps:
        length = f"the video has {info.frames / info.fps:.6g} s"
        raise DataError(f"{row.where}, column time_of_event: {event:g} s, but {length}; correct the row")
    labels = event_labels(row.where, info, event, alert)
    light = row.groups.get("light_conditions")
    return Clip(
        name=name,
        source=videos.sources[name],
        num_frames=info.frames,
        fps=info.fps,
        labels=None if row.positive is None else _unless_untimed(labels, row.positive and event is None),
        night=None if light is None else light.lower() in ("dark", "night"),
        recording=recording,
        positive=row.positive,
        event_time=event,
        alert_time=alert,
        groups=row.groups,
    )


def _unless_untimed(labels: np.ndarray, untimed: bool) -> np.ndarray:
    return np.full_like(labels, IGNORED) if untimed else labels
