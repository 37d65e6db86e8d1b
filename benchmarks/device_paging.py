"""What a paged pool on a CUDA device costs: copies against the link's own speed, host time of a use, pinning.

python benchmarks/device_paging.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import device_harness as device
import harness
from qlora_rs.paging import PagedBuffer, PagedPool
from qlora_rs.pool import Mode

MUST_REACH = 0.85  # of the link
BUFFER_BYTES = 256 << 20
BUFFERS = 12
FRAMES_FOR = 4  # buffers that the budget holds


def seconds(work: Callable[[], object], repetitions: int) -> float:
    """Median of the whole, the device waited for."""
    times = []
    for _ in range(repetitions + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def link(repetitions: int) -> dict[str, float]:
    """GB/s of plain pinned copies: in alone, out alone, each of both at once."""
    host = [torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    card = [torch.empty(BUFFER_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def copy(into: bool, out: bool) -> None:
        for _ in range(4):
            if into:
                with torch.cuda.stream(streams[0]):
                    card[0].copy_(host[0], non_blocking=True)
            if out:
                with torch.cuda.stream(streams[1]):
                    host[1].copy_(card[1], non_blocking=True)

    size = 4 * BUFFER_BYTES / 1e9
    return {
        "in": size / seconds(lambda: copy(True, False), repetitions),
        "out": size / seconds(lambda: copy(False, True), repetitions),
        "both": size / seconds(lambda: copy(True, True), repetitions),
    }


def paged(mode: Mode, repetitions: int) -> tuple[float, float]:
    """GB/s that cross the link each way while more buffers than fit are used in turn."""
    # What is overwritten needs no fetch, but the learned order would fetch it ahead all the same.
    pool = PagedPool(FRAMES_FOR * BUFFER_BYTES, "cuda", policy="lru" if mode == "overwrite" else "trace")
    buffers = [pool.zeros(BUFFER_BYTES, torch.uint8, name=str(i)) for i in range(BUFFERS)]
    for buffer in buffers:  # pages that nobody wrote are not copied
        buffer.copy_(torch.full((BUFFER_BYTES,), 1, dtype=torch.uint8))

    def use() -> None:
        for buffer in buffers:
            with buffer.acquired(mode) as values:
                values[:64].add_(1) if mode != "read" else values[:64].sum()

    use()
    before = pool.stats()
    taken = seconds(use, repetitions)
    after = pool.stats()
    rounds = (repetitions + 1) * 1e9 * taken
    return (after.bytes_in - before.bytes_in) / rounds, (after.bytes_out - before.bytes_out) / rounds


def host_times() -> dict[str, float]:
    """Microseconds of the host for one use of a buffer."""
    pool = PagedPool("256MiB", "cuda")
    buffer = pool.store(torch.zeros(1 << 20), frozen=False)
    lone = pool.zeros(1 << 20)
    many = PagedPool("24GiB", "cuda", page_size="16MiB")
    layers = [many.zeros(1 << 20, torch.uint8, name=str(i)) for i in range(320)]

    def turn(of: list[PagedBuffer]) -> Callable[[], None]:
        state = {"next": 0}

        def use() -> None:
            of[state["next"] % len(of)].acquire()
            of[state["next"] % len(of)].release()
            state["next"] += 1

        return use

    def block() -> None:
        with lone.acquired("write"):
            pass

    small = PagedPool("3GiB", "cuda", page_size="2MiB", policy="lru")
    pages = [small.store(torch.zeros(2 << 20, dtype=torch.uint8)) for _ in range(2000)]

    work = {
        "acquire and release, one buffer": turn([buffer]),
        "the same, in a with block, for writing": block,
        "the same, 320 buffers in turn, order learned": turn(layers),
        "the same, each fetched first, 1,536 frames": turn(pages),
    }
    for call in work.values():
        for _ in range(2000):
            call()
    # Few enough calls that the driver's queue has room for what they copy.
    return device.host_us(work, calls=100)


def first_use() -> float:
    """GB/s at which frames get memory of the device, which the host does."""
    pool = PagedPool("8GiB", "cuda")
    buffer = pool.zeros(8 << 30, torch.uint8)
    torch.cuda.synchronize()
    start = time.perf_counter()
    buffer.acquire("overwrite")
    taken = time.perf_counter() - start
    buffer.release()
    return buffer.nbytes / 1e9 / taken


def pinning(bytes: int) -> dict[str, float]:
    """GB/s."""

    def timed(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return bytes / 1e9 / (time.perf_counter() - start)

    def pin_memory() -> object:
        return torch.empty(bytes, dtype=torch.uint8, pin_memory=True)

    pool = PagedPool("2GiB", "cuda")
    source = torch.ones(BUFFER_BYTES * 4, dtype=torch.uint8)
    speeds = {
        "reserve (touched by threads, then registered)": timed(lambda: pool.reserve(bytes)),
        "one cuMemHostAlloc (torch's pin_memory)": timed(
            lambda: torch.empty(bytes, dtype=torch.uint8, pin_memory=True)
        ),
    }
    buffer = pool.zeros(source.shape, torch.uint8)
    taken = seconds(lambda: buffer.copy_(source), 3)
    speeds["store of a CPU tensor into pinned memory"] = source.nbytes / 1e9 / taken
    plain = torch.empty_like(source)
    speeds["torch's copy between ordinary tensors"] = source.nbytes / 1e9 / seconds(lambda: plain.copy_(source), 3)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5, help="timed repetitions; the median counts")
    parser.add_argument("--pin-gigabytes", type=float, default=8.0, help="how much to pin")
    arguments = parser.parse_args()
    torch.empty(1, device="cuda")
    print(device.machine())

    speed = link(arguments.repetitions)
    print(f"link: {speed['in']:.1f} GB/s in, {speed['out']:.1f} out, {speed['both']:.1f} each way at once")
    lines = []
    for name, mode, lane, ceiling in (
        ("fetch (read)", "read", 0, "in"),
        ("evict (overwrite)", "overwrite", 1, "out"),
        ("fetch and evict (write): in", "write", 0, "both"),
        ("fetch and evict (write): out", "write", 1, "both"),
    ):
        got = paged(mode, arguments.repetitions)[lane]  # type: ignore[arg-type]
        lines.append((name, f"{got:.1f}", f"{got / speed[ceiling]:.0%}", f"{MUST_REACH:.0%}"))
    print(harness.table(("pool", "GB/s", "of the link", "must reach"), lines))
    print(harness.table(("host", "us"), [(name, f"{time:.1f}") for name, time in host_times().items()]))
    print(f"frames get memory at {first_use():.0f} GB/s")
    pinned = pinning(int(arguments.pin_gigabytes * 1e9))
    print(harness.table(("host memory", "GB/s"), [(name, f"{speed:.1f}") for name, speed in pinned.items()]))


if __name__ == "__main__":
    main()
