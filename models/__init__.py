"""Video models by name. A model is pure: torch, timm and einops, no files, no processes, no arguments object."""

from models import vit  # noqa: F401  (fills the registry)
from models.registry import ModelDefaults, create_model, list_models, model_defaults

__all__ = ["ModelDefaults", "create_model", "list_models", "model_defaults"]
