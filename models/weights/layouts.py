"""Where in a file the weights lie: under which key, however deep, or flat beside a few other things."""

import re
from typing import Any

import torch
from torch import Tensor

from models.weights.errors import CheckpointError
from utils.text import first_few

MODEL_KEYS = "model|module|state_dict|model_state"
_DEEPEST = 3  # dictionaries within dictionaries
_AVERAGES = r"(.+\.)?(target_encoder|ema_encoder)"  # V-JEPA's, which stand beside the encoder they average
# What trainers write flat beside the weights; no tensor of a model here is called like it.
_BESIDE = re.compile(
    r"_?(epochs?|steps?|global_step|iter(ation)?s?|lr|loss\w*|acc\w*|auc\w*|best\w*|metrics?|args|cfg|config|opts?|options"
    r"|hparams|hyper_parameters|optim\w*|(lr_)?sched\w*|scaler|seed|rng\w*|version|arch|name|family|time|date|comment"
    r"|meta|info|history|classes|num_classes)"
)


def find_state(content: dict, model_key: str, path: str) -> tuple[str, dict[str, Tensor], list[str]]:
    """Return (the key that the weights are under, with dots where it is deep, or ""; the weights; keys beside them).

    Keys of `model_key` come first, then the file itself, then any dictionary of weights in it, if there is one alone.
    Raises CheckpointError where there is none, or several and nothing says which.
    """
    names = model_key.split("|")
    for name in names:
        if is_state_dict(value := _at(content, name)):
            return name, value, []
    if is_state_dict(content):
        return "", content, []
    if model_key == MODEL_KEYS:
        flat = {k: v for k, v in content.items() if isinstance(k, str) and "." in k} or {}
        beside = [k for k in content if k not in flat]
        found = _places(content)
        if is_state_dict(flat) and not found and all(isinstance(k, str) and _BESIDE.fullmatch(k) for k in beside):
            return "", flat, beside
        if averages := {name: state for name, state in found.items() if re.fullmatch(_AVERAGES, name)}:
            found = averages
        if len(found) == 1 and not is_state_dict(flat):
            return *next(iter(found.items())), []
        if found:
            told = ", ".join(f"--model_key {name}" for name in found)
            raise CheckpointError(f"{path}: holds weights in {len(found)} places; name one: {told}")
    raise CheckpointError(
        f"{path}: no weights under {' or '.join(names)}; the file's keys are {first_few(content, 4)}. "
        f"{_why_none(content)}Name the right one with --model_key"
    )


def _at(content: dict, name: str) -> Any:
    """Return what is under a key, or under keys with dots between, or None."""
    if name in content:
        return content[name]
    head, _, rest = name.partition(".")
    inner = content.get(head)
    return _at(inner, rest) if rest and isinstance(inner, dict) else None


def _places(content: dict, prefix: str = "", depth: int = 1) -> dict[str, dict]:
    """Return {key with dots: weights} of all dictionaries of weights within."""
    found = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, dict):
            continue
        if is_state_dict(value) and any("." in name for name in value):
            found[f"{prefix}{key}"] = value
        elif depth < _DEEPEST:
            found |= _places(value, f"{prefix}{key}.", depth + 1)
    return found


def _why_none(content: dict) -> str:
    """Say what stands in place of weights, where that is known."""
    for name, value in content.items():
        kinds = {type(v).__name__ for v in value.values()} if isinstance(value, dict) else set()
        if kinds & {"ndarray", "Passed"} and isinstance(value, dict) and any("." in str(key) for key in value):
            return f"Under {name} are arrays of NumPy, not tensors: save it with torch.from_numpy of each. "
    return ""


def is_state_dict(value: object) -> bool:
    """Return whether this is a dictionary of names to dense tensors, not an empty one."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
        and all(v.layout == torch.strided and not v.is_quantized and not v.is_meta for v in value.values())
    )
