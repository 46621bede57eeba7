"""What the layers of diffusers call in place of their own processors."""

from __future__ import annotations

from typing import Any

import torch

from vicinal.adapters.diffusers.grid import GridSource
from vicinal.ops.api import attention
from vicinal.pattern.bounds import AnyPattern


class Processor:
    """What a layer of diffusers calls in place of its own processor."""

    def __init__(self, pattern: AnyPattern, replaced: Any, source: GridSource | None, backend: str | None) -> None:
        self.pattern, self.replaced, self.source, self.backend = pattern, replaced, source, backend

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.pattern!r})"

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention over a flat video, `[batch, tokens, heads, head_dim]` to `[batch, tokens, heads * head_dim]`."""
        assert self.source is not None
        grid = self.source.of(query.shape[1])
        query, key, value = (tensor.unflatten(1, grid) for tensor in (query, key, value))
        out: torch.Tensor = attention(query, key, value, self.pattern, backend=self.backend)
        return out.flatten(4).flatten(1, 3)


class VicinalLTXDecoderProcessor(Processor):
    """For `LTX2VideoVaeNeighborhoodAttention`, whose tensors keep their grid."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, block_mask: Any = None) -> torch.Tensor:
        """`[batch, time, height, width, channels]` to the same shape; there is no block mask to read."""
        query, key, value = attn.project_qkv(hidden_states)
        # the factor on the scores is in the query already
        out = attention(query, key, value, self.pattern, scale=1.0, backend=self.backend)
        result: torch.Tensor = attn.to_out[0](out.flatten(-2))
        return result


class VicinalWanProcessor(Processor):
    """For the self-attention of `WanTransformer3DModel`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`[batch, tokens, channels]` to the same shape."""
        _check_plain(encoder_hidden_states, attention_mask)
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)  # over all heads at once, so before they are told apart
        query, key, value = (tensor.unflatten(-1, (attn.heads, -1)) for tensor in (query, key, value))
        if rotary_emb is not None:
            cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]
            query, key = _rotate_neighbors(query, cos, sin), _rotate_neighbors(key, cos, sin)
        out = self.attend(query, key, value).type_as(query)
        result: torch.Tensor = attn.to_out[1](attn.to_out[0](out))
        return result


class VicinalCosmosProcessor(Processor):
    """For the self-attention of `CosmosTransformer3DModel` and `CosmosControlNetModel`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`[batch, tokens, channels]` to the same shape."""
        _check_plain(encoder_hidden_states, attention_mask)
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            cos, sin = (table[:, None] for table in image_rotary_emb)
            query, key = _rotate_halves(query, cos, sin), _rotate_halves(key, cos, sin)
        out = self.attend(query, key, value).type_as(query)
        result: torch.Tensor = attn.to_out[1](attn.to_out[0](out))
        return result


def _rotate_neighbors(tensor: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs of channels (0, 1), (2, 3), ...; the tables have one entry per pair."""
    even, odd = tensor.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(tensor)


def _rotate_halves(tensor: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs of channels (0, n/2), (1, n/2 + 1), ...; the tables have one entry per channel."""
    first, second = tensor.float().chunk(2, dim=-1)
    return (tensor.float() * cos + torch.cat((-second, first), dim=-1) * sin).type_as(tensor)


def _check_plain(encoder_hidden_states: torch.Tensor | None, attention_mask: torch.Tensor | None) -> None:
    """Raise `ValueError` on what would make it another attention than that over the video's own tokens."""
    if encoder_hidden_states is not None:
        raise ValueError("encoder_hidden_states: this processor is for self-attention, leave cross-attention its own")
    if attention_mask is not None:
        raise ValueError("attention_mask: the pattern says who sees whom, a mask beside it is not supported")
