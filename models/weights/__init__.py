"""Checkpoints in, with every key accounted for, our own weights files, and what is exported of them."""

from models.weights.file import CheckpointError, fetch, read_checkpoint, read_spec
from models.weights.pretrained import LoadReport, load_pretrained
from models.weights.rebuild import load

__all__ = ["CheckpointError", "LoadReport", "fetch", "load", "load_pretrained", "read_checkpoint", "read_spec"]
