"""Our models as transformers backbones: importing this file registers them, for UperNet, Mask2Former and the like.

>>> config = VicinalBackboneConfig(name="nat_mini", out_indices=[1, 4])
>>> maps = VicinalBackbone(config)(torch.randn(1, 3, 64, 64)).feature_maps
>>> [tuple(features.shape) for features in maps]
[(1, 64, 16, 16), (1, 512, 2, 2)]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from vicinal.layers.pyramid import Features
from vicinal.models import registry


class VicinalBackboneConfig(BackboneConfigMixin, PreTrainedConfig):
    """One of our models by name. Stage 0 is the image before the first stage and cannot be asked for.

    >>> VicinalBackboneConfig(name="dinat_mini", options={"dilations": "seg512"}).stage_names
    ['stem', 'stage1', 'stage2', 'stage3', 'stage4']
    """

    model_type = "vicinal_backbone"

    def __init__(
        self,
        name: str = "nat_mini",
        options: dict[str, Any] | None = None,
        use_norms: bool = True,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.name = name
        self.options = dict(options or {})
        self.use_norms = use_norms
        with torch.device("meta"):
            model = registry.create_model(name, **self.options)
        self.feature_channels = [info.channels for info in model.feature_info]  # type: ignore[union-attr]
        self.hidden_size = self.feature_channels[-1]
        self.num_channels = model.in_channels
        self.stage_names = ["stem", *(f"stage{index + 1}" for index in range(len(self.feature_channels)))]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        if "stem" in self.out_features:
            raise ValueError("out_features: the stem's output is no feature map here; take stage1 and later")


class VicinalBackbone(BackboneMixin, PreTrainedModel):
    """The chosen maps of one of our models, each through a norm of its own where `use_norms` is set.

    >>> backbone = VicinalBackbone(VicinalBackboneConfig(name="nat_mini", out_features=["stage2"]))
    >>> backbone.channels
    [128]
    """

    config_class = VicinalBackboneConfig
    main_input_name = "pixel_values"
    has_attentions = False

    def __init__(self, config: VicinalBackboneConfig) -> None:
        super().__init__(config)
        self.num_features = [config.feature_channels[0], *config.feature_channels]
        # transformers counts from the end too
        stages = [index % len(config.stage_names) - 1 for index in config.out_indices]
        features = registry.create_model(
            config.name, features_only=True, stages=stages, use_norms=config.use_norms, **config.options
        )
        assert isinstance(features, Features)
        self.features = features
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every family draws its own weights when it is built."""

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Feature maps `[batch, channels, height, width]`, finest first; there are no attentions to return."""
        maps = tuple(self.features(pixel_values))
        return BackboneOutput(feature_maps=maps) if return_dict is not False else (maps,)


AutoConfig.register("vicinal_backbone", VicinalBackboneConfig, exist_ok=True)
AutoBackbone.register(VicinalBackboneConfig, VicinalBackbone, exist_ok=True)
