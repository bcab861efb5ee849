"""Checkpoints in, with every key accounted for: `load_pretrained(model, path)` fills a model or says why it cannot.

A published file differs from our module in four ways only: a wrapper around the state dict (`model`, `module`, ...),
prefixes (`_orig_mod.`, `module.`, `encoder.`, `backbone.`), the name of the final norm (`encoder.norm`, `norm`,
`fc_norm`), and tensors of the pre-training task. The keys of both sides are brought to one canonical form and matched;
what the file has beyond the model must be named by a rule of its dialect. What the file may lack is the head of a
classifier and the whole decoder of a masked autoencoder.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.checkpoint_file import MODEL_KEYS, Checkpoint, CheckpointError, brief, fetch, read_checkpoint
from models.registry import create_model, list_models

__all__ = ["CheckpointError", "LoadReport", "fetch", "load_pretrained", "read_checkpoint"]


@dataclass(frozen=True)
class Dialect:
    """How one kind of published file is recognised and read. All patterns match whole keys.

    marks: a pattern that at least one key matches. decoder_outputs: rows of decoder.head.weight, where that tells
    families with the same keys apart. prefix: pattern of what stands before the encoder's keys. ignored: patterns of
    keys that are left out on purpose where the model has no place for them. own_target: the decoder predicts something
    else than pixels, so it is left out of a masked autoencoder too. models: pattern of the models it is for.
    pos_embed: the position table the weights were trained with, where the file is of one family alone.
    """

    name: str
    marks: str
    prefix: str = r"encoder\."
    ignored: tuple[str, ...] = ()
    decoder_outputs: int | None = None
    own_target: bool = False
    models: str = r"(pretrain_videomae|vit)_.+"
    pos_embed: str | None = "sinusoid"


_BLOCK = r"blocks\.\d+\.(norm1|norm2|attn|attn\.(qkv|proj)|mlp\.(fc1|fc2))\.(weight|bias|q_bias|v_bias)"
_PIXEL_DECODER = (
    r"mask_token",
    r"encoder_to_decoder\.weight",
    rf"decoder\.{_BLOCK}",
    r"decoder\.(norm|head)\.(weight|bias)",
)
# The first that fits wins.
DIALECTS = (
    Dialect(
        "MVD pre-training",
        marks=r"decoder_(img|vid)\..+|mask_token_(img|vid)",
        prefix="",
        ignored=(
            r"pos_embed(_img|_vid)?",  # frozen tables, which the model computes
            r"mask_token_(img|vid)",
            r"down_(img|vid)\.(weight|bias)",
            rf"decoder_(img|vid)\.{_BLOCK}",
            r"decoder_(img|vid)\.(norm|head)\.(weight|bias)",
        ),
        own_target=True,
        models=r"(pretrain_)?mvd_.+",
        pos_embed="sincos_3d",
    ),
    Dialect(
        "UMT pre-training",
        marks=r"clip_decoder\.\d+\.head\.weight",
        ignored=(r"clip_decoder\.\d+\.(norm|head)\.(weight|bias)",),
        own_target=True,
        models=r"(pretrain_)?umt_.+",
        pos_embed="umt",
    ),
    Dialect(
        "MME pre-training",
        marks=r"decoder\.\d+\.blocks\..+|encoder(_q\.encoder)?\.model\.blocks\.\d+\..+",
        prefix=r"(encoder_q\.)?encoder\.(model\.)?",
        ignored=(
            r"mask_token",
            r"encoder_to_decoder\.\d+\.weight",
            rf"decoder\.\d+\.{_BLOCK}",
            r"decoder\.\d+\.norm\.(weight|bias)",
            r"decoder\.\d+\.head\.\d+\.\d+\.(weight|bias)",
        ),
        own_target=True,
    ),
    Dialect(
        "SIGMA pre-training",
        marks=r"prototypes",
        ignored=(*_PIXEL_DECODER, r"prototypes", r"head\.[0246]\.(weight|bias)", r"memory", r"memory_pred_head\..+"),
        own_target=True,
    ),
    Dialect(
        "SMILE pre-training",
        marks=r"encoder\.blocks\.\d+\..+",
        ignored=_PIXEL_DECODER,
        decoder_outputs=768,
        own_target=True,
    ),
    Dialect("VideoMAE pre-training", marks=r"encoder\.blocks\.\d+\..+", ignored=_PIXEL_DECODER, pos_embed=None),
    Dialect("Video ViT", marks=r"blocks\.\d+\..+", prefix="", ignored=(r"head\.(weight|bias)",), pos_embed=None),
    Dialect("Video ViT as a backbone", marks=r"backbone\.blocks\.\d+\..+", prefix=r"backbone\.", pos_embed=None),
)
_OWN_PREFIX = r"encoder\."  # of our masked autoencoder; the classifier has none
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # of DataParallel and torch.compile
_DECODER = re.compile(r"(decoder|encoder_to_decoder)\..+|mask_token")


@dataclass(frozen=True)
class LoadReport:
    """What became of every key. `loaded` and `missing` are the model's keys, `ignored` the file's.

    sources maps each loaded key to the file's name for it; reasons maps each ignored key to why. epoch: of the file.
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
            )
        )


