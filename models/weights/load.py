"""Checkpoints in, with every key accounted for: `load_pretrained(model, path)` fills a model or says why it cannot.

A published file differs from our module in a few ways only: a wrapper around the state dict (`model`, `module`, ...),
prefixes (`_orig_mod.`, `module.`, `encoder.`, `backbone.`), the name of the final norm (`encoder.norm`, `norm`,
`fc_norm`), tensors of the pre-training task, and a position table or patch embedding for clips of another size. The
keys of both sides are brought to one canonical form and matched; what the file has beyond the model must be named by a
rule of its dialect. What the file may lack is the head of a classifier and the whole decoder of a masked autoencoder.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from models.pos_embed import likely_grid, resampled
from models.registry import list_models
from models.weights.dialects import Dialect
from models.weights.file import MODEL_KEYS, CheckpointError, brief, fetch, read_checkpoint
from models.weights.identify import Entry, Shapes, check_architecture, find_entries, recognise

__all__ = ["CheckpointError", "LoadReport", "fetch", "load_pretrained", "read_checkpoint"]


_OWN_PREFIX = r"encoder\."  # of our masked autoencoder; the classifier has none
_DECODER = re.compile(r"(decoder|encoder_to_decoder)\..+|mask_token")


@dataclass(frozen=True)
class LoadReport:
    """What became of every key. `loaded` and `missing` are the model's keys, `ignored` the file's.

    sources maps each loaded key to the file's name for it; reasons maps each ignored key to why. epoch: of the file.
    fitted: what was done to tensors of another grid or type.
    """

    path: str
    dialect: str
    wrapper: str
    epoch: int | None
    dtypes: tuple[str, ...]
    loaded: list[str]
    ignored: list[str]
    missing: list[str]
    sources: dict[str, str] = field(repr=False)
    reasons: dict[str, str] = field(repr=False)
    fitted: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        wrapped = f" under {self.wrapper!r}" if self.wrapper else ""
        epoch = "" if self.epoch is None else f", epoch {self.epoch}"
        renamed = sum(new != old for new, old in self.sources.items())
        missing = brief(self.missing) + " (newly initialised)" * bool(self.missing)
        why = ", ".join(f"{n} {reason}" for reason, n in Counter(self.reasons.values()).most_common())
        return "\n".join(
            (
                f"weights from {self.path}",
                f"  dialect  {self.dialect}{wrapped}, {'/'.join(self.dtypes)}{epoch}",
                f"  loaded   {len(self.loaded):4d}  ({renamed} of them renamed)",
                f"  ignored  {len(self.ignored):4d}  {why}".rstrip(),
                f"  missing  {len(self.missing):4d}  {missing}".rstrip(),
                *(f"  fitted         {what}" for what in self.fitted),
            )
        )


# ----------------------------------------------------------------------------------------------------------------------
# Keys


def _canonical(key: str, prefix: str, final_norm: str) -> str:
    """One name for the same tensor in every dialect: without the encoder's prefix, the final norm called `norm`."""
    return re.sub(rf"^{final_norm}\.", "norm.", re.sub(f"^{prefix}", "", key))


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def load_pretrained(
    model: nn.Module,
    path: str,
    *,
    model_key: str = MODEL_KEYS,
    model_prefix: str = "",
    stored_table: bool = True,
) -> LoadReport:
    """Fill `model` in place from a published, DAPT or fine-tuned checkpoint.

    Half-precision files are copied up into the model's own dtype. The head (`head.*`) is loaded where its shape
    fits and left as initialised where the file has none or one of another class count; so is InternVideo2's `fc_norm`,
    and a masked autoencoder's decoder. A learned position table makes the model's one a parameter, and is `resampled`
    for another grid of tokens.

    Args:
        path: file or http(s) URL. model_key: see `read_checkpoint`.
        model_prefix: take the keys under this prefix alone, e.g. "student."; the others are reported as ignored.
        stored_table: take a learned position table, where the file has one; else it is left out.

    Returns the LoadReport. Raises CheckpointError: unreadable file, another model's size, an encoder tensor absent or
    of another shape or with NaN, a key that nothing accounts for. The model is untouched then.
    """
    checkpoint = read_checkpoint(path, model_key)
    reasons: dict[str, str] = {}  # of each key that is ignored
    entries = find_entries(checkpoint, model_prefix, reasons)
    dialect = recognise(entries, checkpoint)
    source = _by_canonical_key(entries, dialect, path)  # as are `target` and `shapes`
    state = model.state_dict()
    target = {_canonical(key, _OWN_PREFIX, dialect.final_norm): key for key in state}
    shapes = {c: tuple(state[key].shape) for c, key in target.items()}

    check_architecture(model, shapes, {c: tuple(e.tensor.shape) for c, e in source.items()}, dialect, checkpoint)
    _set_foreign_head_aside(source, shapes, reasons)
    _check_pooling(source, target, path)
    _set_ignored_aside(source, target, dialect, reasons)
    encoder = getattr(model, "encoder", model)
    if not stored_table:
        _drop_table(source, shapes, reasons, path)
    ours = checkpoint.model in list_models()
    fitted = _settle_position_table(source, encoder, reasons, learned=ours) + _fit_patch_embed(source, shapes)
    if not (ours or dialect.pos_embed or dialect.stored_table or "pos_embed" in source):
        kind = encoder.pos_embed_kind
        fitted.append(f"position table: {kind}, the model's; the file does not say which it was trained with")
    if "pos_embed" in source or (stored_table and dialect.stored_table):
        target["pos_embed"] = "pos_embed" if encoder is model else "encoder.pos_embed"
        shapes["pos_embed"] = tuple(encoder.pos_embed.shape)
    _check_shapes(source, shapes, path)
    missing = {c: key for c, key in target.items() if c not in source}
    unknown = [entry.key for c, entry in source.items() if c not in target]
    _check_complete([missing[c] for c in _needed(missing, source, dialect)], unknown, dialect, path)
    _check_values(source, path)

    if "pos_embed" in source:
        encoder.learn_pos_embed()
        state = model.state_dict()
    with torch.no_grad():
        for c, entry in source.items():
            state[target[c]].copy_(entry.tensor)
    sources = {key: source[c].key for c, key in target.items() if c in source}
    return LoadReport(
        path=checkpoint.path,
        dialect=dialect.name,
        wrapper=checkpoint.wrapper,
        epoch=checkpoint.epoch,
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in checkpoint.state.values()})),
        loaded=list(sources),
        ignored=[key for key in checkpoint.state if key in reasons],
        missing=list(missing.values()),
        sources=sources,
        reasons=reasons,
        fitted=fitted,
    )


