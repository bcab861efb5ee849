"""Checkpoints in, with every key accounted for: `load_pretrained(model, path)` fills a model or says why it cannot.

A published file differs from our module in four ways only: a wrapper around the state dict (`model`, `module`, ...),
prefixes (`_orig_mod.`, `module.`, `encoder.`, `backbone.`), the name of the final norm (`encoder.norm`, `norm`,
`fc_norm`), and tensors of the pre-training task. The keys of both sides are brought to one canonical form and matched;
what the file has beyond the model must be named by a rule of its dialect, and all the model may lack is the head.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor, nn

from models.registry import create_model, list_models

MODEL_KEYS = "model|module|state_dict|model_state"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file, what is wrong and the remedy."""


@dataclass(frozen=True)
class Dialect:
    """How one kind of published file is recognised and read.

    marks: a pattern that at least one key matches in full. prefix: what stands before the encoder's keys.
    ignored: patterns of whole keys that are left out on purpose where the model has no place for them.
    """

    name: str
    marks: str
    prefix: str = ""
    ignored: tuple[str, ...] = ()


# The first whose mark is found wins.
DIALECTS = (
    Dialect(
        "VideoMAE pre-training",
        marks=r"encoder\.blocks\.\d+\..+",
        prefix="encoder.",
        ignored=(
            r"mask_token",
            r"encoder_to_decoder\.weight",
            r"decoder\.blocks\.\d+\.(norm1|norm2|attn|attn\.(qkv|proj)|mlp\.(fc1|fc2))\.(weight|bias|q_bias|v_bias)",
            r"decoder\.(norm|head)\.(weight|bias)",
        ),
    ),
    Dialect("Video ViT", marks=r"blocks\.\d+\..+", ignored=(r"head\.(weight|bias)",)),
    Dialect("Video ViT as a backbone", marks=r"backbone\.blocks\.\d+\..+", prefix="backbone."),
)
_OWN_PREFIX = "encoder."  # of our masked autoencoder; the classifier has none


@dataclass(frozen=True)
class Checkpoint:
    """A state dict as read: wrapper is the key it was under ("" if none), state maps the file's keys to tensors."""

    path: str
    wrapper: str
    state: dict[str, Tensor]


@dataclass(frozen=True)
class LoadReport:
    """What became of every key. `loaded` and `missing` are the model's keys, `ignored` the file's.

    sources maps each loaded key to the file's name for it; reasons maps each ignored key to why.
    """

    path: str
    dialect: str
    wrapper: str
    dtypes: tuple[str, ...]
    loaded: list[str]
    ignored: list[str]
    missing: list[str]
    sources: dict[str, str] = field(repr=False)
    reasons: dict[str, str] = field(repr=False)

    def __str__(self) -> str:
        wrapped = f" under {self.wrapper!r}" if self.wrapper else ""
        renamed = sum(new != old for new, old in self.sources.items())
        missing = _brief(self.missing) + " (newly initialised)" * bool(self.missing)
        why = ", ".join(f"{n} {reason}" for reason, n in Counter(self.reasons.values()).most_common())
        return "\n".join(
            (
                f"weights from {self.path}",
                f"  dialect  {self.dialect}{wrapped}, {'/'.join(self.dtypes)}",
                f"  loaded   {len(self.loaded):4d}  ({renamed} of them renamed)",
                f"  ignored  {len(self.ignored):4d}  {why}".rstrip(),
                f"  missing  {len(self.missing):4d}  {missing}".rstrip(),
            )
        )


def _brief(keys: Iterable[str], limit: int = 4) -> str:
    keys = list(keys)
    return ", ".join(keys[:limit]) + (f", ... ({len(keys)} in all)" if len(keys) > limit else "")


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def fetch(path_or_url: str) -> str:
    """A local path for a path or an http(s) URL; a URL is downloaded once into torch.hub's cache.

    Raises CheckpointError where the download fails.
    """
    if urlparse(path_or_url).scheme not in ("http", "https"):
        return path_or_url
    target = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(path_or_url).path).name)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(path_or_url, str(target), progress=False)  # temporary file, then renamed
        except OSError as e:
            raise CheckpointError(f"{path_or_url}: download failed ({e}); fetch it by hand and give its path") from e
    return str(target)


def _safe_types() -> list:
    """What published training scripts pickle beside tensors: their arguments, and NumPy's scalars in the optimizer."""
    dtypes = [type(np.dtype(t)) for t in (np.float64, np.float32, np.int64, np.bool_)]
    scalar = np.float64(0).__reduce__()[0]
    scalars = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # NumPy 1 and 2 files
    return [argparse.Namespace, np.dtype, *dtypes, *scalars]


def _explain_unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as f:
        head = f.read(512).lstrip()
    if head[:1] == b"<":
        return "this is an HTML or XML page saved under the name of a checkpoint; download the file itself"
    if head.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the weights; run `git lfs pull`"
    if "Unsupported global" in str(error) or "Unsupported class" in str(error):
        found = re.search(r"GLOBAL (\S+)|class (\S+)", str(error))
        name = next(filter(None, found.groups()), "a class") if found else "a class"
        return (
            f"it pickles {name}, which is refused because unpickling can run code; if you trust the file, re-save its "
            "weights alone: torch.save(torch.load(FILE, weights_only=False)['model'], NEW_FILE)"
        )
    return f"truncated, or not a PyTorch checkpoint ({str(error).splitlines()[0][:120]}); download or copy it again"


