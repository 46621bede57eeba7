"""Writes down the calls that the problem table makes of the CPU kernels, for csrc/tests/replay.cpp.

    python -m tests.ops.record_calls FILE [EVERY]

takes every EVERY-th problem, in float32 and in a type of two bytes. What is read is written down with its exact extent
in memory.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, BinaryIO

import numpy as np
import torch

from vicinal.ops import cpu
from vicinal.ops.cpu import library, record

from .problems import PROBLEMS
from .tolerance import run

FIRST_TENSOR, TENSOR_WORDS, TABLES, LAYOUT, ROW_SUMS = 25, 7, 15, 18, 11
FIRST_OUTPUT, FIRST_GRADIENT = 7, 12
NARROW = (torch.bfloat16, torch.float16)


def extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * (1 + sum((size - 1) * stride for size, stride in steps))


def main(path: str, every: int) -> None:
    packed: list[Any] = []
    pack, call = record.pack, library.call

    def noted_pack(*arguments: Any) -> bytes:
        packed[:] = [arguments[-1]]
        return pack(*arguments)

    with open(path, "wb") as file:

        def noted_call(function: Any, data: bytes, *others: Any) -> None:
            write(file, function is library.load().attend_backward, data, packed[0])
            call(function, data, *others)

        cpu.record.pack, cpu.library.call = noted_pack, noted_call
        for number, problem in enumerate(PROBLEMS[::every]):
            run(problem, torch.float32, "cpu")
            run(problem, NARROW[number % 2], "cpu")


def write(file: BinaryIO, is_backward: bool, data: bytes, tensors: record.Tensors) -> None:
    """One call and its buffers."""
    words = np.frombuffer(data, dtype=np.int64)
    rows, columns = words[TABLES + 1], words[TABLES + 2]
    buffers = [(TABLES, int(rows * columns * 4), 0), (LAYOUT, int(words[LAYOUT + 1] * 8), 0)]
    for number, tensor in enumerate(tensors):
        if tensor is not None and extent(tensor):
            is_output = number >= FIRST_GRADIENT or (number >= FIRST_OUTPUT and not is_backward)
            # the room for the backward is nobody's result: it may stay unwritten
            is_result = is_output and number != ROW_SUMS
            buffers.append((FIRST_TENSOR + TENSOR_WORDS * number, extent(tensor), int(is_result)))
    file.write(np.int64(is_backward).tobytes() + data + np.int64(len(buffers)).tobytes())
    for word, count, is_output in buffers:
        contents = ctypes.string_at(int(words[word]), count)
        file.write(np.array([word, count, is_output], dtype=np.int64).tobytes() + contents)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)
