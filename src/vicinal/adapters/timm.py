"""Our models under timm's `create_model`: importing this file registers the names that timm lacks.

>>> import timm, vicinal.adapters.timm
>>> timm.create_model("nat_mini", features_only=True, out_indices=(1, 2)).feature_info.channels()
[128, 256]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from torch import nn

from vicinal.layers.channels import channels_first, channels_last
from vicinal.layers.pyramid import Head, Pyramid, least_image, run_stages
from vicinal.layers.tags import parameter_tags
from vicinal.models import loading, nat, registry

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TimmModel(nn.Module):
    """One of our models with the methods that timm expects; its parameters have our names.

    >>> model = TimmModel("nat_mini", num_classes=10)
    >>> model.forward_features(torch.randn(1, 3, 64, 64)).shape
    torch.Size([1, 512, 2, 2])
    """

    def __init__(
        self,
        variant: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if drop_path_rate is not None:
            options["drop_path_rate"] = drop_path_rate
        model = registry.create_model(variant, num_classes=num_classes, in_channels=in_chans, **options)
        assert isinstance(model, Pyramid)
        self.variant, self.in_chans, self.num_classes = variant, in_chans, num_classes
        self.stem, self.stages = model.stem, model.stages
        self.head: Head | nn.Identity = model.head
        self.num_features = self.head_hidden_size = model.head.dim
        self.least_image = model.least_image
        self.feature_info = [
            {"num_chs": info.channels, "reduction": info.stride, "module": f"stages.{index}"}
            for index, info in enumerate(model.feature_info)
        ]

    def no_weight_decay(self) -> set[str]:
        """The parameters that do not decay."""
        return {name for name, tag in parameter_tags(self).items() if not tag.weight_decay}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm's layer-wise learning rates group the parameters."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^stages\.(\d+)\.downsample", (0,))]}

    def get_classifier(self) -> nn.Module | None:
        """The classifier's linear layer."""
        return self._whole_head().classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier; the pooling is the model's own."""
        self.num_classes = num_classes
        self._whole_head().reset(num_classes)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """The last map, `[batch, channels, height, width]`, without the head's norm."""
        outputs = run_stages(self.stem, self.stages, images, self.in_chans, self.least_image)
        for features, _ in outputs:  # noqa: B007 - the last is wanted
            pass
        return channels_first(features)

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits of a map, or the vector before them."""
        tokens, head = channels_last(features), self._whole_head()
        result: torch.Tensor = head.embed(tokens, None) if pre_logits else head(tokens, None)
        return result

    def _whole_head(self) -> Head:
        if not isinstance(self.head, Head):
            raise ValueError(f"{self.variant} was cut down to feature maps, which took its head away")
        return self.head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self,
        images: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of chosen stages, and the last map unless `intermediates_only`."""
        if output_fmt != "NCHW" or norm:
            raise ValueError(f"maps are NCHW and without a norm, got output_fmt={output_fmt!r}, norm={norm}")
        chosen = self._indices(indices)
        stages = self.stages[: max(chosen) + 1] if stop_early or intermediates_only else self.stages
        outputs = run_stages(self.stem, stages, images, self.in_chans, least_image(self.stem, stages))
        maps = [channels_first(features) for features, _ in outputs]
        found = [maps[index] for index in chosen]
        return found if intermediates_only else (maps[-1], found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages and the head that the maps do not need."""
        chosen = self._indices(indices)
        self.stages = self.stages[: max(chosen) + 1]
        if prune_head:
            self.head = nn.Identity()
        return chosen

    def _indices(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.stages)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            return list(range(count))[-indices:]
        return [range(count)[index] for index in indices]


def _filter(state: dict[str, torch.Tensor], model: TimmModel) -> dict[str, torch.Tensor]:
    """A checkpoint of any layout of the family under our names, as timm's loader wants it."""
    from vicinal.models.checkpoint import unwrap

    family = registry.families()[model.variant]
    _, ours, _ = loading.match(unwrap(state).state, model, family)
    return ours


def _names() -> list[str]:
    """What timm lacks: names it has no model for, of families it has under no other name either."""
    there = ("swin_", "convnext_", "poolformer_", "maxvit_", "davit_", "focalnet_")
    beside = ("pvt_",)  # its class token is no part of a feature map
    return [
        name for name in sorted(registry.classifiers()) if not name.startswith(there + beside) and not is_model(name)
    ]


def _entry(variant: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        levels = 1 if "isotropic" in variant or variant.startswith("vitrpb") else 4
        indices = options.pop("out_indices", tuple(range(levels)))
        model: nn.Module = build_model_with_cfg(
            partial(TimmModel, variant),
            variant,
            pretrained,
            pretrained_filter_fn=_filter,
            feature_cfg={"out_indices": indices, "feature_cls": "getter"},
            **options,
        )
        return model

    create.__name__ = create.__qualname__ = variant
    create.__doc__ = f"{variant} of vicinal."
    create.__module__ = __name__
    return create


default_cfgs = {}
"""What timm reads from the module of a registered model."""

REGISTERED = _names()
"""The names that importing this file gave to timm."""

default_cfgs.update(
    generate_default_cfgs(
        {
            name: {
                "input_size": (3, 224, 224),
                "pool_size": None,
                "crop_pct": 0.875,
                "interpolation": "bicubic",
                "mean": _MEAN,
                "std": _STD,
                "num_classes": 1000,
                "first_conv": "stem.conv1" if name in nat.VARIANTS else "stem.conv",
                "classifier": "head.classifier",
            }
            for name in REGISTERED
        }
    )
)
for _name in REGISTERED:
    globals()[_name] = register_model(_entry(_name))