def read_checkpoint(path: str, model_key: str = MODEL_KEYS) -> Checkpoint:
    """Read a state dict to the CPU, unpickling tensors and plain types only.

    Args:
        path: file or URL. model_key: names separated by |; the first one present is unwrapped, else the file itself
            must be a state dict.

    Raises CheckpointError: missing, empty, truncated or foreign file, no state dict inside.
    """
    file = Path(fetch(path))
    if not file.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    if file.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; download or copy it again")
    try:
        with torch.serialization.safe_globals(_safe_types()):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises a dozen types, depending on where the bytes go wrong
        raise CheckpointError(f"{path}: {_explain_unreadable(file, e)}") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    wrapper = next((k for k in model_key.split("|") if isinstance(content.get(k), dict)), "")
    state = content[wrapper] if wrapper else content
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(
            f"{path}: no weights under {' or '.join(model_key.split('|'))}; the file's keys are "
            f"{_brief(map(str, content))}. Name the right one with --model_key"
        )
    return Checkpoint(str(path), wrapper, dict(state))


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
    return re.sub(r"^fc_norm\.", "norm.", key.removeprefix(prefix))


def _entries(checkpoint: Checkpoint, model_prefix: str, reasons: dict[str, str]) -> list[_Entry]:
    """The file's tensors under model_prefix; the others go to reasons."""
    entries = []
    for key, tensor in checkpoint.state.items():
        bare = re.sub(r"^((module|_orig_mod)\.)+", "", key)
        if bare.startswith(model_prefix):
            entries.append(_Entry(key, bare.removeprefix(model_prefix), tensor))
        else:
            reasons[key] = f"outside {model_prefix}*"
    return entries


def _recognise(entries: list[_Entry], path: str) -> Dialect:
    for dialect in DIALECTS:
        if any(re.fullmatch(dialect.marks, entry.bare) for entry in entries):
            return dialect
    raise CheckpointError(f"{path}: not a Video ViT checkpoint; its keys begin {_brief(e.bare for e in entries)}")


def _architecture(shapes: dict[str, tuple[int, ...]]) -> tuple:
    """(shape of the patch embedding or None, number of blocks) under canonical keys: what tells the sizes apart."""
    numbers = [int(m.group(1)) for k in shapes if (m := re.match(r"blocks\.(\d+)\.", k))]
    return shapes.get("patch_embed.proj.weight"), 1 + max(numbers, default=-1)


def _describe(architecture: tuple) -> str:
    """The registered models of this architecture, else its numbers."""
    names = []
    for name in list_models():
        with torch.device("meta"):
            state = create_model(name).state_dict()
        if _architecture({_canonical(k, _OWN_PREFIX): tuple(v.shape) for k, v in state.items()}) == architecture:
            names.append(name)
    embed, depth = architecture
    return " or ".join(names) or f"a model of {depth} blocks with patch_embed.proj.weight of shape {embed}"


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def load_pretrained(model: nn.Module, path: str, *, model_key: str = MODEL_KEYS, model_prefix: str = "") -> LoadReport:
    """Fill `model` in place from a published, DAPT or fine-tuned checkpoint.

    Half-precision files are copied up into the model's own dtype. The head (`head.*`) is loaded where its shape
    fits and left as initialised where the file has none or one of another class count.

    Args:
        path: file or http(s) URL. model_key: see `read_checkpoint`.
        model_prefix: take the keys under this prefix alone, e.g. "student."; the others are reported as ignored.

    Returns the LoadReport. Raises CheckpointError: unreadable file, another model's size, an encoder tensor absent or
    of another shape, a key that nothing accounts for. The model is untouched then.
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
    _check_architecture(shapes, {c: tuple(entry.tensor.shape) for c, entry in source.items()}, path)
    _set_foreign_head_aside(source, shapes, reasons)
    _check_shapes(source, shapes, path)
    for c in [c for c in source if c not in target]:
        if any(re.fullmatch(rule, source[c].bare) for rule in dialect.ignored):
            entry = source.pop(c)
            reasons[entry.key] = entry.bare if "." not in entry.bare else f"{entry.bare.split('.')[0]}.*"
    missing = [key for c, key in target.items() if c not in source]
    unknown = [entry.key for c, entry in source.items() if c not in target]
    _check_complete([key for key in missing if not key.startswith("head.")], unknown, dialect, path)

    with torch.no_grad():
        for c, entry in source.items():
            state[target[c]].copy_(entry.tensor)
    sources = {key: source[c].key for c, key in target.items() if c in source}
    return LoadReport(
        path=checkpoint.path,
        dialect=dialect.name,
        wrapper=checkpoint.wrapper,
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in checkpoint.state.values()})),
        loaded=list(sources),
        ignored=[key for key in checkpoint.state if key in reasons],
        missing=missing,
        sources=sources,
        reasons=reasons,
    )


def _check_architecture(wanted: dict[str, tuple], found: dict[str, tuple], path: str) -> None:
    """Raise CheckpointError where the file is of another model size. Shapes by canonical key."""
    wanted, found = _architecture(wanted), _architecture(found)
    if found[0] is not None and found != wanted:
        raise CheckpointError(f"{path}: this is {_describe(found)}, but the model is {_describe(wanted)}")


def _set_foreign_head_aside(source: dict[str, _Entry], shapes: dict[str, tuple], reasons: dict[str, str]) -> None:
    """Move a head of another class count from source to reasons."""
    head = [c for c in source if c.startswith("head.") and c in shapes]
    if any(tuple(source[c].tensor.shape) != shapes[c] for c in head):
        for c in head:
            entry = source.pop(c)
            reasons[entry.key] = f"head.* of {len(entry.tensor)} classes"


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
        problems.append(f"lacks {len(lacking)} tensors the model needs: {_brief(lacking)}; the file is incomplete")
    if unknown:
        problems.append(
            f"has {len(unknown)} keys that no rule of {dialect.name!r} accounts for: {_brief(unknown)}; "
            "wrong file, or a family this loader does not know"
        )
    if problems:
        raise CheckpointError(f"{path}: " + "; ".join(problems))
