"""Any pattern in the image encoders of transformers that dispatch their attention: ViT, DINOv2, DINOv3 and others.

Their tokens are a few prefix tokens (class token, registers) and then the cells of one grid. The cells attend by the
pattern and to every prefix token; prefix tokens attend to everything, and so they stay as global as they were.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch

from vicinal.adapters.transformers.host import HostChanged
from vicinal.ops import apply_scores, attention, attention_scores
from vicinal.ops.backend import check_name
from vicinal.pattern import AnyPattern, Bounds, Near, bounds
from vicinal.pattern.compose import check_pattern
from vicinal.pattern.numbers import as_grid, as_integer

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import bidirectional_mask_function
except ImportError as error:
    if error.__cause__ is not None:  # the name is there, but what it needs cannot be imported
        raise ImportError(f"transformers cannot be imported here: {error.__cause__}", name="transformers") from error
    raise HostChanged(f"register_attention() does not fit this transformers: {error}") from error
try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # where it is not, models hand on by themselves that weights are asked for
    _active_collector = None

LayerPatterns: TypeAlias = AnyPattern | list[AnyPattern] | Callable[[int], AnyPattern]
"""A pattern for all layers, a list with one per layer, or a function of the layer's number from 0."""

Model = TypeVar("Model", bound=torch.nn.Module)

PREFIX_TOKENS = {"deit": 2, "siglip_vision_model": 0, "ijepa": 0}
"""How many tokens stand before the grid, by `model_type`; elsewhere a class token and the configured registers."""

WITHOUT_GRID = {"vit_mae": "its patches are shuffled, most are left out, and what is left stands on no grid"}
"""Models whose tokens might pass for a grid in their number only, by `model_type`."""

RESERVED = ("eager", "sdpa", "flash", "flex", "/", "|", ":")
"""What transformers reads a meaning into when it stands in the name of an attention."""

MEANINGFUL = ("position_bias", "softcap", "sliding_window", "s_aux", "cache")
"""Arguments of some hosts that change what attention computes."""


def register_attention(
    name: str = "vicinal",
    pattern: LayerPatterns = Near(7),  # noqa: B008 - a frozen value
    *,
    grid: Sequence[int] | None = None,
    num_prefix_tokens: int | None = None,
    backend: str | None = None,
) -> None:
    """Register attention by a pattern under a name that transformers' models take as `attn_implementation`.

    The grid is the one given with the model's call (`model(images, grid=(14, 21))`), else the one given here, else
    the configuration's `image_size / patch_size` where that has as many cells as there are tokens, else a square
    where the configuration has these two and no `tubelet_size`. So images that are not square need one of the first
    two, as do videos. A list or a function of patterns, one per layer, needs
    models whose attention modules know their `layer_idx`; `number_layers(model)` tells them.

    `num_prefix_tokens` is known for the encoders named in the documentation, and else 1 (the class token) and the
    configuration's `num_register_tokens`. Registering a name of ours again replaces it.

    >>> from transformers import ViTConfig, ViTModel
    >>> register_attention("near", Near(5))
    >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    >>> model = ViTModel(config)
    >>> model.set_attn_implementation("near")
    >>> model(torch.randn(1, 3, 224, 224)).last_hidden_state.shape
    torch.Size([1, 197, 32])
    >>> images = torch.randn(1, 3, 160, 240)
    >>> model(images, interpolate_pos_encoding=True, grid=(10, 15)).last_hidden_state.shape
    torch.Size([1, 151, 32])
    """
    if not isinstance(name, str) or not name or any(part in name for part in RESERVED):
        raise ValueError(f"name must be a word without any of {', '.join(RESERVED)}, got {name!r}")
    standing = AttentionInterface().get(name)
    if standing is not None and not isinstance(standing, _GridAttention):
        raise ValueError(f"name must not be one that transformers or somebody else has registered, got {name!r}")
    if isinstance(pattern, list) and not pattern:
        raise ValueError("pattern must be a pattern, a function, or a list of at least one pattern, got []")
    if num_prefix_tokens is not None:
        num_prefix_tokens = as_integer("register_attention", "num_prefix_tokens", num_prefix_tokens, 0)
    check_name(backend)
    sizes = None if grid is None else as_grid("register_attention", "grid", grid)
    given: list[Any] = pattern if isinstance(pattern, list) else [pattern]
    for one in given:
        if one is pattern and callable(one) and not isinstance(one, type):  # a class of axis kinds is no function
            continue
        if isinstance(one, Bounds) or sizes is not None:
            bounds(one, sizes)
        else:
            check_pattern("pattern", one)
    AttentionInterface.register(name, _GridAttention(name, pattern, sizes, num_prefix_tokens, backend))
    AttentionMaskInterface.register(name, _mask)


