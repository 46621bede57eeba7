"""The attention of transformers' DiNAT over all pairs of tokens, written from its definition."""

from __future__ import annotations

import torch

from vicinal.pattern import Near, mask


def dense_bias(table, grid, kernel_size, dilation):
    """The bias of every pair, `[heads, *grid, *grid]`, from its rule: (key - query) / dilation + kernel_size - 1."""
    rows, columns = (torch.arange(size) for size in grid)
    places = []
    for axis in (rows, columns):
        apart = axis[None, :] - axis[:, None]
        steps = torch.where(apart % dilation == 0, apart // dilation, 0)
        places.append((steps + kernel_size - 1).clamp(0, 2 * kernel_size - 2))
    return table[:, places[0][:, None, :, None], places[1][None, :, None, :]]


def dense_forward(self, hidden_states, output_attentions=False):
    """The host's attention, written out over all pairs of tokens."""
    batch, height, width, dim = hidden_states.shape
    heads, cells = self.num_attention_heads, height * width
    query, key, value = (
        project(hidden_states).reshape(batch, cells, heads, dim // heads).transpose(1, 2)
        for project in (self.query, self.key, self.value)
    )
    pattern = Near(self.kernel_size, dilation=self.dilation)
    sees = mask(pattern, (height, width)).reshape(cells, cells)
    bias = dense_bias(self.rpb, (height, width), self.kernel_size, self.dilation).reshape(heads, cells, cells)
    scores = query @ key.transpose(2, 3) * (dim // heads) ** -0.5 + bias
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    out = (weights @ value).transpose(1, 2).reshape(hidden_states.shape)
    if not output_attentions:
        return (out,)
    windows = weights[:, :, sees].reshape(batch, heads, height, width, self.kernel_size**2)  # keys in order
    return out, windows
