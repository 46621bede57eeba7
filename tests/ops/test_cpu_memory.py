"""Results in memory of earlier results: never while anybody can still see them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import vicinal
from vicinal import Near
from vicinal.ops import backend
from vicinal.ops.cpu import memory

pytestmark = pytest.mark.skipif(
    "cpu" not in backend.usable(), reason="the library of CPU kernels was not built on this machine"
)
SHAPE = (256, 512)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    memory.forget()
    yield
    memory.forget()
    memory._shelf.cache_clear()


@pytest.fixture
def allow(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes may be kept, for this test."""

    def set_most(most: int) -> None:
        monkeypatch.setattr(memory, "most_kept", lambda: most)
        memory._shelf.cache_clear()

    return set_most


def kept() -> list[memory._Room]:
    return [room for shelf in memory._filled for room in shelf.rooms]


def kept_bytes() -> int:
    return sum(room.storage.nbytes() for room in kept())


def address_of_next() -> int:
    return memory.empty(SHAPE, torch.float32).data_ptr()


def test_memory_is_used_again_once_a_result_is_gone() -> None:
    first = memory.empty(SHAPE, torch.float32)
    address = first.data_ptr()
    del first
    again = memory.empty(SHAPE, torch.float32)
    assert again.data_ptr() == address
    assert again.shape == SHAPE
    assert again.is_contiguous()
    assert again.untyped_storage().nbytes() == again.nbytes
    assert again._version == 0
    assert not again._is_view()


def test_results_of_many_layers_are_all_used_again() -> None:
    for _ in range(3):
        held = [memory.empty(SHAPE, torch.float32) for _ in range(2 * memory.MOST_TRIED + 3)]
        assert len({tensor.data_ptr() for tensor in held}) == len(kept()) == len(held)
        del held
    assert len({address_of_next() for _ in range(5)}) == 1  # what is in the caches


def test_parts_are_used_again_once_all_are_gone() -> None:
    shelf = memory.Shelf((2, 64, 4, 64), torch.float32, parts=3)
    first = shelf.empty_parts()
    addresses = [part.data_ptr() for part in first]
    whole = torch.empty(2, 64, 3, 4, 64)
    assert [part.stride() for part in first] == [part.stride() for part in whole.unbind(-3)]
    assert [address - addresses[0] for address in addresses] == [0, 4 * 4 * 64, 2 * 4 * 4 * 64]
    last = first[2]
    del first
    assert not {part.data_ptr() for part in shelf.empty_parts()} & set(addresses)
    del last
    both = shelf.empty_parts(), shelf.empty_parts()
    assert addresses in [[part.data_ptr() for part in parts] for parts in both]
    assert not any(part._is_view() for parts in both for part in parts)


def test_small_results_are_left_to_the_system() -> None:
    memory.empty((10,), torch.float32)
    assert not memory._filled


WAYS_TO_SEE: dict[str, Callable[[torch.Tensor], Any]] = {
    "view": lambda result: result[3:, ::2],
    "detach": torch.Tensor.detach,
    "numpy": torch.Tensor.numpy,
    "storage": torch.Tensor.untyped_storage,
    "dlpack": torch.utils.dlpack.to_dlpack,
    "saved": lambda result: torch.ones((), requires_grad=True) * result,
}


@pytest.mark.parametrize("see", WAYS_TO_SEE)
def test_memory_that_can_be_seen_is_not_used_again(see: str) -> None:
    result = memory.empty(SHAPE, torch.float32)
    result.fill_(1.0)
    address = result.data_ptr()
    seen = WAYS_TO_SEE[see](result)
    del result
    other = memory.empty(SHAPE, torch.float32)
    assert other.data_ptr() != address
    del seen
    if see != "numpy":  # what was lent to numpy can no longer be resized, so it is not used again
        assert memory.empty(SHAPE, torch.float32).data_ptr() == address


def test_shared_and_resized_memory_is_given_up() -> None:
    shared = memory.empty(SHAPE, torch.float32).share_memory_()
    address = shared.data_ptr()
    del shared
    assert address_of_next() != address
    resized = memory.empty(SHAPE, torch.float32)
    resized.untyped_storage().resize_(0)
    del resized
    assert memory.empty(SHAPE, torch.float32).untyped_storage().nbytes() == 4 * 256 * 512


