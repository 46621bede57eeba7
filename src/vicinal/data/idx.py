"""The idx format of MNIST and its successors: a magic number, big-endian sizes, bytes; often in gzip."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vicinal.data.dataset import DataMissing

UNSIGNED_BYTE = 8


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The array in an idx file of unsigned bytes.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix="-idx1-ubyte") as file:
    ...     _ = file.write(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
    ...     file.flush()
    ...     read_idx(Path(file.name)).tolist()
    [7, 8, 9]
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataMissing(f"{path} is damaged ({error}); fetch it again") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTE:
        raise DataMissing(f"{path} is no idx file of bytes: it begins with {content[:4].hex(' ')}")
    rank = content[3]
    start = 4 + 4 * rank
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4))
    if len(content) != start + math.prod(shape):
        raise DataMissing(f"{path} should hold {shape} bytes, but {len(content) - start} are there; fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
