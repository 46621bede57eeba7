"""OneFormer: a picture and a task to segments; Mask2Former without the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vicinal.layers.pyramid import Features, Pyramid
from vicinal.layers.tags import set_group
from vicinal.models import compact, registry
from vicinal.models.oneformer.attention import Perceptron
from vicinal.models.oneformer.config import OneFormerConfig
from vicinal.models.oneformer.pixels import PixelDecoder
from vicinal.models.oneformer.queries import Prediction, QueryDecoder
from vicinal.models.oneformer.text import TextMapper

STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class OneFormerOutput:
    """Predictions of the last layer, and what losses need beside them.

    Attributes:
        class_logits: `[batch, queries, classes + 1]`, the last for "no object".
        mask_logits: `[batch, queries, height / 4, width / 4]`.
        auxiliary: the same pairs before every layer, the first before all of them.
        object_queries: `[batch, queries, dim]` before the first layer, which the contrastive loss compares.
        text_queries: `[batch, queries, dim]`, where text was given.
        logit_scale: of the contrastive loss, its logarithm; a parameter of the text branch.
    """

    class_logits: torch.Tensor
    mask_logits: torch.Tensor
    auxiliary: list[Prediction]
    object_queries: torch.Tensor
    text_queries: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None


torch.export.register_dataclass(OneFormerOutput)  # so that exported and compiled models can give it


class OneFormer(nn.Module):
    """Images `[batch, 3, height, width]` and tasks to classes and masks of `num_queries` segments.

    >>> config = OneFormerConfig("dinat_mini", num_queries=20, num_classes=5, dim=64, decoder_layers=3)
    >>> output = OneFormer(config)(torch.randn(1, 3, 64, 96), ["semantic"])
    >>> output.class_logits.shape, output.mask_logits.shape, len(output.auxiliary)
    (torch.Size([1, 20, 6]), torch.Size([1, 20, 16, 24]), 3)
    """

    def __init__(self, config: OneFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = _backbone(config)
        for part in (self.backbone.stem, *self.backbone.stages, self.backbone.norms):
            assert isinstance(part, nn.Module)
            set_group(part, "backbone")
        self.pixel_decoder = PixelDecoder(config, [info.channels for info in self.backbone.feature_info])
        self.decoder = QueryDecoder(config)
        self.task = Perceptron([config.task_length, config.dim, config.dim]) if config.task else None
        self.text = None if config.text is None else TextMapper(config.text, config.dim)

    def forward(
        self,
        images: torch.Tensor,
        task: torch.Tensor | Sequence[str] | None = None,
        text: torch.Tensor | None = None,
    ) -> OneFormerOutput:
        """Segments.

        Args:
            images: `[batch, 3, height, width]`, of any size.
            task: one per image, "panoptic", "semantic" or "instance", or their token ids `[batch, task_length]`; None
                for a Mask2Former.
            text: token ids `[batch, num_queries - contexts, context_length]` of what is in the images, for training.
        """
        if images.dim() != 4 or not images.is_floating_point():
            raise ValueError(
                f"images must be [batch, 3, height, width] of a floating type, got {tuple(images.shape)} {images.dtype}"
            )
        token = self._task_token(images, task)
        refined = self.decoder(self.pixel_decoder(self.backbone(images)), token)
        *auxiliary, (class_logits, mask_logits) = refined.predictions
        if text is None:
            return OneFormerOutput(class_logits, mask_logits, auxiliary, refined.first)
        if self.text is None:
            raise ValueError("text was given, but this model has no text branch; build it with text=TextConfig()")
        queries = self.text(text)
        if queries.shape[1] != self.config.num_queries:
            texts = self.config.num_queries - (queries.shape[1] - text.shape[1])
            raise ValueError(f"text must have {texts} texts per image, got {text.shape[1]}")
        return OneFormerOutput(class_logits, mask_logits, auxiliary, refined.first, queries, self.text.logit_scale)

    def _task_token(self, images: torch.Tensor, task: torch.Tensor | Sequence[str] | None) -> torch.Tensor | None:
        if self.task is None:
            if task is not None:
                raise ValueError("task was given, but this model has none: it is a Mask2Former")
            return None
        if task is None:
            raise ValueError("task is needed: one of panoptic, semantic and instance per image")
        if not isinstance(task, torch.Tensor):
            from vicinal.models.oneformer.tokenizer import task_ids

            task = task_ids(task, self.config.task_length).to(images.device)
        wanted = (images.shape[0], self.config.task_length)
        if tuple(task.shape) != wanted:
            raise ValueError(f"task must be one text per image, {wanted} token ids, got {tuple(task.shape)}")
        # the ids themselves, as numbers: published weights were trained on them
        result: torch.Tensor = self.task(task.to(self.task.get_parameter("layers.0.weight").dtype))
        return result


def _backbone(config: OneFormerConfig) -> Features:
    if isinstance(config.backbone, str):
        options = dict(config.backbone_options)
        features = registry.create_model(config.backbone, features_only=True, use_norms=True, **options)
        assert isinstance(features, Features)
        assert features.norms is not None
        if config.backbone.startswith("convnext"):  # its norms have another constant, there too
            for norm in features.norms.values():
                assert isinstance(norm, nn.LayerNorm)
                norm.eps = 1e-6
    else:
        pyramid: Pyramid = compact.build(config.backbone)
        features = Features(pyramid, range(1, len(pyramid.stages)), use_norms=True)
    strides = tuple(info.stride for info in features.feature_info)
    if strides != STRIDES:
        raise ValueError(f"backbone must give maps of strides {STRIDES}, got {strides} from {config.backbone!r}")
    return features
