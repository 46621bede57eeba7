"""Tasks: a model, its losses and metrics, what to log and what to draw, for one purpose each."""

from vicinal.tasks.classification import Classification, Named
from vicinal.tasks.joint_labels import TASKS, TaskName
from vicinal.tasks.mixing import Mixing
from vicinal.tasks.postprocess import Rules
from vicinal.tasks.protocol import Evaluation, Losses, Moment, Panel, Task, TaskConfig, Turn
from vicinal.tasks.segmentation import Segmentation
from vicinal.tasks.stem import Stem

__all__ = [
    "TASKS",
    "Classification",
    "Evaluation",
    "Losses",
    "Mixing",
    "Moment",
    "Named",
    "Panel",
    "Rules",
    "Segmentation",
    "Stem",
    "Task",
    "TaskConfig",
    "TaskName",
    "Turn",
]
