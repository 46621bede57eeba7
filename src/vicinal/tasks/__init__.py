"""Tasks: a model, its losses and metrics, what to log and what to draw, for one purpose each."""

from vicinal.tasks.classification import Classification, Named
from vicinal.tasks.mixing import Mixing
from vicinal.tasks.protocol import Evaluation, Losses, Moment, Panel, Task, TaskConfig, Turn

__all__ = [
    "Classification",
    "Evaluation",
    "Losses",
    "Mixing",
    "Moment",
    "Named",
    "Panel",
    "Task",
    "TaskConfig",
    "Turn",
]
