"""Families of models: each file holds configurations by name, a builder, and the layouts of weights elsewhere."""

from vicinal.models.registry import create_model, list_models
from vicinal.models.stylenat import StyleNAT, StyleNatConfig

__all__ = ["StyleNAT", "StyleNatConfig", "create_model", "list_models"]
