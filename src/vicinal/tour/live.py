"""Other people's models, live: transformers' DiNAT and OneFormer on our operator and on dense masked attention."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vicinal.measure import Timing, compare
from vicinal.measure.peers.installed import mend_torchvision
from vicinal.pattern import Near, mask

TOLERANCE = 1e-3
"""How far two answers may lie apart, relative to the largest number in them, after dozens of float32 layers."""

STAGES = ("stage1", "stage2", "stage3", "stage4")
QUERIES, TASK_LENGTH = 20, 77


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of the host: `build(host)` makes it with random weights; pictures are `size` pixels wide and high.

    `inputs` are what it takes besides the picture, and `answer` picks the tensors that must agree.
    """

    title: str
    size: int
    build: Callable[[Any], torch.nn.Module]
    answer: Callable[[Any], tuple[torch.Tensor, ...]]
    inputs: Callable[[], dict[str, torch.Tensor]] = dict


@dataclasses.dataclass(frozen=True)
class Result:
    """Milliseconds of a forward pass on both; `reason` says why there are none."""

    title: str
    detail: str = ""
    ours: Timing | None = None
    dense: Timing | None = None
    reason: str = ""

    @property
    def speedup(self) -> float | None:
        """How many times faster we are, by pairs of calls that took turns."""
        return None if self.ours is None or self.dense is None else self.ours.speedup_over(self.dense)


def _dinat(host: Any, **changes: Any) -> torch.nn.Module:
    model: torch.nn.Module = host.DinatForImageClassification(host.DinatConfig(num_labels=1000, **changes))
    return model


def _oneformer(host: Any, **changes: Any) -> torch.nn.Module:
    config = host.OneFormerConfig(
        backbone_config=host.DinatConfig(out_features=list(STAGES), **changes),
        num_queries=QUERIES,
        encoder_layers=2,
        decoder_layers=4,
        task_seq_len=TASK_LENGTH,
    )
    model: torch.nn.Module = host.OneFormerForUniversalSegmentation(config)
    return model


def _task() -> dict[str, torch.Tensor]:
    return {"task_inputs": torch.randint(1, 49_000, (1, TASK_LENGTH)).float()}


def _logits(output: Any) -> tuple[torch.Tensor, ...]:
    return (output.logits,)


def _masks(output: Any) -> tuple[torch.Tensor, ...]:
    return output.class_queries_logits, output.masks_queries_logits


SMALL = {"depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8], "embed_dim": 16, "kernel_size": 3}
SMALL |= {"dilations": [[2], [1, 4], [1], [1]]}

MODELS: tuple[Model, ...] = (
    Model("DiNAT-Mini, a classifier", 224, _dinat, _logits),
    Model("OneFormer on DiNAT-Mini, small decoder", 224, _oneformer, _masks, _task),
)
QUICK_MODELS: tuple[Model, ...] = (Model("a tiny DiNAT", 64, functools.partial(_dinat, **SMALL), _logits),)


def run_models(
    models: Sequence[Model] = MODELS,
    *,
    seconds: float = 3.0,
    begin: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Run each model on both attentions, compare the answers, and time those that agree for about `seconds`."""
    mend_torchvision()
    results = []
    for model in models:
        begin(f"running {model.title}")
        try:
            adapter = importlib.import_module("vicinal.adapters.transformers")
            adapter.patch_dinat()
        except ImportError as error:
            results.append(Result(model.title, reason=str(error)))
            continue
        try:
            results.append(_run(model, seconds))
        finally:
            adapter.unpatch_dinat()
    return results


def _run(model: Model, seconds: float) -> Result:
    host = importlib.import_module("transformers")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            ours = model.build(host).eval()
        except ImportError as error:  # the host's own way to say that it needs another package
            return Result(model.title, reason=" ".join(str(error).split()))
        for name, parameter in ours.named_parameters():
            if name.endswith("rpb"):
                torch.nn.init.trunc_normal_(parameter, std=0.5)  # a bias of 0 would not show a wrong one
        images, more = torch.randn(1, 3, model.size, model.size), model.inputs()
        dense = _densely(copy.deepcopy(ours))
        apart = _distance(model.answer(ours(images, **more)), model.answer(dense(images, **more)))
        count = sum(parameter.numel() for parameter in ours.parameters()) / 1e6
        detail = f"{model.size} × {model.size} pixels, {count:.1f} million random weights"
        if not apart <= TOLERANCE:
            return Result(model.title, detail, reason=f"the answers lie {apart:.1g} apart")
        calls = {"ours": lambda: ours(images, **more), "dense": lambda: dense(images, **more)}
        timings = compare(calls, seconds=seconds)
    return Result(model.title, detail, timings["ours"], timings["dense"])


def _distance(ours: tuple[torch.Tensor, ...], dense: tuple[torch.Tensor, ...]) -> float:
    """The largest difference, relative to the largest number."""
    pairs = zip(ours, dense, strict=True)
    return max(float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs)


def _densely(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its neighborhood attention over all pairs of tokens, with a mask."""
    module: Any  # a forward of its own is set on it
    for module in model.modules():
        if type(module).__name__ == "NeighborhoodAttention":
            module.forward = functools.partial(_dense_attention, module, {})
    return model


def _dense_attention(
    module: Any, masks: dict[tuple[int, ...], torch.Tensor], hidden_states: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor]:
    """The host's attention by torch's fused dense one; mask and bias are written out once and kept."""
    batch, *grid, dim = hidden_states.shape
    heads = module.num_attention_heads
    query, key, value = (
        project(hidden_states).view(batch, -1, heads, dim // heads).transpose(1, 2)
        for project in (module.query, module.key, module.value)
    )
    if tuple(grid) not in masks:
        masks[tuple(grid)] = _bias_and_mask(module, grid)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=masks[tuple(grid)])
    return (out.transpose(1, 2).reshape(hidden_states.shape),)


def _bias_and_mask(module: Any, grid: list[int]) -> torch.Tensor:
    """What is added to the scores, `[1, heads, cells, cells]`: the position bias, -inf where a query does not see."""
    size, dilation = module.kernel_size, module.dilation
    places = []
    for length in grid:
        along = torch.arange(length)
        places.append(((along[None, :] - along[:, None]) // dilation + size - 1).clamp(0, 2 * size - 2))
    bias = module.rpb[:, places[0][:, None, :, None], places[1][None, :, None, :]]
    unseen = ~mask(Near(size, dilation=dilation), grid)
    return bias.masked_fill(unseen, -torch.inf).flatten(3, 4).flatten(1, 2)[None]
