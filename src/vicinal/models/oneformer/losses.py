"""The loss of OneFormer and Mask2Former: classes, masks and dice of every layer, and queries against text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed, nn

from vicinal.models.oneformer.matching import LossConfig, Pairs, Target, at_points, check_targets, match
from vicinal.models.oneformer.model import OneFormerOutput

__all__ = ["LossConfig", "SegmentationLoss", "contrastive_loss", "match"]


class SegmentationLoss:
    """The weighted terms of the loss, by name; the loss is their sum.

    `class`, `mask` and `dice` are of the last layer, `class_0` and so on of what came before, `contrastive` is there
    where the model was given text.

    >>> from vicinal.models.oneformer import OneFormer, OneFormerConfig
    >>> model = OneFormer(OneFormerConfig("dinat_mini", num_queries=9, num_classes=5, dim=32, decoder_layers=1))
    >>> output = model(torch.randn(1, 3, 64, 64), ["panoptic"])
    >>> target = {"labels": torch.tensor([2]), "masks": torch.ones(1, 64, 64, dtype=torch.bool)}
    >>> sorted(SegmentationLoss(LossConfig(num_points=64))(output, [target]))
    ['class', 'class_0', 'dice', 'dice_0', 'mask', 'mask_0']
    """

    def __init__(self, config: LossConfig | None = None) -> None:
        self.config = LossConfig() if config is None else config

    def __call__(self, output: OneFormerOutput, targets: Sequence[Target]) -> dict[str, torch.Tensor]:
        """Targets are one per image: `labels` `[segments]`, `masks` `[segments, height, width]`, for a padded batch."""
        classes = output.class_logits.shape[-1] - 1
        check_targets(targets, len(output.class_logits), classes)
        count = segment_count(targets, output.class_logits.device)
        terms = self._set(output.class_logits, output.mask_logits, targets, count)
        if output.text_queries is not None:
            assert output.logit_scale is not None
            contrast = contrastive_loss(output.object_queries, output.text_queries, output.logit_scale)
            terms["contrastive"] = self.config.contrastive_weight * contrast
        for index, prediction in enumerate(output.auxiliary):
            found = self._set(*prediction, targets, count)
            terms |= {f"{name}_{index}": term for name, term in found.items()}
        return terms

    def _set(
        self, class_logits: torch.Tensor, mask_logits: torch.Tensor, targets: Sequence[Target], count: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The terms of one set of predictions."""
        pairs = match(class_logits, mask_logits, targets, self.config)
        mask, dice = self._masks(mask_logits, targets, pairs)
        return {
            "mask": self.config.mask_weight * mask / count,
            "dice": self.config.dice_weight * dice / count,
            "class": self.config.class_weight * self._classes(class_logits, targets, pairs),
        }

    def _classes(self, logits: torch.Tensor, targets: Sequence[Target], pairs: list[Pairs]) -> torch.Tensor:
        last = logits.shape[-1] - 1
        wanted = torch.full(logits.shape[:2], last, dtype=torch.long, device=logits.device)
        for row, target, (queries, segments) in zip(wanted, targets, pairs, strict=True):
            row[queries] = target["labels"].to(logits.device)[segments]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weight = torch.ones(last + 1, dtype=logits.dtype, device=logits.device)
        weight[-1] = self.config.no_object
        return nn.functional.cross_entropy(logits.transpose(1, 2), wanted, weight)

    def _masks(
        self, logits: torch.Tensor, targets: Sequence[Target], pairs: list[Pairs]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy and dice, summed over segments."""
        precise = torch.promote_types(logits.dtype, torch.float32)
        found = torch.cat([masks[queries] for masks, (queries, _) in zip(logits, pairs, strict=True)]).to(precise)
        if not len(found):
            return found.sum(), found.sum()
        chosen = [
            target["masks"].to(logits.device)[segments] for target, (_, segments) in zip(targets, pairs, strict=True)
        ]
        with torch.no_grad():
            points = self._points(found)
            wanted = at_points(torch.cat(chosen).to(precise), points)
        values = at_points(found, points)
        entropy = nn.functional.binary_cross_entropy_with_logits(values, wanted, reduction="none").mean(1).sum()
        probabilities = values.sigmoid()
        both, all_of_them = (probabilities * wanted).sum(1), probabilities.sum(1) + wanted.sum(1)
        return entropy, (1 - (2 * both + 1) / (all_of_them + 1)).sum()

    def _points(self, logits: torch.Tensor) -> torch.Tensor:
        """Points `[masks, num_points, 2]`, most of them where a mask is least certain."""
        config = self.config
        drawn = torch.rand(len(logits), int(config.num_points * config.oversample), 2, device=logits.device)
        uncertain = int(config.importance * config.num_points)
        nearest = at_points(logits, drawn).abs().neg().topk(uncertain, 1).indices
        kept = drawn.gather(1, nearest[..., None].expand(-1, -1, 2))
        others = torch.rand(len(logits), config.num_points - uncertain, 2, device=logits.device)
        return torch.cat([kept, others], 1)


def segment_count(targets: Sequence[Target], device: torch.device) -> torch.Tensor:
    """Segments per process, on average, and at least one.

    >>> segment_count([{"labels": torch.zeros(3)}, {"labels": torch.zeros(2)}], torch.device("cpu"))
    tensor(5.)
    """
    count = torch.tensor(float(sum(len(target["labels"]) for target in targets)), device=device)
    if _processes() > 1:
        distributed.all_reduce(count)
    return (count / _processes()).clamp(min=1)


def contrastive_loss(objects: torch.Tensor, texts: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """How well each picture's queries find its text queries among those of all pictures, and the other way round.

    Both are `[batch, queries, dim]`; pictures of all processes count.

    >>> queries = torch.eye(2).reshape(2, 1, 2)
    >>> contrastive_loss(queries, queries, torch.tensor(10.0)) < 1e-6
    tensor(True)
    """
    ours = nn.functional.normalize(objects.float().flatten(1), dim=-1)
    theirs = nn.functional.normalize(texts.float().flatten(1), dim=-1)
    scale = logit_scale.exp().clamp(max=100)
    first = distributed.get_rank() * len(ours) if _processes() > 1 else 0
    labels = torch.arange(first, first + len(ours), device=ours.device)
    by_picture = nn.functional.cross_entropy(scale * ours @ _gathered(theirs).T, labels)
    return by_picture + nn.functional.cross_entropy(scale * theirs @ _gathered(ours).T, labels)


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _gathered(rows: torch.Tensor) -> torch.Tensor:
    if _processes() == 1:
        return rows
    gathered: torch.Tensor = _Gather.apply(rows)
    return gathered


class _Gather(torch.autograd.Function):
    """The rows of all processes; what they ask of a row's gradient comes back to where it is from."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.length = len(rows)
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].contiguous()
        distributed.all_reduce(total)
        return total[distributed.get_rank() * ctx.length :][: ctx.length]
