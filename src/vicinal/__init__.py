"""Local attention for images, video and sequences: one operator, fast on every device.

>>> query, key, value = torch.randn(3, 1, 56, 56, 4, 32).unbind(0)
>>> vicinal.na2d(query, key, value, kernel_size=7).shape
torch.Size([1, 56, 56, 4, 32])
"""

from typing import TYPE_CHECKING, Any

from vicinal import pattern
from vicinal.layers.neighborhood import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from vicinal.ops import (
    BackendRefused,
    Explanation,
    Simulation,
    apply_scores,
    attention,
    attention_scores,
    explain,
    merge_attentions,
    na1d,
    na2d,
    na3d,
    simulate,
)
from vicinal.pattern import (
    AxisKind,
    Bounds,
    Full,
    Grid,
    Halo,
    Heads,
    Near,
    Same,
    Union,
    Window,
    bias_shape,
    bounds,
    heads,
    union,
)
from vicinal.version import __version__

if TYPE_CHECKING:
    from vicinal.models.registry import create_model, list_models

__all__ = [
    "AxisKind",
    "BackendRefused",
    "Bounds",
    "Explanation",
    "Full",
    "Grid",
    "Halo",
    "Heads",
    "Near",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "Same",
    "Simulation",
    "Union",
    "Window",
    "__version__",
    "apply_scores",
    "attention",
    "attention_scores",
    "bias_shape",
    "bounds",
    "create_model",
    "explain",
    "heads",
    "list_models",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "pattern",
    "simulate",
    "union",
]


def __getattr__(name: str) -> Any:
    """The models, imported when first asked for: most programs that import this want the operator alone."""
    if name in ("create_model", "list_models"):
        from vicinal.models import registry

        globals()[name] = getattr(registry, name)
        return globals()[name]
    raise AttributeError(f"module 'vicinal' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Every public name, imported already or not."""
    return sorted({*globals(), *__all__})
