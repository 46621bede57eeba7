"""NATTEN's fused functions, heads last: what they were called from 0.17 to 0.21, on our operator.

Arguments may come in the order of either generation, see `versions`. What they mean is NATTEN's documentation's, with
the differences that docs/natten.md lists. All take any device, dtype and head dim that our operator takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vicinal.adapters.natten.arguments import generate_varlen_parameters
from vicinal.adapters.natten.versions import Release, by_name, show_signature
from vicinal.ops import BackendRefused, checks
from vicinal.ops import attention as vicinal_attention
from vicinal.ops import merge_attentions as vicinal_merge_attentions
from vicinal.ops import na1d as vicinal_na1d
from vicinal.ops import na2d as vicinal_na2d
from vicinal.ops import na3d as vicinal_na3d
from vicinal.pattern import Full, bounds

_SHARED_HINTS = ("backward_kv_splits", "backward_use_pt_reduction", "run_persistent_kernel", "kernel_schedule",
                 "torch_compile")  # fmt: skip
_NA_HINTS = ("q_tile_shape", "kv_tile_shape", "backward_q_tile_shape", "backward_kv_tile_shape", *_SHARED_HINTS)
_ATTENTION_HINTS = ("q_tile_size", "kv_tile_size", "backward_q_tile_size", "backward_kv_tile_size", *_SHARED_HINTS)

NEIGHBORHOOD: dict[Release, tuple[str, ...]] = {
    (0, 17): ("dilation", "is_causal", "rpb", "scale", "additional_keys", "additional_values", "xformers_kwargs"),
    (0, 20): (
        "stride", "dilation", "is_causal", "scale", "additional_keys", "additional_values", "attention_kwargs",
        "backend", *_NA_HINTS, "return_lse",
    ),
}  # fmt: skip
"""What may follow query, key, value and kernel_size."""

KERNELS = ("cutlass-fna", "hopper-fna", "blackwell-fna", "flex-fna",
           "cutlass-fmha", "hopper-fmha", "blackwell-fmha", "flex-fmha")  # fmt: skip
"""The names of NATTEN's own back ends."""


def na1d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    *args: Any,
    **options: Any,
) -> Any:
    """Neighborhood attention on a sequence `[batch, length, heads, head_dim]`, as `natten.na1d`.

    >>> query, key, value = torch.randn(3, 1, 100, 2, 16).unbind(0)
    >>> na1d(query, key, value, kernel_size=9, stride=3, is_causal=True).shape
    torch.Size([1, 100, 2, 16])
    >>> na1d(query, key, value, 9, 2, False, rpb=torch.zeros(2, 17)).shape  # 0.17: dilation, is_causal
    torch.Size([1, 100, 2, 16])
    """
    return _neighborhood("na1d", 1, query, key, value, kernel_size, args, options)


def na2d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    *args: Any,
    **options: Any,
) -> Any:
    """Neighborhood attention on feature maps `[batch, height, width, heads, head_dim]`, as `natten.na2d`.

    `rpb` is the position bias `[heads, 2 * kernel_height - 1, 2 * kernel_width - 1]` that NATTEN had until 0.17.

    >>> query, key, value = torch.randn(3, 1, 14, 20, 2, 32).unbind(0)
    >>> out, lse = na2d(query, key, value, kernel_size=7, rpb=torch.zeros(2, 13, 13), return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([1, 14, 20, 2, 32]), torch.Size([1, 14, 20, 2]))
    """
    return _neighborhood("na2d", 2, query, key, value, kernel_size, args, options)


def na3d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    *args: Any,
    **options: Any,
) -> Any:
    """Neighborhood attention on videos `[batch, time, height, width, heads, head_dim]`, as `natten.na3d`.

    >>> query, key, value = torch.randn(3, 1, 4, 8, 8, 2, 16).unbind(0)
    >>> na3d(query, key, value, kernel_size=(3, 5, 5), is_causal=(True, False, False)).shape
    torch.Size([1, 4, 8, 8, 2, 16])
    """
    return _neighborhood("na3d", 3, query, key, value, kernel_size, args, options)