# ----------------------------------------------------------------------------------------------------------------------
# Keys


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: its key there, and the key without wrappers' prefixes."""

    key: str
    bare: str
    tensor: Tensor


def _canonical(key: str, prefix: str) -> str:
    """One name for the same tensor in every dialect: without the encoder's prefix, the final norm called `norm`."""
    return re.sub(r"^fc_norm\.", "norm.", re.sub(f"^{prefix}", "", key))


def _entries(checkpoint: Checkpoint, model_prefix: str, reasons: dict[str, str]) -> list[_Entry]:
    """The file's tensors under model_prefix; the others go to reasons."""
    prefix = _WRAPPERS.sub("", model_prefix and model_prefix.rstrip(".") + ".")
    entries = []
    for key, tensor in checkpoint.state.items():
        bare = _WRAPPERS.sub("", key)
        if bare.startswith(prefix):
            entries.append(_Entry(key, _WRAPPERS.sub("", bare.removeprefix(prefix)), tensor))
        else:
            reasons[key] = f"outside {prefix}*"
    if not entries:
        raise CheckpointError(f"{checkpoint.path}: no key begins {prefix!r}; the keys begin {brief(checkpoint.state)}")
    return entries


def _recognise(entries: list[_Entry], path: str) -> Dialect:
    outputs = next((len(e.tensor) for e in entries if e.bare == "decoder.head.weight" and e.tensor.ndim), None)
    for dialect in DIALECTS:
        fits = dialect.decoder_outputs in (None, outputs)
        if fits and any(re.fullmatch(dialect.marks, entry.bare) for entry in entries):
            return dialect
    raise CheckpointError(f"{path}: not a Video ViT checkpoint; its keys begin {brief(e.bare for e in entries)}")


def _architecture(shapes: dict[str, tuple[int, ...]]) -> tuple:
    """(shape of the patch embedding or None, number of blocks) under canonical keys: what tells the sizes apart."""
    return shapes.get("patch_embed.proj.weight"), _depth("blocks", shapes)


def _depth(prefix: str, keys: Iterable[str]) -> int:
    """How many blocks there are under a prefix."""
    return 1 + max((int(m.group(1)) for k in keys if (m := re.match(rf"{prefix}\.(\d+)\.", k))), default=-1)


def _names(architecture: tuple, fits: Callable[[str, nn.Module], bool]) -> list[str]:
    """The registered models of this architecture that fit."""
    names = []
    for name in list_models():
        with torch.device("meta"):
            model = create_model(name)
        shapes = {_canonical(k, _OWN_PREFIX): tuple(v.shape) for k, v in model.state_dict().items()}
        if _architecture(shapes) == architecture and fits(name, model):
            names.append(name)
    return names


def _describe(architecture: tuple, fits: Callable[[str, nn.Module], bool]) -> str:
    """Their names, else the numbers of the architecture."""
    embed, depth = architecture
    names = _names(architecture, fits)
    return " or ".join(names) or f"a model of {depth} blocks with patch_embed.proj.weight of shape {embed}"


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def load_pretrained(model: nn.Module, path: str, *, model_key: str = MODEL_KEYS, model_prefix: str = "") -> LoadReport:
    """Fill `model` in place from a published, DAPT or fine-tuned checkpoint.

    Half-precision files are copied up into the model's own dtype. The head (`head.*`) is loaded where its shape
    fits and left as initialised where the file has none or one of another class count; a masked autoencoder's decoder
    is left as initialised where the file has none.

    Args:
        path: file or http(s) URL. model_key: see `read_checkpoint`.
        model_prefix: take the keys under this prefix alone, e.g. "student."; the others are reported as ignored.

    Returns the LoadReport. Raises CheckpointError: unreadable file, another model's size, an encoder tensor absent or
    of another shape or with NaN, a key that nothing accounts for. The model is untouched then.
    """
    checkpoint = read_checkpoint(path, model_key)
    reasons: dict[str, str] = {}  # of each key that is ignored
    entries = _entries(checkpoint, model_prefix, reasons)
    dialect = _recognise(entries, path)
    source: dict[str, _Entry] = {}  # by canonical key, as is `target`
    for entry in entries:
        other = source.setdefault(_canonical(entry.bare, dialect.prefix), entry)
        if other is not entry:
            raise CheckpointError(f"{path}: {other.key} and {entry.key} both stand for the same tensor; one must go")
    state = model.state_dict()
    target = {_canonical(key, _OWN_PREFIX): key for key in state}

    shapes = {c: tuple(state[key].shape) for c, key in target.items()}
    _check_architecture(model, shapes, {c: tuple(entry.tensor.shape) for c, entry in source.items()}, dialect, path)
    _set_foreign_head_aside(source, shapes, reasons)
    for c in [c for c in source if c not in target or dialect.own_target]:
        if any(re.fullmatch(rule, source[c].bare) for rule in dialect.ignored):
            entry = source.pop(c)
            reasons[entry.key] = entry.bare if "." not in entry.bare else f"{entry.bare.split('.')[0]}.*"
    _check_shapes(source, shapes, path)
    missing = [key for c, key in target.items() if c not in source]
    unknown = [entry.key for c, entry in source.items() if c not in target]
    has_decoder = any(map(_DECODER.fullmatch, source))
    lacking = [key for key in missing if not key.startswith("head.") and (has_decoder or not _DECODER.fullmatch(key))]
    _check_complete(lacking, unknown, dialect, path)
    _check_values(source, path)

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
        missing=missing,
        sources=sources,
        reasons=reasons,
    )


