"""Families of models: each file holds configurations by name, a builder, and the layouts of weights elsewhere."""

from vicinal.models.registry import create_model, list_models
from vicinal.models.stylenat import StyleNAT, StyleNatConfig

from vicinal.models.oneformer import (  # isort: skip - backbones come from the registry
    OneFormer,
    OneFormerConfig,
    OneFormerOutput,
    TextConfig,
)

__all__ = [
    "OneFormer",
    "OneFormerConfig",
    "OneFormerOutput",
    "StyleNAT",
    "StyleNatConfig",
    "TextConfig",
    "create_model",
    "list_models",
]