def neighborhood_attention_generic(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    *args: Any,
    **options: Any,
) -> Any:
    """`na1d`, `na2d` or `na3d`, by the number of axes of `query`.

    >>> query = torch.randn(1, 6, 7, 2, 8)
    >>> neighborhood_attention_generic(query, query, query, kernel_size=3).shape
    torch.Size([1, 6, 7, 2, 8])
    """
    rank = query.dim() - 3
    if rank not in checks.RANKS:
        raise ValueError(f"query must be [batch, *grid, heads, head_dim] with 1 to 3 axes, got {tuple(query.shape)}")
    return _neighborhood("neighborhood_attention_generic", rank, query, key, value, kernel_size, args, options)


for _function in (na1d, na2d, na3d, neighborhood_attention_generic):
    show_signature(_function, ("query", "key", "value", "kernel_size"), NEIGHBORHOOD)


def attention(  # noqa: PLR0917 - NATTEN's arguments, in NATTEN's order
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: torch.Tensor | None = None,
    seqlens_KV: torch.Tensor | None = None,
    cumulative_seqlen_Q: torch.Tensor | None = None,
    cumulative_seqlen_KV: torch.Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Any:
    """Attention of all queries `[batch, tokens, heads, head_dim]` to all keys, as `natten.attention`.

    A causal query sees the keys up to its own number, counted from the first. With sequence lengths the batch is one
    packed row, and each sequence sees itself. The arguments from `q_tile_size` to `torch_compile` are about kernels
    that are not here, and change nothing.

    >>> query, key = torch.randn(2, 5, 2, 8), torch.randn(2, 9, 2, 8)
    >>> attention(query, key, key, is_causal=True).shape
    torch.Size([2, 5, 2, 8])
    """
    check_backend("attention", backend)
    options: dict[str, Any] = {"is_causal": bool(is_causal), "scale": scale, "backend": backend}
    if seqlens_Q is not None or seqlens_KV is not None:
        cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV = generate_varlen_parameters(
            query, key, value, seqlens_Q, seqlens_KV
        )
    if cumulative_seqlen_Q is None and cumulative_seqlen_KV is None and not max_seqlen_Q and not max_seqlen_KV:
        out, lse = _attend(query, key, value, **options)
    else:
        given = (cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV)
        if any(entry is None for entry in given):
            raise ValueError("attention: cumulative_seqlen_{Q,KV} and max_seqlen_{Q,KV} come together, one is missing")
        assert cumulative_seqlen_Q is not None
        assert cumulative_seqlen_KV is not None
        out, lse = _attend_packed(query, key, value, cumulative_seqlen_Q, cumulative_seqlen_KV, options)
    return (out, lse) if return_lse else out


def merge_attentions(
    outputs: Sequence[torch.Tensor],
    lse_tensors: Sequence[torch.Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join attention outputs over disjoint keys, as `natten.merge_attentions`.

    Our log-sum-exps carry gradients, so there is nothing to fix: both flags change nothing.

    >>> query, key = torch.randn(1, 6, 2, 8), torch.randn(1, 10, 2, 8)
    >>> parts = [attention(query, part, part, return_lse=True) for part in key.split(5, 1)]
    >>> out, lse = merge_attentions([out for out, _ in parts], [lse for _, lse in parts])
    >>> torch.allclose(out, attention(query, key, key), atol=1e-6)
    True
    """
    del torch_compile, use_autograd_fix
    return vicinal_merge_attentions(outputs, lse_tensors)


def check_backend(function: str, backend: Any) -> None:
    """Refuse NATTEN's own back ends by name: who asks for a kernel must not silently get another."""
    if backend in KERNELS:
        raise BackendRefused(
            f"{function}: backend {backend!r} is a kernel of NATTEN's own library, which is not here. Leave backend "
            f"out to let Vicinal choose, or name one of Vicinal's"
        )


def _neighborhood(
    function: str,
    rank: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    given = by_name(function, NEIGHBORHOOD, args, options)
    check_backend(function, given.get("backend"))
    _check_attention_options(
        function, "attention_kwargs", given.get("attention_kwargs"), ("backend", *_ATTENTION_HINTS)
    )
    _check_attention_options(function, "xformers_kwargs", given.get("xformers_kwargs"), ("op",))
    call: Callable[..., Any] = (vicinal_na1d, vicinal_na2d, vicinal_na3d)[rank - 1]
    return call(
        query,
        key,
        value,
        kernel_size,
        stride=_or(given.get("stride"), 1),
        dilation=_or(given.get("dilation"), 1),
        is_causal=_or(given.get("is_causal"), False),
        scale=given.get("scale"),
        additional_keys=given.get("additional_keys"),
        additional_values=given.get("additional_values"),
        bias=bias_like(given.get("rpb"), query),
        return_lse=bool(given.get("return_lse", False)),
        backend=given.get("backend"),
    )


def bias_like(rpb: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """A position bias in a dtype that suits the query, as NATTEN casts it."""
    if rpb is None or not isinstance(rpb, torch.Tensor) or rpb.dtype in (torch.float32, query.dtype):
        return rpb
    return rpb.to(query.dtype)


def _or(value: Any, default: Any) -> Any:
    """NATTEN takes None for a default."""
    return default if value is None else value


def _check_attention_options(function: str, name: str, value: Any, allowed: Sequence[str]) -> None:
    """Options for a second kernel, which does not run here: hints are ignored, what changes a result is refused."""
    if value is None:
        return
    if not isinstance(value, Mapping) or not set(value) <= set(allowed):
        raise ValueError(
            f"{function}: {name} must be None or a dict with keys among {', '.join(allowed)}, got {value!r}"
        )
    check_backend(f"{function}: {name}", value.get("backend"))


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool, scale: float | None, backend: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of attention on one axis, causal from the top left."""
    pattern: Any = Full(causal=is_causal)
    queries, keys = query.shape[1], key.shape[1]
    if is_causal and queries != keys:
        longest = max(queries, keys)
        pattern = bounds(pattern, (longest,)).slice(0, 0, queries).shift(0, 0, keys)
    out, lse = vicinal_attention(query, key, value, pattern, scale=scale, backend=backend, return_lse=True)
    return out, lse


def _attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention within each sequence of a packed row `[1, tokens, heads, head_dim]`."""
    query_at, key_at = query_ends.tolist(), key_ends.tolist()
    for name, places, tensor in (("Q", query_at, query), ("KV", key_at, key)):
        if places[:1] != [0] or places != sorted(places) or places[-1] != tensor.shape[1]:
            raise ValueError(
                f"attention: cumulative_seqlen_{name} must rise from 0 to the number of tokens ({tensor.shape[1]}), "
                f"got {places}"
            )
    if len(query_at) != len(key_at) or any(tensor.shape[0] != 1 for tensor in (query, key, value)):
        raise ValueError(
            f"attention: packed sequences need a batch of 1 and as many lengths for queries as for keys, got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {len(query_at) - 1} and {len(key_at) - 1} lengths"
        )
    outs, lses = [], []
    for begin, end, key_begin, key_end in zip(query_at, query_at[1:], key_at, key_at[1:], strict=False):
        own, keys = query[:, begin:end], slice(key_begin, key_end)
        if begin == end:
            continue
        if key_begin == key_end:  # who sees nothing gets 0
            outs.append(own.new_zeros(*own.shape[:-1], value.shape[-1]))
            wide = torch.promote_types(own.dtype, torch.float32)
            lses.append(torch.full(own.shape[:-1], -torch.inf, dtype=wide, device=own.device))
            continue
        out, lse = _attend(own, key[:, keys], value[:, keys], **options)
        outs.append(out)
        lses.append(lse)
    if not outs:
        raise ValueError("attention: there is no query in any of the sequences")
    return torch.cat(outs, 1), torch.cat(lses, 1)
