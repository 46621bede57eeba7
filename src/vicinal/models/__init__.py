"""Families of models: each file holds configurations by name, a builder, and the layouts of weights elsewhere."""

from vicinal.models.registry import create_model, list_models

__all__ = ["create_model", "list_models"]
