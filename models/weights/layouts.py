"""Where in a file the weights lie: under which key, however deep, or flat beside a few other things."""

import re
from typing import Any

import torch
from torch import Tensor

from models.weights.errors import CheckpointError
from utils.text import first_few

MODEL_KEYS = "model|module|state_dict|model_state"
_DEEPEST = 8  # dictionaries within dictionaries
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
        if mixed := _mixed(_at(content, name)):
            return name, *mixed
    if is_state_dict(content):
        return "", content, []
    if model_key == MODEL_KEYS:
        found, mixed = _places(content), _mixed(content)
        if mixed and not found:
            return "", *mixed
        if averages := {name: state for name, state in found.items() if re.fullmatch(_AVERAGES, name)}:
            found = averages
        if len(found) == 1 and not mixed:
            return *next(iter(found.items())), []
        if found:
            told = ", ".join(f"--model_key {name}" for name in found)
            raise CheckpointError(f"{path}: holds weights in {len(found)} places; name one: {told}")
    keys = f"the file's keys are {first_few(content, 4)}" if content else "the file holds an empty dictionary"
    raise CheckpointError(f"{path}: no weights under {' or '.join(names)}; {keys}. {_why_none(content, names)}")


def _mixed(value: object) -> tuple[dict[str, Tensor], list[str]] | None:
    """Return (the weights, keys of what stands beside them) of a dictionary; None where it may hold more weights."""
    if is_state_dict(value):
        return value, []
    if not isinstance(value, dict):
        return None
    weights = {k: v for k, v in value.items() if isinstance(v, Tensor)}
    beside = [k for k in value if k not in weights]
    named = is_state_dict(weights) and any("." in k for k in weights)
    return (weights, beside) if named and all(map(_is_beside, beside)) else None


def _is_beside(key: object) -> bool:
    return isinstance(key, str) and bool(_BESIDE.fullmatch(key))


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


def _why_none(content: dict, names: list[str]) -> str:
    """Say what stands in place of weights, where that is known, and what to do."""
    for name, value in content.items():
        kinds = {type(v).__name__ for v in value.values()} if isinstance(value, dict) else set()
        if kinds & {"ndarray", "Passed"} and not kinds & {"Tensor"} and any("." in str(key) for key in value):
            return f"Under {name} are arrays of NumPy, not tensors: save it with torch.from_numpy of each"
    for name in names:
        value = _at(content, name)
        if isinstance(value, dict) and (why := "there is nothing" if not value else _why_not(value)):
            return f"Under {name}, {why}"
    return _why_not(content) or "Name the right one with --model_key"


def _why_not(value: dict) -> str:
    """Say why a dictionary with tensors in it is not one of weights; "" of one without tensors."""
    if not any(isinstance(v, Tensor) for v in value.values()):
        return ""
    for key, tensor in value.items():
        if not isinstance(key, str):
            return f"keys are of type {type(key).__name__}, no names of tensors: save model.state_dict()"
        if not isinstance(tensor, Tensor):
            if not _is_beside(key):
                return f"{key} is no tensor: take it out"
        elif tensor.is_meta:
            return f"{key} has no values (it is on the device meta): save the model after it has them"
        elif tensor.is_quantized:
            return f"{key} is quantised: save its dequantize()"
        elif tensor.layout != torch.strided:
            return f"{key} is sparse: save its to_dense()"
    return ""


def is_state_dict(value: object) -> bool:
    """Return whether this is a dictionary of names to dense tensors, not an empty one."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
        and all(v.layout == torch.strided and not v.is_quantized and not v.is_meta for v in value.values())
    )
