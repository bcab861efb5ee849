"""Checkpoint files: downloaded once, unpickled safely, unwrapped to a state dict, or refused with the remedy.

What torch.save writes holds a CRC-32 of each part, which is checked. Older pickles, safetensors and flax checkpoints
hold no sums: of these, damage is found in their structure alone, not within the values of a tensor.

A weights file of ours is {"model": state dict, "spec": what `models.load` builds the model from}, or what
`python -m models.export` makes of it.
"""

import argparse
import hashlib
import math
import os
import pickle
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.registry import SPEC_VERSION
from models.weights import container, hf_folder
from models.weights.errors import CheckpointError
from models.weights.kinds import explain_unreadable, foreign_kind
from models.weights.layouts import MODEL_KEYS, find_state, is_state_dict
from models.weights.plain import is_harmless, read_plain
from utils.damage import zip_damage
from utils.event_rule import check_operating_point
from utils.exits import explain
from utils.files import temporary_beside
from utils.text import first_few, not_utf8

_LARGE = 1 << 30  # bytes of a file whose tensors stay in it until they are used: it may hold more than one model
_LONGEST_NAME = 200  # characters of a file name; systems allow 255 with what is put before and behind


@dataclass(frozen=True)
class Checkpoint:
    """A state dict as read.

    path: the file or URL.
    wrapper: the key it was under; "" if none.
    state: the file's keys to tensors.
    epoch, family: what the file says of itself, if it does.
    model: its registered name, in a file of ours.
    spec: see `read_spec`.
    beside: keys of the file that stand flat beside the weights and are none.
    """

    path: str
    wrapper: str
    state: dict[str, Tensor]
    epoch: int | None = None
    family: str | None = None
    model: str | None = None
    spec: dict | None = None
    beside: tuple[str, ...] = ()


def fetch(path_or_url: str) -> str:
    """Return a local path for a path or an http(s) URL; a URL is downloaded once into torch.hub's cache.

    Raises CheckpointError where the download fails, or the path is none or behind a folder that is closed.
    """
    if not path_or_url.startswith(("http://", "https://")):
        try:
            os.stat(path_or_url)
        except (FileNotFoundError, NotADirectoryError):
            pass  # said where it is read
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{path_or_url}: cannot be read ({getattr(e, 'strerror', None) or e})") from e
        return path_or_url
    encoded = path_or_url.encode(errors="surrogateescape")
    digest = hashlib.sha256(encoded).hexdigest()[:8]  # files of the same name are told apart
    name = re.sub(r"[^ -~]", "", path_or_url.partition("?")[0].split("/")[-1])[-_LONGEST_NAME:]
    target = _downloads() / f"{digest}-{name}"
    if target.exists():
        return str(target)
    partial = temporary_beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(path_or_url, timeout=60) as response, partial.open("wb") as f:
            shutil.copyfileobj(response, f)
            announced = response.headers.get("Content-Length")
        if announced and partial.stat().st_size != int(announced):
            raise OSError(f"{partial.stat().st_size} of {announced} bytes came")
        partial.replace(target)
    except (OSError, HTTPException, ValueError) as e:
        if explain(e):  # the disk's fault, not the download's
            raise CheckpointError(
                f"{target}: cannot be written ({e.strerror}); set TORCH_HOME to another folder"
            ) from e
        raise CheckpointError(f"{path_or_url}: download failed ({e}); fetch it by hand and give its path") from e
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return str(target)


def _downloads() -> Path:
    return Path(torch.hub.get_dir(), "checkpoints")


def _safe_types() -> list:
    """List what published scripts pickle beside tensors: their arguments, and NumPy's scalars in the optimizer."""
    dtypes = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    scalar = np.float64(0).__reduce__()[0]
    scalars = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # NumPy 1 and 2 files
    return [argparse.Namespace, np.dtype, *dtypes, *scalars]


