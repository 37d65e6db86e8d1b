"""The paged pool on a CUDA device: order between streams, the host's waits, graphs, the ends of pools and processes."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from qlora_rs.errors import DeviceError, PageError
from qlora_rs.paging import PagedPool

PAGE = 2 << 20
LONG = 200_000_000  # cycles: a tenth of a second


@pytest.mark.parametrize("seed", range(4))
def test_random_use_on_late_streams_loses_no_write_and_reads_nothing_stale(seed: int) -> None:
    pool = PagedPool(13 * PAGE, "cuda", page_size=PAGE)
    sizes = [PAGE // 4 * pages - 64 * number - 3 for number, pages in enumerate((1, 1, 2, 2, 3, 3, 4, 5))]
    written = [pool.zeros(size, torch.int32, name=f"written {i}") for i, size in enumerate(sizes)]
    frozen = [pool.store(torch.full((size,), i + 7, dtype=torch.int32)) for i, size in enumerate(sizes)]
    counts, locks = [0] * len(sizes), [threading.Lock() for _ in sizes]
    failures: list[object] = []
    refused: list[PageError] = []

    def work(number: int) -> None:
        try:
            draw, stream, wrong = random.Random(100 * seed + number), torch.cuda.Stream(), []
            with torch.cuda.stream(stream):
                for _ in range(120):
                    try:
                        wrong.append(use(draw, draw.randrange(len(sizes))))
                    except PageError as error:  # the other threads hold too much just now
                        if "no room" not in str(error):
                            raise
                        refused.append(error)
                stream.synchronize()
                failures.extend(w for w in wrong if w.item())
        except BaseException as error:  # handed to the thread that judges
            failures.append(error)

    def use(draw: random.Random, index: int) -> Tensor:
        """A write or a read; how many values were wrong."""
        late = draw.choice([0, 0, 10_000, 300_000, 1_000_000])
        if draw.random() < 0.4:
            values = frozen[index].acquire()
            torch.cuda._sleep(late)
            wrong = (values != index + 7).sum()
            frozen[index].release()
            return wrong
        with locks[index]:  # held while it is acquired, not while the device is busy
            values = written[index].acquire("write")
            wrong = (values != counts[index]).sum()
            torch.cuda._sleep(late)
            values += 1
            counts[index] += 1
            written[index].release()
        if draw.random() < 0.1:
            pool.prefetch([written[draw.randrange(len(sizes))] for _ in range(2)])
        return wrong

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(refused) < 120
    for buffer, count in zip(written, counts, strict=True):
        assert (buffer.host() == count).all(), buffer.name
    stats = pool.stats()
    assert stats.bytes_out > 0
    assert stats.misses > 0


def test_host_never_waits_for_streams_or_copies() -> None:
    pool = PagedPool(4 * PAGE, "cuda", page_size=PAGE)
    buffers = [pool.store(torch.full((2 * PAGE,), i, dtype=torch.uint8), frozen=False) for i in range(5)]
    for buffer in buffers:  # frames get their memory, and kernels are loaded
        with buffer.acquired("write") as values:
            values += 1
    torch.cuda.synchronize()
    torch.cuda._sleep(5 * LONG)
    for buffer in buffers:
        with buffer.acquired("write") as values:
            values += 1
    assert not torch.cuda.current_stream().query()
    assert all((buffer.host() == i + 2).all() for i, buffer in enumerate(buffers))


def test_waiting_for_content_leaves_the_pool_to_others() -> None:
    pool = PagedPool(4 * PAGE, "cuda", page_size=PAGE)
    late, other = pool.zeros(PAGE, torch.uint8), pool.zeros(PAGE, torch.uint8)
    with late.acquired("write") as values:
        torch.cuda._sleep(10 * LONG)
        values += 3
    stream, answers = torch.cuda.Stream(), []
    reader = threading.Thread(target=lambda: answers.append(bool((late.host() == 3).all())))
    reader.start()
    with torch.cuda.stream(stream), other.acquired("write") as values:
        values += 1
    stream.synchronize()
    assert reader.is_alive()
    reader.join()
    assert answers == [True]


def test_stall_is_the_time_that_streams_wait_for_copies() -> None:
    pool = PagedPool(32 * PAGE, "cuda", page_size=PAGE, policy="lru")
    buffers = [pool.store(torch.zeros(16 * PAGE, dtype=torch.uint8)) for _ in range(3)]
    for buffer in buffers * 3:
        with buffer.acquired() as values:
            values.sum()
    torch.cuda.synchronize()
    assert 0 < pool.stats().stall_seconds < 10


def test_values_of_the_device_are_stored_without_fetching_or_waiting() -> None:
    pool = PagedPool(8 * PAGE, "cuda", page_size=PAGE)
    sources = [torch.randint(0, 255, (3 * PAGE - 5,), dtype=torch.uint8, device="cuda") for _ in range(4)]
    pool.store(sources[0], frozen=False).free()
    torch.cuda._sleep(5 * LONG)
    buffers = [pool.store(source) for source in sources]
    assert not torch.cuda.current_stream().query()
    assert pool.stats().bytes_in == 0
    for source, buffer in zip(sources, buffers, strict=True):
        assert torch.equal(buffer.to_tensor(), source.cpu())
        with buffer.acquired() as values:
            assert torch.equal(values, source)
    with pytest.raises(PageError, match="frozen"):
        buffers[0].copy_(sources[1])


def test_values_of_the_device_go_to_the_host_where_acquired_buffers_leave_no_room() -> None:
    pool = PagedPool(2 * PAGE, "cuda", page_size=PAGE)
    held, stored = pool.zeros(2 * PAGE, torch.uint8), torch.arange(99, device="cuda")
    with held.acquired():
        buffer = pool.store(stored)
    assert torch.equal(buffer.to_tensor(), stored.cpu())


def test_two_pools_of_a_device_do_not_mind_each_other() -> None:
    pools = [PagedPool(3 * PAGE, "cuda", page_size=PAGE) for _ in range(2)]
    buffers = [[pool.zeros(PAGE, torch.uint8, name=str(i)) for i in range(5)] for pool in pools]
    for step in range(7):
        for pair in zip(*buffers, strict=True):
            for number, buffer in enumerate(pair):
                with buffer.acquired("write") as values:
                    values += step * (number + 1)
    for number, of_pool in enumerate(buffers):
        assert all((buffer.host() == 21 * (number + 1)).all() for buffer in of_pool)


def test_pools_of_several_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices, and torch finds one")
    pools = [PagedPool(3 * PAGE, f"cuda:{index}", page_size=PAGE) for index in range(2)]
    source = torch.arange(PAGE // 4, dtype=torch.int32, device="cuda:0")
    buffers = [[pool.store(source, frozen=False) for _ in range(4)] for pool in pools]
    for _ in range(3):
        for pool, of_pool in zip(pools, buffers, strict=True):
            for buffer in of_pool:
                with buffer.acquired("write") as values:
                    assert values.device == pool.device
                    values += 1
    for of_pool in buffers:
        assert all(torch.equal(buffer.host(), source.cpu() + 3) for buffer in of_pool)


def test_captured_graph_uses_what_is_held_and_nothing_else() -> None:
    pool = PagedPool(2 * PAGE, "cuda", page_size=PAGE)
    held, other = pool.zeros(PAGE, torch.uint8, name="held"), pool.zeros(PAGE, torch.uint8, name="other")
    held.acquire("write").add_(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with held.acquired("write") as values:
            values += 1
        with pytest.raises(PageError, match='graph is being captured, and buffer "other" is not held'):
            other.acquire()
    for _ in range(5):
        graph.replay()
    with other.acquired("write") as values:
        values += 1
    held.release()
    assert (held.host() == 6).all()
    reading = other.acquire("read")
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        with pytest.raises(PageError, match="for writing if the graph writes"):
            other.acquire("write")
        with other.acquired() as values:
            total = values.sum()
    graph.replay()
    assert total.item() == PAGE
    assert reading[0] == 1
    other.release()


def test_pool_is_used_beside_a_capture_on_another_thread() -> None:
    pool = PagedPool(2 * PAGE, "cuda", page_size=PAGE)
    buffers = [pool.zeros(PAGE, torch.uint8) for _ in range(4)]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for buffer in buffers:
                    values = buffer.acquire("write")
                    torch.cuda._sleep(1000)
                    del values
                    buffer.release()
                pool.give_back(PAGE)
                pool.reclaim()
                pool.stats()
        except BaseException as error:  # handed to the thread that judges
            failures.append(error)

    values = torch.zeros(99, device="cuda")
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        values += 1
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    graph.replay()
    assert not failures
    assert values.sum().item() == 99


@pytest.mark.parametrize("release", [True, False])
def test_pool_that_goes_with_work_under_way_waits_for_it(release: bool) -> None:
    before = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        pool = PagedPool(64 * PAGE, "cuda", page_size=PAGE)
        buffers = [pool.zeros(16 * PAGE, torch.uint8) for _ in range(6)]
        for buffer in buffers:
            values = buffer.acquire("write")
            torch.cuda._sleep(LONG // 10)
            values += 1
            if release or buffer is not buffers[-1]:
                buffer.release()
        del pool, buffer, buffers, values
        gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] >= before - 8 * PAGE  # torch's own, for kernels and results


def test_interpreter_ends_with_pools_and_work_under_way() -> None:
    program = f"""
