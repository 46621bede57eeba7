"""Random numbers that depend on what they are for, and on nothing that was drawn before."""

from __future__ import annotations

import numpy as np

_LAST = 2**64 - 1


def sample_random(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator for one sample in one epoch, the same in whichever process and whichever order it is asked for.

    >>> sample_random(0, 3, 17).integers(100) == sample_random(0, 3, 17).integers(100)
    np.True_
    """
    return _keyed(seed, epoch, index)


def order_random(seed: int, epoch: int) -> np.random.Generator:
    """The generator for the order of an epoch."""
    return _keyed(seed, epoch, _LAST)


def _keyed(seed: int, epoch: int, word: int) -> np.random.Generator:
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in 0 .. 2**32 - 1, got {seed}")
    key = np.array([(seed << 32) | epoch, word], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
