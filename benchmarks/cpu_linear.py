"""Products of 1 to 64 tokens on the CPU against bitsandbytes, dequantize + matmul, and a dense matmul, in one run.

    python benchmarks/cpu_linear.py                        # 4096 x 4096 and 14336 x 4096, one core and all cores
    python benchmarks/cpu_linear.py --shape 11008 4096 --tokens 1 16
    python benchmarks/cpu_linear.py --least --repetitions 60     # least, not median times: on a machine with other work

The peer's plain path dequantizes, then multiplies. "repacked" is its kernel for AVX512-BF16 (bfloat16 only, where the
processor has it), which needs the weight in a layout of its own, made once and without gradients.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import subprocess
import sys
from collections.abc import Callable

import harness

BLOCK_SIZE = 64
SHAPES = ((4096, 4096), (14336, 4096))
TOKENS = (1, 4, 8, 16, 32, 64)
MUST_REACH = {1: 3.0, 4: 1.3, 32: 1.3}
# Packed weights, each with scales of its own, taken in turn, so that none is still in the cache.
PAST_CACHES = 160 << 20


def measure(rows: int, columns: int, tokens: list[int], repetitions: int, least: bool) -> None:
    import bitsandbytes.functional as peer
    import torch

    import qlora_rs

    torch.manual_seed(0)
    summary = min if least else statistics.median
    speed, elements = harness.copy_speed(summary=summary), rows * columns
    packed_bytes = elements / 2 + 4 * elements / BLOCK_SIZE
    count = max(2, math.ceil(PAST_CACHES / packed_bytes))
    spec = qlora_rs.QuantSpec("nf4", block_size=BLOCK_SIZE, double_quant=False)
    weight = torch.randn(rows, columns) * 0.02
    first = qlora_rs.Linear4bit.from_packed(qlora_rs.quantize(weight, spec))
    layers = [qlora_rs.Linear4bit.from_packed(clone(first.packed())) for _ in range(count)]
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        dense = [weight.to(dtype) for _ in range(2)]
        codes, state = peer.quantize_4bit(dense[0], blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=False)
        theirs = [(codes.clone(), copy.deepcopy(state)) for _ in range(count)]
        repacked = repack(peer, codes, state, count) if dtype == torch.bfloat16 else None
        for m in tokens:
            x = torch.randn(m, columns).to(dtype)
            work: dict[str, Callable[[], object]] = {
                "ours": in_turn(layers, lambda layer, x=x: layer(x)),
                "peer": in_turn(theirs, lambda w, x=x: torch.nn.functional.linear(x, peer.dequantize_4bit(*w))),
                "both": in_turn(layers, lambda layer, x=x: torch.nn.functional.linear(x, layer.dequantize(x.dtype))),
                "dense": in_turn(dense, lambda w, x=x: torch.nn.functional.linear(x, w)),
            }
            if repacked is not None:
                work["repacked"] = in_turn(repacked, lambda w, x=x: peer.gemv_4bit(x, w[0], state=w[1]))
            with torch.inference_mode():
                torch.testing.assert_close(work["ours"](), work["both"](), rtol=0.02, atol=0.02)  # the same work
                times = harness.interleaved(work, repetitions, summary=summary)
            lines.append(row(str(dtype), m, times, packed_bytes, speed))
    print(f"\n{rows} x {columns}, NF4, block {BLOCK_SIZE}, {harness.cores()} core(s), copy {speed / 1e9:.1f} GB/s")
    print(f"{'least' if least else 'median'} of {repetitions}\n")
    header = ("x", "M", "ours ms", "bitsandbytes ms", "ratio", "must reach", "repacked ms", "ratio (must reach 1)")
    print(
        harness.table((*header, "dequantize + matmul ms", "dense ms", "packed GB/s", "share of copy"), lines),
        flush=True,
    )


def clone(packed):  # type: ignore[no-untyped-def]
    import dataclasses

    return dataclasses.replace(packed, codes=packed.codes.clone(), absmax=packed.absmax.clone())


def repack(peer, codes, state, count: int):  # type: ignore[no-untyped-def]
    """The peer's layout for its own kernel, so many times; None where it has none for this processor."""
    if not peer.has_avx512bf16():
        return None
    repacked, state = peer._convert_weight_packed_for_cpu(codes.clone(), copy.deepcopy(state))
    return [(repacked.clone(), copy.deepcopy(state)) for _ in range(count)]


def in_turn(weights, function):  # type: ignore[no-untyped-def]
    """A call that takes the next weight each time."""
    turn = iter(range(sys.maxsize))
    return lambda: function(weights[next(turn) % len(weights)])


def row(dtype: str, m: int, times: dict[str, float], packed_bytes: float, speed: float) -> tuple[str, ...]:
    ratio, must = times["peer"] / times["ours"], MUST_REACH.get(m)
    return (
        dtype.removeprefix("torch."),
        str(m),
        f"{times['ours'] * 1e3:.2f}",
        f"{times['peer'] * 1e3:.2f}",
        f"{ratio:.1f}",
        "-" if must is None else f">= {must:g}{'' if ratio >= must else ' MISSED'}",
        f"{times['repacked'] * 1e3:.2f}" if "repacked" in times else "-",
        f"{times['repacked'] / times['ours']:.2f}" if "repacked" in times else "-",
        f"{times['both'] * 1e3:.2f}",
        f"{times['dense'] * 1e3:.2f}",
        f"{packed_bytes / times['ours'] / 1e9:.1f}",
        f"{packed_bytes / times['ours'] / speed:.0%}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--least", action="store_true", help="print least times, not medians")
    parser.add_argument("--cores", type=int, help="measure on so many cores, in this process")
    options = parser.parse_args()
    shapes = options.shape or SHAPES
    if options.cores:
        harness.limit_to_cores(options.cores)
        for rows, columns in shapes:
            measure(rows, columns, list(options.tokens), options.repetitions, options.least)
        return
    print(harness.machine(("torch", "bitsandbytes")), flush=True)
    for count in sorted({1, harness.cores()}):
        # A process for each count: OpenMP and rayon read how many cores there are once.
        command = [sys.executable, __file__, "--cores", str(count), "--repetitions", str(options.repetitions)]
        command += ["--tokens", *map(str, options.tokens)]
        command += ["--least"] * options.least
        for shape in shapes:
            command += ["--shape", *map(str, shape)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