def _load(file: Path, *, mapped: bool) -> object:
    """Return the content of a PyTorch or safetensors file. mapped: tensors stay in the file, unread, where they can."""
    if kind := container.kind_of(file):
        record = container.read_record(file, kind, check=not mapped)
        if kind != container.SAFETENSORS:
            return {"spec": record, "program": kind}
        if mapped and record is not None:
            return {"spec": record}
        tensors = load_file(file)
        if record is not None:
            return {"model": tensors, "spec": record}
        if not mapped:
            container.check_folder(file, tensors)
        return tensors
    with file.open("rb") as f:
        is_zip = f.read(2) == b"PK"
    if is_zip and (damage := zip_damage(file, leave_out=r".*/data/\d+" if mapped else "")):
        raise ValueError(damage)
    try:
        with torch.serialization.safe_globals(_safe_types()):
            return torch.load(
                str(file),
                map_location="cpu",
                weights_only=True,
                mmap=is_zip and (mapped or file.stat().st_size > _LARGE),
            )
    except pickle.UnpicklingError:
        if is_zip and is_harmless(file):
            return read_plain(file)
        raise


def _read(path: str, *, mapped: bool = False) -> dict:
    """Return the dictionary in a file, or in all parts that an index names, which may be that of a folder.

    Raises CheckpointError: missing, empty, truncated or foreign file, parts that are not those of their index.
    """
    file = Path(fetch(str(path)))
    if odd := not_utf8(str(file)):
        raise CheckpointError(odd)
    if file.is_dir():
        file = hf_folder.weights_file(file)
        path = str(file)
    if file.name.endswith(hf_folder.INDEX) and file.is_file():
        return _read_parts(file, mapped=mapped)
    if not file.is_file():
        what = "this is a pipe or a device, not a file" if file.exists() else "no such checkpoint file"
        told = f" (a link to {os.readlink(file)})" if file.is_symlink() else ""
        raise CheckpointError(f"{path}: {what}{told}")
    if file.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; download or copy it again")
    if not container.kind_of(file) and (foreign := foreign_kind(file)):
        raise CheckpointError(f"{path}: {foreign}{_forget(file)}")
    try:
        content = _load(file, mapped=mapped)
    except container.ExportedFileError as e:
        raise CheckpointError(f"{path}: {e}") from e
    except Exception as e:  # torch.load raises a dozen types, depending on where the bytes go wrong
        raise CheckpointError(f"{path}: {explain_unreadable(file, e)}{_forget(file)}") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return content


def _forget(file: Path) -> str:
    """Remove a file that does not load from the cache of downloads, and say so; "" for any other file."""
    if file.parent != _downloads() or not re.match("[0-9a-f]{8}-", file.name):
        return ""
    with suppress(OSError):
        file.unlink()
        return f". It was downloaded to {file}, where it is removed: the next run downloads it again"
    return f". It was downloaded to {file}; remove that before the next run"


def _read_parts(index: Path, *, mapped: bool) -> dict:
    """Return the dictionary in all parts that an index names."""
    content: dict = {}
    for part, keys in hf_folder.parts_of(index).items():
        held = _read(str(part), mapped=mapped)
        if lacking := keys - held.keys():
            names = first_few(sorted(lacking), 4)
            raise CheckpointError(f"{part}: lacks {names}, which {index.name} says it has; copy all parts again")
        if twice := held.keys() & content.keys():
            names = first_few(sorted(twice), 4)
            raise CheckpointError(f"{part}: has {names}, which another part has too; copy all parts again")
        content |= held
    return content


def read_checkpoint(path: str, model_key: str = MODEL_KEYS) -> Checkpoint:
    """Read a state dict to the CPU from a PyTorch or safetensors file, unpickling tensors and plain types only.

    Args:
        path: file or URL, or a folder, see `models.weights.hf_folder`.
        model_key: names separated by |, with dots where they are deep; the first one present is unwrapped, else the
            file itself is a state dict, or, with the default, the one dictionary in it that is.

    Raises CheckpointError: missing, empty, truncated or foreign file, no state dict inside, a damaged spec.
    """
    content = _read(path)
    if content.get("program") in (container.ONNX, container.PROGRAM):
        raise CheckpointError(
            f"{path}: an exported program, which runs as it is (models.load) and cannot be trained or changed; give "
            "the weights file that it was exported from"
        )
    if model_key == MODEL_KEYS and "ranks" in content and content.get("model_ema"):
        raise CheckpointError(
            f"{path}: the state of a run that averages its weights: use its checkpoint-<epoch>.pth, or name the "
            "average with --model_key model_ema, the weights themselves with --model_key model"
        )
    wrapper, state, beside = find_state(content, model_key, str(path))
    spec = _checked_spec(content, path)
    about = {**(spec or {}), **content} if wrapper or beside else {}
    epoch, family = about.get("epoch"), about.get("family")
    return Checkpoint(
        str(path),
        wrapper,
        dict(state),
        epoch=epoch if isinstance(epoch, int) else None,
        family=family if isinstance(family, str) else None,
        model=spec["model"] if spec else getattr(state, "_metadata", {}).get("", {}).get("model"),
        spec=spec,
        beside=tuple(map(str, beside)),
    )