import threading, torch
from qlora_rs.paging import PagedPool
pool = PagedPool({4 * PAGE}, "cuda", page_size={PAGE})
buffers = [pool.zeros({PAGE}, torch.uint8) for _ in range(6)]
for buffer in buffers:
    values = buffer.acquire("write")
    torch.cuda._sleep({LONG})
    values += 1
    if buffer is not buffers[-1]:
        buffer.release()
kept = [buffers[0].host(), values]
kept.append(kept)
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_forked_child_is_told_and_does_not_hang() -> None:
    program = f"""
import os, torch
from qlora_rs import DeviceError
from qlora_rs.paging import PagedPool
pool = PagedPool({4 * PAGE}, "cuda", page_size={PAGE})
buffer = pool.zeros({PAGE}, torch.uint8)
with buffer.acquired("write") as values:
    values += 1
child = os.fork()
if child == 0:
    try:
        buffer.host()
    except DeviceError as error:
        if "forked" in str(error):
            del buffer, pool, values
            os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert (buffer.host() == 1).all()
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_impossible_pools_on_a_device_are_refused() -> None:
    with pytest.raises(ValueError, match=r"page_size must be a multiple of 2097152 bytes on .*, got 4096"):
        PagedPool("1MiB", "cuda", page_size=4096)
    with pytest.raises(ValueError, match=r"a budget of .* is more than .* has"):
        PagedPool("9TiB", "cuda")
    with pytest.raises(DeviceError, match="no CUDA device 99"):
        PagedPool("64MiB", "cuda:99")
    pool = PagedPool("64MiB", "cuda")
    for wish in ("900TB", "12TB"):  # more than there are addresses, and than there is memory
        with pytest.raises(DeviceError, match=r"cannot pin \d+ bytes more: .*pinned so far: \d+ bytes"):
            pool.reserve(wish)
    assert (pool.zeros(5).host() == 0).all()