def _check_architecture(
    model: nn.Module, wanted: dict[str, tuple], found: dict[str, tuple], dialect: Dialect, path: str
) -> None:
    """Raise CheckpointError where the file is of another model size or family. Shapes by canonical key."""
    own, other = _architecture(wanted), _architecture(found)
    tables = (None, model.pos_embed_kind)
    if other[0] is not None and (other != own or dialect.pos_embed not in tables):

        def fits_file(name: str, candidate: nn.Module) -> bool:
            return type(candidate) is type(model) and bool(re.fullmatch(dialect.models, name))

        def fits_model(name: str, candidate: nn.Module) -> bool:
            return type(candidate) is type(model) and candidate.pos_embed_kind == model.pos_embed_kind

        raise CheckpointError(
            f"{path}: this is {_describe(other, fits_file)}, but the model is {_describe(own, fits_model)}"
        )
    own_decoder, decoder = (_depth(r"decoder\.blocks", shapes) for shapes in (wanted, found))
    if own_decoder and decoder and own_decoder != decoder and not dialect.own_target:
        raise CheckpointError(
            f"{path}: its decoder has {decoder} blocks, the model's {own_decoder}; use --decoder_depth {decoder}"
        )


def _set_foreign_head_aside(source: dict[str, _Entry], shapes: dict[str, tuple], reasons: dict[str, str]) -> None:
    """Move a head of another class count, the same in all else, from source to reasons."""
    head = {c: tuple(entry.tensor.shape) for c, entry in source.items() if c.startswith("head.") and c in shapes}
    if all(len(s) == len(shapes[c]) and s[1:] == shapes[c][1:] and s[0] != shapes[c][0] for c, s in head.items()):
        for c, (classes, *_) in head.items():
            reasons[source.pop(c).key] = f"head.* of {classes} classes"


def _check_values(source: dict[str, _Entry], path: str) -> None:
    """Raise CheckpointError where a tensor to be loaded is not of floating point or not finite."""
    for entry in source.values():
        if not entry.tensor.is_floating_point():
            raise CheckpointError(f"{path}: {entry.key} holds {entry.tensor.dtype}, not weights; wrong or damaged file")
        if not entry.tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: {entry.key} has NaN or infinite values; the training that wrote it diverged"
            )


def _check_shapes(source: dict[str, _Entry], shapes: dict[str, tuple], path: str) -> None:
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


# ----------------------------------------------------------------------------------------------------------------------
# python -m models.weights CHECKPOINT


def likely_models(path: str, *, model_key: str = MODEL_KEYS, model_prefix: str = "") -> list[str]:
    """Names of the registered models that the weights in a file are for, classifiers first. Raises CheckpointError."""
    checkpoint = read_checkpoint(path, model_key)
    entries = _entries(checkpoint, model_prefix, {})
    dialect = _recognise(entries, path)
    found = _architecture({_canonical(e.bare, dialect.prefix): tuple(e.tensor.shape) for e in entries})
    names = _names(found, lambda name, _: bool(re.fullmatch(dialect.models, name)))
    if not names:
        raise CheckpointError(f"{path}: {dialect.name}, {_describe(found, lambda *_: False)}: no registered model")
    return sorted(names, key=lambda name: name.startswith("pretrain_"))


def main() -> None:
    """Command line: say what a checkpoint is and load it into a model, for a trial."""
    parser = argparse.ArgumentParser(description="Say what a checkpoint is; exit with an error if it does not load.")
    parser.add_argument("checkpoint", help="path or URL")
    parser.add_argument("--model", help="registered model to load it into (default: the one it seems to be for)")
    parser.add_argument("--model_key", default=MODEL_KEYS, help=f"where the weights are (default: {MODEL_KEYS})")
    parser.add_argument("--model_prefix", default="", help="read only the keys under this prefix")
    args = parser.parse_args()
    where = {"model_key": args.model_key, "model_prefix": args.model_prefix}
    try:
        names = [args.model] if args.model else likely_models(args.checkpoint, **where)
        report = load_pretrained(create_model(names[0]), args.checkpoint, **where)
    except (CheckpointError, ValueError) as e:
        sys.exit(f"error: {e}")
    print(report)
    print(f"  model    {' or '.join(names)}")


if __name__ == "__main__":
    main()
