"""Named model sizes: `create_model(name)`, `list_models()`, and the input each name was trained on."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelDefaults:
    """What a named model was trained with; the command line overrides each of them.

    num_frames at view_fps frames per second, input_size pixels square, tubelet_size frames per token,
    mean and std of RGB in [0, 1], finetune_lr the published base learning rate (per 256 clips) for fine-tuning.
    """

    num_frames: int
    view_fps: float
    input_size: int
    tubelet_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    finetune_lr: float


_MODELS: dict[str, tuple[Callable[..., nn.Module], ModelDefaults]] = {}


def register_model(
    *,
    num_frames: int = 16,
    view_fps: float = 10,
    input_size: int = 224,
    tubelet_size: int = 2,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    finetune_lr: float = 5e-4,
) -> Callable:
    """Decorator: put a constructor into the registry under its function name."""
    defaults = ModelDefaults(num_frames, view_fps, input_size, tubelet_size, mean, std, finetune_lr)

    def register(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if build.__name__ in _MODELS:
            raise ValueError(f"model {build.__name__!r} is registered twice")
        _MODELS[build.__name__] = (build, defaults)
        return build

    return register


def _find(name: str) -> tuple[Callable[..., nn.Module], ModelDefaults]:
    if name not in _MODELS:
        close = difflib.get_close_matches(name, _MODELS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown model {name!r}.{hint} Known models: {', '.join(list_models())}")
    return _MODELS[name]


def list_models() -> list[str]:
    """Every registered name, sorted."""
    return sorted(_MODELS)


def model_defaults(name: str) -> ModelDefaults:
    """Defaults of a registered model, without building it. Raises ValueError for an unknown name."""
    return _find(name)[1]


def create_model(name: str, **kwargs) -> nn.Module:
    """Build a registered model; keyword arguments go to its constructor over the name's defaults.

    Its state dict carries the name, in the metadata that PyTorch keeps beside the tensors.

    Raises ValueError for an unknown name (with the list of known ones), TypeError for an unknown argument.
    """
    build, defaults = _find(name)
    shape = {
        "num_frames": defaults.num_frames,
        "input_size": defaults.input_size,
        "tubelet_size": defaults.tubelet_size,
    }
    model = build(**(shape | kwargs))
    model.register_state_dict_post_hook(partial(_sign, name))
    return model


def _sign(name: str, module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    """Put the name of a model into the metadata of its state dict."""
    metadata["model"] = name
