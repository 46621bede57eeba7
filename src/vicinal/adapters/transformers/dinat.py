"""transformers' DiNAT on our operator: what it calls in natten is gone since natten 0.20, and its layout is wrong.

Two names of `transformers.models.dinat.modeling_dinat` are replaced, and nothing else: the forward of
`NeighborhoodAttention`, and the `requires_backends` by which the models ask for natten.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch

from vicinal.adapters.transformers.host import HostChanged
from vicinal.ops import apply_scores, attention, attention_scores
from vicinal.pattern import Near

MODELING = "transformers.models.dinat.modeling_dinat"

SIGNATURES = {
    "__init__": ("self", "config", "dim", "num_heads", "kernel_size", "dilation"),
    "forward": ("self", "hidden_states", "output_attentions"),
}
"""The arguments of the host's attention module as its layers pass them."""

NUMBERS = {"num_attention_heads": 2, "attention_head_size": 4, "kernel_size": 3, "dilation": 4, "dropout.p": 0.25}
"""What our forward reads, in a module of 8 channels and 2 heads with a window of 3 and dilation 4."""

SHAPES: dict[str, tuple[int, ...]] = {
    "rpb": (2, 5, 5),
    **{f"{name}.weight": (8, 8) for name in ("query", "key", "value")},
    **{f"{name}.bias": (8,) for name in ("query", "key", "value")},
}
"""The parameters of that module."""


@dataclasses.dataclass(frozen=True)
class _Applied:
    """What the host had before, and what stands there now."""

    modeling: Any
    forward: Callable[..., Any]
    requires_backends: Callable[..., None]
    without_natten: Callable[..., None]


_applied: list[_Applied] = []
"""The patch, while it is there."""


def patch_dinat() -> None:
    """Make transformers' DiNAT run, without natten: `DinatModel`, `DinatForImageClassification`, `DinatBackbone`.

    With the backbone run OneFormer, Mask2Former and whatever else takes one. Weights, configurations and padding of
    small inputs stay the host's own. Applying it twice is applying it once; `unpatch_dinat()` undoes it.

    >>> from transformers import DinatBackbone, DinatConfig
    >>> patch_dinat()
    >>> config = DinatConfig(depths=[1, 1], num_heads=[1, 2], embed_dim=16, dilations=[[4], [1]])
    >>> [tuple(maps.shape) for maps in DinatBackbone(config)(torch.randn(1, 3, 40, 64)).feature_maps]
    [(1, 32, 5, 8)]
    >>> unpatch_dinat()
    """
    if _applied:
        return
    modeling = _import_modeling()
    _check_shape(modeling)
    requires_backends = modeling.requires_backends

    def without_natten(obj: Any, backends: Any) -> None:
        names = backends if isinstance(backends, list | tuple) else [backends]
        requires_backends(obj, [name for name in names if name != "natten"])

    module = modeling.NeighborhoodAttention
    _applied.append(_Applied(modeling, module.forward, requires_backends, without_natten))
    module.forward = neighborhood_attention
    modeling.requires_backends = without_natten


def unpatch_dinat() -> None:
    """Give transformers back what `patch_dinat()` replaced; models that were built meanwhile stop running.

    >>> unpatch_dinat()  # nothing to undo is fine
    """
    while _applied:
        applied = _applied.pop()
        # what somebody else has put there since is theirs
        if applied.modeling.NeighborhoodAttention.forward is neighborhood_attention:
            applied.modeling.NeighborhoodAttention.forward = applied.forward
        if applied.modeling.requires_backends is applied.without_natten:
            applied.modeling.requires_backends = applied.requires_backends


def neighborhood_attention(
    self: Any, hidden_states: torch.Tensor, output_attentions: bool | None = False
) -> tuple[torch.Tensor, ...]:
    """The forward of the host's `NeighborhoodAttention`: `[batch, height, width, dim]` to the same shape.

    Probabilities `[batch, heads, height, width, kernel_size ** 2]` come second where they are asked for.
    """
    per_head = (self.num_attention_heads, self.attention_head_size)
    query, key, value = (
        projection(hidden_states).unflatten(-1, per_head) for projection in (self.query, self.key, self.value)
    )
    pattern = Near(self.kernel_size, dilation=self.dilation)
    has_dropout = self.training and self.dropout.p > 0
    if not output_attentions and not has_dropout:
        fused: torch.Tensor = attention(query, key, value, pattern, bias=self.rpb)
        return (fused.flatten(-2),)
    scores = attention_scores(query, key, pattern, bias=self.rpb)
    weights = self.dropout(scores.softmax(-1)).to(value.dtype)  # under autocast a softmax gives float32
    out = apply_scores(weights, value, pattern).flatten(-2)
    return (out, weights.permute(0, 3, 1, 2, 4)) if output_attentions else (out,)


def _import_modeling() -> Any:
    """The host's module. Its import asks natten for functions that natten 0.20 and later do not have."""
    try:
        return importlib.import_module(MODELING)
    except ImportError:
        host: Any = importlib.import_module("transformers.utils")
        asked = getattr(host, "is_natten_available", None)
        if asked is None or not asked():
            raise
        host.is_natten_available = lambda: False
        try:
            return importlib.import_module(MODELING)
        finally:
            host.is_natten_available = asked


def _check_shape(modeling: Any) -> None:
    """Raise `HostChanged` unless all that is replaced or used is as expected."""
    module: Any = getattr(modeling, "NeighborhoodAttention", None)
    is_class = inspect.isclass(module)
    if not is_class:
        raise _changed("there is no class NeighborhoodAttention")
    if not callable(getattr(modeling, "requires_backends", None)):
        raise _changed("there is no requires_backends")
    for name, expected in SIGNATURES.items():
        found = tuple(inspect.signature(getattr(module, name)).parameters)
        if found != expected:
            raise _changed(f"NeighborhoodAttention.{name} takes {', '.join(found)}, not {', '.join(expected)}")
    config = importlib.import_module("transformers").DinatConfig(attention_probs_dropout_prob=0.25)
    with torch.device("meta"):  # no memory, and no random numbers drawn
        sample = module(config, dim=8, num_heads=2, kernel_size=3, dilation=4)
    found_numbers = {name: attrgetter(name)(sample) for name in NUMBERS if _has(sample, name)}
    if found_numbers != NUMBERS:
        raise _changed(f"NeighborhoodAttention has {found_numbers}, not {NUMBERS}")
    found_shapes = {name: tuple(tensor.shape) for name, tensor in sample.named_parameters()}
    if found_shapes != SHAPES:
        raise _changed(f"the parameters of NeighborhoodAttention are {found_shapes}, not {SHAPES}")


def _has(sample: Any, name: str) -> bool:
    """Whether there is such an attribute, at the end of a dotted path."""
    *path, last = name.split(".")
    for part in path:
        sample = getattr(sample, part, None)
    return hasattr(sample, last)


def _changed(what: str) -> HostChanged:
    version = importlib.import_module("transformers").__version__
    return HostChanged(f"patch_dinat() does not fit the DiNAT of transformers {version}: {what}")
