"""Checkpoints in, with every key accounted for, our own weights files, and what is exported of them."""

from models.weights.errors import CheckpointError
from models.weights.file import fetch, read_checkpoint, read_spec
from models.weights.hf_config import read_hints
from models.weights.pretrained import LoadReport, load_pretrained
from models.weights.rebuild import classifier_spec, load

__all__ = [
    "CheckpointError",
    "LoadReport",
    "classifier_spec",
    "fetch",
    "load",
    "load_pretrained",
    "read_checkpoint",
    "read_hints",
    "read_spec",
]
