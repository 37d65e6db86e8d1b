"""The paged pool: the same values as plain tensors, whatever the budget, on the CPU and on a CUDA device."""

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
PAGES = {"cpu": PAGE, "cuda": 2 << 20}

both_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

Step = tuple[str, int, int]


def steps() -> st.SearchStrategy[list[Step]]:
    names = (
        ["add"] * 6
        + ["read"] * 6
        + ["overwrite", "flush", "fill", "prefetch", "host", "copy", "discard", "replace", "give_back", "reclaim"]
    )
    part = st.lists(st.tuples(st.sampled_from(names), st.integers(0, 99), st.integers(1, 9000)), min_size=1, max_size=9)
    repeated = st.tuples(part, st.integers(1, 4)).map(lambda pair: pair[0] * pair[1])
    return st.lists(repeated, min_size=1, max_size=4).map(lambda parts: [step for part in parts for step in part])


@both_devices
@settings(max_examples=150, deadline=None)
@given(
    frames=st.integers(3, 9),
    policy=st.sampled_from(["trace", "lru"]),
    shares=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=7),
    program=steps(),
)
def test_values_are_those_of_plain_tensors(
    device: str, frames: int, policy: str, shares: list[float], program: list[Step]
) -> None:
    page = PAGES[device]
    pool = PagedPool(frames * page + 17, device, page_size=page, policy=policy)  # type: ignore[arg-type]
    sizes = [1 + int(share * (3 * page // 4 - 1)) for share in shares]
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
        assert stats.resident_bytes <= stats.committed_bytes <= stats.limit_bytes <= pool.budget == frames * page
        pages = [page for page in pool.frame_map() if page is not None]
        assert len(set(pages)) == len(pages) == stats.resident_bytes // page
    for values, buffer in zip(plain, paged, strict=True):
        assert torch.equal(values, buffer.to_tensor())


def act(pool: PagedPool, paged: list[PagedBuffer], plain: Tensor, name: str, index: int, number: int) -> Tensor:
    """Do the same to a buffer and to a tensor; returns the tensor."""
    buffer = paged[index]
    if name == "add":
        with buffer.acquired("write") as values:
            assert torch.equal(values.cpu(), plain)
            values[number % len(values) :] += number
        plain[number % len(plain) :] += number
    elif name == "read":
        with buffer.acquired() as values:
            assert torch.equal(values.cpu(), plain)
    elif name == "overwrite":
        plain = torch.arange(number, number + len(plain), dtype=torch.int32)
        with buffer.acquired("overwrite") as values:
            values.copy_(plain)
    elif name == "flush":
        buffer.flush()
    elif name == "fill":
        plain = torch.full_like(plain, -number)
        with buffer.filling() as values:
            values.copy_(plain)
    elif name == "prefetch":
        pool.prefetch([paged[(index + i) % len(paged)] for i in range(number % 3)])
    elif name == "host":
        assert torch.equal(buffer.host(), plain)
    elif name == "copy":
        plain = torch.full_like(plain, number)
        buffer.copy_(plain.to(pool.device) if number % 2 else plain)
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


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@both_devices
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn]
)
def test_buffers_hold_every_type_and_shape(device: str, dtype: torch.dtype) -> None:
    page = PAGES[device]
    pool = PagedPool(8 * page, device, page_size=page)
    for shape in ((), (1,), (3, 5, 7), (1023,)):
        tensor = torch.randint(0, 2, shape).to(dtype)
        buffer = pool.store(tensor)
        assert buffer.nbytes == tensor.nbytes
        with buffer.acquired() as values:
            assert (values.shape, values.dtype, values.device) == (tensor.shape, dtype, pool.device)
            assert torch.equal(as_bytes(values.cpu()), as_bytes(tensor))
        assert torch.equal(as_bytes(buffer.host()), as_bytes(tensor))


@both_devices
def test_second_step_needs_no_fetch_when_asked_for(device: str) -> None:
    page = PAGES[device]
    pool = PagedPool(6 * page, device, page_size=page)
    layers = [pool.store(torch.full((2 * page,), i, dtype=torch.uint8), name=str(i)) for i in range(8)]
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


@both_devices
def test_trace_that_breaks_is_learned_anew(device: str) -> None:
    page = PAGES[device]
    pool = PagedPool(4 * page, device, page_size=page)
    layers = [pool.store(torch.zeros(page, dtype=torch.uint8)) for _ in range(7)]

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


@both_devices
def test_forgotten_buffers_give_their_pages_up_but_not_under_a_tensor(device: str) -> None:
    page = PAGES[device]
    pool = PagedPool(2 * page, device, page_size=page)
    buffer = pool.store(torch.full((page,), 7, dtype=torch.uint8))
    values = buffer.host()
    del buffer
    gc.collect()
    assert pool.stats().buffers == 1
    assert values.sum() == 7 * page
    del values
    gc.collect()
    assert pool.stats().buffers == 0


@both_devices
def test_tensor_keeps_the_pool_alive(device: str) -> None:
    page = PAGES[device]
    values = PagedPool(2 * page, device, page_size=page).store(torch.arange(99)).host()
    gc.collect()
    assert torch.equal(values, torch.arange(99))


@both_devices
def test_threads_share_a_pool(device: str) -> None:
    page = PAGES[device]
    pool = PagedPool(5 * page, device, page_size=page)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            mine = [pool.zeros(page // 4, torch.int32, name=f"{number}.{i}") for i in range(3)]
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


@both_devices
def test_wrong_use_is_named_with_the_way_out(device: str) -> None:
    page = PAGES[device]
    pool = PagedPool(4 * page, device, page_size=page)
    first, second = pool.zeros(3 * page // 4, name="first"), pool.store(torch.zeros(2 * page // 4), name="second")
    with pytest.raises(PageError, match=r"'?\"head\"'? takes 5 pages .* raise the budget"):
        pool.zeros(5 * page // 4, name="head")
    with pytest.raises(ValueError, match="no bytes"):
        pool.zeros(0)
    with pytest.raises(ValueError, match=r"\"?'?head'?\"? cannot have the shape \[-2, -3\]"):
        pool.zeros((-2, -3), name="head")
    with first.acquired():
        with pytest.raises(PageError, match=r'no room for buffer "second".*hold 3 of 4.*release some first'):
            second.acquire()
        with pytest.raises(PageError, match='cannot free buffer "first"'):
            first.free()
        with pytest.raises(PageError, match="acquired for reading"):
            first.copy_(torch.zeros(3 * page // 4))
    with pytest.raises(PageError, match="not acquired"):
        first.release()
    with pytest.raises(PageError, match="frozen"):
        second.acquire("write")
    with pytest.raises(PageError, match="frozen"):
        second.copy_(torch.zeros(2 * page // 4))
    with pytest.raises(ValueError, match=r"holds \[\d+\] of torch.float32, got \[5\]"):
        first.copy_(torch.zeros(5))
    with pytest.raises(ValueError, match="'read', 'write' or 'overwrite'"):
        first.acquire("rw")  # type: ignore[arg-type]
    with first.filling():
        with pytest.raises(PageError, match="being filled by the host"):
            first.acquire()
        with pytest.raises(PageError, match="being filled by the host"):
            first.host()
    first.free()
    for use in (first.acquire, first.release, first.host, first.free, first.discard):
        with pytest.raises(PageError, match="was freed"):
            use()
    with pytest.raises(ValueError, match="another pool"):
        PagedPool(page, device, page_size=page).prefetch([second])
    with pytest.raises(TypeError):
        copy.deepcopy(second)


@both_devices
def test_fill_that_fails_leaves_zeros(device: str) -> None:
    page = PAGES[device]
    buffer = PagedPool(4 * page, device, page_size=page).store(torch.ones(page), frozen=False)
    with pytest.raises(RuntimeError), buffer.filling() as values:
        values[: page // 2].copy_(torch.full((3,), 2.0))  # another shape
    with buffer.acquired() as values:
        assert not values.any()


@both_devices
def test_reserved_host_memory_is_used_and_progress_reported(device: str) -> None:
    page = PAGES[device]
    pool = PagedPool(2 * page, device, page_size=page)
    seen: list[tuple[int, int]] = []
    wish = 5 * page + 1000
    assert pool.reserve(wish, progress=lambda done, total: seen.append((done, total))) >= wish
    reserved = pool.stats().host_bytes
    assert seen[-1] == (wish, wish)
    stored = [pool.store(torch.full((page,), i, dtype=torch.uint8)) for i in range(5)]
    assert pool.stats().host_bytes == reserved >= wish
    assert all((buffer.host() == i).all() for i, buffer in enumerate(stored))


@both_devices
def test_timeline_tells_who_was_fetched_used_and_written_back(device: str) -> None:
    page = PAGES[device]
    pool = PagedPool(page, device, page_size=page)
    first, second = (pool.store(torch.zeros(page, dtype=torch.uint8), name=name, frozen=False) for name in "ab")
    with pool.record_timeline() as spans:
        for buffer in (first, second):
            with buffer.acquired("write") as values:
                values += 1
    assert [span.begin for span in spans] == sorted(span.begin for span in spans)
    assert all(0 <= span.begin <= span.end for span in spans)
    by_lane = {lane: [span.buffer for span in spans if span.lane == lane] for lane in ("in", "compute", "out")}
    assert by_lane == {"in": ["a", "b"], "compute": ["a", "b"], "out": ["a"]}
    use, back, fetch = (
        next(span for span in spans if (span.lane, span.buffer) == key)
        for key in (("compute", "a"), ("out", "a"), ("in", "b"))
    )
    assert use.end <= back.begin <= back.end <= fetch.begin


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