def number_layers(model: Model) -> Model:
    """Tell each attention module its layer (`layer_idx`, from 0) where the host did not; returns the model.

    The number is the last one in the module's place: 3 for `encoder.layers.3.attention`.

    >>> from transformers import ViTConfig, ViTModel
    >>> register_attention("dilating", lambda layer: Near(5, dilation=1 + layer % 2))
    >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    >>> model = number_layers(ViTModel(config))
    >>> [module.layer_idx for module in model.modules() if hasattr(module, "layer_idx")]
    [0, 1]
    """
    found = False
    place: str
    module: Any  # takes any attribute
    for place, module in model.named_modules():
        forward = inspect.unwrap(type(module).forward)
        code = getattr(forward, "__code__", None)
        if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
            continue
        found = True
        numbers = [int(part) for part in place.split(".") if part.isdecimal()]
        if numbers and getattr(module, "layer_idx", None) is None:
            module.layer_idx = numbers[-1]
    if not found:
        raise ValueError(f"model must use transformers' attention interface, {type(model).__name__} does not")
    return model


@dataclasses.dataclass(frozen=True)
class _GridAttention:
    """What the host calls in place of its own attention."""

    name: str
    pattern: LayerPatterns
    grid: tuple[int, ...] | None
    num_prefix_tokens: int | None
    backend: str | None

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """From `[batch, heads, tokens, head_dim]` to `[batch, tokens, heads, value_dim]`, and weights if asked for."""
        config = getattr(module, "config", None)
        self._refuse(module, query, key, attention_mask, dropout, kwargs)
        prefix, grid = self._places(config, query.shape[2], kwargs.get("grid"))
        pattern = self._pattern(module, config)
        tokens = _Tokens(*(_Parts.of(tensor, prefix, grid) for tensor in (query, key, value)))
        out = tokens.attend(pattern, scaling, self.backend)
        return out, tokens.weights(pattern, scaling) if _are_weights_wanted(config, kwargs) else None

    def _refuse(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float,
        kwargs: dict[str, Any],
    ) -> None:
        """Raise `ValueError` for everything that this attention would silently leave out."""
        host = f"attn_implementation={self.name!r} in {type(module).__name__}"
        if attention_mask is not None:
            raise ValueError(f"{host}: attention_mask must be None; a pattern says who sees whom, and takes no mask")
        if dropout > 0:
            raise ValueError(
                f"{host}: dropout of attention probabilities must be 0, got {dropout}; set it to 0 in the model's "
                "configuration, or call model.eval()"
            )
        if kwargs.get("is_causal") or (kwargs.get("is_causal") is None and getattr(module, "is_causal", False)):
            raise ValueError(f"{host}: is_causal must be false; causal axes are written into the pattern")
        present = [name for name in MEANINGFUL if kwargs.get(name) is not None]
        if present:
            raise ValueError(f"{host}: {', '.join(present)} must be None; this attention does not know it")
        tokens, keys = query.shape[2], key.shape[2]
        if tokens != keys:
            raise ValueError(f"{host}: queries and keys must be the same tokens, got {tokens} queries and {keys} keys")

    def _places(self, config: Any, tokens: int, given: Sequence[int] | None) -> tuple[int, tuple[int, ...]]:
        """How many prefix tokens there are, and the grid of the others."""
        reason = WITHOUT_GRID.get(getattr(config, "model_type", ""))
        if reason is not None:
            raise ValueError(f"attn_implementation={self.name!r} does not suit {config.model_type}: {reason}")
        prefix = self.num_prefix_tokens
        if prefix is None:
            registers = getattr(config, "num_register_tokens", None) or 0
            prefix = PREFIX_TOKENS.get(getattr(config, "model_type", ""), 1 + registers)
        cells = tokens - prefix
        wanted = self.grid if given is None else as_grid(f"attn_implementation={self.name!r}", "grid", given)
        if wanted is None:
            configured = _configured_grid(config)
            side = math.isqrt(max(cells, 0))
            if configured is not None and math.prod(configured) == cells:
                return prefix, configured
            if configured is not None and side * side == cells > 0:
                return prefix, (side, side)
        elif math.prod(wanted) == cells:
            return prefix, wanted
        what = "no grid was given, and none can be guessed" if wanted is None else f"grid is {wanted}"
        raise ValueError(
            f"attn_implementation={self.name!r}: {tokens} tokens are {prefix} prefix tokens and {cells} on the grid, "
            f"but {what}; give grid=(rows, columns) with the model's call or (where the model does not hand it on) "
            "to register_attention, and num_prefix_tokens where that number is another one"
        )

    def _pattern(self, module: torch.nn.Module, config: Any) -> AnyPattern:
        """The pattern of this module's layer."""
        if not isinstance(self.pattern, list) and not callable(self.pattern):
            return self.pattern
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise ValueError(
                f"attn_implementation={self.name!r}: the pattern depends on the layer, but {type(module).__name__} "
                "has no layer_idx; call vicinal.adapters.transformers.number_layers(model) first"
            )
        if callable(self.pattern):
            return self.pattern(layer)
        layers = getattr(config, "num_hidden_layers", None)
        if layer >= len(self.pattern) or layers not in (None, len(self.pattern)):
            raise ValueError(
                f"attn_implementation={self.name!r}: pattern must have one entry per layer, got {len(self.pattern)} "
                f"for {layers if layers is not None else f'layer {layer}'}"
            )
        return self.pattern[layer]


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Tokens `[batch, tokens, heads, dim]`, those before the grid (None where there are none) and those on it."""

    prefix: torch.Tensor | None
    cells: torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor, prefix: int, grid: tuple[int, ...]) -> _Parts:
        """Split what the host gives, `[batch, heads, tokens, dim]`."""
        tokens = tensor.transpose(1, 2)
        return cls(tokens[:, :prefix] if prefix else None, tokens[:, prefix:].unflatten(1, grid))


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """Query, key and value, each as prefix and grid."""

    query: _Parts
    key: _Parts
    value: _Parts

    def attend(self, pattern: AnyPattern, scale: float | None, backend: str | None) -> torch.Tensor:
        """The output, `[batch, tokens, heads, value_dim]`."""
        rank = self.query.cells.dim() - 3
        cells = (self.query.cells, self.key.cells, self.value.cells)
        if self.query.prefix is None:
            alone: torch.Tensor = attention(*cells, pattern, scale=scale, backend=backend)
            return alone.flatten(1, rank)
        out, prefix_out = attention(
            *cells,
            pattern,
            extra_key=self.key.prefix,
            extra_value=self.value.prefix,
            extra_query=self.query.prefix,
            scale=scale,
            backend=backend,
        )
        return torch.cat([prefix_out, out.flatten(1, rank)], 1)

    def weights(self, pattern: AnyPattern, scale: float | None) -> torch.Tensor:
        """The probabilities as hosts return them, `[batch, heads, tokens, tokens]`, 0 where a query does not see."""
        cells, heads = self.key.cells, self.query.cells.shape[-2]
        rank, kv_heads = cells.dim() - 3, cells.shape[-2]
        prefix = 0 if self.key.prefix is None else self.key.prefix.shape[1]
        tokens = prefix + math.prod(cells.shape[1:-2])
        # a weighted sum of unit vectors is the row of weights
        units = torch.eye(tokens, dtype=cells.dtype, device=cells.device)
        units = units[None, :, None].expand(cells.shape[0], -1, kv_heads, -1)
        unit_cells, unit_prefix = units[:, prefix:].unflatten(1, cells.shape[1:-2]), units[:, :prefix]
        scores = attention_scores(self.query.cells, cells, pattern, extra_key=self.key.prefix, scale=scale)
        rows = apply_scores(
            scores.softmax(-1).to(cells.dtype), unit_cells, pattern, extra_value=unit_prefix if prefix else None
        ).flatten(1, rank)
        if self.query.prefix is not None and self.key.prefix is not None:
            keys = torch.cat([self.key.prefix, cells.flatten(1, rank)], 1).repeat_interleave(heads // kv_heads, 2)
            factor = cells.shape[-1] ** -0.5 if scale is None else scale
            prefix_scores = torch.einsum("bqhd,bkhd->bqhk", self.query.prefix * factor, keys)
            rows = torch.cat([prefix_scores.softmax(-1).to(rows.dtype), rows], 1)
        return rows.transpose(1, 2)


def _mask(*, mask_function: Any = None, attention_mask: Any = None, **sizes: Any) -> None:
    """The host's mask, which is none; without this function hosts would drop masks silently."""
    del sizes
    if attention_mask is not None or mask_function is not bidirectional_mask_function:
        raise ValueError(
            "attention_mask must be None for attention by a pattern, and the model must not want a mask of its own "
            "(causal, sliding or packed); the pattern says who sees whom"
        )


def _are_weights_wanted(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the host was asked for attention weights, also where its layers do not hand the question on."""
    if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
        return True
    if _active_collector is None or torch.compiler.is_compiling():
        return False  # a compiler cannot follow the collector
    collected = _active_collector.get()
    return collected is not None and "attentions" in collected


def _configured_grid(config: Any) -> tuple[int, ...] | None:
    """Rows and columns of patches by the configuration, None where it does not say or means videos."""
    sizes, patches = (getattr(config, name, None) for name in ("image_size", "patch_size"))
    if sizes is None or patches is None or getattr(config, "tubelet_size", None) is not None:
        return None
    sizes, patches = ((size, size) if isinstance(size, int) else tuple(size) for size in (sizes, patches))
    return tuple(size // patch for size, patch in zip(sizes, patches, strict=True))
