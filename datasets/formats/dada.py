"""DADA-2000 (github.com/JWFangit/LOTVS-DADA) and CAP-DATA (MM-AU): annotation sheets -> clips.

DADA2K     ROOT/annotation/full_anno.csv                            the annotation sheet, saved as csv
           ROOT/DADA2K_my_split/{training,validation,half_training}.txt     lines "<type>/<video>", e.g. 1/001
           ROOT/frames/<type>/<video>/images.zip or images/         0001.png, 0002.png, ...
CAP-DATA   ROOT/annotation/cap_text_annotations.csv or cap_annotation_file.csv
           ROOT/CAPDATA_my_split/{training,validation}.txt          lines "<type>/<video>", e.g. 10/000001
           ROOT/frames/<type>/<video>/images.zip or images/         000001.jpg, 000002.jpg, ...

Frames are read as MM-AU ships them, too (huggingface.co/datasets/JeffreyChou/MM-AU: join the parts of an archive with
cat, then unpack it): ROOT, or CAP-DATA/ or DADA-DATA/ in it, holds <type>/<video>/images/, or <group>/<type>/<video>/
images/ with groups as 1-10, 11 or 12-42. The sheet may lie in ROOT itself, under the name it is shipped with.

What is known to be wrong: no file states the frame rate; 30 agrees with other evidence on DADA, and CAP-DATA's clips of
50 frames are CCD's, at 10. The accident frame is -1 in 17 rows of DADA's sheet. Workbooks open on another sheet than
the annotation's: `prepare sheet --name` chooses. LOTVS-CAP's lists count frames from 0, the sheet from 1. The numbers
of DADA's first release (LOTVS-DADA, 1,018 clips) are others.

Sheets are read by column name. A frame is anomalous from "abnormal start frame" to "abnormal end frame", both included,
counted from 1; a clip where either is negative has none. Where the lists of a split are absent, they follow from the
authors' own list in the same folder: DADA2K's training clips are those of orig_training.txt, CAP-DATA's validation
clips those of orig_full_testing-text.txt (lines "<type>/<video> <label> <start> <end> <toa>,<text>", a clip on several
lines), and the rest of the sheet is the other split. A list of such lines does as a split's own, too.
"""

import logging
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from datasets.clips import MOST_FRAMES, Clip, ClipTable, DataError, Selection, data_errors
from datasets.formats.text import first_repeated, read_csv, read_lines, read_split, whole_number
from utils.text import first_few

logger = logging.getLogger("tad")

