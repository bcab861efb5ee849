"""DoTA (Detection of Traffic Anomaly, github.com/MoonBlvd/Detection-of-Traffic-Anomaly): annotation files -> clips.

ROOT/dataset/train_split.txt, val_split.txt, half_train_split.txt    one clip name per line
ROOT/dataset/metadata_train.json, metadata_val.json                  category of each clip, and "recording", which DoTA
                                                                     has not: there it is in the clip's name
ROOT/dataset/annotations/<clip>.json                                 a label for each frame
ROOT/frames/<clip>/images.zip  or  ROOT/frames/<clip>/images/        000000.jpg, 000001.jpg, ... at 10 fps
"""

from pathlib import Path

import numpy as np

from datasets.clips import Clip, ClipTable, DataError, Selection
from datasets.formats.text import first_repeated, read_split
from utils.damage import parse_json
from utils.text import short_reason, unicode_name

FPS = 10.0
CATEGORIES = {  # accident_id -> name (code of the DoTA paper)
    1: "start_stop_or_stationary",  # ST
    2: "moving_ahead_or_waiting",  # AH
    3: "lateral",  # LA
    4: "oncoming",  # OC
    5: "turning",  # TC
    6: "pedestrian",  # VP
    7: "obstacle",  # VO
    8: "leave_to_right",  # OO
    9: "leave_to_left",  # OO
    10: "unknown",  # UK
}
CODES = dict(  # of the DoTA paper; both ways of leaving the road are one
    zip(CATEGORIES.values(), ("ST", "AH", "LA", "OC", "TC", "VP", "VO", "OO", "OO", "UK"), strict=True)
)
SPLIT_FILES = {  # variant -> {split: its files under dataset/}; every variant is validated on the full val split
    "DoTA": {"train": ("train_split.txt",), "val": ("val_split.txt",), "all": ("train_split.txt", "val_split.txt")},
    "DoTA_half": {"train": ("half_train_split.txt",), "val": ("val_split.txt",)},
}
HINT = "DoTA's repository (dataset/)"
_HALF = "huggingface.co/tue-mps/simple-tad (datasets/DoTA); or make it with python -m datasets.tools.prepare half"
_HINTS = {"half_train_split.txt": _HALF}


def load_dota(name: str, root: str, split: str, selection: Selection) -> ClipTable:
    """Return the clips of a split: train, val or all (train and val) of "DoTA", train or val of "DoTA_half".

    Frame counts and labels come from the annotations (accident_id > 0 is anomalous), the category from the metadata.
    Raises DataError: a file missing or malformed, an annotation whose frames are not 0, 1, 2, ...
    """
    splits = SPLIT_FILES[name]
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
    folder = Path(root, "dataset")
    names = [clip for file in splits[split] for clip in read_split(folder / file, _HINTS.get(file, HINT))]
    if repeated := first_repeated(names):
        raise DataError(f"{folder}: clip {repeated} is in {' and in '.join(splits[split])}; it must be in one of them")
    metadata = read_metadata(root)
    return selection.table(name, split, names, lambda clip: _clip(Path(root), clip, metadata.get(clip)))


def video_of(name: str) -> str:
    """Return the YouTube video that a clip was cut from."""
    return name.rpartition("_")[0]


def read_metadata(root: str) -> dict[str, dict]:
    """Return {clip: {"anomaly_class": "ego: lateral", "anomaly_start", "num_frames", ...}} of both subsets.

    It is empty where neither metadata file exists: categories then come from the annotations alone. Raises DataError
    where a file is malformed or a clip has no class.
    """
    metadata: dict[str, dict] = {}
    for subset in ("train", "val"):
        path = Path(root, "dataset", f"metadata_{subset}.json")
        if path.is_file():
            metadata |= _read_json(path)
            for name, entry in metadata.items():
                if not isinstance(entry, dict) or not isinstance(entry.get("anomaly_class"), str):
                    raise DataError(f"{path}: clip {name} has no anomaly_class")
    return metadata


def category_of(entry: dict) -> str:
    """Return the category of an entry of the metadata, which has it as "ego: leave_to_right"."""
    return unicode_name(entry["anomaly_class"].split(":")[-1].strip())


def _read_json(path: Path) -> dict:
    try:
        content = parse_json(path.read_bytes())
    except OSError as e:
        remedy = "DoTA_annotations.zip goes into dataset/annotations/"
        raise DataError(f"{path}: cannot be read ({e.strerror}); {remedy}") from e
    except ValueError as e:
        raise DataError(f"{path}: not valid JSON ({e})") from e
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object")
    return content


def _id(value: object) -> int:
    """Return an accident_id, or a flag. Raises ValueError for what is neither a whole number nor true or false."""
    if not isinstance(value, int | str) and not (isinstance(value, float) and value.is_integer()):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def _clip(root: Path, name: str, metadata: dict | None) -> Clip:
    path = root / "dataset" / "annotations" / f"{name}.json"
    annotation = _read_json(path)
    try:
        rows = sorted((int(Path(row["image_path"]).stem), _id(row["accident_id"]) > 0) for row in annotation["labels"])
        ego, night = (bool(_id(annotation[key])) for key in ("ego_involve", "night"))
        kind = annotation.get("accident_id")
        category = None if kind is None else CATEGORIES.get(_id(kind))
    except (KeyError, TypeError, ValueError) as e:
        reason = f"{type(e).__name__}: {short_reason(e)}"
        raise DataError(f"{path}: not a DoTA annotation: {reason}; take it from the archive again") from e
    if [number for number, _ in rows] != list(range(len(rows))):
        raise DataError(f"{path}: the labelled frames are not 0 to {len(rows) - 1}, one each")
    recording = video_of(name)
    if metadata is not None:
        category, recording = category_of(metadata), str(metadata.get("recording", recording))
    return Clip(
        name=name,
        source=str(root / "frames" / name / "images"),
        num_frames=len(rows),
        fps=FPS,
        labels=np.array([anomalous for _, anomalous in rows], dtype=np.uint8),
        category=category,
        ego=ego,
        night=night,
        recording=recording,
    )
