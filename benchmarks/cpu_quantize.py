"""Quantize and dequantize on the CPU against bitsandbytes' CPU path and the machine's copy speed, in one run.

    python benchmarks/cpu_quantize.py                  # 4096 x 4096, one core and all cores
    python benchmarks/cpu_quantize.py --shape 14336 4096

The peer's quantize is slow, hence few repetitions; every repetition times both, one after the other.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import harness

BLOCK_SIZE = 64
WEIGHTS = 4  # taken in turn, so that none is still in the cache
MUST_REACH = {"quantize": 10.0, "dequantize": 1.2}


def measure(rows: int, columns: int, repetitions: int) -> None:
    import bitsandbytes.functional as peer
    import torch

    import qlora_rs

    torch.manual_seed(0)
    speed = harness.copy_speed()
    elements = rows * columns
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        weights = [torch.randn(rows, columns).to(dtype) for _ in range(WEIGHTS)]
        for double_quant in (False, True):
            spec = qlora_rs.QuantSpec("nf4", block_size=BLOCK_SIZE, double_quant=double_quant)
            turn = Turn(WEIGHTS)

            def quantize_ours(spec=spec, weights=weights, turn=turn):  # type: ignore[no-untyped-def]
                return qlora_rs.quantize(weights[turn.next()], spec)

            def quantize_peer(weights=weights, turn=turn, nested=double_quant):  # type: ignore[no-untyped-def]
                return peer.quantize_4bit(
                    weights[turn.next()], blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=nested
                )

            packed_bytes = elements / 2 + elements / BLOCK_SIZE * (1 if double_quant else 4)
            moved = elements * dtype.itemsize + packed_bytes
            times = harness.interleaved({"ours": quantize_ours, "peer": quantize_peer}, repetitions)
            lines.append(row("quantize", str(dtype), double_quant, times, moved, speed))
            if dtype == torch.float32:
                continue

            ours = [qlora_rs.quantize(weight, spec) for weight in weights]
            theirs = [
                peer.quantize_4bit(w, blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=double_quant)
                for w in weights
            ]
            if not torch.equal(ours[0].codes.flatten(), theirs[0][0].flatten()):
                raise SystemExit("the packed bytes differ from the peer's: the timings would not compare the same work")

            def dequantize_ours(packed=ours, turn=turn):  # type: ignore[no-untyped-def]
                return qlora_rs.dequantize(packed[turn.next()], torch.bfloat16)

            def dequantize_peer(packed=theirs, turn=turn):  # type: ignore[no-untyped-def]
                codes, state = packed[turn.next()]
                return peer.dequantize_4bit(codes, state)

            times = harness.interleaved({"ours": dequantize_ours, "peer": dequantize_peer}, 4 * repetitions)
            lines.append(row("dequantize", str(dtype), double_quant, times, moved, speed))
    print(f"\n{rows} x {columns}, NF4, block {BLOCK_SIZE}, {harness.cores()} core(s), copy {speed / 1e9:.1f} GB/s\n")
    header = (
        "",
        "float type",
        "scales",
        "ours ms",
        "peer ms",
        "ratio",
        "must reach",
        "GB/s",
        "share of copy",
    )
    print(harness.table(header, lines))


class Turn:
    """Which weight is next."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.now = 0

    def next(self) -> int:
        self.now = (self.now + 1) % self.count
        return self.now


def row(
    name: str, dtype: str, double_quant: bool, times: dict[str, float], moved: float, speed: float
) -> tuple[str, ...]:
    ratio = times["peer"] / times["ours"]
    return (
        name,
        dtype.removeprefix("torch."),
        "8-bit" if double_quant else "float32",
        f"{times['ours'] * 1e3:.2f}",
        f"{times['peer'] * 1e3:.2f}",
        f"{ratio:.1f}",
        f">= {MUST_REACH[name]:g}{'' if ratio >= MUST_REACH[name] else ' MISSED'}",
        f"{moved / times['ours'] / 1e9:.1f}",
        f"{moved / times['ours'] / speed:.0%}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--cores", type=int, help="measure on so many cores, in this process")
    options = parser.parse_args()
    if options.cores:
        harness.limit_to_cores(options.cores)
        measure(*options.shape, options.repetitions)
        return
    print(harness.machine(("torch", "bitsandbytes")), flush=True)
    for count in sorted({1, harness.cores()}):
        # A process for each count: OpenMP and rayon read how many cores there are once.
        command = [sys.executable, __file__, "--cores", str(count), "--repetitions", str(options.repetitions)]
        subprocess.run([*command, "--shape", *map(str, options.shape)], check=True)


if __name__ == "__main__":
    main()
