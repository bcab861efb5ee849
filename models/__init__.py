"""Video models by name, and from their weights file: `create_model(name)`, `load(path)`.

A model is pure: torch, timm and einops, no files, no processes, no arguments object; `models.weights` reads files.
"""

import sys

from utils.exits import report_uncaught

if sys.argv[:1] == ["-m"]:  # one of its commands starts, of which this is the first file
    report_uncaught()

from models import internvideo2, mae, vit, vivit, vjepa  # noqa: F401  (they fill the registry)
from models.registry import (
    ModelDefaults,
    classifier_of,
    create_model,
    head_of,
    list_models,
    masked_autoencoder_of,
    model_defaults,
)
from models.weights import load

__all__ = [
    "ModelDefaults",
    "classifier_of",
    "create_model",
    "head_of",
    "list_models",
    "load",
    "masked_autoencoder_of",
    "model_defaults",
]
