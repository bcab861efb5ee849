"""A model from its weights file alone: `load(path)`."""

from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from models.registry import VideoInput, classifier_of, create_model, head_of
from models.weights.container import ONNX, PROGRAM, kind_of
from models.weights.file import CheckpointError, fetch, read_checkpoint
from models.weights.pretrained import fill_model
from models.weights.programs import load_program
from utils.text import first_few, short_reason

_COMMON = (*(f.name for f in fields(VideoInput)), "gelu")


def load(path: str) -> tuple[nn.Module, dict]:
    """Build the model that a weights file of ours is for, on the CPU, in evaluation mode, all its weights filled.

    Args:
        path: file or URL of a classifier or a masked autoencoder, or what `python -m models.export` made of one: ONNX
            and torch.export are run as they are, see `models.weights.programs`.

    Returns (model, spec), the spec as it stands in the file. Raises CheckpointError: an unreadable file, one without a
    spec or with a damaged one, weights that are not those of its spec, an exported file that has changed.
    """
    file = Path(fetch(str(path)))
    if file.is_file() and kind_of(file) in (ONNX, PROGRAM):
        return load_program(str(path))
    checkpoint = read_checkpoint(path)
    spec = checkpoint.spec
    if spec is None:
        raise CheckpointError(
            f"{path} has no spec: it is a published file or one written before ours had one; create_model(NAME) and "
            "load_pretrained(model, path), or evaluate it with --model"
        )
    try:
        with torch.device("cpu"):
            model = build_from_spec(spec)
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: its spec does not make a model here: {short_reason(e)}") from e
    report = fill_model(model, checkpoint)
    if other := [*report.missing, *report.ignored]:
        raise CheckpointError(f"{path}: its weights are not those of its spec: {first_few(other)}")
    return model.eval(), spec


def build_from_spec(spec: dict) -> nn.Module:
    """Return the model of a spec, with new weights. Raises ValueError or TypeError where there is none."""
    options = {key: spec[key] for key in _COMMON}
    if classifier_of(spec["model"]) == spec["model"]:
        options |= {"final_reduction": spec["final_reduction"], "head": spec.get("head")}
        options["num_classes"] = len(spec["classes"])
    elif "decoder_depth" in spec:
        options |= {key: spec[key] for key in ("decoder_depth", "normalize_target")}
    else:
        raise ValueError(f"{spec['model']} needs decoder_depth and normalize_target")
    model = create_model(spec["model"], **options)
    if spec["pos_embed"] == "learned":
        getattr(model, "encoder", model).learn_pos_embed()
    return model


def classifier_spec(spec: dict, path: str) -> dict:
    """Return what a spec says of the classifier with its encoder, for the flags of run_finetune.py.

    "head" is there in any case, "final_reduction" not of a masked autoencoder, which pools nothing; "pos_embed" is
    learned or sincos. Raises CheckpointError for a model that this version of the code does not know.
    """
    try:
        said = spec | {"model": classifier_of(spec["model"])}
        if said["model"] != spec["model"]:
            del said["final_reduction"]
        said["head"] = spec.get("head", head_of(said["model"], None, said.get("final_reduction")))
    except ValueError as e:
        raise CheckpointError(f"{path}: its spec is for another version of this code: {e}") from e
    return said | {"pos_embed": "learned" if spec["pos_embed"] == "learned" else "sincos"}