EGO_TYPES = frozenset((*range(1, 19), 61, 62))  # accident types the recording car is part of
FPS = 30.0  # of the frames as they are distributed; neither sheet says
CCD_FRAMES, CCD_FPS = 50, 10.0  # CAP-DATA's clips of exactly 50 frames come from CCD, which has 10 fps
SPLITS = {"train": "training.txt", "val": "validation.txt"}  # whose lists may be derived from the authors'
ACCIDENT = "accident frame"  # a column that may be absent
COLUMNS = ("video", "type", "light", "abnormal start frame", "abnormal end frame", "total frames")
Key = tuple[int, int]  # (type, video)


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps what."""

    sheets: tuple[str, ...]  # names of the annotation sheet, in annotation/ or the root; the first there is read
    split_folder: str
    digits: int  # of a video's number in the names of clips
    frame_name: str
    authors_list: str  # in split_folder
    authors_split: str  # the split it stands for
    splits: dict[str, str] = field(default_factory=lambda: SPLITS)  # {split: its list}

    def clip_name(self, key: Key) -> str:
        """Return <type>/<video>."""
        return f"{key[0]}/{key[1]:0{self.digits}d}"


_DADA2K = Layout(
    ("full_anno.csv", "dada_text_annotations.csv"), "DADA2K_my_split", 3, "{:04d}.png", "orig_training.txt", "train"
)
_CAP_SHEETS = ("cap_text_annotations.csv", "cap_annotation_file.csv")
LAYOUTS = {
    "DADA2K": _DADA2K,
    "DADA2K_half": replace(_DADA2K, splits=SPLITS | {"train": "half_training.txt"}),
    "CAP-DATA": Layout(_CAP_SHEETS, "CAPDATA_my_split", 6, "{:06d}.jpg", "orig_full_testing-text.txt", "val"),
}


def load_dada(name: str, root: str, split: str, *, fps: float | None = None, selection: Selection) -> ClipTable:
    """Return the clips of a split of one of LAYOUTS: train, val, or all, which is every row of the sheet.

    fps: of the frames, but for those of CCD, which have 10; None: 30, as the published code has it. Raises DataError:
    a file missing or malformed, a clip that the sheet lacks, labels beyond the clip.
    """
    layout = LAYOUTS[name]
    if split not in (*layout.splits, "all"):
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(layout.splits)}, all")
    places = [folder / sheet for folder in (Path(root, "annotation"), Path(root)) for sheet in layout.sheets]
    sheet = next((path for path in places if path.is_file()), places[0])
    rows, folders = _read_sheet(sheet), _find_frames(Path(root))
    keys = rows if split == "all" else _split(layout, root, split, rows, sheet)
    keys = {layout.clip_name(key): key for key in keys}

    def clip(clip_name: str) -> Clip:
        if keys[clip_name] not in rows:
            raise DataError(f"{sheet}: no row of clip {clip_name}, which a split file lists")
        key = keys[clip_name]
        source = folders.get(key, Path(root, "frames", clip_name)) / "images"
        return _clip(name, source, clip_name, rows[key], sheet, fps or FPS)

    late = [n for n, key in keys.items() if key in rows and rows[key].get(ACCIDENT, -1) > rows[key]["total frames"]]
    if late:
        logger.warning(f"{sheet}: {ACCIDENT} is after the last frame of {len(late)} clips, not used: {first_few(late)}")
    return selection.table(name, split, keys, clip)


def _find_frames(root: Path) -> dict[Key, Path]:
    """Return {(type, video): its folder} of what lies as it was shipped, not in ROOT/frames/<type>/<video>.

    A folder of types is told from one of videos by names below it: types have two digits at most, videos more.
    """
    found: dict[Key, Path] = {}
    for base in (root / "frames", root, root / "CAP-DATA", root / "DADA-DATA"):
        for folder in _numbered_folders(base, r"\d{1,2}(-\d{1,2})?"):
            kinds = [*_numbered_folders(folder, r"\d{1,2}"), *([folder] if folder.name.isdecimal() else [])]
            for kind in kinds:
                for video in _numbered_folders(kind, r"\d{3,6}"):
                    found.setdefault((int(kind.name), int(video.name)), video)
    return found


def _numbered_folders(folder: Path, pattern: str) -> list[Path]:
    """Return the folders in a folder whose names are of a pattern, sorted."""
    if not folder.is_dir():
        return []
    with data_errors(folder), os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if re.fullmatch(pattern, entry.name) and entry.is_dir())


def _split(layout: Layout, root: str, split: str, rows: dict[Key, dict[str, int]], sheet: Path) -> list[Key]:
    """Return the clips of a split, in the order of its list."""
    folder, file = Path(root, layout.split_folder), layout.splits[split]
    path, derivable = folder / file, file in SPLITS.values()
    if derivable and not path.exists() and (folder / layout.authors_list).is_file():
        return _derived_split(layout, path, split, rows, sheet)
    other = f"put {layout.authors_list} there" if derivable else "make it with python -m datasets.tools.prepare half"
    lines = read_split(path, f"huggingface.co/tue-mps/simple-tad (datasets/); or {other}")
    keys = [_key((line.split(",")[0].split() or [line])[0], path) for line in lines]
    if len(lines[0].split(",")[0].split()) == 5:  # as LOTVS-CAP has it, with stretches of a clip on several lines
        return list(dict.fromkeys(keys))
    if repeated := first_repeated(keys):
        raise DataError(f"{path}: type {repeated[0]}, video {repeated[1]} is listed twice")
    return keys


def _derived_split(layout: Layout, absent: Path, split: str, rows: dict[Key, dict[str, int]], sheet: Path) -> list[Key]:
    """Return the clips of a split whose list is absent, from the authors' list, sorted."""
    path = absent.with_name(layout.authors_list)
    listed = {_key((line.split(",")[0].split() or [line])[0], path) for line in read_lines(path)}
    if unknown := listed - rows.keys():
        raise DataError(f"{path}: clip {layout.clip_name(min(unknown))} is not in {sheet}")
    keys = sorted(listed if split == layout.authors_split else rows.keys() - listed)
    if not keys:
        raise DataError(f"{path}: lists every clip of {sheet}; none is left for {split}")
    logger.info(f"{absent} is absent: {len(keys)} clips, from {path.name} and {sheet.name}")
    return keys


