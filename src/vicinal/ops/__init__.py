"""The operator: its public calls, what it checks, and the back ends that compute it."""

from vicinal.ops import cpu, engines, flop_formula, reference, tiled, triton
from vicinal.ops.api import attention
from vicinal.ops.backend import BackendRefused
from vicinal.ops.explain import Explanation, explain
from vicinal.ops.merge import merge_attentions
from vicinal.ops.na import na1d, na2d, na3d
from vicinal.ops.scores import apply_scores, attention_scores
from vicinal.ops.simulator import Simulation, simulate

flop_formula.hand_over()

__all__ = [
    "BackendRefused",
    "Explanation",
    "Simulation",
    "apply_scores",
    "attention",
    "attention_scores",
    "cpu",
    "engines",
    "explain",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "reference",
    "simulate",
    "tiled",
    "triton",
]
