"""NATTEN's arithmetic of operations, as in 0.17: two for a product and its sum, one if they count as one."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any


def na_qk_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Operations of the scores. As in NATTEN, causal windows count in full, and softmax and bias do not count.

    >>> na_qk_flop_count((1, 56, 56, 2, 32), (1, 56, 56, 2, 32), (7, 7), (1, 1), (False, False), is_heads_last=True)
    19668992
    """
    del k_shape, dilation, is_causal, is_heads_last  # the same product in either layout
    return prod(q_shape) * prod(kernel_size) * (1 if return_macs else 2)


def na_av_flop_count(
    a_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Operations of the weighted sums.

    >>> weights, value = (1, 2, 56, 56, 49), (1, 2, 56, 56, 32)
    >>> na_av_flop_count(weights, value, (7, 7), (1, 1), (False, False), is_heads_last=False)
    19668992
    """
    del a_shape
    return na_qk_flop_count(v_shape, v_shape, kernel_size, dilation, is_causal, is_heads_last, return_macs)


def fna_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Operations of both.

    >>> shape = (1, 56, 56, 2, 32)
    >>> fna_flop_count(shape, shape, shape, (7, 7), (1, 1), (False, False), is_heads_last=True)
    39337984
    """
    window = (kernel_size, dilation, is_causal, is_heads_last, return_macs)
    return na_qk_flop_count(q_shape, k_shape, *window) + na_av_flop_count(q_shape, v_shape, *window)


def add_natten_handle(flop_ctr: Any) -> Any:
    """Refuse: fvcore's counter would look for operators that are not here."""
    raise NotImplementedError(
        f"natten.flops counts with fvcore, by the names of NATTEN's own operators, which {type(flop_ctr).__name__} "
        f"would not meet here. Count with torch.utils.flop_counter.FlopCounterMode, which knows Vicinal's operators"
    )


def get_flops(model: Any, input: Any, disable_warnings: bool = False) -> int:
    """Refuse, for the same reason."""
    del input, disable_warnings
    count: int = add_natten_handle(model)
    return count
