"""A device that is full: pools give frames back to torch, and take them again."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from qlora_rs.errors import DeviceError
from qlora_rs.paging import PagedBuffer, PagedPool

MIB = 1 << 20
PAGE = 16 * MIB
BUFFER = 256 * MIB
BUDGET = 2048 * MIB
LARGE = 1536 * MIB  # finds no room beside the pool


@pytest.fixture
def full() -> Iterator[PagedPool]:
    """A pool on a device that has room for little more than its budget."""
    gc.collect()
    holds(torch.full((PAGE,), 5, dtype=torch.uint8, device="cuda"), 5)  # kernels take memory when they first run
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    ballast = torch.empty(free - BUDGET - 1024 * MIB, dtype=torch.uint8, device="cuda")
    yield PagedPool(BUDGET, "cuda", page_size=PAGE)
    del ballast
    torch.cuda.empty_cache()


def filled(pool: PagedPool) -> list[PagedBuffer]:
    """Buffers that take the whole budget, and whose values are on the device only."""
    buffers = [pool.zeros(BUFFER, torch.uint8, name=str(i)) for i in range(BUDGET // BUFFER)]
    for number, buffer in enumerate(buffers):
        with buffer.acquired("overwrite") as values:
            values.fill_(number + 1)
    assert pool.stats().resident_bytes == BUDGET
    return buffers


def large() -> Tensor:
    return torch.full((LARGE,), 5, dtype=torch.uint8, device="cuda")


def holds(tensor: Tensor, value: int) -> bool:
    """Without a temporary tensor as large as this one."""
    return (tensor.min().item(), tensor.max().item()) == (value, value)


def check(buffers: list[PagedBuffer]) -> None:
    for number, buffer in enumerate(buffers):
        with buffer.acquired() as values:
            assert holds(values, number + 1)


def test_torch_gets_the_frames_memory_and_the_pool_gets_it_back(full: PagedPool) -> None:
    buffers = filled(full)
    with pytest.raises(torch.OutOfMemoryError):
        large()
    with full.sharing_with_torch():
        tensor = large()
        stats = full.stats()
        assert stats.resident_bytes <= stats.limit_bytes <= BUDGET - LARGE + 1024 * MIB
        check(buffers)
        assert holds(tensor, 5)
        del tensor
    check(buffers)
    stats = full.stats()
    assert stats.limit_bytes == BUDGET
    assert stats.resident_bytes > BUDGET - LARGE // 4


def test_threads_of_backward_get_it_too(full: PagedPool) -> None:
    buffers = filled(full)
    threads: list[int] = []

    class Hungry(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
            threads.append(threading.get_ident())
            return grad * large()[0]

    x = torch.ones(3, device="cuda", requires_grad=True)
    with full.sharing_with_torch():
        Hungry.apply(x).sum().backward()
    assert threads != [threading.get_ident()]
    assert (x.grad == 5).all()
    check(buffers)


def test_tensor_that_cannot_fit_costs_the_pool_nothing(full: PagedPool) -> None:
    buffers = filled(full)
    with full.sharing_with_torch():
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(BUDGET + 2048 * MIB, dtype=torch.uint8, device="cuda")
        assert full.stats().resident_bytes == BUDGET
    check(buffers)


def test_acquired_buffers_stay(full: PagedPool) -> None:
    buffers = filled(full)
    with full.sharing_with_torch(), ExitStack() as held:
        views = [held.enter_context(buffer.acquired()) for buffer in buffers]
        with pytest.raises(torch.OutOfMemoryError):
            large()
        assert all(holds(view, number + 1) for number, view in enumerate(views))
    check(buffers)


def test_reclaiming_takes_what_torch_only_caches(full: PagedPool) -> None:
    buffers = filled(full)
    with full.sharing_with_torch():
        kept = torch.full((64 * MIB,), 9, dtype=torch.uint8, device="cuda")
        large()  # now in torch's cache
        check(buffers)
        before = full.stats().resident_bytes
        full.reclaim()
        check(buffers)
        assert full.stats().resident_bytes > before + LARGE // 4
        assert holds(kept, 9)
        large()
    assert holds(kept, 9)


def test_graph_captured_meanwhile_keeps_its_memory(full: PagedPool) -> None:
    buffers = filled(full)
    x = torch.arange(3 * MIB, device="cuda")
    with full.sharing_with_torch():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = (x + 1) * 2
        owners = {
            tuple(segment["segment_pool_id"])
            for segment in torch.cuda.memory_snapshot()
            if segment["address"] <= y.data_ptr() < segment["address"] + segment["total_size"]
        }
        assert owners == {tuple(graph.pool())}
        for _ in range(2):
            large()
        graph.replay()
        assert torch.equal(y, (x + 1) * 2)
    check(buffers)


def test_frames_take_what_the_device_has_and_say_what_is_missing(full: PagedPool) -> None:
    pool = PagedPool(BUDGET, "cuda", page_size=PAGE)
    buffers = filled(full)
    others = [pool.zeros(BUFFER, torch.uint8, name=str(i)) for i in range(BUDGET // BUFFER)]
    for number, buffer in enumerate(others):
        with buffer.acquired("overwrite") as values:
            values.fill_(number + 1)
    assert 0 < pool.stats().resident_bytes < BUDGET
    check(others)
    check(buffers)
    rest = [
        torch.empty(BUFFER, dtype=torch.uint8, device="cuda") for _ in range(torch.cuda.mem_get_info()[0] // BUFFER)
    ]
    third = PagedPool(BUDGET, "cuda", page_size=PAGE).zeros(BUFFER, torch.uint8)
    with pytest.raises(DeviceError, match=r"bytes free, and a paged pool needs .*empty_cache"):
        third.acquire()
    del rest
    torch.cuda.empty_cache()


def test_many_threads_allocate_while_the_pool_works(full: PagedPool) -> None:
    buffers = filled(full)
    failures: list[BaseException] = []

    def allocate(number: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(12):
                    size = (100 + 97 * ((number + turn) % 3)) * MIB
                    tensor = torch.full((size,), number, dtype=torch.uint8, device="cuda")
                    assert holds(tensor, number)
        except BaseException as error:  # handed to the thread that judges
            failures.append(error)

    with full.sharing_with_torch():
        threads = [threading.Thread(target=allocate, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            check(buffers)
            full.reclaim()
        for thread in threads:
            thread.join()
    assert not failures
    check(buffers)
