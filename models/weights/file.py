"""Checkpoint files: downloaded once, unpickled safely, unwrapped to a state dict, or refused with the remedy."""

import argparse
import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

MODEL_KEYS = "model|module|state_dict|model_state"
CONVERT_VIVIT = "convert it with other_models/ViViT/ckpt_vivit.py"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file, what is wrong and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """A state dict as read: wrapper is the key it was under ("" if none), state maps the file's keys to tensors.

    epoch, family: what the file says of itself, if it does. model: its registered name, in a file of ours.
    """

    path: str
    wrapper: str
    state: dict[str, Tensor]
    epoch: int | None = None
    family: str | None = None
    model: str | None = None


def brief(keys: Iterable[str], limit: int = 4) -> str:
    """The first keys, and how many there are."""
    keys = list(keys)
    return ", ".join(keys[:limit]) + (f", ... ({len(keys)} in all)" if len(keys) > limit else "")


def fetch(path_or_url: str) -> str:
    """A local path for a path or an http(s) URL; a URL is downloaded once into torch.hub's cache.

    Raises CheckpointError where the download fails.
    """
    if not path_or_url.startswith(("http://", "https://")):
        return path_or_url
    digest = hashlib.sha256(path_or_url.encode()).hexdigest()[:8]  # files of the same name are told apart
    target = Path(torch.hub.get_dir(), "checkpoints", f"{digest}-{path_or_url.partition('?')[0].split('/')[-1]}")
    if target.exists():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with urlopen(path_or_url, timeout=60) as response, partial.open("wb") as f:
            shutil.copyfileobj(response, f)
            announced = response.headers.get("Content-Length")
        if announced and partial.stat().st_size != int(announced):
            raise OSError(f"{partial.stat().st_size} of {announced} bytes came")
        partial.replace(target)
    except (OSError, HTTPException, ValueError) as e:
        raise CheckpointError(f"{path_or_url}: download failed ({e}); fetch it by hand and give its path") from e
    finally:
        partial.unlink(missing_ok=True)
    return str(target)


def _safe_types() -> list:
    """What published training scripts pickle beside tensors: their arguments, and NumPy's scalars in the optimizer."""
    dtypes = [type(np.dtype(t)) for t in (np.float64, np.float32, np.int64, np.bool_)]
    scalar = np.float64(0).__reduce__()[0]
    scalars = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # NumPy 1 and 2 files
    return [argparse.Namespace, np.dtype, *dtypes, *scalars]


def is_safetensors(head: bytes) -> bool:
    """Whether a file with these 9 bytes at its beginning is one: the length of a JSON header, and the header."""
    return head[8:9] == b"{"


def is_flax(head: bytes) -> bool:
    """Whether a file with these 9 bytes at its beginning is a flax checkpoint: a msgpack map. No pickle begins so."""
    return bool(head) and not is_safetensors(head) and (0x80 < head[0] <= 0x8F or head[0] in (0xDE, 0xDF))


def _explain_unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as f:
        head = f.read(512).lstrip()
    if head[:1] == b"<":
        return "this is an HTML or XML page saved under the name of a checkpoint; download the file itself"
    if head.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the weights; run `git lfs pull`"
    if is_flax(head):
        return f"this is a flax checkpoint; if it is ViViT's, {CONVERT_VIVIT}"
    if "Unsupported global" in str(error) or "Unsupported class" in str(error):
        found = re.search(r"GLOBAL (\S+)|class (\S+)", str(error))
        name = next(filter(None, found.groups()), "a class") if found else "a class"
        return (
            f"it pickles {name}, which is refused because unpickling can run code; if you trust the file, re-save its "
            "weights alone: torch.save(torch.load(FILE, weights_only=False)['model'], NEW_FILE)"
        )
    lines = [] if "weights_only" in str(error) else str(error).splitlines()  # no reason, but advice to unpickle all
    reason = (lines or [type(error).__name__])[0][:120]
    return f"truncated, or not a PyTorch checkpoint ({reason}); download or copy it again"


def _load(file: Path) -> object:
    """The content of a PyTorch or safetensors file."""
    with file.open("rb") as f:
        head = f.read(9)
    if is_safetensors(head):
        return load_file(file)
    with torch.serialization.safe_globals(_safe_types()):
        return torch.load(file, map_location="cpu", weights_only=True)


def read_checkpoint(path: str, model_key: str = MODEL_KEYS) -> Checkpoint:
    """Read a state dict to the CPU from a PyTorch or safetensors file, unpickling tensors and plain types only.

    Args:
        path: file or URL. model_key: names separated by |; the first one present is unwrapped, else the file itself
            must be a state dict.

    Raises CheckpointError: missing, empty, truncated or foreign file, no state dict inside.
    """
    file = Path(fetch(path))
    if not file.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    if file.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; download or copy it again")
    try:
        content = _load(file)
    except Exception as e:  # torch.load raises a dozen types, depending on where the bytes go wrong
        raise CheckpointError(f"{path}: {_explain_unreadable(file, e)}") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    wrapper = next((k for k in model_key.split("|") if _is_state_dict(content.get(k))), "")
    state = content[wrapper] if wrapper else content
    if not _is_state_dict(state):
        raise CheckpointError(
            f"{path}: no weights under {' or '.join(model_key.split('|'))}; the file's keys are "
            f"{brief(map(str, content))}. Name the right one with --model_key"
        )
    about = {name: content.get(name) if wrapper else None for name in ("epoch", "family")}
    return Checkpoint(
        str(path),
        wrapper,
        dict(state),
        epoch=about["epoch"] if isinstance(about["epoch"], int) else None,
        family=about["family"] if isinstance(about["family"], str) else None,
        model=getattr(state, "_metadata", {}).get("", {}).get("model"),
    )


def _is_state_dict(value: object) -> bool:
    """Whether this is a dictionary of names to dense tensors, not an empty one."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
        and all(v.layout == torch.strided and not v.is_quantized and not v.is_meta for v in value.values())
    )
