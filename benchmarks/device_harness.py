"""What benchmarks on a CUDA device share: times by events and by graph replay, the card's ceilings, what it ran on."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

import harness

# Weights are taken in turn from sets of this many times the L2 cache, so that every use reads memory.
L2_ROUNDS = 4
# The host must not be slower than the device within one measured stretch.
STRETCH_SECONDS = 2e-3

Work = Callable[[int], object]  # called with the number of the set to use


def rotations(bytes_touched: int) -> int:
    """Sets of data to take in turn, so that together they are L2_ROUNDS times the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-L2_ROUNDS * cache // bytes_touched))


def eager_us(work: Mapping[str, Work], sets: int, repetitions: int = 100) -> dict[str, float]:
    """Median microseconds of a call, between two events, the functions in turn; launches included where they show."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(repetitions + 5):
        for name, call in work.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The device is busy while the host queues the call, so that only device time is seen.
            torch.cuda._sleep(400_000)
            start.record()
            call(repetition % sets)
            end.record()
            end.synchronize()
            if repetition >= 5:
                times[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def graph_us(work: Mapping[str, Work], sets: int, repetitions: int = 25) -> dict[str, float]:
    """Median microseconds of a call in a replayed graph of several rounds over all sets; the graphs in turn."""
    graphs = {}
    for name, call in work.items():
        for index in range(sets):
            call(index)
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(0)
        torch.cuda.synchronize()
        rounds = max(1, min(40, int(STRETCH_SECONDS / max(1e-6, time.perf_counter() - start) / sets)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for index in range(sets):
                    call(index)
        graphs[name] = (graph, rounds * sets)
    times: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(repetitions + 2):
        for name, (graph, calls) in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repetition >= 2:
                times[name].append(begin.elapsed_time(end) * 1e3 / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def host_us(work: Mapping[str, Callable[[], object]], calls: int = 300, rounds: int = 9) -> dict[str, float]:
    """Median microseconds that the host spends in one call, the device never waited for."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            times[name].append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return {name: statistics.median(values) for name, values in times.items()}


def copy_speed() -> float:
    """Bytes a second, read and written together, of torch's copy of 1 GiB on the device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    median = eager_us({"copy": lambda _: target.copy_(source)}, 1, 30)["copy"]
    return 2 * source.nbytes / (median * 1e-6)


def machine() -> str:
    """Card, driver, versions, commit."""
    from qlora_rs import _core

    driver = _core.driver_probe()["driver_version"]
    host = harness.machine(harness.installed("torch", "bitsandbytes"))
    return f"{torch.cuda.get_device_name()}, CUDA driver {driver}; {host}"


def free() -> None:
    """Give memory of dropped tensors back, so that the next shape has room."""
    gc.collect()
    torch.cuda.empty_cache()
