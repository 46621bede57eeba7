"""The texts of a picture as token ids, for the text branch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vicinal.models.oneformer.config import TextConfig
from vicinal.models.oneformer.tokenizer import Tokenizer, text_prompts
from vicinal.tasks.joint_labels import TASKS, TaskName

CLIP_VOCABULARY = TextConfig().vocabulary


class Prompts:
    """Knows every text that can occur: one for each class, one for each task.

    Where the text branch has fewer words than CLIP, the ids that occur are numbered through, in their order.

    >>> prompts = Prompts(("cat", "sky"), TextConfig(vocabulary=16, context_length=8), count=3)
    >>> prompts([1], "instance").shape
    torch.Size([3, 8])
    """

    def __init__(self, classes: Sequence[str], config: TextConfig, count: int) -> None:
        self.classes, self.count = tuple(classes), count
        named = [text_prompts([name], "panoptic", 1)[0] for name in classes]
        texts = [*named, *(text_prompts([], task, 1)[0] for task in TASKS)]
        ids = Tokenizer()(texts, config.context_length)
        if config.vocabulary < CLIP_VOCABULARY:
            used = ids.unique()
            if len(used) > config.vocabulary:
                raise ValueError(
                    f"the classes need {len(used)} words, but the text branch has text.vocabulary={config.vocabulary}"
                )
            ids = torch.searchsorted(used, ids)
        self.rows = ids

    def __call__(self, labels: Sequence[int], task: TaskName) -> torch.Tensor:
        """Ids `[count, context_length]` for a picture with segments of these classes."""
        filler = len(self.classes) + TASKS.index(task)
        places = [*labels][: self.count]
        return self.rows[torch.tensor(places + [filler] * (self.count - len(places)))]
