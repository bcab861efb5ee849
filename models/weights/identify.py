"""What a checkpoint file is: its dialect, and the registered models its weights are for."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from models.registry import create_model, list_models
from models.weights import hf_keys
from models.weights.dialects import DIALECTS, Dialect
from models.weights.entries import Entries, Entry, possible_prefixes, rename_mmaction, select, under
from models.weights.errors import CheckpointError
from models.weights.file import MODEL_KEYS, Checkpoint, read_checkpoint
from models.weights.hf_config import check_config
from utils.text import first_few

Shapes = dict[str, tuple[int, ...]]  # by canonical key
Fits = Callable[["Registered"], bool]


@dataclass(frozen=True)
class Registered:
    """What tells a registered model from others: its name, class, `architecture` and kind of position table."""

    name: str
    kind: type
    architecture: tuple
    table: str


def find_entries(checkpoint: Checkpoint, model_prefix: str) -> Entries:
    """Return the tensors under model_prefix, in our names where they have Hugging Face's; the others are ignored.

    Raises CheckpointError: there are none, or Hugging Face's are not whole or not those of their config.json.
    """
    found = select(checkpoint, model_prefix)
    rename_mmaction(found)
    if not model_prefix and not _is_known(found, checkpoint):
        found = _within(found, checkpoint)
    if family := hf_keys.family_of(found.entries):
        hf_keys.translate(found, family, checkpoint.path)
        check_config(found, family, checkpoint.path)
    return found


def _is_known(found: Entries, checkpoint: Checkpoint) -> bool:
    return bool(hf_keys.family_of(found.entries)) or _dialect(found, checkpoint) is not None


def _within(found: Entries, checkpoint: Checkpoint) -> Entries:
    """Return the entries under the one prefix that makes a known model of them; all of them where none does.

    Raises CheckpointError where several do.
    """
    choices = {prefix: under(found, prefix) for prefix in possible_prefixes(found)}
    known = [prefix for prefix, entries in choices.items() if _is_known(entries, checkpoint)]
    if len(known) > 1:
        told = " or ".join(f"--model_prefix {prefix.rstrip('.')}" for prefix in known)
        raise CheckpointError(f"{checkpoint.path}: holds {len(known)} models; choose one with {told}")
    return choices[known[0]] if known else found


def recognise(found: Entries, checkpoint: Checkpoint) -> Dialect:
    """Return the dialect of a file. Raises CheckpointError where it is of none."""
    if dialect := _dialect(found, checkpoint):
        return dialect
    keys = first_few((entry.bare for entry in found.entries), 4)
    raise CheckpointError(f"{checkpoint.path}: not a Video ViT checkpoint; its keys begin {keys}")


def _dialect(found: Entries, checkpoint: Checkpoint) -> Dialect | None:
    entries, family = found.entries, found.family or checkpoint.family
    shapes = {re.sub(r"^encoder\.", "", e.bare): "x".join(map(str, e.tensor.shape)) for e in entries}
    for dialect in DIALECTS:
        has_shapes = all(re.fullmatch(shape, shapes.get(key, "")) for key, shape in dialect.shapes.items())
        if dialect.absent and any(re.fullmatch(dialect.absent, e.bare) for e in entries):
            continue
        if has_shapes and dialect.family in (None, family) and _marked(entries, dialect.marks):
            return dialect
    return None


def _marked(entries: list[Entry], pattern: str) -> bool:
    """Return whether a key, with its wrappers' prefixes or without, matches."""
    return any(re.fullmatch(pattern, key) for e in entries for key in (e.bare, e.key))


def architecture(shapes: Shapes) -> tuple:
    """Return (shape of the patch embedding or None, number of blocks): what tells the sizes apart."""
    return shapes.get("patch_embed.proj.weight"), depth("blocks", shapes)


def depth(prefix: str, keys: Iterable[str]) -> int:
    """Return how many blocks there are under a prefix."""
    return 1 + max((int(m.group(1)) for k in keys if (m := re.match(rf"{prefix}\.(\d+)\.", k))), default=-1)


