"""Back ends that hand a problem to an engine the user has: FlexAttention, which torch brings along."""

from vicinal.ops.engines import flex

__all__ = ["flex"]
