"""The rows of NAT and DiNAT: what small trained models take clothes for, and where one query looks."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from vicinal.data.memory import InMemory
from vicinal.data.stream import Stream
from vicinal.layers.attention import PatternAttention
from vicinal.layers.words import at
from vicinal.ops.api import attention
from vicinal.recipes.shipped import LINEAR_BASELINE, sample, shipped
from vicinal.tasks.protocol import Panel
from vicinal.tour.systems import Outcome
from vicinal.training.drawing import save_panels
from vicinal.training.trained import Trained

SHOWN = 16
TIMED = 20


def show_nat(folder: Path) -> Outcome:
    """NAT's row."""
    return _show("nat_fashion_mnist", folder / "nat.png", layer=0)


def show_dinat(folder: Path) -> Outcome:
    """DiNAT's row; the query looks through a dilated layer."""
    return _show("dinat_fashion_mnist", folder / "dinat.png", layer=2)


def _show(name: str, picture: Path, layer: int) -> Outcome:
    model = shipped(name)
    data, accuracy, where = _measured(model)
    batch = next(Stream(sample(model), (), batch_size=SHOWN).evaluation())
    panels = model.task.draw(batch)
    looks = [looked_at(model, image, layer) for image in batch.images[: SHOWN // 2]]
    save_panels([*panels, *looks], picture)
    return Outcome(
        picture,
        number=100 * accuracy,
        baseline=100 * LINEAR_BASELINE[len(data)],
        unit="top-1 accuracy, %",
        baseline_name="linear classifier on pixels",
        note=f"Fashion-MNIST, {len(data)} test images{where}; small weights trained by the recipe {model.recipe.name}; "
        f"{milliseconds(model, data):.1f} ms an image. Below: where one query (red) looks in layer {layer + 1}.",
    )


def _measured(model: Trained) -> tuple[InMemory, float, str]:
    """Accuracy on all test images where they are here, else on those that come with the library."""
    data, where = sample(model), " that come with it"
    look = model.recipe.data.look()[0]
    if look.found:
        whole = model.recipe.data.open("test")
        assert isinstance(whole, InMemory)
        data, where = whole, ""
    evaluation = model.task.evaluation()
    for batch in Stream(data, model.recipe.test_steps, batch_size=100).evaluation():
        evaluation.add(batch)
    return data, evaluation.values()["accuracy"], where


def milliseconds(model: Trained, data: InMemory) -> float:
    """The median time of one image by itself."""
    times = []
    for index in range(TIMED):
        image = torch.from_numpy(data.images[index]).permute(2, 0, 1)[None]
        begin = time.perf_counter()
        with torch.no_grad():
            model.task.logits(image)
        times.append(time.perf_counter() - begin)
    return 1000 * float(np.median(times))


def looked_at(model: Trained, image: torch.Tensor, layer: int, place: tuple[int, int] = (12, 14)) -> Panel:
    """The image with the keys that the query at a pixel attends to in a layer, brighter where it does more."""
    mixers = [module for module in model.task.model.modules() if isinstance(module, PatternAttention)]
    weights, query = attended(model, mixers[layer], image, place)
    height, width = image.shape[-2:]
    shade = np.kron(weights / weights.max(), np.ones((height // weights.shape[0], width // weights.shape[1])))
    pixels = image[0].numpy()[..., None] * np.ones(3) * (0.3 + 0.7 * shade[..., None])
    pixels[..., 1] += 140 * shade
    rows, columns = height // weights.shape[0], width // weights.shape[1]
    pixels[query[0] * rows : (query[0] + 1) * rows, query[1] * columns : (query[1] + 1) * columns] = (230, 40, 40)
    pattern = at(mixers[layer].pattern, weights.shape)
    one = pattern[0] if isinstance(pattern, tuple) else pattern  # the grid is square, so both axes have the same kind
    return Panel(pixels.clip(0, 255).astype(np.uint8), repr(one))


def attended(
    model: Trained, mixer: PatternAttention, image: torch.Tensor, place: tuple[int, int]
) -> tuple[npt.NDArray[np.float64], tuple[int, int]]:
    """The weights `[*grid]` of the keys of the query at a pixel, averaged over heads, and which query that is.

    Attention to one-hot values gives the weights.
    """
    held: list[torch.Tensor] = []
    handle = mixer.register_forward_pre_hook(lambda module, inputs: held.append(inputs[0]))
    with torch.no_grad():
        model.task.logits(image[None])
        handle.remove()
        grid = tuple(held[0].shape[1:-1])
        parts = mixer.qkv(held[0]).unflatten(-1, (3, mixer.num_heads, mixer.head_dim)).unbind(-3)
        tokens = grid[0] * grid[1]
        places = torch.eye(tokens).view(1, *grid, 1, tokens).expand(-1, -1, -1, mixer.num_heads, -1)
        bias = mixer.rpb if isinstance(mixer.rpb, torch.nn.Parameter) else None
        weights = attention(parts[0], parts[1], places.contiguous(), at(mixer.pattern, grid), bias=bias)
    row, column = (place[axis] * grid[axis] // image.shape[1 + axis] for axis in (0, 1))
    found: npt.NDArray[np.float64] = weights[0, row, column].mean(0).view(*grid).double().numpy()
    return found, (row, column)