def trained_table(checkpoint: Checkpoint, dialect: Dialect) -> str | None:
    """Return the kind of position table the weights were trained with, where that is known."""
    if checkpoint.model not in list_models():
        return dialect.pos_embed
    return _registered(checkpoint.model).table


@cache
def _registered(name: str) -> Registered:
    with torch.device("meta"):
        model = create_model(name)
    shapes = {k.removeprefix("encoder."): tuple(v.shape) for k, v in model.state_dict().items()}
    return Registered(name, type(model), architecture(shapes), model.pos_embed_kind)


def _names(wanted: tuple, fits: Fits) -> list[str]:
    """Return the registered models of this architecture that fit: classifiers first, the plainest name first."""
    models = map(_registered, list_models())
    names = [model.name for model in models if model.architecture == wanted and fits(model)]
    return sorted(names, key=lambda name: (name.startswith("pretrain_"), len(name)))


def describe(wanted: tuple, *choices: Fits) -> str:
    """Return the names by the first choice that gives any, else the numbers of the architecture."""
    embed, blocks = wanted
    names = next(filter(None, (_names(wanted, fits) for fits in choices)), ())
    return " or ".join(names) or f"a model of {blocks} blocks with patch_embed.proj.weight {embed}"


def check_architecture(
    model: nn.Module, shapes: Shapes, found: Shapes, dialect: Dialect, checkpoint: Checkpoint
) -> None:
    """Raise CheckpointError where a file is of another model size or family. shapes: the model's; found: the file's."""
    wanted, other = architecture(shapes), architecture(found)
    if other[0] is None:
        return
    fitted = inflated_shape(other[0], wanted[0]) if dialect.inflated else other[0]
    table = trained_table(checkpoint, dialect)
    if (fitted, other[1]) != wanted or table not in (None, model.pos_embed_kind):

        def alike(candidate: Registered) -> bool:
            return candidate.kind is type(model) and candidate.table == model.pos_embed_kind

        def of_file(candidate: Registered) -> bool:
            return candidate.kind is type(model) and _fits(candidate, dialect, table)

        this = describe(other, lambda m: alike(m) and of_file(m), of_file)
        raise CheckpointError(f"{checkpoint.path}: this is {this}, but the model is {describe(wanted, alike)}")
    decoders = [depth(r"decoder\.blocks", side) for side in (shapes, found)]
    if all(decoders) and decoders[0] != decoders[1] and not dialect.own_target:
        raise CheckpointError(
            f"{checkpoint.path}: its decoder has {decoders[1]} blocks, the model's {decoders[0]}; "
            f"use --decoder_depth {decoders[1]}"
        )


def _fits(model: Registered, dialect: Dialect, table: str | None) -> bool:
    """Return whether a model may be what weights of this dialect and kind of position table are for."""
    return bool(re.fullmatch(dialect.models, model.name)) and table in (None, model.table)


def inflated_shape(shape: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a patch embedding of one frame, repeated for as many as wanted; any other shape as it is."""
    return (*shape[:2], wanted[2], *shape[3:]) if len(shape) == 5 and shape[2] == 1 else shape


def likely_models(path: str, *, model_key: str = MODEL_KEYS, model_prefix: str = "") -> tuple[list[str], int]:
    """Return (names of the registered models that the weights in a file are for, blocks of its decoder of pixels).

    Classifiers come first. Raises CheckpointError where the file is not readable or for no registered model.
    """
    checkpoint = read_checkpoint(path, model_key)
    entries = find_entries(checkpoint, model_prefix)
    dialect = recognise(entries, checkpoint)
    shapes = {re.sub(f"^{dialect.prefix}", "", e.bare): tuple(e.tensor.shape) for e in entries.entries}
    found, table = architecture(shapes), trained_table(checkpoint, dialect)
    if not (names := _names(found, lambda model: _fits(model, dialect, table))):
        raise CheckpointError(f"{path}: {dialect.name}, {describe(found)}: no registered model")
    return names, 0 if dialect.own_target else depth(r"decoder\.blocks", shapes)
