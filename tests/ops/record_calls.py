"""Writes down the calls that the problem table makes of the CPU kernels, for csrc/tests/replay.cpp.

    python -m tests.ops.record_calls FILE [EVERY]

takes every EVERY-th problem, in float32 and bfloat16, and every second of them in float16; each twice: the second time
the call is known. What is read is written down with its exact extent in memory.
"""

from __future__ import annotations

import ctypes
import dataclasses
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch

import vicinal
from vicinal.ops.cpu import library, record

from .fuzz_records import FIRST_TENSOR, HEADER, PLACED, TENSOR_WORDS
from .problems import PROBLEMS, arguments, draw
from .tolerance import run

FIRST_OUTPUT, FIRST_GRADIENT = 7, 11
DTYPES = (torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16, torch.float16)
BYTES = {number: dtype.itemsize for dtype, number in record.DTYPES.items()}


def shapes(words: np.ndarray) -> list[tuple[tuple[int, ...], int]]:
    """For each tensor of a record its shape and the bytes of an element."""
    told = {name: int(word) for name, word in zip(HEADER, words, strict=False)}
    grid = tuple(told[f"grid{axis}"] for axis in range(told["rank"]))
    key_grid = tuple(told[f"key_grid{axis}"] for axis in range(told["rank"]))
    batch, dim, value_dim, tokens = told["batch"], told["head_dim"], told["value_dim"], told["extra_tokens"]
    bytes_, wide = BYTES[told["dtype"]], 8 if BYTES[told["dtype"]] == 8 else 4
    rows = (batch, *grid, told["heads"])
    inputs = [
        ((*rows, dim), bytes_),
        ((batch, *key_grid, told["kv_heads"], dim), bytes_),
        ((batch, *key_grid, told["kv_heads"], value_dim), bytes_),
        ((told["bias_words"],), wide),
        ((batch, tokens, told["kv_heads"], dim), bytes_),
        ((batch, tokens, told["kv_heads"], value_dim), bytes_),
    ]
    results = [((*rows, value_dim), bytes_), (rows, wide)]
    return [*inputs, ((batch,), 8), *results, *results, *inputs]


def extent(shape: tuple[int, ...], strides: np.ndarray, bytes_: int) -> int:
    """Bytes from a tensor's first element to its last."""
    if 0 in shape:
        return 0
    return bytes_ * (1 + sum((size - 1) * int(stride) for size, stride in zip(shape, strides, strict=False)))


def main(path: str, every: int) -> None:
    loaded = library.load()
    with open(path, "wb") as file:

        def noted(name: str) -> Callable[..., int]:
            function = getattr(loaded, name)

            def call(data: bytes, *others: Any) -> int:
                write(file, name, data, others[0])
                status: int = function(data, *others)
                return status

            return call

        names = ("attend", "attend_backward", "attend_at", "attend_backward_at")
        watched = dataclasses.replace(loaded, **{name: noted(name) for name in names})
        library.load = lambda: watched  # type: ignore[assignment]
        for number, problem in enumerate(PROBLEMS[::every]):
            for dtype in DTYPES[number % 2] * 2:
                run(problem, dtype, "cpu")
                with torch.no_grad():  # without the log-sum-exp
                    vicinal.attention(**arguments(problem, draw(problem, dtype)), backend="cpu")


def write(file: BinaryIO, name: str, data: bytes, places: Any) -> None:
    """One call and its buffers."""
    words = np.frombuffer(data, dtype=np.int64).copy()
    is_backward, is_placed = "backward" in name, name.endswith("_at")
    if is_placed:
        taken = [HEADER.index("threads"), *(FIRST_TENSOR + TENSOR_WORDS * number for number in PLACED)]
        words[taken] = struct.unpack("=13q", places)
    tables, layout = HEADER.index("tables"), HEADER.index("layout")
    buffers = [(tables, int(words[tables + 1] * words[tables + 2] * 4), 0), (layout, int(words[layout + 1] * 8), 0)]
    for number, (shape, bytes_) in enumerate(shapes(words)):
        place = FIRST_TENSOR + TENSOR_WORDS * number
        count = extent(shape, words[place + 1 : place + TENSOR_WORDS], bytes_)
        if words[place] and count:
            is_output = number >= FIRST_GRADIENT or (number >= FIRST_OUTPUT and not is_backward)
            buffers.append((place, count, int(is_output)))
    file.write(np.int64(is_backward + 2 * is_placed).tobytes() + words.tobytes() + np.int64(len(buffers)).tobytes())
    for word, count, is_output in buffers:
        contents = ctypes.string_at(int(words[word]), count)
        file.write(np.array([word, count, is_output], dtype=np.int64).tobytes() + contents)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)
