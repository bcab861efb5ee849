"""A packed data set: what `python -m datasets.tools.pack` writes, read in place of the original.

ROOT/pack.json          written last, when all is there: version, settings; of each split of each data set its original
                        root, and its clips in order
ROOT/clips.jsonl        a line for each clip: what it is, its labels, where it came from, size and SHA-256 of its zip,
                        and the version of the code that packed it
ROOT/frames/<clip>.zip  JPEGs, each named by the number of its frame in the original: 000000.jpg, 000003.jpg, ...

Damage is found wherever it is read: the zips hold a CRC-32 of each JPEG; a line of the manifest, and the index, one of
itself, but for those of older packs, whose values are looked at alone.

Frames may be squashed to a width; their clip then has the `aspect` they were filmed in.

A pack at a lower rate keeps every n-th frame, counted back from the clip's last one. A packed Clip has the frame count,
numbers, rate, labels and names of the original, so windows are those of the original too: those that end on every n-th
frame, the last of them on the clip's last frame, as `WindowIndex` anchors them at a stride of n.

Version 1, which says nothing of versions, counted the packets of a video file instead of the pictures it shows: its
clips of videos are refused. Those of zips and folders of pictures are as good as ever.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datasets.clips import MOST_FRAMES, Clip, ClipTable, DataError, Selection, data_errors
from datasets.formats.numbered import SteppedClip
from datasets.labels import ANOMALOUS, IGNORED
from utils.damage import check_types, parse_json
from utils.text import first_few, short_reason

logger = logging.getLogger("tad")

VERSION = 2
INDEX, MANIFEST = "pack.json", "clips.jsonl"
COMMAND = "python -m datasets.tools.pack"
_FRAME_NAME = re.compile(r"([^{}]|\{\{|\}\})*\{:0\d{1,3}d\}([^{}]|\{\{|\}\})*", re.DOTALL)
UNPACKABLE = ("labels", "source")  # fields of a Clip that its entry holds in another form


@dataclass(frozen=True)
class PackedClip:
    """An entry of the manifest."""

    clip: dict[str, Any]  # fields of the Clip but for UNPACKABLE
    anomalous: list[list[int]] | None  # [first, one past the last] frames, None without labels
    original: dict[str, Any]  # path, size in bytes and mtime in ns of the source
    settings: dict[str, Any]  # those of the pack
    file: str  # path of the zip, relative to the root
    bytes: int  # size of the zip
    sha256: str  # of the zip, in hexadecimal
    frames: int  # how many the zip holds
    version: int = 1  # of the code that packed it
    ignored: list[list[int]] = field(default_factory=list)  # [first, one past the last] frames

    @property
    def is_outdated(self) -> bool:
        """Tell whether it is of a video whose frames were not counted by timestamp.

        Where the original is gone, a path with a suffix but .zip is taken for that of a video.
        """
        path = self.original["path"]
        if self.version > 1 or path.endswith(".zip") or os.path.isdir(path):
            return False
        return os.path.isfile(path) or os.path.splitext(path)[1] != ""

    def damage(self, root: Path, *, deep: bool) -> str:
        """Say how the zip differs from what was packed, in size or, if deep, in SHA-256; "" where not.

        Raises DataError where the zip cannot be read.
        """
        path = root / self.file
        with data_errors(path):
            if (size := path.stat().st_size) != self.bytes:
                return f"{path}: {size} bytes, {self.bytes} when it was packed"
            if deep and sha256(path) != self.sha256:
                return f"{path}: another SHA-256 than when it was packed"
        return ""

    def to_clip(self, root: Path) -> Clip:
        """Return the Clip, with its frames in the pack at root."""
        labels = None
        if self.anomalous is not None:
            labels = np.zeros(self.clip["num_frames"], dtype=np.uint8)
            for value, stretches in ((ANOMALOUS, self.anomalous), (IGNORED, self.ignored)):
                for first, end in stretches:
                    labels[first:end] = value
        make = SteppedClip if "number_step" in self.clip else Clip
        return make(source=str(root / self.file.removesuffix(".zip")), labels=labels, **self.clip)


@dataclass(frozen=True)
class _Table:
    """What the index says of a split."""

    root: str
    clips: list[str]
    left_out: list[str]
    one_clip_per_video: bool


def describe(clip: Clip) -> dict[str, Any]:
    """Return the fields `clip`, `anomalous` and `ignored` of the PackedClip of a clip that has its pack_step."""
    fields = {k: v for k, v in asdict(clip).items() if k not in UNPACKABLE}
    if clip.labels is None:
        return {"clip": fields, "anomalous": None}
    return {"clip": fields} | {
        name: np.flatnonzero(np.diff(np.concatenate([[0], clip.labels == value, [0]]))).reshape(-1, 2).tolist()
        for name, value in (("anomalous", ANOMALOUS), ("ignored", IGNORED))
    }


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_packed(root: str | Path) -> bool:
    """Tell whether root is a pack, finished or not."""
    return Path(root, INDEX).is_file() or Path(root, MANIFEST).is_file()


def read_manifest(root: Path, *, skip_damaged: bool = False) -> Iterator[PackedClip]:
    """Yield the entries of the manifest; of a line that a kill cut short, nothing.

    Raises DataError for a damaged line, or logs it where they are skipped, and where the file cannot be read.
    """
    path = root / MANIFEST
    if not path.is_file():
        return
    with data_errors(path), path.open("rb") as f:
        for number, line in enumerate(f, start=1):
            if not line.endswith(b"\n"):
                continue
            try:
                entry = _entry(parse_json(line))
            except (KeyError, TypeError, ValueError) as e:
                what = f"{path}: line {number} is damaged ({short_reason(e)})"
                if not skip_damaged:
                    raise DataError(f"{what}; run {COMMAND} again, which packs its clip anew") from e
                logger.warning(f"{what}: its clip is packed anew")
                continue
            yield entry


def _entry(content: Any) -> PackedClip:
    """Return an entry of the manifest. Raises KeyError, TypeError or ValueError where it is none."""
    entry = PackedClip(**content)
    make = SteppedClip if "number_step" in entry.clip else Clip
    check_types(make, {"source": "", "labels": None} | entry.clip)
    check_types(PackedClip, asdict(entry))
    clip, frames = entry.clip, entry.clip["num_frames"]
    if not (0 < frames < MOST_FRAMES and 0 < clip["fps"] < 1000 and 0 < entry.frames <= frames and entry.bytes >= 0):
        raise ValueError(f"{frames} frames at {clip['fps']} per second, {entry.frames} of them packed")
    for name, low in (("first_frame", 0), ("pack_step", 1), ("number_step", 1), ("aspect", 1), ("offset", 0)):
        if clip.get(name) is not None and not low <= clip[name] < 10**9:
            raise ValueError(f"{name} is {clip[name]}")
    for first, end in [*(entry.anomalous or ()), *entry.ignored]:
        if not 0 <= first < end <= frames:
            raise ValueError(f"frames {first} to {end} are labelled, of {frames}")
    if "frame_name" in clip and not _FRAME_NAME.fullmatch(clip["frame_name"]):
        raise ValueError(f"frame_name is {clip['frame_name']!r}")
    if not isinstance(entry.original.get("path"), str) or "\0" in entry.file + entry.original["path"]:
        raise ValueError("a path is none")
    return entry


def refuse_outdated(root: str | Path, entries: Iterable[PackedClip]) -> None:
    """Raise DataError where some of the entries of the pack at root are outdated."""
    if old := [entry.clip["name"] for entry in entries if entry.is_outdated]:
        raise DataError(
            f"{root}: a pack made before frames were counted by timestamp; the pictures of {len(old)} videos in it may "
            f"stand under wrong numbers ({first_few(old, 3)}): pack the original again into another folder"
        )


def read_index(root: Path) -> dict[str, Any] | None:
    """Return the content of pack.json; None where there is none. Raises DataError where it is damaged."""
    path = root / INDEX
    if not path.is_file():
        return None
    try:
        with data_errors(path):
            data = path.read_bytes()
        index = parse_json(data)
        for splits in index["tables"].values():
            for table in splits.values():
                check_types(_Table, table)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise DataError(
            f"{path}: damaged ({short_reason(e)}); remove it and run {COMMAND} again for each data set in it, which "
            "keeps what is packed"
        ) from e
    return index


def load_packed(name: str, root: str, split: str, splits: Sequence[str], selection: Selection) -> ClipTable:
    """Return a split of a packed data set; a split "all" that was not packed is all of `splits`, those of the data set.

    Raises DataError: packing is not finished, another data set or split, a clip without an entry, clips of videos in a
    pack of version 1.
    """
    index = read_index(Path(root))
    if index is None:
        raise DataError(f"{root}: packing is not finished; the same {COMMAND} command again goes on")
    if name not in index["tables"]:
        known = ", ".join(index["tables"])
        raise DataError(f"{root}: a pack of {known}; {COMMAND} {name} ROOT {root} adds {name} to it")
    tables = index["tables"][name]
    parts = splits if split == "all" and split not in tables else [split]
    if missing := " ".join(part for part in parts if part not in tables):
        raise DataError(
            f"{root}: split {split!r} of {name} is not packed, only {', '.join(tables)}; "
            f"{COMMAND} {name} ROOT {root} --split {missing} adds {'it' if missing == split else missing}"
        )
    tables = [tables[part] for part in parts]
    names = dict.fromkeys(clip for table in tables for clip in table["clips"])
    entries = {entry.clip["name"]: entry for entry in read_manifest(Path(root)) if entry.clip["name"] in names}

    refuse_outdated(root, (entry for clip, entry in entries.items() if clip not in selection.leave_out))

    def clip(clip_name: str) -> Clip:
        if clip_name not in entries:
            raise DataError(f"{Path(root, MANIFEST)}: no line of clip {clip_name}; run {COMMAND} again")
        return entries[clip_name].to_clip(Path(root))

    table = selection.table(name, split, names, clip, one_clip_per_video=tables[0]["one_clip_per_video"])
    table.left_out.extend(dict.fromkeys(clip for table in tables for clip in table["left_out"]))
    return table
