"""Whether weights in Hugging Face's layout are those of their config.json, and the model is built as that says."""

import math
import re
from pathlib import Path
from typing import Any

from torch import nn

from models.weights.entries import Entries
from models.weights.errors import CheckpointError
from models.weights.file import fetch
from models.weights.hf_folder import FAMILIES, folder_hints, read_config

_OF_2_1 = ("use_rope_interleave", "interpolate_rope", "use_modality_embeddings")  # proposed, not in transformers 5.24


def read_hints(path_or_url: str) -> dict[str, Any]:
    """Return what stands beside weights in Hugging Face's layout, see `hf_folder.folder_hints`; {} elsewhere.

    It fills what the user and the file leave open.
    """
    return folder_hints(Path(fetch(path_or_url)))


def check_config(found: Entries, family: str, path: str) -> None:
    """Raise CheckpointError where tensors, in our names, are not of the family or the sizes of their config.json."""
    config = read_config(Path(fetch(path)))
    if config is None:
        return
    kind = config.get("model_type")
    if kind != family:
        known = f"; it must be one of {', '.join(FAMILIES)}" if kind not in FAMILIES else ""
        raise CheckpointError(f"{path}: its config.json says model_type {kind!r}, its keys are {family}'s{known}")
    if other := [key for key in _OF_2_1 if config.get(key)]:
        raise CheckpointError(
            f"{path}: its config.json says {other[0]}: V-JEPA 2.1 converted by others, whose rotations are not "
            "known; give Meta's own file"
        )
    has_norm = any(re.fullmatch(r"(encoder\.|fc_)norm\.(weight|bias)", entry.bare) for entry in found.entries)
    if family == "videomae" and config.get("use_mean_pooling", True) and not has_norm:
        found.fresh = r"norm\..+"
        found.notes.append("no final norm in the file, as its config.json says (use_mean_pooling): a new one")
    shapes = {entry.bare: tuple(entry.tensor.shape) for entry in found.entries}
    tubelet = config.get("tubelet_size")
    patch = config.get("patch_size")
    cube = tubelet if isinstance(tubelet, list) else [tubelet, patch, patch]
    embed = shapes.get("encoder.patch_embed.proj.weight", ())
    blocks = {key.split(".")[2] for key in shapes if key.startswith("encoder.blocks.")}
    fc1 = shapes.get("encoder.blocks.0.mlp.fc1.weight", ())
    for key, said, has in (
        ("hidden_size", config.get("hidden_size"), embed[0] if embed else None),
        ("num_channels", config.get("num_channels"), embed[1] if len(embed) == 5 else None),
        ("tubelet_size and patch_size", cube, list(embed[2:]) if len(embed) == 5 else None),
        ("num_hidden_layers", config.get("num_hidden_layers"), len(blocks) or None),
        ("intermediate_size", config.get("intermediate_size"), fc1[0] if fc1 else None),
    ):
        if None not in (said, has) and said != has and not (isinstance(said, list) and None in said):
            raise CheckpointError(
                f"{path}: its config.json says {key} {said}, its tensors have {has}; they are not of one model"
            )


def notes_on(model: nn.Module, path: str) -> list[str]:
    """Return in what the model differs from what stands beside its weights, for the report: GELU, pixels.

    Raises CheckpointError where the number of heads differs, which changes no shape.
    """
    config, encoder = read_config(Path(fetch(path))), getattr(model, "encoder", model)
    hints = read_hints(path)
    if not hints:
        return []
    heads = config.get("num_attention_heads"), getattr(encoder.blocks[0].attn, "num_heads", None)
    if None not in heads and heads[0] != heads[1]:
        raise CheckpointError(f"{path}: has {heads[0]} heads by its config.json, the model {heads[1]}; another model")
    notes = []
    if hints["gelu"] != encoder.gelu:
        notes.append(f"gelu: the model has {encoder.gelu}, the weights were trained with {hints['gelu']}")
    for key in ("mean", "std"):
        own = getattr(encoder.video, key)
        if key in hints and not all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(own, hints[key], strict=True)):
            said = ", ".join(f"{value:.4g}" for value in hints[key])
            notes.append(f"{key} of pixels: the model's; the weights were trained with {said}")
    return notes
