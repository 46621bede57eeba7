"""Back ends that hand a problem to an engine the user has: FlexAttention, which torch brings along, and NATTEN."""

from vicinal.ops.engines import flex, natten

__all__ = ["flex", "natten"]
