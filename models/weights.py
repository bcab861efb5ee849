"""Checkpoints in, with every key accounted for: `load_pretrained(model, path)` fills a model or says why it cannot.

A published file differs from our module in four ways only: a wrapper around the state dict (`model`, `module`, ...),
prefixes (`_orig_mod.`, `module.`, `encoder.`, `backbone.`), the name of the final norm (`encoder.norm`, `norm`,
`fc_norm`), and tensors of the pre-training task. Both sides' keys are brought to one canonical form and matched;
what the file has beyond the model must be named by a rule of its dialect, and all the model lacks is the head.
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
    """How one kind of published file is recognised, and which of its keys are left out on purpose.

    marks: a pattern at least one key matches in full. ignored: patterns of whole keys; a key that none of them
    matches and that the model lacks is an error.
    """

    name: str
    marks: str
    ignored: tuple[str, ...] = ()


# The first whose mark is found wins.
DIALECTS = (
    Dialect(
        "VideoMAE pre-training",
        marks=r"encoder\.blocks\.\d+\..+",
        ignored=(
            r"mask_token",
            r"encoder_to_decoder\.weight",
            r"decoder\.blocks\.\d+\.(norm1|norm2|attn|attn\.(qkv|proj)|mlp\.(fc1|fc2))\.(weight|bias|q_bias|v_bias)",
            r"decoder\.(norm|head)\.(weight|bias)",
        ),
    ),
    Dialect("fine-tuned Video ViT", marks=r"blocks\.\d+\..+", ignored=(r"head\.(weight|bias)",)),
)


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
        why = ", ".join(f"{n} {reason}" for reason, n in Counter(self.reasons.values()).items())
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


def _strip_wrappers(key: str) -> str:
    return re.sub(r"^((module|_orig_mod)\.)+", "", key)


def _canonical(key: str) -> str:
    """One name for the same tensor in every dialect: no encoder prefix, the final norm called `norm`."""
    return re.sub(r"^fc_norm\.", "norm.", re.sub(r"^(encoder|backbone)\.", "", key))


def _recognise(keys: Iterable[str], path: str) -> Dialect:
    keys = list(keys)
    for dialect in DIALECTS:
        if any(re.fullmatch(dialect.marks, key) for key in keys):
            return dialect
    raise CheckpointError(f"{path}: not a Video ViT checkpoint; its keys begin {_brief(keys)}")


def _architecture(shapes: dict[str, tuple[int, ...]]) -> tuple:
    """(shape of the patch embedding or None, number of blocks) under canonical keys: what tells the sizes apart."""
    numbers = [int(m.group(1)) for k in shapes if (m := re.match(r"blocks\.(\d+)\.", k))]
    return shapes.get("patch_embed.proj.weight"), 1 + max(numbers, default=-1)


def _describe(architecture: tuple) -> str:
    """The registered models of this architecture, else its numbers."""
    names = []
    for name in list_models():
        with torch.device("meta"):
            candidate = create_model(name)
        if _architecture({_canonical(k): tuple(v.shape) for k, v in candidate.state_dict().items()}) == architecture:
            names.append(name)
    embed, depth = architecture
    return " or ".join(names) or f"a model of {depth} blocks with patch_embed.proj.weight of shape {embed}"


def _index(keys: Iterable[str], path: str) -> dict[str, str]:
    """{canonical key: key}. Raises CheckpointError where two keys mean the same tensor."""
    index: dict[str, str] = {}
    for key in keys:
        other = index.setdefault(_canonical(key), key)
        if other != key:
            raise CheckpointError(f"{path}: {other} and {key} both stand for {_canonical(key)}")
    return index


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
    of another shape, a key that nothing accounts for.
    """
    checkpoint = read_checkpoint(path, model_key)
    reasons: dict[str, str] = {}
    origin: dict[str, str] = {}  # stripped key -> the file's key
    for key in checkpoint.state:
        stripped = _strip_wrappers(key)
        if stripped.startswith(model_prefix):
            origin[stripped.removeprefix(model_prefix)] = key
        else:
            reasons[key] = f"outside {model_prefix}*"
    dialect = _recognise(origin, path)

    own = model.state_dict()
    own_index, file_index = _index(own, path), _index(origin, path)
    tensors = {c: checkpoint.state[origin[k]] for c, k in file_index.items()}
    _check_architecture({c: own[k] for c, k in own_index.items()}, tensors, path)

    mismatched = [c for c, k in own_index.items() if c in tensors and tensors[c].shape != own[k].shape]
    if any(c.startswith("head.") for c in mismatched):
        head = [c for c in own_index if c.startswith("head.") and c in tensors]
        reasons |= {origin[file_index[c]]: f"head.* of {tensors[c].shape[0]} classes" for c in head}
        mismatched = [c for c in mismatched if c not in head]
        tensors = {c: t for c, t in tensors.items() if c not in head}
    if mismatched:
        c = mismatched[0]
        raise CheckpointError(
            f"{path}: {len(mismatched)} tensors have another shape than the model's: {c} is {tuple(tensors[c].shape)}, "
            f"not {tuple(own[own_index[c]].shape)}{'; also ' * (len(mismatched) > 1)}{_brief(mismatched[1:])}"
        )

    missing = [k for c, k in own_index.items() if c not in tensors]
    unknown = []
    for canonical in tensors.keys() - own_index.keys():
        key = file_index[canonical]
        if any(re.fullmatch(rule, key) for rule in dialect.ignored):
            reasons[origin[key]] = key if "." not in key else f"{key.split('.')[0]}.*"
        else:
            unknown.append(origin[key])
    _check_complete([k for k in missing if not k.startswith("head.")], sorted(unknown), dialect, path)

    sources = {k: origin[file_index[c]] for c, k in own_index.items() if c in tensors}
    with torch.no_grad():
        for key, source in sources.items():
            own[key].copy_(checkpoint.state[source])
    return LoadReport(
        path=checkpoint.path,
        dialect=dialect.name,
        wrapper=checkpoint.wrapper,
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in checkpoint.state.values()})),
        loaded=list(sources),
        ignored=[k for k in checkpoint.state if k in reasons],
        missing=missing,
        sources=sources,
        reasons=reasons,
    )


def _check_architecture(own: dict[str, Tensor], tensors: dict[str, Tensor], path: str) -> None:
    """Raise CheckpointError where the file is of another model size. Both dictionaries have canonical keys."""
    wanted, found = (_architecture({c: tuple(t.shape) for c, t in side.items()}) for side in (own, tensors))
    if found[0] is not None and found != wanted:
        raise CheckpointError(f"{path}: this is {_describe(found)}, but the model is {_describe(wanted)}")


def _check_complete(lacking: list[str], unknown: list[str], dialect: Dialect, path: str) -> None:
    """Raise CheckpointError where the model needs more than the file has, or the file has more than its rules name."""
    problems = []
    if lacking:
        problems.append(f"lacks {len(lacking)} tensors the model needs: {_brief(lacking)}; the file is incomplete")
    if unknown:
        problems.append(f"has {len(unknown)} keys that no rule of {dialect.name!r} accounts for: {_brief(unknown)}; "
                        "wrong file, or a family this loader does not know")  # fmt: skip
    if problems:
        raise CheckpointError(f"{path}: " + "; ".join(problems))
