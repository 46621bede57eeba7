"""Models of Hugging Face transformers on our operator: DiNAT runs again, and image encoders take any pattern.

>>> from transformers import DinatConfig, DinatModel
>>> patch_dinat()
>>> model = DinatModel(DinatConfig(depths=[1, 1], num_heads=[1, 2], embed_dim=16, dilations=[[2], [1]]))
>>> model(torch.randn(1, 3, 64, 64)).last_hidden_state.shape
torch.Size([1, 8, 8, 32])
>>> unpatch_dinat()
"""

from vicinal.adapters.transformers.host import HostChanged, check_host

check_host()

from vicinal.adapters.transformers.dinat import patch_dinat, unpatch_dinat  # noqa: E402 - after the check
from vicinal.adapters.transformers.encoder import LayerPatterns, number_layers, register_attention  # noqa: E402

__all__ = [
    "HostChanged",
    "LayerPatterns",
    "number_layers",
    "patch_dinat",
    "register_attention",
    "unpatch_dinat",
]