def read_spec(path_or_url: str) -> dict | None:
    """Return the spec of a weights file of ours; None where the file has none. Of a file as torch.save writes
    it, the tensors are not read.

    A folder has none: see `read_hints`. Raises CheckpointError: an unreadable file, a damaged spec.
    """
    if Path(fetch(path_or_url)).is_dir():
        hf_folder.weights_file(Path(path_or_url))
        return None
    return _checked_spec(_read(path_or_url, mapped=True), path_or_url)


def _is_name(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_positive(value: object) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


# key -> what its value, or each part of it, must be. All are required. A field that comes later does not belong here:
# check it where it is present, and let build_from_spec take the value that files without it mean.
_SPEC = {
    "model": _is_name,
    "num_frames": _is_count,
    "view_fps": _is_positive,
    "input_size": _is_count,
    "tubelet_size": _is_count,
    "gelu": ("erf", "tanh").__contains__,
    "final_reduction": _is_name,
    "pos_embed": _is_name,
    "mean": _is_number,
    "std": _is_positive,
    "classes": _is_name,
}
_LISTS = {"mean": 3, "std": 3, "classes": None}  # key -> length
_AUTOENCODER = {"decoder_depth": _is_count, "normalize_target": lambda value: isinstance(value, bool)}  # has both


def _checked_spec(content: dict, path: str) -> dict | None:
    """Return the spec in the content of a file, or None. Raises CheckpointError where it is not one."""
    if "spec" not in content or is_state_dict(content):
        return None
    spec = content["spec"]
    if isinstance(spec, dict) and "export" in spec:
        spec = {key: value for key, value in spec.items() if key != "export"}  # of the file it was exported from
    remedy = (
        "take another copy, or its weights alone (torch.save({'model': torch.load(FILE)['model']}, NEW_FILE)), with "
        "--model, --num_frames, --view_fps, --input_size, --tubelet_size, --gelu and --final_reduction of the run's "
        "args.json"
    )
    if isinstance(spec, dict) and not _SPEC.keys() & spec.keys():
        return None  # another code's
    if isinstance(spec, dict) and spec.get("version", SPEC_VERSION) != SPEC_VERSION:
        raise CheckpointError(
            f"{path}: its spec is of version {spec['version']}, this code knows {SPEC_VERSION}: update it"
        )
    if not isinstance(spec, dict):
        raise CheckpointError(f"{path}: its spec is a {type(spec).__name__}, not a dictionary; {remedy}")
    rules = _SPEC | (_AUTOENCODER if _AUTOENCODER.keys() & spec.keys() else {})
    for key, is_right in rules.items():
        if key not in spec:
            raise CheckpointError(f"{path}: its spec lacks {key}; {remedy}")
        value = spec[key]
        parts = value if key in _LISTS else [value]
        right = (
            isinstance(parts, list | tuple)
            and all(map(is_right, parts))
            and len(parts) == (_LISTS.get(key) or len(parts))
        )
        if not right:
            raise CheckpointError(f"{path}: its spec says {key} = {value!r}; {remedy}")
    if spec.get("head", "linear") not in ("linear", "attentive"):
        raise CheckpointError(f"{path}: its spec says head = {spec['head']!r}, not linear or attentive; {remedy}")
    if "operating_point" in spec:
        try:
            check_operating_point(spec["operating_point"])
        except ValueError as e:
            raise CheckpointError(f"{path}: its spec is damaged: {e}; {remedy}") from e
    return spec
