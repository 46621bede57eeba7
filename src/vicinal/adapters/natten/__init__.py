"""NATTEN's names on our operator: for code that says `import natten`, on any device, with gradients for everything.

Either import from here instead, or let the whole process find this under NATTEN's name before that code is imported:

>>> import vicinal.adapters.natten
>>> vicinal.adapters.natten.install()
>>> from natten import NeighborhoodAttention2D  # current names, and those of 0.14 to 0.17
>>> from natten.functional import na2d, natten2dqkrpb, natten2dav
>>> NeighborhoodAttention2D(dim=32, num_heads=2, kernel_size=7, rel_pos_bias=True)(torch.randn(1, 9, 9, 32)).shape
torch.Size([1, 9, 9, 32])
>>> vicinal.adapters.natten.uninstall()

docs/natten.md says what is exact, what differs and what is not covered.
"""

from typing import Any

from vicinal.adapters.natten import context, functional, modules, types
from vicinal.adapters.natten.functional import attention, merge_attentions, na1d, na2d, na3d
from vicinal.adapters.natten.installation import install, uninstall
from vicinal.adapters.natten.modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from vicinal.adapters.natten.namespace import CONTENTS
from vicinal.adapters.natten.versions import CURRENT

__version__ = CURRENT

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "attention",
    "context",
    "functional",
    "install",
    "merge_attentions",
    "modules",
    "na1d",
    "na2d",
    "na3d",
    "types",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    """The rest of what `import natten` has in it: switches and questions of all its releases."""
    try:
        return CONTENTS["natten"][name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *CONTENTS["natten"]})
