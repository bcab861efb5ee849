"""Checkpoints in, with every key accounted for: `load_pretrained(model, path)` fills a model or says why it cannot.

A published file differs from our module in a few ways only: a wrapper around the state dict (`model`, `module`, ...),
prefixes (`_orig_mod.`, `module.`, `encoder.`, `backbone.`), the name of the final norm (`encoder.norm`, `norm`,
`fc_norm`), tensors of the pre-training task, and a position table or patch embedding for clips of another size. The
keys of both sides are brought to one canonical form and matched; what the file has beyond the model must be named by a
rule of its dialect. What the file may lack is the head of a classifier and the whole decoder of a masked autoencoder.
"""

import re
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from models.registry import list_models
from models.weights.dialects import Dialect
from models.weights.entries import Entry
from models.weights.errors import CheckpointError
from models.weights.file import MODEL_KEYS, Checkpoint, read_checkpoint
from models.weights.hf_config import notes_on
from models.weights.identify import Shapes, check_architecture, find_entries, recognise, trained_table
from models.weights.position import PositionTable
from utils.text import first_few

_ENCODER_PREFIX = r"encoder\."  # of a masked autoencoder of ours; a classifier has none
SPLIT = "qkv.bias split into q_bias and v_bias; its key part changes no attention, and is left out"
_PROBE = ("pooler.query_tokens", "pooler.cross_attention_block.", "pooler.blocks.")  # of an attentive head
_DECODER = re.compile(r"(decoder|encoder_to_decoder)\..+|mask_token")


@dataclass(frozen=True)
class LoadReport:
    """What became of every key. `loaded` and `missing` are the model's keys, `ignored` the file's.

    sources maps each loaded key to the file's name for it; reasons maps each ignored key to why. epoch: of the file.
    fitted: what was done to tensors of another grid or type. notes: what else should be known.
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
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        wrapped = f" under {self.wrapper!r}" if self.wrapper else ""
        epoch = "" if self.epoch is None else f", epoch {self.epoch}"
        renamed = sum(new != old for new, old in self.sources.items())
        missing = first_few(self.missing, 4) + " (newly initialised)" * bool(self.missing)
        why = ", ".join(f"{n} {reason}" for reason, n in Counter(self.reasons.values()).most_common())
        return "\n".join(
            (
                f"weights from {self.path}",
                f"  dialect  {self.dialect}{wrapped}, {'/'.join(self.dtypes)}{epoch}",
                f"  loaded   {len(self.loaded):4d}  ({renamed} of them renamed)",
                f"  ignored  {len(self.ignored):4d}  {why}".rstrip(),
                f"  missing  {len(self.missing):4d}  {missing}".rstrip(),
                *(f"  fitted         {what}" for what in self.fitted),
                *(f"  note           {what}" for what in self.notes),
            )
        )


def load_pretrained(
    model: nn.Module,
    path: str,
    *,
    model_key: str = MODEL_KEYS,
    model_prefix: str = "",
    stored_table: bool = True,
    table_grid: str | None = None,
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
        table_grid: slots x rows x columns of the tokens that the file's position table is for, as in "8x14x14"; None
            takes what the file says. A fixed table is resampled from there where it is given, and trained from then on.

    Returns the LoadReport. Raises CheckpointError: unreadable file, another model's size, an encoder tensor absent or
    of another shape or with NaN, a key that nothing accounts for. The model is untouched then.
    """
    options = {"model_prefix": model_prefix, "stored_table": stored_table, "table_grid": table_grid}
    return fill_model(model, read_checkpoint(path, model_key), **options)


def fill_model(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    model_prefix: str = "",
    stored_table: bool = True,
    table_grid: str | None = None,
) -> LoadReport:
    """Fill `model` in place from a checkpoint that is read; the same as `load_pretrained` in all else."""
    matching = Matching(model, checkpoint, model_prefix)
    matching.split_qkv_biases()
    matching.check_spec()
    matching.check_architecture()
    matching.check_config()
    matching.ignore_head_of_other_classes()
    matching.ignore_head_of_other_kind()
    matching.fit_class_token()
    matching.check_pooling()
    matching.ignore_by_rules()
    if not stored_table:
        matching.ignore_position_table()
    PositionTable(matching, table_grid).fit()
    matching.fit_patch_embed()
    matching.expect_learned_table(stored_table)
    matching.check_shapes()
    matching.check_complete()
    matching.check_values()
    matching.copy()
    return matching.report()


