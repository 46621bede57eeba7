"""Local attention in models of diffusers: the LTX-2.5 diffusion decoder, Wan and Cosmos video transformers.

`apply` gives a model's self-attention layers processors that call `vicinal.attention`; `restore` puts back what was
there. Only processors are exchanged (through each layer's own `set_processor`), so weights, state dict and everything
around the attention stay the host's. Video transformers show their processors a flat sequence; for those a pair of
hooks on the model notes the grid of the video it is called with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

from torch import nn

from vicinal.adapters.diffusers.grid import GridSource
from vicinal.adapters.diffusers.hosts import Host, host_of, layers_of
from vicinal.adapters.diffusers.processors import Processor
from vicinal.ops.backend import check_name
from vicinal.pattern.bounds import AnyPattern, Bounds
from vicinal.pattern.compose import check_pattern, pattern_rank
from vicinal.pattern.numbers import as_grid

__all__ = ["apply", "restore"]

Model = TypeVar("Model", bound=nn.Module)

Choice: TypeAlias = str | AnyPattern | Callable[[int], AnyPattern | None]
"""A preset's name, one pattern for every layer, or a function from a layer's number to its pattern."""


def apply(
    model: Model, preset_or_pattern: Choice, grid: Sequence[int] | None = None, *, backend: str | None = None
) -> Model:
    """Let the self-attention of a diffusers model see what a pattern lets it see.

    >>> from diffusers import WanTransformer3DModel
    >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2}
    >>> model = WanTransformer3DModel(text_dim=8, freq_dim=8, in_channels=4, out_channels=4, **sizes)
    >>> model = apply(model, (Full(), Near(3), Near(3)))
    >>> video, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 5, 8)
    >>> model(video, timestep=torch.tensor([1]), encoder_hidden_states=text).sample.shape
    torch.Size([1, 4, 3, 8, 8])
    >>> model = restore(model)

    Applying again replaces the patterns of the last time; nothing is stacked.

    Args:
        model: an `LTX2VideoDiffusionDecoderModel`, `WanTransformer3DModel`, `CosmosTransformer3DModel` or
            `CosmosControlNetModel`.
        preset_or_pattern: `"ltx-decoder"`, the decoder's own kernel sizes; or a pattern for three axes (time, height,
            width); or a function from the layer's number to a pattern, or to None where a layer is to stay as it is.
        grid: how many tokens a video transformer has along (time, height, width), as three integers; by default this
            is read from the video the model is called with. The decoder's layers know their grid.
        backend: `None` to choose, or a name; see `vicinal.explain`.

    Returns:
        The same model.
    """
    host = host_of(model)
    layers = layers_of(host, model)
    patterns = _patterns(host, preset_or_pattern, layers)
    source = _grid_source(host, model, grid)
    check_name(backend)
    # all that can be refused has been; from here on the model changes
    restore(model)
    for layer, pattern in zip(layers, patterns, strict=True):
        if pattern is not None:
            layer.set_processor(host.processor(pattern, layer.processor, source, backend))
    if source is not None and any(pattern is not None for pattern in patterns):
        source.attach(model)
    return model


def restore(model: Model) -> Model:
    """Give a model back the processors that `apply` took away; a model without ours stays as it is.

    >>> from diffusers import CosmosTransformer3DModel
    >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1}
    >>> model = CosmosTransformer3DModel(text_embed_dim=8, adaln_lora_dim=4, max_size=(4, 8, 8), **sizes)
    >>> restore(apply(model, Near(3))).transformer_blocks[0].attn1.processor.__class__.__name__
    'CosmosAttnProcessor2_0'
    """
    host_of(model)
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, Processor):
            module.set_processor(processor.replaced)  # type: ignore[operator]
    # found by the hooks, so also where somebody has set other processors over ours
    for hook in list(model._forward_pre_hooks.values()):
        source = getattr(hook, "__self__", None)
        if isinstance(source, GridSource):
            source.detach()
    return model


def _patterns(host: Host, choice: Any, layers: Sequence[nn.Module]) -> list[AnyPattern | None]:
    """One pattern per layer, checked; None where a layer stays as it is."""
    if isinstance(choice, str):
        if choice not in host.presets:
            known = f"the presets {', '.join(map(repr, host.presets))}" if host.presets else "no presets, only patterns"
            raise ValueError(f"preset_or_pattern: this model has {known}, got {choice!r}")
        return [host.presets[choice](layer) for layer in layers]
    if not callable(choice) or isinstance(choice, type):  # a class of axis kinds is no pattern; the check says so
        _check_rank(choice)
        return [choice] * len(layers)
    patterns = [choice(number) for number in range(len(layers))]
    for pattern in patterns:
        if pattern is not None:
            _check_rank(pattern)
    return patterns


def _check_rank(pattern: Any) -> None:
    """Raise `ValueError` unless it is a pattern for three axes."""
    if isinstance(pattern, Bounds):
        rank: int | None = len(pattern.grid)
    else:
        check_pattern("preset_or_pattern", pattern)
        rank = pattern_rank(pattern)
    if rank not in (None, 3):
        raise ValueError(f"preset_or_pattern: the axes are (time, height, width), got {rank} axes: {pattern!r}")


def _grid_source(host: Host, model: Any, grid: Sequence[int] | None) -> GridSource | None:
    """Where the layers learn their grid, or None where they know it."""
    if host.video is None:
        if grid is not None:
            raise ValueError(f"grid: the layers of {type(model).__name__} know their grid; leave it out, got {grid!r}")
        return None
    if grid is None:
        return GridSource(host.video, tuple(model.config.patch_size), None)
    fixed = as_grid("apply", "grid", grid)
    if len(fixed) != 3:
        raise ValueError(f"apply: grid must be the numbers of tokens along (time, height, width), got {grid!r}")
    return GridSource(host.video, (), fixed)
