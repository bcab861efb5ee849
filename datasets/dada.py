"""DADA-2000 (github.com/JWFangit/LOTVS-DADA) and CAP-DATA (MM-AU): annotation sheets -> clips.

DADA2K     ROOT/annotation/full_anno.csv                            the annotation sheet, saved as csv
           ROOT/DADA2K_my_split/{training,validation,half_training}.txt     lines "<type>/<video>", e.g. 1/001
           ROOT/frames/<type>/<video>/images.zip or images/         0001.png, 0002.png, ... at 30 fps
CAP-DATA   ROOT/annotation/cap_text_annotations.csv
           ROOT/CAPDATA_my_split/{training,validation}.txt          lines "<type>/<video>", e.g. 10/000001
           ROOT/frames/<type>/<video>/images.zip or images/         000001.jpg, 000002.jpg, ...

Sheets are read by column name. A frame is anomalous from "abnormal start frame" to "abnormal end frame", both included,
counted from 1; a clip where either is negative has none.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.clips import ALL_CLIPS, Clip, ClipTable, DataError, Selection, first_repeated, read_split, read_text

EGO_TYPES = frozenset((*range(1, 19), 61, 62))  # accident types the recording car is part of
CCD_FRAMES, CCD_FPS = 50, 10.0  # CAP-DATA's clips of exactly 50 frames come from CCD, which has 10 fps


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps what: sheet, folder of splits, split -> file, digits of a video, name of a frame."""

    sheet: str
    split_folder: str
    splits: dict[str, str]
    digits: int
    frame_name: str


_SPLITS = {"train": "training.txt", "val": "validation.txt"}
LAYOUTS = {
    "DADA2K": Layout("full_anno.csv", "DADA2K_my_split", _SPLITS, 3, "{:04d}.png"),
    "DADA2K_half": Layout(
        "full_anno.csv", "DADA2K_my_split", _SPLITS | {"train": "half_training.txt"}, 3, "{:04d}.png"
    ),
    "CAP-DATA": Layout("cap_text_annotations.csv", "CAPDATA_my_split", _SPLITS, 6, "{:06d}.jpg"),
}


def load_dada(name: str, root: str, split: str, selection: Selection = ALL_CLIPS) -> ClipTable:
    """The clips of a split of one of LAYOUTS: train, val, or all, which is every row of the sheet.

    Raises DataError: a file missing or malformed, a clip that the sheet lacks, labels beyond the clip.
    """
    layout = LAYOUTS[name]
    if split not in (*layout.splits, "all"):
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(layout.splits)}, all")
    sheet = Path(root, "annotation", layout.sheet)
    rows = _read_sheet(sheet)
    names = list(rows)
    if split != "all":
        path = Path(root, layout.split_folder, layout.splits[split])
        listed = {line: _key(line, path) for line in read_split(path, "huggingface.co/tue-mps/simple-tad (datasets/)")}
        names = list(listed.values())
        if repeated := first_repeated(names):
            raise DataError(f"{path}: type {repeated[0]}, video {repeated[1]} is listed twice")
    keys = {f"{kind}/{video:0{layout.digits}d}": (kind, video) for kind, video in names}
    return selection.table(name, split, keys, lambda own: _clip(name, Path(root), own, rows.get(keys[own]), sheet))


def _key(line: str, path: Path) -> tuple[int, int]:
    """(type, video) of "<type>/<video>"."""
    try:
        kind, video = map(int, line.split("/"))
    except ValueError as e:
        raise DataError(f"{path}: {line!r} is not <type>/<video>, e.g. 1/001") from e
    return kind, video


def _read_sheet(path: Path) -> dict[tuple[int, int], dict[str, int]]:
    """{(type, video): {column: value}} of the columns that are used. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: annotation sheet not found; save the data set's .xlsx or .xls sheet as csv there")
    columns = ("video", "type", "light", "abnormal start frame", "abnormal end frame", "total frames")
    with io.StringIO(read_text(path), newline="") as f:
        reader = csv.reader(f)
        header = [cell.strip().lower() for cell in next(reader, [])]
        where = {}
        for column in columns:
            found = [i for i, cell in enumerate(header) if cell.startswith(column)]
            if len(found) != 1:
                raise DataError(f"{path}: {len(found)} columns begin with {column!r}, 1 is needed")
            where[column] = found[0]
        rows: dict[tuple[int, int], dict[str, int]] = {}
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            row = {}
            for column, i in where.items():
                try:
                    row[column] = int(cells[i])
                except (ValueError, IndexError) as e:
                    raise DataError(f"{path}: line {reader.line_num}: {column!r} is not a whole number: {e}") from e
            key = row["type"], row["video"]
            if key in rows:
                raise DataError(f"{path}: line {reader.line_num}: type {key[0]}, video {key[1]} is listed twice")
            rows[key] = row
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _clip(name: str, root: Path, own: str, row: dict[str, int] | None, sheet: Path) -> Clip:
    if row is None:
        raise DataError(f"{sheet}: no row of clip {own}, which a split file lists")
    kind = row["type"]
    start, end, total = row["abnormal start frame"], row["abnormal end frame"], row["total frames"]
    if not 0 < total < 10**7:
        raise DataError(f"{sheet}: {own} has {total} frames; correct the row")
    labels = np.zeros(total, dtype=np.uint8)
    if start > -1 and end > -1:
        if not start <= end <= total:
            raise DataError(f"{sheet}: {own}: frames {start} to {end} are anomalous, of {total}; correct the row")
        labels[max(start - 1, 0) : end] = 1
    return Clip(
        name=own,
        source=str(root / "frames" / own / "images"),
        num_frames=total,
        fps=CCD_FPS if name == "CAP-DATA" and total == CCD_FRAMES else 30.0,
        frame_name=LAYOUTS[name].frame_name,
        first_frame=1,
        labels=labels,
        category=str(kind),
        ego=kind in EGO_TYPES,
        night=row["light"] == 2,
    )
