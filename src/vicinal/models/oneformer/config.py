"""What a OneFormer or a Mask2Former is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vicinal.models.compact import CompactConfig


@dataclass(frozen=True)
class TextConfig:
    """The text branch, which training alone needs: an encoder as CLIP's, a projection, learned contexts.

    `contexts` queries are learned instead of read from text, so a picture brings `num_queries - contexts` texts. Heads
    have 64 channels. `is_causal` is as published; transformers 5.23 leaves the mask out.
    """

    width: int = 256
    num_layers: int = 6
    vocabulary: int = 49408
    context_length: int = 77
    contexts: int = 16
    is_causal: bool = True


@dataclass(frozen=True)
class OneFormerConfig:
    """A OneFormer; without `task`, a Mask2Former.

    >>> from vicinal.models.oneformer import OneFormer
    >>> config = OneFormerConfig("dinat_mini", num_queries=20, num_classes=5, dim=64, pixel_layers=2, decoder_layers=3)
    >>> OneFormer(config)(torch.randn(1, 3, 64, 96), ["panoptic"]).mask_logits.shape
    torch.Size([1, 20, 16, 24])

    Args:
        backbone: a name in `list_models()` whose maps have strides 4, 8, 16 and 32, or a compact pyramid of such maps.
        backbone_options: fields of the backbone's configuration, for example `{"dilations": "seg640"}`.
        num_queries: segments that can be found in one picture.
        num_classes: without the class "no object", which is added.
        task: whether a task's text conditions the queries.
        text: the text branch, for training with the contrastive loss; None for none.
        dim: channels of pixels and queries.
        pixel_layers, pixel_hidden_dim: of the pixel decoder.
        query_layers: of the class transformer, which makes queries of the task.
        decoder_layers, hidden_dim: of the masked-attention decoder (`hidden_dim` of the class transformer too).
        dropout: of the pixel decoder and the class transformer.
        task_length: tokens of the task's text.
    """

    backbone: str | CompactConfig = "dinat_large"
    backbone_options: Mapping[str, Any] = field(default_factory=dict)
    num_queries: int = 250
    num_classes: int = 150
    task: bool = True
    text: TextConfig | None = None
    dim: int = 256
    num_heads: int = 8
    num_points: int = 4
    pixel_layers: int = 6
    pixel_hidden_dim: int = 1024
    query_layers: int = 2
    decoder_layers: int = 9
    hidden_dim: int = 2048
    dropout: float = 0.1
    task_length: int = 77

    def __post_init__(self) -> None:
        """Say what cannot be built."""
        if self.dim % self.num_heads or self.dim % 4:
            raise ValueError(
                f"dim must be a multiple of num_heads and of 4, got {self.dim} with {self.num_heads} heads"
            )
        fewest = 1 if self.text is None else self.text.contexts + 1
        if self.num_queries < max(fewest, 2 if self.task else 1):
            raise ValueError(f"num_queries must be more than the text's contexts and the task, got {self.num_queries}")
        if self.text is not None and not self.task:
            raise ValueError("text needs task: a Mask2Former has no text branch")
        if self.text is not None and self.text.width % 64:
            raise ValueError(f"text.width must be a multiple of 64, the width of a head, got {self.text.width}")
