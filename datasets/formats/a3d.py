"""A3D, AnAn Accident Detection (github.com/MoonBlvd/tad-IROS2019): a pickle of labels -> clips.

ROOT/A3D_labels.pkl or ROOT/datasets/A3D_labels.pkl    {clip: {"video_name", "target": 0/1 of each frame, ...}}
ROOT/frames/<clip>/images.zip or images/               000001.jpg, 000002.jpg, ... at 10 fps
Or, as UString (github.com/Cogito2012/UString) cut it: ROOT/frame_labels/<clip>.txt, lines "<frame> <0 or 1>", at 20 fps

Where: the labels are in the repository; the videos are YouTube's, and most are gone. There is one split, all;
`prepare split` makes others. The pickle is read without running what it names: arrays and plain types alone.

What is known to be wrong: two clips have no anomaly, and 430 are still anomalous in their last frame; frames are
numbered from 1 where DoTA numbers them from 0. Clips come from 80 source videos, none of which is in DoTA.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from datasets.clips import Clip, ClipTable, DataError, Selection, data_errors
from datasets.formats.shipped import refuse_split
from datasets.formats.text import read_lines
from utils.damage import stand_in
from utils.text import short_reason

FPS, USTRING_FPS = 10.0, 20.0
_LABELS = {"0": 0, "1": 1}
_ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
    (f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")
}


class _Plain(pickle.Unpickler):
    """Reads arrays and plain types, and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a pickle names. Raises pickle.UnpicklingError where that is not of an array."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which may run code")
        if name == "_reconstruct" or name == "scalar":
            module = np.zeros(0).__reduce__()[0].__module__  # where this version of NumPy keeps it
        return super().find_class(module, name)


def load_a3d(root: str, split: str, selection: Selection) -> ClipTable:
    """Return all clips, split "all". Raises DataError: labels missing, malformed or neither 0 nor 1."""
    refuse_split("A3D", split, ("all",), "; python -m datasets.tools.prepare split makes train and val of it")
    path = next(
        (p for p in (Path(root, "A3D_labels.pkl"), Path(root, "datasets", "A3D_labels.pkl")) if p.is_file()), None
    )
    if path is None and Path(root, "frame_labels").is_dir():
        files = {file.stem: file for file in sorted(Path(root, "frame_labels").glob("*.txt"))}
        return selection.table("A3D", split, files, lambda name: _of_lines(root, name, files[name]))
    if path is None:
        raise DataError(f"{root}: no A3D_labels.pkl, nor a folder frame_labels; the first is in MoonBlvd/tad-IROS2019")
    entries = _read_pickle(path)
    return selection.table("A3D", split, entries, lambda name: _of_entry(root, name, entries[name], path))


def _read_pickle(path: Path) -> dict[str, Any]:
    with data_errors(path):
        data = path.read_bytes()
    if other := stand_in(data[:512]):
        raise DataError(f"{path}: {other}")
    try:
        content = _Plain(io.BytesIO(data), encoding="latin1").load()  # as for one that Python 2 wrote
    except Exception as e:  # damage may raise almost anything
        raise DataError(f"{path}: not A3D's labels ({short_reason(e)}); take the file from the repository again") from e
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise DataError(f"{path}: expected a dictionary of clips; take the file from the repository again")
    return {str(name): entry for name, entry in content.items()}


def _of_entry(root: str, name: str, entry: dict[str, Any], path: Path) -> Clip:
    try:
        labels, ego = np.asarray(entry["target"]).reshape(-1), bool(entry["ego_envolve"])
        frames = int(entry["clip_end"]) - int(entry["clip_start"]) + 1
    except (KeyError, TypeError, ValueError) as e:
        raise DataError(f"{path}: clip {name}: {type(e).__name__}: {short_reason(e)}") from e
    if len(labels) != frames:
        raise DataError(f"{path}: clip {name}: {len(labels)} labels, but clip_start to clip_end are {frames} frames")
    recording = str(entry.get("video_name", name.rpartition("_")[0]))
    groups = {"ego_only": str(int(bool(entry["ego_only"])))} if "ego_only" in entry else {}
    return _clip(root, name, labels, f"{path}: clip {name}", FPS, ego=ego, recording=recording, groups=groups)


def _of_lines(root: str, name: str, path: Path) -> Clip:
    try:
        rows = sorted((int(frame), _LABELS[label]) for frame, label in (line.split() for line in read_lines(path)))
    except (KeyError, ValueError) as e:
        raise DataError(f"{path}: lines are '<frame> <0 or 1>' ({type(e).__name__}: {short_reason(e)})") from e
    if [frame for frame, _ in rows] != list(range(len(rows))):
        raise DataError(f"{path}: the labelled frames are not 0 to {len(rows) - 1}, one each")
    labels = np.array([label for _, label in rows], dtype=np.int64)
    video = name.rsplit("_", 2)[0]  # the names end in the number of the clip and of the cut
    return _clip(root, name, labels, str(path), USTRING_FPS, recording=video)


def _clip(root: str, name: str, labels: np.ndarray, where: str, fps: float, **known: Any) -> Clip:
    if not len(labels) or not np.isin(labels, (0, 1)).all():
        raise DataError(f"{where}: a label that is neither 0 nor 1, or none at all")
    first = np.flatnonzero(labels)[:1]
    return Clip(
        name=name,
        source=str(Path(root, "frames", name, "images")),
        num_frames=len(labels),
        fps=fps,
        first_frame=1,
        labels=labels.astype(np.uint8),
        alert_time=None,
        event_time=float(first[0] / fps) if len(first) else None,
        **known,
    )
