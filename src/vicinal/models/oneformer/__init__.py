"""OneFormer and Mask2Former: semantic, instance and panoptic segmentation by queries and masks.

>>> config = OneFormerConfig("dinat_mini", num_queries=20, num_classes=5, dim=64, pixel_layers=2, decoder_layers=3)
>>> output = OneFormer(config)(torch.randn(1, 3, 64, 64), ["instance"])
>>> output.class_logits.shape
torch.Size([1, 20, 6])
"""

from vicinal.models.oneformer.config import OneFormerConfig, TextConfig
from vicinal.models.oneformer.model import OneFormer, OneFormerOutput

__all__ = ["OneFormer", "OneFormerConfig", "OneFormerOutput", "TextConfig"]
