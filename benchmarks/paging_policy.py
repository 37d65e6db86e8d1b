"""What a budget costs: traces of training replayed through the paged pool, against LRU and the least possible.

    python benchmarks/paging_policy.py                                  # the table
    python benchmarks/paging_policy.py --plot docs/paging-policy.svg    # and the picture

The pool is the real one, on the CPU, with pages of 4096 bytes that stand for pages of 16 MiB; bytes are printed as they
would be. The least possible is Belady's: single pages anywhere, the one leaving whose next use is farthest, nothing
fetched ahead; no policy copies less from the host. Counts are of steps after the order is learned; they are exact.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import harness

PAGE = 4096
STANDS_FOR = 16 << 20
LEARNING, MEASURED = 4, 4  # steps


@dataclass(frozen=True)
class Use:
    """One use of a buffer in a step."""

    buffer: int
    write: bool = False
    last: bool = False  # its content is not needed afterwards


@dataclass(frozen=True)
class Trace:
    """What a step uses, in order; a buffer's pages by its number."""

    name: str
    pages: tuple[int, ...]
    frozen: int  # so many of the first buffers are never written
    step: tuple[Use, ...]


def pages_of(count: float) -> int:
    return -(-int(count) // STANDS_FOR)


def weights(layers: int, layer_bytes: float) -> Trace:
    """Forward, then backward with every layer recomputed first."""
    step = [Use(i) for i in range(layers)]
    for i in reversed(range(layers)):
        step += [Use(i), Use(i)]
    return Trace("70B weights, forward and backward", (pages_of(layer_bytes),) * layers, layers, tuple(step))


def with_optimizer(base: Trace, state_bytes: float) -> Trace:
    """Then every page of optimizer state, read and written."""
    first, count = len(base.pages), pages_of(state_bytes)
    step = [*base.step, *(Use(first + i, write=True) for i in range(count))]
    return Trace("70B weights, then AdamW state", base.pages + (1,) * count, base.frozen, tuple(step))


def with_activations(layers: int, layer_bytes: float, activation_bytes: float) -> Trace:
    """A layer's input is kept in the forward pass, and taken in the backward pass."""
    step = []
    for i in range(layers):
        step += [Use(i), Use(layers + i, write=True)]
    for i in reversed(range(layers)):
        step += [Use(layers + i, last=True), Use(i), Use(i)]
    pages = (pages_of(layer_bytes),) * layers + (pages_of(activation_bytes),) * layers
    return Trace("70B weights and activations", pages, layers, tuple(step))


def cycle(name: str, count: int, size_bytes: float, write: bool) -> Trace:
    step = tuple(Use(i, write=write) for i in range(count))
    return Trace(name, (pages_of(size_bytes),) * count, 0 if write else count, step)


def traces() -> list[Trace]:
    layer = 441e6  # NF4, doubly quantized, of hidden size 8192 and 28672 between
    seventy = weights(80, layer)
    return [
        seventy,
        with_optimizer(seventy, 1.66e9),  # LoRA of rank 16 on all layers, 207 M parameters, float32 moments
        with_activations(80, layer, 8192 * 8192 * 2),  # 8,192 tokens in bfloat16
        cycle("70B weights, forward only", 80, layer, write=False),
        cycle("AdamW state of 4 B parameters", 480, 8 * 4e9 / 480, write=True),
    ]


@dataclass(frozen=True)
class Cost:
    """Of one step on average."""

    hit_rate: float
    bytes_in: float
    bytes_out: float


def replay(trace: Trace, frames: int, policy: str) -> Cost:
    """Through the pool."""
    import torch

    from qlora_rs.paging import PagedPool

    pool = PagedPool(frames * PAGE, page_size=PAGE, policy=policy)  # type: ignore[arg-type]
    buffers = []
    for number, pages in enumerate(trace.pages):
        content = torch.zeros(pages * PAGE, dtype=torch.uint8)
        buffers.append(pool.store(content, name=str(number), frozen=number < trace.frozen))

    def step() -> None:
        for use in trace.step:
            buffer = buffers[use.buffer]
            buffer.acquire("write" if use.write else "read")
            buffer.release()
            if use.last:
                buffer.discard()

    for _ in range(LEARNING):
        step()
    before = pool.stats()
    for _ in range(MEASURED):
        step()
    after = pool.stats()
    hits, misses = after.hits - before.hits, after.misses - before.misses
    scale = STANDS_FOR / PAGE / MEASURED
    return Cost(
        hits / (hits + misses),
        (after.bytes_in - before.bytes_in) * scale,
        (after.bytes_out - before.bytes_out) * scale,
    )


def least_in(trace: Trace, frames: int) -> float:
    """Bytes from the host a step that no policy can do without."""
    accesses: list[tuple[tuple[int, int], bool, bool]] = []  # page, needs its content, dead afterwards
    dead = {use.buffer for use in trace.step if use.last}
    for use in trace.step * (LEARNING + MEASURED):
        needs = not (use.write and use.buffer in dead)
        accesses += [((use.buffer, page), needs, use.last) for page in range(trace.pages[use.buffer])]
    never = len(accesses)
    next_use, seen = [never] * len(accesses), dict[tuple[int, int], int]()
    for time in reversed(range(len(accesses))):
        page = accesses[time][0]
        next_use[time] = seen.get(page, never)
        seen[page] = time
    resident: dict[tuple[int, int], int] = {}  # to the next use
    farthest: list[tuple[int, tuple[int, int]]] = []
    start, fetched = LEARNING * (len(accesses) // (LEARNING + MEASURED)), 0
    for time, (page, needs, last) in enumerate(accesses):
        if page not in resident:
            fetched += needs and time >= start
            while len(resident) >= frames:
                when, victim = heapq.heappop(farthest)
                if resident.get(victim) == -when:
                    del resident[victim]
        if last:
            resident.pop(page, None)
        else:
            resident[page] = next_use[time]
            heapq.heappush(farthest, (-next_use[time], page))
    return fetched * STANDS_FOR / MEASURED


def gb(count: float) -> str:
    return f"{count / 1e9:.1f}"


def rows_of(trace: Trace, budgets: Sequence[int]) -> list[tuple[int, Cost, Cost, float]]:
    """Budget in bytes, LRU, ours, the least bytes in."""
    rows = []
    for budget in budgets:
        frames = budget // STANDS_FOR
        rows.append((budget, replay(trace, frames, "lru"), replay(trace, frames, "trace"), least_in(trace, frames)))
    return rows


def plot(path: Path, results: dict[Trace, list[tuple[int, Cost, Cost, float]]]) -> None:
    """Bytes from the host a step over the budget, one panel a trace."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "qlora_rs", "font.size": 8}):
        figure, panels = pyplot.subplots(1, len(results), figsize=(3 * len(results), 2.9), layout="constrained")
        for panel, (trace, rows) in zip(panels, results.items(), strict=True):
            gib = [budget / 2**30 for budget, *_ in rows]
            panel.plot(gib, [lru.bytes_in / 1e9 for _, lru, _, _ in rows], "s-", color="#999999", label="LRU")
            panel.plot(gib, [ours.bytes_in / 1e9 for _, _, ours, _ in rows], "o-", color="#1f77b4", label="pool")
            panel.plot(gib, [least / 1e9 for *_, least in rows], "k:", label="least possible")
            title = f"{trace.name}\n({gb(sum(trace.pages) * STANDS_FOR)} GB in all)"
            panel.set(title=title, xlabel="budget, GiB", ylim=(0, None))
        panels[0].set_ylabel("GB from the host a step")
        panels[0].legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budgets", type=int, nargs="+", default=(12, 18, 24, 30), metavar="GIB")
    parser.add_argument("--plot", type=Path, help="write the picture here (.svg or .png)")
    options = parser.parse_args()
    print(harness.machine(), flush=True)
    results = {trace: rows_of(trace, [gib << 30 for gib in options.budgets]) for trace in traces()}
    header = ("trace", "GB in all", "budget GiB", "LRU hits", "in GB", "out GB", "pool hits", "in GB", "out GB")
    lines = []
    for trace, rows in results.items():
        for budget, lru, ours, least in rows:
            lines.append(
                (
                    trace.name,
                    gb(sum(trace.pages) * STANDS_FOR),
                    budget >> 30,
                    *(f"{lru.hit_rate:.0%}", gb(lru.bytes_in), gb(lru.bytes_out)),
                    *(f"{ours.hit_rate:.0%}", gb(ours.bytes_in), gb(ours.bytes_out)),
                    gb(least),
                    f"{ours.bytes_in / least:.2f}" if least else "-",
                )
            )
    print(f"\nBytes a step; pages of {STANDS_FOR >> 20} MiB\n")
    print(harness.table((*header, "least in GB", "pool / least"), lines))
    if options.plot:
        plot(options.plot, results)


if __name__ == "__main__":
    main()
