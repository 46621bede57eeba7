"""Training: one loop for every task, from a typed recipe to a run folder that can be resumed."""

from vicinal.training.memory import keep_memory
from vicinal.training.recipe import AdamW, Cosine, Held, Loop, Poly, Recipe, Sgd, Steps
from vicinal.training.run import train

__all__ = ["AdamW", "Cosine", "Held", "Loop", "Poly", "Recipe", "Sgd", "Steps", "keep_memory", "train"]
