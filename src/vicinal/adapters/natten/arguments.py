"""What NATTEN's models use to bring their own arguments into shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vicinal.ops.na import neighborhood, on_each_axis


def check_all_args(na_dim: int, kernel_size: Any, *rest: Any, **options: Any) -> tuple[tuple[Any, ...], ...]:
    """Each window argument as one value per axis, as `natten.utils.checks.check_all_args`.

    The rest is (dilation, is_causal) up to 0.17 and (stride, dilation, is_causal) since 0.20, and so is the answer.

    >>> check_all_args(2, 7, (1, 2), False), check_all_args(1, 7, 1, 2, True)
    (((7, 7), (1, 2), (False, False)), ((7,), (1,), (2,), (True,)))
    """
    names: tuple[str, ...] = ("stride", "dilation", "is_causal")
    if len(rest) + len(options) == 2 and "stride" not in options:
        names = names[1:]
    given = {**dict(zip(names, rest, strict=False)), **options}
    if len(rest) > len(names) or sorted(given) != sorted(names) or len(given) != len(rest) + len(options):
        raise TypeError(
            "check_all_args() takes na_dim, kernel_size and then dilation, is_causal or stride, dilation, is_causal"
        )
    defaults: dict[str, Any] = {"stride": 1, "dilation": 1, "is_causal": False}
    window = {name: defaults[name] if given[name] is None else given[name] for name in names}
    neighborhood(na_dim, kernel_size, **window)  # raises ValueError for what no neighborhood can be
    wanted = {"kernel_size": kernel_size, **window}
    return tuple(on_each_axis(name, value, na_dim) for name, value in wanted.items())


def get_num_na_weights(kernel_size: Sequence[int]) -> int:
    """How many keys a window has.

    >>> get_num_na_weights((3, 5, 5))
    75
    """
    number = 1
    for length in kernel_size:
        number *= length
    return number


def generate_varlen_parameters(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seqlens_Q: torch.Tensor | None = None,
    seqlens_KV: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, int, int]:
    """Where the sequences of a packed row begin and end, and the longest of each: what `attention` takes.

    >>> query, lengths = torch.randn(1, 5, 2, 8), torch.tensor([2, 3], dtype=torch.int32)
    >>> generate_varlen_parameters(query, query, query, lengths, lengths)[0]
    tensor([0, 2, 5], dtype=torch.int32)
    """
    del key, value
    if seqlens_Q is None and seqlens_KV is None:
        return None, None, 0, 0
    for name, lengths in (("seqlens_Q", seqlens_Q), ("seqlens_KV", seqlens_KV)):
        if not isinstance(lengths, torch.Tensor) or lengths.dtype != torch.int32 or lengths.dim() != 1:
            raise ValueError(f"{name} must be an int32 tensor [sequences], given with the other one, got {lengths!r}")
    assert seqlens_Q is not None
    assert seqlens_KV is not None
    if seqlens_Q.shape != seqlens_KV.shape or not len(seqlens_Q):
        raise ValueError(
            f"seqlens_Q and seqlens_KV must hold one length per sequence, got {len(seqlens_Q)} and {len(seqlens_KV)}"
        )
    if query.shape[0] != 1:
        raise ValueError(f"query must have a batch of 1, the packed sequences, got {query.shape[0]}")
    ends = [
        torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)) for lengths in (seqlens_Q, seqlens_KV)
    ]
    return ends[0], ends[1], int(seqlens_Q.max()), int(seqlens_KV.max())


def get_device_cc(device_index: Any = None) -> int:
    """The compute capability of a CUDA device times ten, 0 where there is none.

    >>> get_device_cc("cpu")
    0
    """
    if not torch.cuda.is_available():
        return 0
    device = None if device_index is None else torch.device(device_index)
    if device is not None and device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
