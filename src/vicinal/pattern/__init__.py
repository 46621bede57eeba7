"""Who sees whom: axis kinds, patterns, the tables they become, and pictures of them. No kernels."""

from vicinal.pattern.axis import AxisKind, Full, Grid, Halo, Near, Same, Window
from vicinal.pattern.bounds import AnyPattern, Bounds, Group, bounds
from vicinal.pattern.compose import Heads, Pattern, Union, heads, union
from vicinal.pattern.counting import bias_shape, count, flops, mask, receptive_field
from vicinal.pattern.draw import draw
from vicinal.pattern.parse import parse
from vicinal.pattern.table import AxisTable

__all__ = [
    "AnyPattern",
    "AxisKind",
    "AxisTable",
    "Bounds",
    "Full",
    "Grid",
    "Group",
    "Halo",
    "Heads",
    "Near",
    "Pattern",
    "Same",
    "Union",
    "Window",
    "bias_shape",
    "bounds",
    "count",
    "draw",
    "flops",
    "heads",
    "mask",
    "parse",
    "receptive_field",
    "union",
]
