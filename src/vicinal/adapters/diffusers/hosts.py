"""The models of diffusers that we know, and what of them is relied on."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vicinal.adapters.diffusers.processors import (
    Processor,
    VicinalCosmosProcessor,
    VicinalLTXDecoderProcessor,
    VicinalWanProcessor,
)
from vicinal.pattern.axis import Near
from vicinal.pattern.bounds import AnyPattern

try:
    import diffusers
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "vicinal.adapters.diffusers needs diffusers 0.42 or newer: pip install 'vicinal[diffusers]'", name="diffusers"
    ) from error

OLDEST, TESTED = (0, 42), "0.42.1"
"""The oldest release that has all hosts, and the one that the tests run with."""


@dataclasses.dataclass(frozen=True)
class Host:
    """What is relied on in a model of diffusers, and what its layers get."""

    home: str
    """The module of diffusers that has the processors."""
    layers: str
    """Names of the self-attention layers, as a regular expression."""
    attributes: tuple[str, ...]
    """What our processor reads from a layer."""
    arguments: tuple[str, ...]
    """What a processor is called with, after the layer."""
    replaces: tuple[str, ...]
    """The host's own processors for these layers."""
    processor: type[Processor]
    video: str | None = None
    """The model's first argument, a video that the grid is read from; None where layers know their grid."""
    presets: Mapping[str, Callable[[Any], AnyPattern]] = dataclasses.field(default_factory=dict)


_PROJECTIONS = ("heads", "to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out")

_COSMOS = Host(
    home="diffusers.models.transformers.transformer_cosmos",
    layers=r"transformer_blocks\.\d+\.attn1",
    attributes=_PROJECTIONS,
    arguments=("hidden_states", "encoder_hidden_states", "attention_mask", "image_rotary_emb"),
    replaces=("CosmosAttnProcessor2_0",),
    processor=VicinalCosmosProcessor,
    video="hidden_states",
)

HOSTS = {
    "LTX2VideoDiffusionDecoderModel": Host(
        home="diffusers.models.autoencoders.ltx2_diffusion_decoder",
        layers=r"decoder\.(det_stages\.\d+|diff_blocks)\.\d+\.attn",
        attributes=("kernel_size", "project_qkv", "to_out"),
        arguments=("hidden_states", "block_mask"),
        replaces=("LTX2VideoVaeNeighborhoodAttnProcessor", "LTX2VideoVaeNeighborhoodNattenProcessor"),
        processor=VicinalLTXDecoderProcessor,
        presets={"ltx-decoder": lambda layer: tuple(Near(size) for size in layer.kernel_size)},
    ),
    "WanTransformer3DModel": Host(
        home="diffusers.models.transformers.transformer_wan",
        layers=r"blocks\.\d+\.attn1",
        attributes=(*_PROJECTIONS, "fused_projections"),
        arguments=("hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb"),
        replaces=("WanAttnProcessor",),
        processor=VicinalWanProcessor,
        video="hidden_states",
    ),
    "CosmosTransformer3DModel": _COSMOS,
    "CosmosControlNetModel": dataclasses.replace(
        _COSMOS, layers=r"control_blocks\.\d+\.attn1", video="controls_latents"
    ),
}

JOINT = re.compile(
    r"(Flux\d?|HunyuanVideo.*|HunyuanImage|CogVideoX|CogView\w*|SD3|QwenImage\w*|Mochi|Chroma)Transformer\dDModel"
)
"""Models whose attention runs over text and video tokens together."""


def host_of(model: nn.Module) -> Host:
    """What we know about the model, or `TypeError`; diffusers itself must be new enough."""
    found = re.match(r"(\d+)\.(\d+)", diffusers.__version__)
    if found is None or tuple(map(int, found.groups())) < OLDEST:
        raise ImportError(f"vicinal.adapters.diffusers needs diffusers 0.42 or newer, found {diffusers.__version__}")
    names = [kind.__name__ for kind in type(model).__mro__ if kind.__module__.split(".")[0] == "diffusers"]
    for name in names:
        if name in HOSTS:
            return HOSTS[name]
    hint = "a compiled or wrapped model is given before it is compiled or wrapped"
    if "DiffusionPipeline" in names:
        hint = "give the model in the pipeline, such as pipeline.transformer"
    elif any(map(JOINT.fullmatch, names)):
        hint = "its attention runs over text and video tokens together, which is not covered yet"
    elif names:
        hint = "other models of diffusers are not covered yet"
    raise TypeError(f"model must be one of {', '.join(HOSTS)}, got {type(model).__name__}: {hint}")


def layers_of(host: Host, model: nn.Module) -> list[Any]:
    """The self-attention layers, with all that we rely on checked."""
    layers = [layer for name, layer in model.named_modules() if re.fullmatch(host.layers, name)]
    wrong = [f"{type(layer).__name__} has no {name}" for layer in layers[:1] for name in _missing(host, layer)]
    if not layers:
        wrong.append(f"{type(model).__name__} has no layers named {host.layers}")
    wrong += _wrong_calls(host)
    if wrong:
        raise RuntimeError(
            f"diffusers {diffusers.__version__} has another shape than the one known here (that of {TESTED}): "
            + "; ".join(wrong)
        )
    for number, layer in enumerate(layers):
        if not isinstance(layer.processor, Processor) and type(layer.processor).__name__ not in host.replaces:
            raise ValueError(
                f"model: layer {number} has the processor {type(layer.processor).__name__}, which does something else "
                f"than {' or '.join(host.replaces)}; set one of these first"
            )
    return layers


def _wrong_calls(host: Host) -> list[str]:
    """What is not as expected about how the host calls its own processors."""
    home, wrong = importlib.import_module(host.home), []
    for name in host.replaces:
        kind = getattr(home, name, None)
        if kind is None:
            wrong.append(f"there is no {name}")
            continue
        found = tuple(inspect.signature(kind.__call__).parameters)[2:]  # after the processor itself and the layer
        if found != host.arguments:
            wrong.append(f"{name} takes {', '.join(found)} instead of {', '.join(host.arguments)}")
    return wrong


def _missing(host: Host, layer: nn.Module) -> list[str]:
    return [name for name in (*host.attributes, "processor", "set_processor") if not hasattr(layer, name)]
