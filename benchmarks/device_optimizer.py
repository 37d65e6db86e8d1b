"""Optimizer steps on a CUDA device (B9): 448 LoRA tensors of an 8B model, beside bitsandbytes and torch's fused AdamW.

    python benchmarks/device_optimizer.py

"step" is the time of one of many steps in a row, host and device overlapping as they do in training; "host" is what the
host spends in one; "moved" gives gradients new addresses at each step, as backward passes do. Device times are of
replayed graphs where a step can be captured, else between two events while the device was busy before.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import device_harness as device
import harness
from qlora_rs import optim
from qlora_rs.errors import QloraError
from qlora_rs.paging import PagedPool

LAYERS, HIDDEN, KEYS, INNER = 32, 4096, 1024, 14336
LINEARS = (
    (HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN),
    (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER),
)  # fmt: skip
MUST_REACH, AIM, LINK_SHARE = 10.0, 20.0, 0.85
# Bytes moved for a float32 parameter.
FULL, EIGHT = 28, 16 + 4 * 4 / 256
Step = Callable[[], object]


class Problem:
    """A and B of every Linear layer, with two sets of gradients."""

    def __init__(self, rank: int) -> None:
        shapes = [shape for out, columns in LINEARS for shape in ((rank, columns), (out, rank))] * LAYERS
        self.params = [nn.Parameter(torch.randn(shape, device="cuda") * 0.01) for shape in shapes]
        self.grads = [[torch.randn_like(param) * 1e-3 for param in self.params] for _ in range(2)]
        self.elements = sum(param.numel() for param in self.params)
        self.give(0)

    def give(self, which: int) -> None:
        for param, grad in zip(self.params, self.grads[which], strict=True):
            param.grad = grad


def step_ms(step: Step, before: Step | None = None, seconds: float = 0.4) -> float:
    """Median over rounds of the time of one step in a row of them."""

    def row(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            if before is not None:
                before()
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count * 1e3

    row(3)
    count = max(3, min(50, int(seconds * 1e3 / 5 / row(3))))
    return statistics.median(row(count) for _ in range(5))


def host_us(step: Step) -> float:
    """Median time until a step returns, the device idle before."""
    times = []
    for _ in range(30):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def device_ms(make: Callable[..., torch.optim.Optimizer]) -> float:
    """Of a replayed graph of some steps."""
    optimizer = make(capturable=True)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            optimizer.step()
    return device.eager_us({"step": lambda _: graph.replay()}, 1, 15)["step"] / 4e3


def link_speed() -> float:
    """Bytes a second in each direction, both at once, between pinned memory and the device."""
    size = 256 << 20
    host = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.cuda.stream(streams[0]):
            there[0].copy_(host[0], non_blocking=True)
        with torch.cuda.stream(streams[1]):
            host[1].copy_(there[1], non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return size / statistics.median(times)


def peers(params: list[nn.Parameter]) -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """By name; the second is what the others are measured against."""
    made: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "torch AdamW, fused": lambda **more: torch.optim.AdamW(params, fused=True, **more)
    }
    try:
        import bitsandbytes as peer
    except ImportError:
        return made
    made["bitsandbytes PagedAdamW8bit"] = lambda: peer.optim.PagedAdamW8bit(params)
    made["bitsandbytes AdamW8bit"] = lambda: peer.optim.AdamW8bit(params)
    return made


def measure(rank: int, copy_speed: float, link: float) -> None:
    problem = Problem(rank)
    params, elements = problem.params, problem.elements
    ours: dict[str, tuple[Callable[..., Any], float, bool]] = {
        "AdamW": (lambda **more: optim.AdamW(params, **more), FULL, True),
        "AdamW8bit": (lambda **more: optim.AdamW8bit(params, **more), EIGHT, True),
        "AdamW, clipping": (lambda **more: optim.AdamW(params, max_grad_norm=1.0, **more), FULL + 4, True),
        "AdamW8bit, clipping": (lambda **more: optim.AdamW8bit(params, max_grad_norm=1.0, **more), EIGHT + 4, True),
        "Lion8bit": (lambda **more: optim.Lion8bit(params, **more), 14 + 2 * 4 / 256, True),
        "AdEMAMix8bit": (lambda **more: optim.AdEMAMix8bit(params, **more), 18 + 6 * 4 / 256, True),
        "PagedAdamW32bit, resident": (lambda: optim.PagedAdamW32bit(params, budget="4GiB"), FULL, False),
        "PagedAdamW8bit, resident": (lambda: optim.PagedAdamW8bit(params, budget="4GiB"), EIGHT, False),
    }
    theirs: dict[str, tuple[Callable[..., Any], float, bool]] = {
        name: (make, FULL if "8bit" not in name else EIGHT, "torch" in name) for name, make in peers(params).items()
    }
    times: dict[str, tuple[float, float, float, float | None]] = {}
    for name, (make, _, graph) in {**theirs, **ours}.items():
        try:
            optimizer = make()
            optimizer.step()
        except QloraError as error:
            print(f"{name}: {error}")
            continue
        turn = iter(range(10**9))
        moved = step_ms(optimizer.step, lambda turn=turn: problem.give(next(turn) % 2))
        problem.give(0)
        optimizer.step()
        plain, host = step_ms(optimizer.step), host_us(optimizer.step)
        times[name] = (plain, moved, host, device_ms(make) if graph else None)
        del optimizer
        device.free()
    against = times.get("bitsandbytes PagedAdamW8bit")
    rows = []
    for name, (plain, moved, host, alone) in times.items():
        size = elements * {**theirs, **ours}[name][1]
        seconds = (plain if alone is None else alone) * 1e-3
        ratio = "-" if against is None else f"{against[0] / plain:.1f}x"
        rows.append((
            name, f"{plain:.3f}", f"{moved:.3f}", f"{host:.0f}", "-" if alone is None else f"{alone:.3f}",
            f"{size / seconds / 1e12:.2f} ({size / seconds / copy_speed:.0%})", ratio,
        ))  # fmt: skip
    columns = ("optimizer", "step ms", "moved ms", "host us", "graph ms", "TB/s (of copy)", "against paged peer")
    print(f"\n{elements / 1e6:.1f} M float32 parameters in {len(params)} tensors")
    print(harness.table(columns, rows))
    print(f"must reach {MUST_REACH:.0f}x, aim {AIM:.0f}x")
    for cls, size in ((optim.PagedAdamW32bit, 8), (optim.PagedAdamW8bit, 2 + 8 / 256)):
        evicted(cls, params, int(elements * size), link)


def evicted(cls: type, params: list[nn.Parameter], size: int, link: float) -> None:
    """A step whose state does not fit: what crosses the link, and how fast."""
    page = 16 << 20
    frames = max(4, size // page // 4)
    try:
        pool = PagedPool(frames * page, "cuda", page_size=page)
        optimizer = cls(params, pool=pool)
        for _ in range(4):
            optimizer.step()
    except QloraError as error:
        print(f"{cls.__name__}, evicted: {error}")
        return
    before = pool.stats()
    count = 10
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        optimizer.step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / count
    after = pool.stats()
    moved = max(after.bytes_in - before.bytes_in, after.bytes_out - before.bytes_out) / count
    speed = moved / seconds
    print(
        f"{cls.__name__}, {frames} of {-(-size // page)} pages resident: {seconds * 1e3:.2f} ms a step, "
        f"{moved / 1e6:.0f} MB each way, {speed / 1e9:.1f} GB/s of {link / 1e9:.1f}: {speed / link:.0%} "
        f"(must reach {LINK_SHARE:.0%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64], help="LoRA ranks: 16 is 42 M parameters")
    ranks = parser.parse_args().ranks
    print(device.machine())
    copy_speed, link = device.copy_speed(), link_speed()
    print(f"copy {copy_speed / 1e12:.2f} TB/s, link {link / 1e9:.1f} GB/s each way")
    for rank in ranks:
        measure(rank, copy_speed, link)
        device.free()


if __name__ == "__main__":
    main()