def _key(line: str, path: Path) -> Key:
    """Return (type, video) of "<type>/<video>"."""
    try:
        kind, video = map(int, line.split("/"))
    except ValueError as e:
        raise DataError(f"{path}: {line!r} is not <type>/<video>, e.g. 1/001") from e
    return kind, video


def _read_sheet(path: Path) -> dict[Key, dict[str, int]]:
    """Return {(type, video): {column: value}} of COLUMNS. Raises DataError."""
    if not path.is_file():
        raise DataError(
            f"{path}: annotation sheet not found; python -m datasets.tools.prepare sheet makes it of .xlsx, .xls"
        )
    lines = read_csv(path)
    header = [cell.lower() for cell in next(lines, (0, []))[1]]
    where = {}
    for column in (*COLUMNS, ACCIDENT):
        found = [i for i, cell in enumerate(header) if cell.startswith(column)]
        if column == ACCIDENT and not found:
            continue
        if len(found) != 1:
            raise DataError(f"{path}: {len(found)} columns begin with {column!r}, 1 is needed")
        where[column] = found[0]
    rows: dict[Key, dict[str, int]] = {}
    for line, cells in lines:
        row = {}
        for column, i in where.items():
            try:
                row[column] = whole_number(cells[i])
            except (ValueError, IndexError) as e:
                raise DataError(f"{path}: line {line}: {column!r} is not a whole number: {e}") from e
        key = row["type"], row["video"]
        if key in rows:
            raise DataError(f"{path}: line {line}: type {key[0]}, video {key[1]} is listed twice")
        rows[key] = row
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _clip(name: str, source: Path, clip_name: str, row: dict[str, int], sheet: Path, fps: float) -> Clip:
    start, end, total = row["abnormal start frame"], row["abnormal end frame"], row["total frames"]
    if not 0 < total < MOST_FRAMES:
        raise DataError(f"{sheet}: {clip_name} has {total} frames; correct the row")
    labels = np.zeros(total, dtype=np.uint8)
    if start > -1 and end > -1:
        if not start <= end <= total:
            raise DataError(f"{sheet}: {clip_name}: frames {start} to {end} are anomalous, of {total}; correct the row")
        labels[max(start - 1, 0) : end] = 1
    fps, accident = CCD_FPS if name == "CAP-DATA" and total == CCD_FRAMES else fps, row.get(ACCIDENT, -1)
    accident = accident if 0 < accident <= total else None
    return Clip(
        name=clip_name,
        source=str(source),
        num_frames=total,
        fps=fps,
        frame_name=LAYOUTS[name].frame_name,
        first_frame=1,
        labels=labels,
        category=str(row["type"]),
        ego=row["type"] in EGO_TYPES,
        night=row["light"] == 2,
        event_time=None if accident is None else (accident - 1) / fps,
        alert_time=max(start - 1, 0) / fps if accident is not None and -1 < start <= accident else None,
    )
