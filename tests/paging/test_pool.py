"""The paged pool on the CPU: the same values as plain tensors, whatever the budget."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_rs.errors import PageError, UnsupportedError
from qlora_rs.paging import PagedBuffer, PagedPool

PAGE = 4096

Step = tuple[str, int, int]


def steps() -> st.SearchStrategy[list[Step]]:
    names = ["add"] * 6 + ["read"] * 6 + ["prefetch", "host", "copy", "discard", "replace", "give_back", "reclaim"]
    part = st.lists(st.tuples(st.sampled_from(names), st.integers(0, 99), st.integers(1, 9000)), min_size=1, max_size=9)
    repeated = st.tuples(part, st.integers(1, 4)).map(lambda pair: pair[0] * pair[1])
    return st.lists(repeated, min_size=1, max_size=4).map(lambda parts: [step for part in parts for step in part])


@settings(max_examples=150, deadline=None)
@given(
    frames=st.integers(3, 9),
    policy=st.sampled_from(["trace", "lru"]),
    sizes=st.lists(st.integers(1, 3 * PAGE // 4), min_size=1, max_size=7),
    program=steps(),
)
def test_values_are_those_of_plain_tensors(frames: int, policy: str, sizes: list[int], program: list[Step]) -> None:
    pool = PagedPool(frames * PAGE + 17, page_size=PAGE, policy=policy)  # type: ignore[arg-type]
    plain = [torch.zeros(size, dtype=torch.int32) for size in sizes]
    paged = [pool.zeros(size, torch.int32, name=str(i)) for i, size in enumerate(sizes)]
    for name, which, number in program:
        index = which % len(sizes)
        try:
            plain[index] = act(pool, paged, plain[index], name, index, number)
        except PageError as error:
            if "were given back" not in str(error):
                raise
        stats = pool.stats()
        assert stats.resident_bytes <= stats.committed_bytes <= stats.limit_bytes <= pool.budget == frames * PAGE
        pages = [page for page in pool.frame_map() if page is not None]
        assert len(set(pages)) == len(pages) == stats.resident_bytes // PAGE
    for values, buffer in zip(plain, paged, strict=True):
        assert torch.equal(values, buffer.to_tensor())


def act(pool: PagedPool, paged: list[PagedBuffer], plain: Tensor, name: str, index: int, number: int) -> Tensor:
    """Do the same to a buffer and to a tensor; returns the tensor."""
    buffer = paged[index]
    if name == "add":
        with buffer.acquired("write") as values:
            assert torch.equal(values, plain)
            values[number % len(values) :] += number
        plain[number % len(plain) :] += number
    elif name == "read":
        with buffer.acquired() as values:
            assert torch.equal(values, plain)
    elif name == "prefetch":
        pool.prefetch([paged[(index + i) % len(paged)] for i in range(number % 3)])
    elif name == "host":
        assert torch.equal(buffer.host(), plain)
    elif name == "copy":
        plain = torch.full_like(plain, number)
        buffer.copy_(plain)
    elif name == "discard":
        buffer.discard()
        plain = torch.zeros_like(plain)
    elif name == "replace":
        buffer.free()
        plain = torch.arange(len(plain), dtype=torch.int32)
        paged[index] = pool.store(plain, name=f"{index} anew", frozen=False)
    elif name == "give_back":
        pool.give_back(number)
    else:
        pool.reclaim()
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
def test_buffers_hold_every_type_and_shape(dtype: torch.dtype) -> None:
    pool = PagedPool("32KiB", page_size="4KiB")
    for shape in ((), (1,), (3, 5, 7), (1023,)):
        tensor = torch.randint(0, 2, shape).to(dtype)
        buffer = pool.store(tensor)
        assert buffer.nbytes == tensor.nbytes
        with buffer.acquired() as values:
            assert (values.shape, values.dtype) == (tensor.shape, dtype)
            assert torch.equal(values, tensor)
        assert torch.equal(buffer.host(), tensor)


def test_second_step_needs_no_fetch_when_asked_for() -> None:
    pool = PagedPool(6 * PAGE, page_size=PAGE)
    layers = [pool.store(torch.full((2 * PAGE,), i, dtype=torch.uint8), name=str(i)) for i in range(8)]
    for step in range(5):
        before = pool.stats()
        for layer in [*layers, *reversed(layers)]:
            with layer.acquired():
                pass
        after = pool.stats()
        if step > 1:
            assert after.misses == before.misses
            assert after.trace_period == 2 * len(layers) - 2  # two in a row are one
    assert after.bytes_out == 0  # frozen
    assert 0 < after.hit_rate < 1
    assert "hit rate" in str(after)


def test_trace_that_breaks_is_learned_anew() -> None:
    pool = PagedPool(4 * PAGE, page_size=PAGE)
    layers = [pool.store(torch.zeros(PAGE, dtype=torch.uint8)) for _ in range(7)]

    def play(order: list[int]) -> int:
        before = pool.stats().misses
        for index in order:
            with layers[index].acquired():
                pass
        return pool.stats().misses - before

    play([0, 1, 2, 3, 4, 5, 6] * 4)
    assert play([0, 1, 2, 3, 4, 5, 6]) == 0
    breaks = pool.stats().trace_breaks
    assert play([6, 2, 0, 5, 3, 1, 4]) > 0
    assert pool.stats().trace_breaks > breaks
    play([6, 2, 0, 5, 3, 1, 4] * 2)
    assert play([6, 2, 0, 5, 3, 1, 4]) == 0


def test_forgotten_buffers_give_their_pages_up_but_not_under_a_tensor() -> None:
    pool = PagedPool(2 * PAGE, page_size=PAGE)
    buffer = pool.store(torch.full((PAGE,), 7, dtype=torch.uint8))
    values = buffer.host()
    del buffer
    gc.collect()
    assert pool.stats().buffers == 1
    assert values.sum() == 7 * PAGE
    del values
    gc.collect()
    assert pool.stats().buffers == 0


def test_tensor_keeps_the_pool_alive() -> None:
    values = PagedPool(2 * PAGE, page_size=PAGE).store(torch.arange(99)).host()
    gc.collect()
    assert torch.equal(values, torch.arange(99))


def test_threads_share_a_pool() -> None:
    pool = PagedPool(5 * PAGE, page_size=PAGE)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            mine = [pool.zeros(PAGE // 4, torch.int32, name=f"{number}.{i}") for i in range(3)]
            for _ in range(60):
                for buffer in mine:
                    with buffer.acquired("write") as values:
                        values += number
            for buffer in mine:
                assert (buffer.host() == 60 * number).all()
        except BaseException as error:  # handed to the thread that judges
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_wrong_use_is_named_with_the_way_out() -> None:
    pool = PagedPool(4 * PAGE, page_size=PAGE)
    first, second = pool.zeros(3 * PAGE // 4, name="first"), pool.store(torch.zeros(2 * PAGE // 4), name="second")
    with pytest.raises(PageError, match=r"'?\"head\"'? takes 5 pages .* raise the budget"):
        pool.zeros(5 * PAGE // 4, name="head")
    with pytest.raises(ValueError, match="no bytes"):
        pool.zeros(0)
    with first.acquired():
        with pytest.raises(PageError, match=r'no room for buffer "second".*hold 3 of 4.*release some first'):
            second.acquire()
        with pytest.raises(PageError, match='cannot free buffer "first"'):
            first.free()
        with pytest.raises(PageError, match="acquired for reading"):
            first.copy_(torch.zeros(3 * PAGE // 4))
    with pytest.raises(PageError, match="not acquired"):
        first.release()
    with pytest.raises(PageError, match="frozen"):
        second.acquire("write")
    with pytest.raises(PageError, match="frozen"):
        second.copy_(torch.zeros(2 * PAGE // 4))
    with pytest.raises(ValueError, match=r"holds \[3072\] of torch.float32, got \[5\]"):
        first.copy_(torch.zeros(5))
    with pytest.raises(ValueError, match="'read' or 'write'"):
        first.acquire("rw")  # type: ignore[arg-type]
    first.free()
    for use in (first.acquire, first.release, first.host, first.free, first.discard):
        with pytest.raises(PageError, match="was freed"):
            use()
    with pytest.raises(ValueError, match="another pool"):
        PagedPool(PAGE, page_size=PAGE).prefetch([second])
    with pytest.raises(TypeError):
        copy.deepcopy(second)


def test_impossible_pools_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="device='cpu'"):
        PagedPool("1GiB", device="meta")
    with pytest.raises(ValueError, match="raise the budget"):
        PagedPool("1MiB")  # a page has 16
    with pytest.raises(ValueError, match="multiple of 4096"):
        PagedPool("1MiB", page_size=1000)
    with pytest.raises(ValueError, match="'24GiB'"):
        PagedPool("much")
    with pytest.raises(ValueError, match="trace"):
        PagedPool("64MiB", policy="clock")  # type: ignore[arg-type]
