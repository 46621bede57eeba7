"""Measuring: how fast, with how much memory, against whom, and only where the answer is right."""

from vicinal.measure.timing import Timing, compare

__all__ = ["Timing", "compare"]
