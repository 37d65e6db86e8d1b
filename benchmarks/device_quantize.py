"""Quantize and dequantize on a CUDA device against bitsandbytes and the card's copy speed, in one run.

    python benchmarks/device_quantize.py

Graph replay shows the kernels alone; the peer, whose calls wait for the device, is timed eagerly beside ours.
"""

from __future__ import annotations

import argparse

import torch

import device_harness as device
import harness
import qlora_rs

BLOCK_SIZE = 64
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)]
LARGE = 50_000_000  # weights, from which on the higher share must be reached
MUST_REACH = {"dequantize": (0.70, 0.83), "quantize": (0.55, 0.70)}


def measure(rows: int, columns: int, speed: float, repetitions: int) -> list[tuple[object, ...]]:
    try:
        import bitsandbytes.functional as peer
    except ImportError:
        peer = None

    elements = rows * columns
    sets = device.rotations(elements * 5 // 2)
    weights = [torch.randn(rows, columns, device="cuda").bfloat16() for _ in range(sets)]
    lines = []
    for nested in (False, True):
        spec = qlora_rs.QuantSpec("nf4", BLOCK_SIZE, nested)
        moved = elements * 2.5 + elements / BLOCK_SIZE * (1 if nested else 4)
        ours = [qlora_rs.quantize(weight, spec) for weight in weights]
        work = {
            "dequantize": lambda i, ours=ours: qlora_rs.dequantize(ours[i]),
            "quantize": lambda i, spec=spec: qlora_rs.quantize(weights[i], spec, nonfinite="propagate"),
        }
        theirs = {}
        if peer is not None:
            packed = [
                peer.quantize_4bit(w, blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=nested)
                for w in weights
            ]
            same = torch.equal(qlora_rs.dequantize(adopted(packed[0], spec)), peer.dequantize_4bit(*packed[0]))
            if not same:
                raise SystemExit("dequantized values differ from the peer's on the same packed bytes")
            theirs = {
                "dequantize": lambda i, packed=packed: peer.dequantize_4bit(*packed[i]),
                "quantize": lambda i, nested=nested: peer.quantize_4bit(
                    weights[i], blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=nested
                ),
            }
        for name, call in work.items():
            graph = device.graph_us({"ours": call}, sets, repetitions)["ours"]
            eager = device.eager_us({"ours": call, **({"peer": theirs[name]} if theirs else {})}, sets, repetitions)
            share = moved / (graph * 1e-6) / speed
            must = MUST_REACH[name][elements >= LARGE]
            ratio = f"{eager['peer'] / eager['ours']:.1f}x" if "peer" in eager else "-"
            peer_us = f"{eager['peer']:.1f}" if "peer" in eager else "-"
            lines.append((
                f"{rows} x {columns}", name + (" nested" if nested else ""), f"{graph:.1f}", f"{eager['ours']:.1f}",
                peer_us, ratio, f"{moved / graph / 1e6:.2f}", f"{share:.0%}", f"{must:.0%}",
            ))  # fmt: skip
    return lines


def adopted(packed: tuple, spec: qlora_rs.QuantSpec) -> qlora_rs.PackedTensor:
    """The peer's packed weight as ours: the bytes are the same, the shapes are not."""
    codes, state = packed
    rows, columns = state.shape
    blocks = (rows, columns // BLOCK_SIZE)
    nested = spec.double_quant
    return qlora_rs.PackedTensor(
        codes=codes.view(rows, columns // 2),
        absmax=state.absmax.view(blocks),
        absmax_scale=state.state2.absmax if nested else None,
        absmax_offset=state.offset.view(1) if nested else None,
        spec=spec,
        shape=(rows, columns),
        dtype=torch.bfloat16,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=100, help="of each measurement (default 100)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    qlora_rs.warmup("cuda")
    speed = device.copy_speed()
    print(f"{device.machine()}\ncopy {speed / 1e12:.2f} TB/s; weights rotated past {device.L2_ROUNDS}x the L2 cache")
    lines = []
    for rows, columns in SHAPES:
        lines += measure(rows, columns, speed, arguments.repetitions)
        device.free()
    header = (
        "NF4, bf16", "what", "graph us", "eager us", "peer eager us", "ratio", "TB/s", "of copy", "must reach",
    )  # fmt: skip
    print(harness.table(header, lines))


if __name__ == "__main__":
    main()
