"""Folders as save_pretrained of Hugging Face's transformers writes them: their weights files, and what their JSON says.

config.json                      what the model is
model.safetensors                its weights; or pytorch_model.bin; or parts of either, with
model.safetensors.index.json     {"weight_map": key -> the part that has it}
preprocessor_config.json         how pictures are made ready; V-JEPA 2 has a video_preprocessor_config.json
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from models.weights.errors import CheckpointError
from utils.text import first_few, short_reason

INDEX = ".index.json"
_WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
_OTHERS = {  # file -> why its folder holds no weights that are read
    "adapter_config.json": "an adapter, not a model: merge it into its model (merge_and_unload) and save that",
    "tf_model.h5": "weights of TensorFlow alone; save them with transformers as model.safetensors",
    "flax_model.msgpack": "weights of flax alone; save them with transformers as model.safetensors",
}
_PROCESSORS = ("video_preprocessor_config.json", "preprocessor_config.json")
_GELU = {"gelu": "erf", "gelu_fast": "tanh", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
FAMILIES = ("videomae", "vivit", "vjepa2")  # model_type in config.json


def weights_file(folder: Path) -> Path:
    """Return the file in a folder that holds the weights, or the index of their parts.

    Raises CheckpointError where there is none.
    """
    names = _names(folder)
    if name := next((name for name in _WEIGHTS if name in names), None):
        return folder / name
    if why := next((why for name, why in _OTHERS.items() if name in names), None):
        raise CheckpointError(f"{folder}: a folder with {why}")
    if "state.pth" in names:
        weights = _weights_of_run(folder.absolute().parent)
        raise CheckpointError(
            f"{folder}: the state of a run, which its own command goes on from; its weights: {weights}"
        )
    if "args.json" in names:
        raise CheckpointError(f"{folder}: the folder of a run; its weights: {_weights_of_run(folder)}")
    held = first_few(names, 4) if names else "nothing"
    raise CheckpointError(
        f"{folder}: this is a folder without {' or '.join(_WEIGHTS[::2])}; it holds {held}. Give a weights file, "
        "checkpoint-<epoch>.pth of a run of ours"
    )


def parts_of(index: Path) -> dict[Path, set[str]]:
    """Return {file: the keys that an index says it has}. Raises CheckpointError: a damaged index, an absent part."""
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: has no weight_map of keys to files; it is no index of weights")
    parts: dict[Path, set[str]] = {}
    for key, name in places.items():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise CheckpointError(f"{index}: {key} is said to be in {name!r}, which is no file beside it")
        parts.setdefault(index.with_name(name), set()).add(key)
    if absent := [part.name for part in parts if not os.path.isfile(part)]:
        raise CheckpointError(f"{index}: names {first_few(absent)}, which is not there; copy all parts beside it")
    return parts


def read_config(path: Path) -> dict[str, Any] | None:
    """Return the content of config.json in a folder, or beside a weights file; None where there is none.

    Raises CheckpointError where it is damaged.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    return _read_json(file) if file.is_file() else None


def folder_hints(path: Path) -> dict[str, Any]:
    """Return what a folder, or that of a weights file, says of the clips and the model: keys as in a spec.

    num_frames, input_size, tubelet_size, gelu, of a classifier final_reduction, of a masked autoencoder
    normalize_target, all from config.json; mean and std from the processor's file, never from what its class would say.
    What is not said is left out; {} where there is no config.json of a known family. Raises CheckpointError: damaged
    JSON, a value of another kind.
    """
    config = read_config(path)
    if config is None or config.get("model_type") not in FAMILIES:
        return {}
    file = (path if path.is_dir() else path.parent) / "config.json"
    tubelet = config.get("tubelet_size")
    counts = {
        "num_frames": config.get("num_frames", config.get("frames_per_clip")),
        "input_size": config.get("crop_size", config.get("image_size")),
        "tubelet_size": tubelet[0] if isinstance(tubelet, list) and tubelet else tubelet,
    }
    for key, value in counts.items():
        if value is not None and (type(value) is not int or value <= 0):
            raise CheckpointError(f"{file}: {key} is {value!r}, not a whole number; copy config.json again")
    hints = {key: value for key, value in counts.items() if value is not None} | _gelu(config, file)
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if config["model_type"] == "videomae" and architecture.endswith("Classification"):
        hints["final_reduction"] = "fc_norm" if config.get("use_mean_pooling", True) else "cls"
    if architecture.endswith("PreTraining"):
        hints["normalize_target"] = config.get("norm_pix_loss", True) is not False
    return hints | _pixels(file.parent)


def _gelu(content: dict[str, Any], file: Path) -> dict[str, str]:
    activation = content.get("hidden_act", "gelu_fast" if content["model_type"] == "vivit" else "gelu")
    if not isinstance(activation, str) or activation not in _GELU:
        raise CheckpointError(f"{file}: hidden_act is {activation!r}; the models here have {' or '.join(_GELU)}")
    return {"gelu": _GELU[activation]}


def _pixels(folder: Path) -> dict[str, list[float]]:
    """Return mean and std, of pixels in [0, 1], by the processor's file; {} where there is none.

    The processor maps a pixel p of 0 to 255 to ((p [- 127.5 if offset]) rescale_factor - image_mean) / image_std, each
    step behind its own switch.
    """
    file = next((folder / name for name in _PROCESSORS if (folder / name).is_file()), None)
    if file is None:
        return {}
    content = _read_json(file)
    try:
        scale = float(content.get("rescale_factor", 1 / 255)) if content.get("do_rescale", True) else 1.0
        offset = 127.5 * scale if content.get("offset") else 0.0
        mean, std = [0.0] * 3, [1.0] * 3
        if content.get("do_normalize", True):
            mean, std = _three(content["image_mean"]), _three(content["image_std"])
        mean, std = ([value / (255 * scale) for value in values] for values in ([m + offset for m in mean], std))
        if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise ValueError("a deviation of 0, or no finite number")
    except (KeyError, TypeError, ValueError, ArithmeticError) as e:
        raise CheckpointError(f"{file}: says no mean and deviation of pixels ({short_reason(e)}); copy it again") from e
    return {"mean": mean, "std": std}


def _three(value: Any) -> list[float]:
    values = [float(v) for v in (value if isinstance(value, list) else [value] * 3)]
    if len(values) != 3:
        raise ValueError(f"{len(values)} channels, not 3")
    return values


def _weights_of_run(folder: Path) -> str:
    files = [str(folder / name) for name in _names(folder) if name.endswith(".pth")]
    return first_few(files) if files else f"none in {folder} yet; each run of ours writes checkpoint-<epoch>.pth there"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(p.name for p in folder.iterdir())
    except OSError as e:
        raise CheckpointError(f"{folder}: cannot be read ({e.strerror})") from e


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: cannot be read as JSON ({short_reason(e)}); copy it again") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not an object; copy it again")
    return content