def test_memory_somebody_left_a_trace_on_is_given_up() -> None:
    lent = memory.empty(SHAPE, torch.float32)
    lent.numpy()
    del lent
    memory.empty(SHAPE, torch.float32).resize_(2 * 256 * 512)
    noted = memory.empty(SHAPE, torch.float32)
    noted.untyped_storage().note = 1  # type: ignore[attr-defined]
    del noted
    assert not hasattr(memory.empty(SHAPE, torch.float32).untyped_storage(), "note")


def test_shared_memory_is_let_go_when_another_size_comes() -> None:
    for rows in range(300, 310):
        memory.empty((rows, 512), torch.float32).share_memory_()
    memory.empty(SHAPE, torch.float32)
    assert [room.storage.nbytes() for room in kept()] == [4 * 256 * 512]


def test_what_is_looked_at_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a signal's handler, which comes in the middle of a call and makes one itself."""
    address, inner = address_of_next(), []
    is_as_new = memory._Room.is_as_new

    def interrupted(room: memory._Room, size: int) -> bool:
        if not inner:
            inner.append(None)
            inner[0] = memory.empty(SHAPE, torch.float32)
        return is_as_new(room, size)

    monkeypatch.setattr(memory._Room, "is_as_new", interrupted)
    assert address_of_next() == address
    assert inner[0].data_ptr() != address
    assert len(kept()) == 2


def test_no_more_is_kept_than_allowed(allow: Callable[[int], None]) -> None:
    allow(1 << 20)
    for rows in range(256, 300):
        memory.empty((rows, 512), torch.float32)
        memory.empty((64, 512), torch.float32)
        assert kept_bytes() <= 1 << 20
    assert {room.storage.nbytes() for room in kept()} == {299 * 512 * 4, 64 * 512 * 4}  # what was used last
    memory.empty((1024, 1024), torch.float32)
    assert kept_bytes() <= 1 << 20


@pytest.mark.parametrize("most", [256 << 20, 1 << 20])
def test_threads_never_get_the_same_memory(most: int, allow: Callable[[int], None]) -> None:
    allow(most)
    failures = []

    def work(number: int) -> None:
        for _ in range(300):
            mine = memory.empty((256 + 64 * number, 512), torch.float32)
            del mine
            mine = memory.empty(SHAPE, torch.float32)
            mine[0, 0] = number
            other = memory.empty(SHAPE, torch.float32)
            other[0, 0] = -1.0
            if mine[0, 0] != number:
                failures.append(number)

    done = []
    threads = [threading.Thread(target=lambda own=number: (work(own), done.append(own))) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(done) == 4


def test_a_loop_of_training_keeps_its_results_apart() -> None:
    query, key, value = (torch.randn(1, 40, 40, 2, 32, requires_grad=True) for _ in range(3))
    pattern = (Near(5), Near(5))
    with torch.no_grad():
        expected = vicinal.attention(query, key, value, pattern, backend="reference")
    outs = []
    for _ in range(3):
        out = vicinal.attention(query, key, value, pattern)
        grads = torch.autograd.grad(out.sum(), (query, key, value))
        assert len({tensor.data_ptr() for tensor in (out, *grads, *outs)}) == 4 + len(outs)
        outs.append(out)
    for out in outs:
        assert torch.allclose(out, expected, atol=1e-5)
    addresses = {tensor.data_ptr() for tensor in (*outs, *grads)}
    del out, outs, grads
    assert vicinal.attention(query, key, value, pattern).data_ptr() in addresses


def test_inference_mode_has_memory_of_its_own() -> None:
    """A tensor is one of inference or is none for good."""
    for _ in range(2):
        with torch.inference_mode():
            result = memory.empty(SHAPE, torch.float32)
            assert result.is_inference()
            address = result.data_ptr()
            del result
            assert address_of_next() == address
        result = memory.empty(SHAPE, torch.float32)
        assert not result.is_inference()
        assert result.data_ptr() != address


@pytest.mark.parametrize(("given", "reason"), [("-1", "-1"), ("many", "many")])
def test_the_variable_is_checked(given: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VICINAL_CPU_KEEP_MB", given)
    with pytest.raises(ValueError, match=f"VICINAL_CPU_KEEP_MB must be a whole number of megabytes.*{reason}"):
        memory.most_kept.__wrapped__()


def test_nothing_is_kept_where_nothing_may_be() -> None:
    program = (
        "import torch; from vicinal.ops.cpu import memory; "
        "memory.empty((1024, 1024), torch.float32); print(memory.most_kept(), len(memory._filled))"
    )
    environment = {**os.environ, "VICINAL_CPU_KEEP_MB": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0"]
