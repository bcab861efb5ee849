"""Checkpoints in, with every key accounted for, and our own weights files."""

from models.weights.file import CheckpointError, fetch, read_checkpoint
from models.weights.load import LoadReport, load_pretrained

__all__ = ["CheckpointError", "LoadReport", "fetch", "load_pretrained", "read_checkpoint"]
