"""The tensors of a file under their keys, before they are matched with a model."""

import re
from dataclasses import dataclass, field, replace

from torch import Tensor

from models.weights.errors import CheckpointError
from models.weights.file import Checkpoint
from utils.text import first_few

_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # of DataParallel and torch.compile

_INNER = r"((?:.+?\.)??)(?:(?:videomae|vivit|vjepa2|encoder)\.)?"  # what stands between a prefix and a model's modules
_FIRST_BLOCK = re.compile(_INNER + r"(?:blocks\.0|encoder\.layer\.0|layer\.0)\..+")
_PATCHES = re.compile(_INNER + r"(?:patch_embed|embeddings\.patch_embeddings)\..+")

_MMACTION = {
    r"^cls_head\.fc_cls\.": "head.",
    r"^(backbone\.)patch_embed\.projection\.": r"\1patch_embed.proj.",
    r"\.mlp\.layers\.0\.0\.": ".mlp.fc1.",
    r"\.mlp\.layers\.1\.": ".mlp.fc2.",
}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its key there, and the key without wrappers' prefixes, in our names where they differ.

    Where it is joined from several, the key is a pattern of theirs, as in "attention.{query,key,value}.weight".
    """

    key: str
    bare: str
    tensor: Tensor


@dataclass
class Entries:
    """What a file holds: entries to be loaded, the reasons why other keys are ignored, notes for the report.

    family: the model_type whose keys they had, where they are Hugging Face's. fresh: pattern of what the file lacks by
    its config.json, in our names without "encoder.", besides what its dialect may lack.
    """

    entries: list[Entry] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    family: str | None = None
    fresh: str = ""


def select(checkpoint: Checkpoint, model_prefix: str) -> Entries:
    """Return the tensors under model_prefix; the others are ignored. Raises CheckpointError where there are none."""
    if empty := [key for key, tensor in checkpoint.state.items() if tensor.numel() == 0]:
        raise CheckpointError(
            f"{checkpoint.path}: {len(empty)} of its tensors are empty ({first_few(empty, 2)}), as in a part of "
            "DeepSpeed ZeRO-3: gather it first (python zero_to_fp32.py . weights.pth, in its folder)"
        )
    prefix = _WRAPPERS.sub("", model_prefix and model_prefix.rstrip(".") + ".")
    found = Entries(reasons=dict.fromkeys(checkpoint.beside, "not weights"))
    for key, tensor in checkpoint.state.items():
        bare = _WRAPPERS.sub("", key)
        if bare.startswith(prefix):
            tensor = _wide(tensor, key, checkpoint.path)
            found.entries.append(Entry(key, _WRAPPERS.sub("", bare.removeprefix(prefix)), tensor))
        else:
            found.reasons[key] = f"outside {prefix}*"
    if not found.entries:
        raise CheckpointError(
            f"{checkpoint.path}: no key begins {prefix!r}; the keys begin {first_few(checkpoint.state, 4)}"
        )
    return found


def _wide(tensor: Tensor, key: str, path: str) -> Tensor:
    """Return a tensor of 8 bits in float32, any other as it is. Raises CheckpointError where PyTorch cannot."""
    if not tensor.is_floating_point() or tensor.element_size() > 1:
        return tensor
    try:
        return tensor.float()
    except RuntimeError as e:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"{path}: {key} is {kind}, which PyTorch does not copy up; save it in bfloat16") from e


def possible_prefixes(found: Entries) -> list[str]:
    """Return the prefixes under which whole models seem to lie: those before a first block and a patch embedding."""
    prefixes = {}
    for entry in found.entries:
        if match := _FIRST_BLOCK.match(entry.bare):
            prefixes.setdefault(match[1], set()).add("block")
        elif match := _PATCHES.match(entry.bare):
            prefixes.setdefault(match[1], set()).add("patches")
    return sorted(prefix for prefix, parts in prefixes.items() if prefix and len(parts) == 2)


def under(found: Entries, prefix: str) -> Entries:
    """Return the entries under a prefix, without it; the others are ignored, as where --model_prefix is given."""
    chosen = Entries(reasons=dict(found.reasons), notes=[*found.notes, f"the keys under {prefix.rstrip('.')}"])
    for entry in found.entries:
        if entry.bare.startswith(prefix):
            chosen.entries.append(replace(entry, bare=_WRAPPERS.sub("", entry.bare.removeprefix(prefix))))
        else:
            chosen.reasons[entry.key] = f"outside {prefix}*"
    return chosen


def rename_mmaction(found: Entries) -> None:
    """Bring mmaction's names of a Video ViT to ours, in place, where it has its head."""
    if not any(entry.bare.startswith("cls_head.fc_cls.") for entry in found.entries):
        return
    for i, entry in enumerate(found.entries):
        bare = entry.bare
        for theirs, ours in _MMACTION.items():
            bare = re.sub(theirs, ours, bare)
        found.entries[i] = replace(entry, bare=bare)
