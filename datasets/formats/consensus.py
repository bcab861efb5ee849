"""BADAS consensus labels (github.com/getnexar/BADAS-Open, annotation/): when people saw an accident come, and happen.

ROOT/consensus/{dota_test,dada2000_small_test,dad_test}_concensus.csv        (the spelling is theirs)

They take the place of a data set's own labels: `build_clips(..., labels="consensus")`, or "consensus_ego" for the rows
of category pos-ego alone, which their table uses. Frames are anomalous from the alert to the collision, and ignored
from the collision on (see datasets.labels). As in their paper (arXiv:2510.14876) the first 4 s of clips whose alert
comes at 4.5 s or later are negative clips of their own, called "<clip>_first4s"; DAD has its own, which stay. All other
clips of the split are left out. The rows "less2s", whose collision comes before 2 s, and "excluded" are not used.

What is known to be wrong: DoTA and DADA have few negatives (65 and 68 of all, 43 and 39 of ego), so that chance is an
AP of .88; the category follows DoTA's own ego flag, not the annotators'; DADA's rows have the numbers of its old
release: only those 168 of 221 are used whose accident frame agrees with the clip that dada_crosswalk.csv, which is
inferred, has for them.
"""

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from datasets.clips import Clip, ClipTable, DataError
from datasets.formats.shipped import read_rows, seconds
from datasets.labels import frame_at, labels_of_times
from utils.names import LABELS

logger = logging.getLogger("tad")

OWN, ALL, EGO = LABELS
FILES = {
    "DoTA": "dota_test_concensus.csv",
    "DADA2K": "dada2000_small_test_concensus.csv",
    "DAD": "dad_test_concensus.csv",
}
CATEGORIES = {ALL: ("pos-ego", "pos-not-ego"), EGO: ("pos-ego",)}
COLUMNS = ("id", "event-type", "nexar-vehicle-involved", "min_support", "time-of-alert", "time-of-collision")
_KNOWN = {
    "event-type": ("collision|near-collision", "Collision or Near-collision"),
    "nexar-vehicle-involved": ("yes|no", "yes or no"),
    "article_category": (r"pos-ego|pos-not-ego|less2s|excluded.*", "pos-ego, pos-not-ego, less2s or excluded"),
}
CROSSWALK = Path(__file__).with_name("dada_crosswalk.csv")
NEGATIVE, LATE_ALERT = 4.0, 4.5  # seconds: of a negative clip, and the alert that leaves so much without a sign


@dataclass(frozen=True)
class _Row:
    """What the annotators say of a clip; times in seconds."""

    where: str
    collision: bool  # rather than a near one
    ego: bool
    support: str
    alert: float
    event: float
    category: str


def with_consensus(table: ClipTable, root: str, labels: str) -> ClipTable:
    """Return the clips of a split that the consensus labels know, under those. labels: ALL or EGO.

    Raises DataError: a data set or split without such labels, a file missing or malformed, times beyond the file.
    """
    if table.name not in FILES:
        raise DataError(f"{table.name} has no consensus labels; {', '.join(FILES)} have")
    path = Path(root, "consensus", FILES[table.name])
    if not path.is_file():
        raise DataError(f"{path}: not found; it is in annotation/ of github.com/getnexar/BADAS-Open")
    every = _read(path, table.name)
    rows = {name: row for name, row in every.items() if row.category in CATEGORIES[labels]}
    clips: list[Clip] = []
    for clip in table:
        if row := rows.get(clip.name):
            clips.append(_positive(clip, row))
            if row.alert >= LATE_ALERT:
                clips.append(_negative(clip, row))
        elif clip.is_positive is False and clip.name not in every:
            clips.append(clip)
    known = {clip.name for clip in table}
    if not every.keys() & known:
        raise DataError(f"{path}: no row is of a clip of {table}; the labels are of the test split, val")
    if not rows.keys() & known:
        logger.warning(f"{path}: no row of category {' or '.join(CATEGORIES[labels])} is of a clip of {table}")
    logger.info(
        f"{table}: {labels} labels of {len(rows.keys() & known)} clips, with {sum(not c.is_positive for c in clips)} "
        f"negatives; {len(rows.keys() - known)} of {len(rows)} rows are of no clip of the split, and "
        f"{len(known - rows.keys() - {c.name for c in clips})} clips have no row and are not used"
    )
    return replace(table, clips=clips)


def _read(path: Path, name: str) -> dict[str, _Row]:
    crosswalk = _read_crosswalk() if name == "DADA2K" else None
    rows: dict[str, _Row] = {}
    for number, cells in read_rows(path, (*COLUMNS, "article_category")):
        where = f"{path}: row {number}"
        identity = cells["id"].removesuffix(".mp4")
        if crosswalk is not None:
            identity = crosswalk.get(cells["id"], "")
        elif name == "DAD":
            identity = f"testing/positive/{identity.zfill(6)}"  # a spreadsheet drops the zeros
        alert, event = (seconds(f"{where}, column {column}", cells[column]) for column in COLUMNS[-2:])
        if alert is None or event is None:
            raise DataError(f"{where}, column {COLUMNS[-2 if alert is None else -1]}: empty; take the file again")
        if alert > event:
            raise DataError(
                f"{where}: an alert at {alert:g} s, after the collision at {event:g} s; take the file again"
            )
        if identity in rows:
            raise DataError(f"{where}: clip {cells['id']} is in {rows[identity].where}, too")
        for column, (known, words) in _KNOWN.items():
            if not re.fullmatch(known, cells[column], re.IGNORECASE):
                raise DataError(f"{where}, column {column}: {cells[column]!r} is not {words}; take the file again")
        collision, ego = cells["event-type"].lower() == "collision", cells["nexar-vehicle-involved"].lower() == "yes"
        if identity:
            row = _Row(where, collision, ego, cells["min_support"], alert, event, cells["article_category"])
            rows[identity] = row
    return rows


def _read_crosswalk() -> dict[str, str]:
    """Return {id in the file: name of the clip} where the two agree."""
    rows = read_rows(CROSSWALK, ("id", "mm_au_clip", "status"))
    return {row["id"]: row["mm_au_clip"] for _, row in rows if row["status"] == "agrees"}


def _positive(clip: Clip, row: _Row) -> Clip:
    if row.event > clip.num_frames / clip.fps:
        length = f"clip {clip.name} has {clip.num_frames / clip.fps:.6g} s"
        raise DataError(f"{row.where}: a collision at {row.event:g} s, but {length}: another clip, or another rate")
    event = "collision" if row.collision else "near collision"
    return replace(
        clip,
        labels=labels_of_times(clip.num_frames, clip.fps, event=row.event, alert=row.alert),
        positive=True,
        event_time=row.event,
        alert_time=row.alert,
        ego=row.ego,
        recording=clip.recording or clip.name,
        groups=clip.groups | {"event": event, "support": row.support, "article_category": row.category},
    )


def _negative(clip: Clip, row: _Row) -> Clip:
    count = frame_at(NEGATIVE, clip.fps)
    count -= (count - clip.num_frames) % (clip.pack_step or 1)  # a pack's frames are counted back from the last
    return replace(
        clip,
        name=f"{clip.name}_first4s",
        num_frames=count,
        labels=np.zeros(count, dtype=np.uint8),
        offset=0,
        recording=clip.recording or clip.name,
        positive=False,
        event_time=None,
        alert_time=None,
        groups=clip.groups | {"article_category": row.category},
    )