def _by_canonical_key(entries: list[Entry], dialect: Dialect, path: str) -> dict[str, Entry]:
    """The entries by canonical key. Raises CheckpointError where two have the same."""
    source: dict[str, Entry] = {}
    for entry in entries:
        other = source.setdefault(_canonical(entry.bare, dialect.prefix, dialect.final_norm), entry)
        if other is not entry:
            raise CheckpointError(f"{path}: {other.key} and {entry.key} both stand for the same tensor; one must go")
    return source


def _set_ignored_aside(
    source: dict[str, Entry], target: dict[str, str], dialect: Dialect, reasons: dict[str, str]
) -> None:
    """Move what the dialect's rules leave out from source to reasons."""
    for c in [c for c in source if c not in target or dialect.own_target]:
        if any(re.fullmatch(rule, source[c].bare) for rule in dialect.ignored):
            entry = source.pop(c)
            module = re.match(r"(encoder\.)?[^.]+", entry.bare).group()
            reasons[entry.key] = module if module == entry.bare else f"{module}.*"


def _check_pooling(source: dict[str, Entry], target: dict[str, str], path: str) -> None:
    """Raise CheckpointError where a trained head stands behind another pooling than the model's."""
    c = "norm.weight"
    if c in source and c in target and "head.weight" in source and "head.weight" in target:
        names = [key.split(".")[-2] for key in (source[c].bare, target[c])]
        if names[0] != names[1]:
            theirs, ours = ("fc_norm" if name == "fc_norm" else "cls" for name in names)
            raise CheckpointError(
                f"{path}: its head was trained with --final_reduction {theirs}, the model has {ours}; use {theirs}"
            )


def _set_foreign_head_aside(source: dict[str, Entry], shapes: Shapes, reasons: dict[str, str]) -> None:
    """Move a head of another class count, the same in all else, from source to reasons."""
    head = {c: tuple(entry.tensor.shape) for c, entry in source.items() if c.startswith("head.") and c in shapes}
    if all(len(s) == len(shapes[c]) and s[1:] == shapes[c][1:] and s[0] != shapes[c][0] for c, s in head.items()):
        for c, (classes, *_) in head.items():
            reasons[source.pop(c).key] = f"head.* of {classes} classes"


