"""What a family is to the rest of the library: configurations by name, a builder, layouts, published files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from vicinal.models.layout import Layout


@dataclass(frozen=True)
class Published:
    """Where weights of a variant are published. Nothing was fetched: there was no network where this was written.

    `source` is an address, or a repository id on the Hugging Face hub. `changes` are configuration fields in which
    the published model differs from the variant.
    """

    source: str
    layout: str = "published"
    num_classes: int = 1000
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """Named configurations, `build` from one of them to a model, and the layouts of weights elsewhere.

    A classifier is a `Pyramid`. A segmenter is a `OneFormer`, whose checkpoints are whole models, backbone and all. A
    generator makes images. `classifier` begins the names of what depends on the number of classes, and
    `extra_classes` it has beside them. `hint` says in words what a checkpoint that does not fit a model looks like, or
    gives nothing.
    """

    variants: Mapping[str, Any]
    build: Callable[[Any], nn.Module]
    layouts: Mapping[str, Layout]
    published: Mapping[str, tuple[Published, ...]] = field(default_factory=dict)
    kind: Literal["classifier", "segmenter", "generator"] = "classifier"
    classifier: str = "head.classifier."
    extra_classes: int = 0
    hint: Callable[[Mapping[str, torch.Tensor], nn.Module], str] = lambda state, model: ""
