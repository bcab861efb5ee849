"""Video models by name. A model is pure: torch and timm, no files, no processes, no arguments object."""

from models import internvideo2, mae, vit  # noqa: F401  (they fill the registry)
from models.registry import ModelDefaults, create_model, list_models, model_defaults

__all__ = ["ModelDefaults", "create_model", "list_models", "model_defaults"]
