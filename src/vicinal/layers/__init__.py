"""What models are made of: mixers, combinators, one residual block, a pyramid builder; the channels come last.

A model is a few lines of them. Here windows and dilated neighborhoods take turns, in two stages:

>>> from vicinal.layers.attention import PatternAttention
>>> from vicinal.layers.block import Block
>>> from vicinal.layers.mlp import Mlp
>>> from vicinal.layers.pyramid import Head, Pyramid, Stage
>>> from vicinal.layers.tokens import ConvPatches, PatchMerging
>>> from vicinal.layers.words import near, window
>>> turns = (window(7), near(7, dilation="max"))
>>> def blocks(dim, heads):
...     return [Block(dim, PatternAttention(dim, heads, word, rel_pos_bias=True), Mlp(dim, 4 * dim)) for word in turns]
>>> stages = [
...     Stage(blocks(32, 1), dim=32),
...     Stage(blocks(64, 2), dim=64, downsample=PatchMerging(32, 64)),
... ]
>>> model = Pyramid(ConvPatches(3, 32, kernel_size=4, stride=4), stages, Head(64, num_classes=10))
>>> model(torch.randn(1, 3, 112, 112)).shape, model.cost(112).parameters
(torch.Size([1, 10]), 137184)
"""

from vicinal.layers.neighborhood import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from vicinal.layers.tile_ordered import TileOrdered

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D", "TileOrdered"]