class Matching:
    """A checkpoint and a model, matched key by key; each pass decides on some keys or refuses the file.

    Keys are canonical: the same for the same tensor in every dialect, without the encoder's prefix, the final norm
    called `norm`.

    Attributes:
        source: key -> the entry of the file that shall be loaded; passes take away what is ignored, and fit tensors.
        target: key -> the model's key.
        shapes: key -> the shape in the model.
        reasons: the file's key -> why it is ignored.
        fitted, notes: what was done to tensors, and what else should be known, for the report.

    Raises CheckpointError, as each pass does: no key under the prefix, no dialect, the same tensor twice.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, model_prefix: str):
        self.model, self.checkpoint, self.path = model, checkpoint, checkpoint.path
        self.encoder = getattr(model, "encoder", model)
        self.is_ours = checkpoint.model in list_models()
        found = find_entries(checkpoint, model_prefix)
        self.found, entries = found, found.entries
        self.reasons, self.fitted, self.notes = found.reasons, found.notes, []
        self.dialect = recognise(found, checkpoint)
        self.source: dict[str, Entry] = {}
        for entry in entries:
            other = self.source.setdefault(_canonical(entry.bare, self.dialect.prefix, self.dialect), entry)
            if other is not entry:
                raise self.error(f"{other.key} and {entry.key} both stand for the same tensor; one must go")
        state = model.state_dict()
        self.target = {_canonical(key, _ENCODER_PREFIX, self.dialect): key for key in state}
        self.shapes: Shapes = {c: tuple(state[key].shape) for c, key in self.target.items()}

    def error(self, message: str) -> CheckpointError:
        """Return the error that says this of the file."""
        return CheckpointError(f"{self.path}: {message}")

    def ignore(self, c: str, reason: str) -> None:
        """Move an entry from source to reasons."""
        self.reasons[self.source.pop(c).key] = reason

    def _missing(self) -> dict[str, str]:
        """Return the part of target that the file does not have."""
        return {c: key for c, key in self.target.items() if c not in self.source}

    def split_qkv_biases(self) -> None:
        """Take the query's and the value's part of a whole qkv.bias, where the model has these alone."""
        for c in [c for c in self.source if c.endswith(".attn.qkv.bias") and c not in self.target]:
            entry, names = self.source[c], [c.replace("qkv.bias", f"{part}_bias") for part in "qv"]
            if not all(name in self.target and name not in self.source for name in names) or entry.tensor.ndim != 1:
                continue
            if len(entry.tensor) % 3 == 0:
                query, _, value = entry.tensor.chunk(3)
                del self.source[c]
                self.source |= {n: replace(entry, tensor=t) for n, t in zip(names, (query, value), strict=True)}
                if SPLIT not in self.fitted:
                    self.fitted.append(SPLIT)

    def check_spec(self) -> None:
        """Refuse a file whose spec is not that of its weights: another position table or number of classes."""
        spec = self.checkpoint.spec
        if spec is None:
            return
        head = self.source.get("head.weight")
        kinds = ("learned",) if "pos_embed" in self.source else (trained_table(self.checkpoint, self.dialect),)
        if self.is_ours and self.encoder.pos_embed is not None and spec["pos_embed"] not in kinds:
            raise self.error(f"its spec says pos_embed = {spec['pos_embed']!r}, but its weights have {kinds[0]!r}")
        if len(spec["classes"]) != (len(head.tensor) if head else 0):
            raise self.error(f"its spec says classes = {spec['classes']!r}, but that is not the size of its head")
        if spec["classes"] != self.model.spec["classes"] and len(spec["classes"]) == len(self.model.spec["classes"]):
            raise self.error(f"its classes are {spec['classes']!r}, the model's {self.model.spec['classes']!r}")

    def check_architecture(self) -> None:
        """Refuse a file of another model size or family."""
        if (entry := self.source.get("patch_embed.proj.weight")) is not None and entry.tensor.ndim != 5:
            shape = tuple(entry.tensor.shape)
            raise self.error(f"{entry.key} is {shape}, no kernel over frames, rows and columns; not of a video model")
        found = {c: tuple(e.tensor.shape) for c, e in self.source.items()}
        check_architecture(self.model, self.shapes, found, self.dialect, self.checkpoint)

    def check_config(self) -> None:
        """Note in what the model differs from the config.json beside the weights; refuse another number of heads."""
        if self.found.family:
            self.fitted += notes_on(self.model, self.path)

    def ignore_head_of_other_classes(self) -> None:
        """Ignore a head of another class count, the same in all else."""
        wanted = self.shapes
        head = {c: tuple(e.tensor.shape) for c, e in self.source.items() if c.startswith("head.") and c in wanted}
        if all(len(s) == len(wanted[c]) and s[1:] == wanted[c][1:] and s[0] != wanted[c][0] for c, s in head.items()):
            for c, (classes, *_) in head.items():
                self.ignore(c, f"head.* of {classes} classes")

    def ignore_head_of_other_kind(self) -> None:
        """Ignore a head that is attentive where the model's is linear, or the other way round."""
        in_file, in_model = (any(c.startswith(_PROBE) for c in side) for side in (self.source, self.target))
        if in_file == in_model:
            return
        kind = "an attentive head" if in_file else "a linear head"
        for c in list(self.source):
            module = c.partition(".")[0]
            if module in ("head", "pooler") or (in_file and module == "norm" and c not in self.target):
                self.ignore(c, f"{module}.* of {kind}")

    def check_pooling(self) -> None:
        """Refuse a trained head that stands behind another pooling than the model's."""
        c = "norm.weight"
        if all(key in side for key in (c, "head.weight") for side in (self.source, self.target)):
            names = [key.split(".")[-2] for key in (self.source[c].bare, self.target[c])]
            if names[0] != names[1]:
                in_file, in_model = ("fc_norm" if name == "fc_norm" else "cls" for name in names)
                raise self.error(
                    f"its head was trained with --final_reduction {in_file}, the model has {in_model}; use {in_file}"
                )

    def ignore_by_rules(self) -> None:
        """Ignore what the dialect's rules leave out."""
        for c in [c for c in self.source if c not in self.target or self.dialect.own_target]:
            bare = self.source[c].bare
            if any(re.fullmatch(rule, bare) for rule in self.dialect.ignored):
                module = re.match(r"(encoder\.)?[^.]+", bare).group()
                self.ignore(c, module if module == bare else f"{module}.*")

    def ignore_position_table(self) -> None:
        """Ignore the file's position table; refuse the file where the model needs it."""
        if "pos_embed" in self.shapes:
            raise self.error("the model's position table is learned, so it takes the file's; not sincos")
        if "pos_embed" in self.source:
            self.ignore("pos_embed", "learned position table")

    def fit_class_token(self) -> None:
        """Leave out the class token, its position and a head that stands on it, where the model has none of it."""
        if "cls_token" not in self.source or "cls_token" in self.target:
            return
        self.ignore("cls_token", "class token")
        for c in [c for c in self.source if c.startswith("head.")]:
            self.ignore(c, "head.* of the class token")
        if (entry := self.source.get("pos_embed")) is not None and entry.tensor.ndim == 3:
            self.source["pos_embed"] = replace(entry, tensor=entry.tensor[:, 1:])

    def fit_patch_embed(self) -> None:
        """Inflate a patch embedding of one frame to the model's frames, keeping its sum."""
        c = "patch_embed.proj.weight"
        if c not in self.source or tuple(self.source[c].tensor.shape) == self.shapes[c]:
            return
        entry, frames = self.source[c], self.shapes[c][2]
        self.source[c] = replace(entry, tensor=entry.tensor.float().expand(self.shapes[c]) / frames)
        self.fitted.append(f"{entry.key} from 1 frame to {frames}")

    def expect_learned_table(self, stored_table: bool) -> None:
        """Expect a learned position table where the file has one, or files of its dialect do."""
        expected = "pos_embed" in self.source or (stored_table and self.dialect.stored_table)
        if expected and self.encoder.pos_embed is not None:
            self.target["pos_embed"] = "pos_embed" if self.encoder is self.model else "encoder.pos_embed"
            self.shapes["pos_embed"] = tuple(self.encoder.pos_embed.shape)

    def check_shapes(self) -> None:
        """Refuse a tensor of another shape than the model's."""
        found = {c: tuple(self.source[c].tensor.shape) for c in self.shapes if c in self.source}
        wrong = [c for c, shape in found.items() if shape != self.shapes[c]]
        if wrong:
            c = wrong[0]
            raise self.error(
                f"{len(wrong)} tensors have another shape than the model's: {self.source[c].key} is {found[c]}, "
                f"not {self.shapes[c]}; give the model's options that the weights were trained with"
            )

    def check_complete(self) -> None:
        """Refuse a file that lacks what the model needs, or has more than the rules of its dialect name."""
        lacking = [key for c, key in self._missing().items() if not self._may_be_fresh(c)]
        unknown = [entry.key for c, entry in self.source.items() if c not in self.target]
        problems = []
        if lacking:
            names = first_few(lacking, 4)
            problems.append(f"lacks {len(lacking)} tensors the model needs: {names}; the file is incomplete")
        if unknown:
            problems.append(
                f"has {len(unknown)} keys that no rule of {self.dialect.name!r} accounts for: "
                f"{first_few(unknown, 4)}; wrong file, or a family this loader does not know"
            )
        if problems:
            raise self.error("; ".join(problems))

    def _may_be_fresh(self, c: str) -> bool:
        """Tell whether the file may lack a tensor: of a module that such files may lack, if it lacks all of it."""
        if _DECODER.fullmatch(c):
            return not any(map(_DECODER.fullmatch, self.source))
        module = c.split(".")[0]
        return all(key.split(".")[0] != module for key in self.source) and any(
            re.fullmatch(pattern, c) for pattern in (self.dialect.fresh, self.found.fresh)
        )

    def check_values(self) -> None:
        """Refuse a tensor that is not of floating point or not finite."""
        for key, tensor in ((entry.key, entry.tensor) for entry in self.source.values()):
            if not tensor.is_floating_point():
                raise self.error(f"{key} holds {tensor.dtype}, not weights; wrong or damaged file")
            if not tensor.isfinite().all():
                raise self.error(f"{key} has NaN or infinite values; the training that wrote it diverged")

    def copy(self) -> None:
        """Write source into the model."""
        if "pos_embed" in self.source:
            self.encoder.learn_pos_embed()
        state = self.model.state_dict()
        with torch.no_grad():
            for c, entry in self.source.items():
                state[self.target[c]].copy_(entry.tensor)

    def report(self) -> LoadReport:
        """Say what became of every key."""
        state = self.checkpoint.state
        sources = {key: self.source[c].key for c, key in self.target.items() if c in self.source}
        return LoadReport(
            path=self.path,
            dialect=self.dialect.name,
            wrapper=self.checkpoint.wrapper,
            epoch=self.checkpoint.epoch,
            dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in state.values()})),
            loaded=list(sources),
            ignored=[key for key in (*state, *self.checkpoint.beside) if key in self.reasons],
            missing=list(self._missing().values()),
            sources=sources,
            reasons=self.reasons,
            fitted=self.fitted,
            notes=self.notes,
        )


def _canonical(key: str, prefix: str, dialect: Dialect) -> str:
    """Return the one name of a tensor in every dialect: without the encoder's prefix, the final norm called `norm`."""
    return re.sub(rf"^{dialect.final_norm}\.", "norm.", re.sub(f"^{prefix}", "", key))
