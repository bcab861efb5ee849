"""The tensors of a file under their keys, before they are matched with a model."""

import re
from dataclasses import dataclass, field

from torch import Tensor

from models.weights.errors import CheckpointError
from models.weights.file import Checkpoint
from utils.text import first_few

_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # of DataParallel and torch.compile


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
    prefix = _WRAPPERS.sub("", model_prefix and model_prefix.rstrip(".") + ".")
    found = Entries()
    for key, tensor in checkpoint.state.items():
        bare = _WRAPPERS.sub("", key)
        if bare.startswith(prefix):
            found.entries.append(Entry(key, _WRAPPERS.sub("", bare.removeprefix(prefix)), tensor))
        else:
            found.reasons[key] = f"outside {prefix}*"
    if not found.entries:
        raise CheckpointError(
            f"{checkpoint.path}: no key begins {prefix!r}; the keys begin {first_few(checkpoint.state, 4)}"
        )
    return found
