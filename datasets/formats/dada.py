"""DADA-2000 (github.com/JWFangit/LOTVS-DADA) and CAP-DATA (MM-AU): annotation sheets -> clips.

DADA2K     ROOT/annotation/full_anno.csv                            the annotation sheet, saved as csv
           ROOT/DADA2K_my_split/{training,validation,half_training}.txt     lines "<type>/<video>", e.g. 1/001
           ROOT/frames/<type>/<video>/images.zip or images/         0001.png, 0002.png, ...
CAP-DATA   ROOT/annotation/cap_text_annotations.csv or cap_annotation_file.csv
           ROOT/CAPDATA_my_split/{training,validation}.txt          lines "<type>/<video>", e.g. 10/000001
           ROOT/frames/<type>/<video>/images.zip or images/         000001.jpg, 000002.jpg, ...

Sheets are read by column name. A frame is anomalous from "abnormal start frame" to "abnormal end frame", both included,
counted from 1; a clip where either is negative has none. Where the lists of a split are absent, they follow from the
authors' own list in the same folder: DADA2K's training clips are those of orig_training.txt, CAP-DATA's validation
clips those of orig_full_testing-text.txt (lines "<type>/<video> <label> <start> <end> <toa>,<text>", a clip on several
lines), and the rest of the sheet is the other split.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.clips import ALL_CLIPS, Clip, ClipTable, DataError, Selection
from datasets.formats.text import first_repeated, read_csv, read_lines, read_split, whole_number

logger = logging.getLogger("tad")

EGO_TYPES = frozenset((*range(1, 19), 61, 62))  # accident types the recording car is part of
FPS = 30.0  # of the frames as they are distributed; neither sheet says
CCD_FRAMES, CCD_FPS = 50, 10.0  # CAP-DATA's clips of exactly 50 frames come from CCD, which has 10 fps
Key = tuple[int, int]  # (type, video)


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps what: sheets, the first that exists; folder of splits; split -> file; digits of a video;
    name of a frame; the authors' own list and the split it stands for.
    """

    sheets: tuple[str, ...]
    split_folder: str
    splits: dict[str, str]
    digits: int
    frame_name: str
    original: str
    original_split: str

    def clip_name(self, key: Key) -> str:
        """<type>/<video>."""
        return f"{key[0]}/{key[1]:0{self.digits}d}"


_SPLITS = {"train": "training.txt", "val": "validation.txt"}
_DADA2K = (3, "{:04d}.png", "orig_training.txt", "train")
LAYOUTS = {
    "DADA2K": Layout(("full_anno.csv",), "DADA2K_my_split", _SPLITS, *_DADA2K),
    "DADA2K_half": Layout(
        ("full_anno.csv",), "DADA2K_my_split", _SPLITS | {"train": "half_training.txt"}, *_DADA2K
    ),
    "CAP-DATA": Layout(
        ("cap_text_annotations.csv", "cap_annotation_file.csv"), "CAPDATA_my_split", _SPLITS,
        6, "{:06d}.jpg", "orig_full_testing-text.txt", "val",
    ),
}  # fmt: skip


def load_dada(
    name: str, root: str, split: str, *, fps: float | None = None, selection: Selection = ALL_CLIPS
) -> ClipTable:
    """The clips of a split of one of LAYOUTS: train, val, or all, which is every row of the sheet.

    fps: of the frames, but for those of CCD, which have 10; None: 30, as the published code has it. Raises DataError:
    a file missing or malformed, a clip that the sheet lacks, labels beyond the clip.
    """
    layout = LAYOUTS[name]
    if split not in (*layout.splits, "all"):
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(layout.splits)}, all")
    folder = Path(root, "annotation")
    sheet = next((folder / s for s in layout.sheets if (folder / s).is_file()), folder / layout.sheets[0])
    rows = _read_sheet(sheet)
    keys = list(rows) if split == "all" else _split(layout, root, split, rows, sheet)
    own = {layout.clip_name(key): key for key in keys}
    return selection.table(
        name, split, own, lambda clip: _clip(name, Path(root), clip, rows.get(own[clip]), sheet, fps or FPS)
    )


def _split(layout: Layout, root: str, split: str, rows: dict[Key, dict[str, int]], sheet: Path) -> list[Key]:
    """The clips of a split, in the order of its list; from the authors' list, sorted, where that is absent."""
    folder, file = Path(root, layout.split_folder), layout.splits[split]
    path, original = folder / file, folder / layout.original
    derivable = file in _SPLITS.values()
    built = derivable and not path.exists() and original.is_file()
    if built:
        path = original
        lines = [(line.split(",")[0].split() or [line])[0] for line in read_lines(path)]
    else:
        other = f"put {layout.original} there" if derivable else "make it with python -m datasets.tools.prepare half"
        lines = read_split(path, f"huggingface.co/tue-mps/simple-tad (datasets/); or {other}")
    keys = [_key(line, path) for line in lines]
    if not built:
        if repeated := first_repeated(keys):
            raise DataError(f"{path}: type {repeated[0]}, video {repeated[1]} is listed twice")
        return keys
    listed = set(keys)
    if unknown := listed - rows.keys():
        raise DataError(f"{path}: clip {layout.clip_name(min(unknown))} is not in {sheet}")
    keys = sorted(listed if split == layout.original_split else rows.keys() - listed)
    if not keys:
        raise DataError(f"{path}: lists every clip of {sheet}; none is left for {split}")
    logger.info(f"{folder / file} is absent: {len(keys)} clips, from {path.name} and {sheet.name}")
    return keys


def _key(line: str, path: Path) -> Key:
    """(type, video) of "<type>/<video>"."""
    try:
        kind, video = map(int, line.split("/"))
    except ValueError as e:
        raise DataError(f"{path}: {line!r} is not <type>/<video>, e.g. 1/001") from e
    return kind, video


def _read_sheet(path: Path) -> dict[Key, dict[str, int]]:
    """{(type, video): {column: value}} of the columns that are used. Raises DataError."""
    if not path.is_file():
        raise DataError(
            f"{path}: annotation sheet not found; python -m datasets.tools.prepare sheet makes it of .xlsx, .xls"
        )
    columns = ("video", "type", "light", "abnormal start frame", "abnormal end frame", "total frames")
    lines = read_csv(path)
    header = [cell.lower() for cell in next(lines, (0, []))[1]]
    where = {}
    for column in columns:
        found = [i for i, cell in enumerate(header) if cell.startswith(column)]
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


def _clip(name: str, root: Path, own: str, row: dict[str, int] | None, sheet: Path, fps: float) -> Clip:
    if row is None:
        raise DataError(f"{sheet}: no row of clip {own}, which a split file lists")
    layout, kind = LAYOUTS[name], row["type"]
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
        fps=CCD_FPS if name == "CAP-DATA" and total == CCD_FRAMES else fps,
        frame_name=layout.frame_name,
        first_frame=1,
        labels=labels,
        category=str(kind),
        ego=kind in EGO_TYPES,
        night=row["light"] == 2,
    )
