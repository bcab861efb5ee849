"""Named models: `create_model(name, **options)`, `list_models()`, and the clips that each name was trained on."""

import difflib
from dataclasses import dataclass, fields, replace
from functools import partial

from torch import nn

SPEC_VERSION = 1  # of the spec of a model, which its weights files hold


@dataclass(frozen=True)
class VideoInput:
    """The clips that a model takes.

    num_frames: frames of a clip, a multiple of tubelet_size.
    view_fps: frames per second at which they are taken from a video.
    input_size: height and width in pixels, a multiple of the patch size.
    tubelet_size: frames of a token.
    mean: the mean of red, green and blue in [0, 1] that is subtracted; ImageNet's by default.
    std: their standard deviation, by which they are divided.
    """

    num_frames: int = 16
    view_fps: float = 10
    input_size: int = 224
    tubelet_size: int = 2
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelDefaults(VideoInput):
    """What a named model was trained with; the command line overrides each of them.

    finetune_lr: the published base learning rate for fine-tuning, per 256 clips.
    """

    finetune_lr: float = 5e-4


@dataclass(frozen=True)
class Dropout:
    """What is left out at random in training.

    drop_rate: the share of channels after projections.
    attn_drop_rate: the share of attention weights.
    drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
    fc_drop_rate: the share of features before the head.
    """

    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    fc_drop_rate: float = 0.0


@dataclass(frozen=True)
class _Registered:
    build: partial
    defaults: ModelDefaults | None  # None: those of its encoder
    encoder: str | None  # of a masked autoencoder


_MODELS: dict[str, _Registered] = {}


def register_model(
    name: str, build: partial, defaults: ModelDefaults | None = None, *, encoder: str | None = None
) -> None:
    """Put a model into the registry. Raises ValueError where the name is taken.

    Args:
        build: (VideoInput, Dropout, **options) -> the model; of a classifier a functools.partial of its class.
        defaults: of a classifier.
        encoder: the name of the classifier that a masked autoencoder trains; their defaults are the same.
    """
    if name in _MODELS:
        raise ValueError(f"model {name!r} is registered twice")
    _MODELS[name] = _Registered(build, defaults, encoder)


def _find(name: str) -> _Registered:
    if name not in _MODELS:
        close = difflib.get_close_matches(name, _MODELS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown model {name!r}.{hint} Known models: {', '.join(list_models())}")
    return _MODELS[name]


def list_models() -> list[str]:
    """List every registered name, sorted."""
    return sorted(_MODELS)


def classifier_of(name: str) -> str:
    """Return the classifier with a masked autoencoder's encoder, or its own name. Raises ValueError if unknown."""
    return _find(name).encoder or name


def masked_autoencoder_of(name: str) -> str:
    """Return the masked autoencoder that trains a classifier's encoder, or its own name. Raises ValueError if none."""
    if _find(name).encoder:
        return name
    for other, registered in _MODELS.items():
        if registered.encoder == name:
            return other
    raise ValueError(f"{name} has no masked autoencoder")


def model_defaults(name: str) -> ModelDefaults:
    """Return the defaults of a registered model, without building it. Raises ValueError for an unknown name."""
    return _find(classifier_of(name)).defaults


def head_of(name: str, head: str | None, final_reduction: str | None) -> str | None:
    """Return the kind of head that a classifier has with these options, None being left open: linear or attentive.

    Raises ValueError where the name or an option is unknown, or they contradict each other.
    """
    family = _family(name)
    return family.reductions.get(family.reduction_of(final_reduction, head))


def _family(name: str) -> type:
    """Return the class of a classifier. Raises ValueError for another model."""
    if _find(name).encoder:
        raise ValueError(f"{name} has no head")
    return _find(name).build.func


def create_model(name: str, **options) -> nn.Module:
    """Build a registered model. Its attribute `name` is the name, its `spec` all that `models.load` builds it from.

    Args:
        options: the fields of VideoInput and of Dropout, and the keywords of the model's class, over the defaults of
            the name. `head`, "linear" or "attentive", stands for the final_reduction before such a head. A masked
            autoencoder takes its encoder's, decoder_depth and normalize_target. None stands for the default.

    Raises ValueError for an unknown name (with the list of known ones) or value, TypeError for an unknown option.
    """
    options = {option: value for option, value in options.items() if value is not None}
    if head := options.pop("head", None):
        options["final_reduction"] = _family(name).reduction_of(options.get("final_reduction"), head)
    video = _take(options, VideoInput, model_defaults(name))
    dropout = _take(options, Dropout, Dropout())
    return build_model(name, video, dropout, **options)


def build_model(name: str, video: VideoInput, dropout: Dropout, **options) -> nn.Module:
    """Build a registered model, its options grouped. Raises what `create_model` raises."""
    model = _find(name).build(video, dropout, **options)
    model.name = name
    return model


def _take(options: dict, kind: type, defaults: VideoInput | Dropout) -> VideoInput | Dropout:
    """Move the options that are fields of a dataclass into a copy of `defaults`."""
    return replace(defaults, **{f.name: options.pop(f.name) for f in fields(kind) if f.name in options})