def _drop_table(source: dict[str, Entry], shapes: Shapes, reasons: dict[str, str], path: str) -> None:
    """Move the file's position table from source to reasons. Raises CheckpointError where the model needs it."""
    if "pos_embed" in shapes:
        raise CheckpointError(f"{path}: the model's position table is learned, so it takes the file's; not sincos")
    if "pos_embed" in source:
        reasons[source.pop("pos_embed").key] = "learned position table"


def _settle_position_table(
    source: dict[str, Entry], encoder: nn.Module, reasons: dict[str, str], *, learned: bool
) -> list[str]:
    """Fit the file's position table in source to the encoder's grid; says how.

    A table equal to the encoder's fixed one goes to reasons, unless it is known to be learned.
    """
    entry, own = source.get("pos_embed"), encoder.pos_embed
    if entry is None or entry.tensor.ndim != 3 or not entry.tensor.is_floating_point():
        return []
    table, said = entry.tensor.float(), []
    first = own.shape[1] - math.prod(encoder.grid)  # the class token's, if there is one
    grid = likely_grid(table.shape[1] - first, encoder.grid)
    if grid:
        table = torch.cat([table[:, :first], resampled(table[0, first:], grid, encoder.grid)[None]], dim=1)
        read, fitted = (" x ".join(map(str, g)) for g in (grid, encoder.grid))
        said.append(f"{entry.key} of {read} tokens" + f", resampled to {fitted}" * (read != fitted))
    if not isinstance(own, nn.Parameter):
        if not learned and table.shape == own.shape and torch.allclose(table, own, atol=1e-3):
            reasons[source.pop("pos_embed").key] = "position table, the model's own"
            return []
        said.append(f"{entry.key} replaces the model's fixed table, and is trained unless --freeze_layers is given")
    source["pos_embed"] = replace(entry, tensor=table)
    return said


def _fit_patch_embed(source: dict[str, Entry], shapes: Shapes) -> list[str]:
    """Inflate a patch embedding of one frame in source to the model's frames, keeping its sum; says so."""
    c = "patch_embed.proj.weight"
    if c not in source or tuple(source[c].tensor.shape) == shapes[c]:
        return []
    frames = shapes[c][2]
    source[c] = replace(source[c], tensor=source[c].tensor.float().expand(shapes[c]) / frames)
    return [f"{source[c].key} from 1 frame to {frames}"]


def _needed(missing: Iterable[str], source: dict[str, Entry], dialect: Dialect) -> list[str]:
    """Those of the missing that a file of this dialect must have. What may be fresh is so wholly or not at all."""
    has_decoder = any(map(_DECODER.fullmatch, source))
    modules = {c.split(".")[0] for c in source}

    def may_be_fresh(c: str) -> bool:
        if _DECODER.fullmatch(c):
            return not has_decoder
        return c.split(".")[0] not in modules and bool(re.fullmatch(dialect.fresh, c))

    return [c for c in missing if not may_be_fresh(c)]


def _check_values(source: dict[str, Entry], path: str) -> None:
    """Raise CheckpointError where a tensor to be loaded is not of floating point or not finite."""
    for entry in source.values():
        if not entry.tensor.is_floating_point():
            raise CheckpointError(f"{path}: {entry.key} holds {entry.tensor.dtype}, not weights; wrong or damaged file")
        if not entry.tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: {entry.key} has NaN or infinite values; the training that wrote it diverged"
            )


def _check_shapes(source: dict[str, Entry], shapes: Shapes, path: str) -> None:
    """Raise CheckpointError where a tensor of the file has another shape than the model's."""
    wrong = [c for c in shapes if c in source and tuple(source[c].tensor.shape) != shapes[c]]
    if wrong:
        first = f"{source[wrong[0]].key} is {tuple(source[wrong[0]].tensor.shape)}, not {shapes[wrong[0]]}"
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors have another shape than the model's: {first}; "
            "give the model's options that the weights were trained with"
        )


def _check_complete(lacking: list[str], unknown: list[str], dialect: Dialect, path: str) -> None:
    """Raise CheckpointError where the model needs more than the file has, or the file has more than its rules name."""
    problems = []
    if lacking:
        problems.append(f"lacks {len(lacking)} tensors the model needs: {brief(lacking)}; the file is incomplete")
    if unknown:
        problems.append(
            f"has {len(unknown)} keys that no rule of {dialect.name!r} accounts for: {brief(unknown)}; "
            "wrong file, or a family this loader does not know"
        )
    if problems:
        raise CheckpointError(f"{path}: " + "; ".join(problems))
