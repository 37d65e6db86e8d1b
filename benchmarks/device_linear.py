"""x W^T with a packed W on a CUDA device against bitsandbytes and bf16 cuBLAS, in one run.

    python benchmarks/device_linear.py              # 1 to 256 tokens
    python benchmarks/device_linear.py --backward   # the gradient of x of 1 to 256 tokens
    python benchmarks/device_linear.py --training   # 1,024 to 16,384 tokens, forward and the gradient of x

Graph replay shows the kernels alone. Eager times, ours and the peer's, hide the host's work; 5 us of launch and events
are in each. NF4 in blocks of 64, doubly quantized unless --plain.
"""

from __future__ import annotations

import argparse
from functools import partial
from types import ModuleType

import torch

import device_harness as device
import harness
import qlora_rs
from qlora_rs import direct, ops

SHAPES = [(1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (128256, 4096)]
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TRAINING_SHAPES = [(14336, 4096), (4096, 14336), (28672, 4096)]
TRAINING_TOKENS = (1024, 2048, 4096, 8192, 16384)
GRAPHS, EAGER = ("ours", "cublas", "dequantized"), ("ours", "peer")
LARGE = 50_000_000  # weights, from which on the higher ratios must be reached
MUST_RATIO = {1: 2.3, 4: 3.0, 8: 4.0, 16: 4.0, 32: 3.0, 64: 2.0, 128: 1.5, 256: 1.1}
MUST_RATIO_SMALL = {1: 1.5, **dict.fromkeys((4, 8, 16, 32), 2.0)}
MUST_OVER_CUBLAS = {1024: 40, 2048: 25, 4096: 12, 8192: 6, 16384: 4}


def peer_module() -> ModuleType | None:
    try:
        import bitsandbytes
    except ImportError:
        return None
    return bitsandbytes


class Sets:
    """Layers of one shape, taken in turn: ours, the peer's, the float weights. Each method multiplies in one way."""

    def __init__(self, rows: int, columns: int, spec: qlora_rs.QuantSpec, sets: int) -> None:
        self.sets = sets
        self.peer = peer_module()
        self.floats = [torch.randn(rows, columns, device="cuda").bfloat16() for _ in range(sets)]
        self.packed = [qlora_rs.quantize(weight, spec) for weight in self.floats]
        self.layers = [qlora_rs.Linear4bit.from_packed(packed) for packed in self.packed]
        self.theirs = [self._peer_packed(weight, spec) for weight in self.floats] if self.peer else []

    def _peer_packed(self, weight: torch.Tensor, spec: qlora_rs.QuantSpec) -> tuple:
        return self.peer.functional.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=spec.double_quant
        )

    def ours(self, x: torch.Tensor, index: int) -> torch.Tensor:
        return self.layers[index](x)

    def cublas(self, x: torch.Tensor, index: int) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.floats[index])

    def dequantized(self, x: torch.Tensor, index: int) -> torch.Tensor:
        return torch.nn.functional.linear(x, qlora_rs.dequantize(self.packed[index], torch.bfloat16))

    def peers(self, x: torch.Tensor, index: int) -> torch.Tensor:
        codes, state = self.theirs[index]
        return self.peer.matmul_4bit(x, codes.t(), quant_state=state)

    def ours_backward(self, grad: torch.Tensor, index: int) -> torch.Tensor:
        return ops.device_linear_backward(grad, direct.device_weight(self.packed[index]))

    def dequantized_backward(self, grad: torch.Tensor, index: int) -> torch.Tensor:
        return grad @ qlora_rs.dequantize(self.packed[index], torch.bfloat16)

    def cublas_backward(self, grad: torch.Tensor, index: int) -> torch.Tensor:
        return grad @ self.floats[index]

    def peers_backward(self, grad: torch.Tensor, index: int) -> torch.Tensor:
        return grad @ self.peer.functional.dequantize_4bit(*self.theirs[index])


def few_tokens(spec: qlora_rs.QuantSpec, speed: float, repetitions: int, backward: bool) -> str:
    lines = []
    for rows, columns in SHAPES:
        elements = rows * columns
        packed_bytes = elements / 2 + elements / 64 * (1 if spec.double_quant else 4)
        layers = Sets(rows, columns, spec, min(64, device.rotations(int(packed_bytes))))
        floor = packed_bytes / speed * 1e6
        if backward:
            ways = {"ours": layers.ours_backward, "cublas": layers.cublas_backward, "peer": layers.peers_backward}
            ways["dequantized"] = layers.dequantized_backward
        else:
            ways = {"ours": layers.ours, "cublas": layers.cublas, "peer": layers.peers}
            ways["dequantized"] = layers.dequantized
        for tokens in TOKENS:
            x = torch.randn(tokens, rows if backward else columns, device="cuda", dtype=torch.bfloat16)
            work = {name: partial(way, x) for name, way in ways.items()}
            graph = device.graph_us({name: work[name] for name in GRAPHS}, layers.sets, repetitions)
            eager = [name for name in EAGER if name != "peer" or layers.peer is not None]
            times = device.eager_us({name: work[name] for name in eager}, layers.sets, 2 * repetitions)
            must = (MUST_RATIO if elements >= LARGE else MUST_RATIO_SMALL).get(tokens)
            by_graph = f"{times['peer'] / graph['ours']:.2f}x" if "peer" in times else "-"
            bar = (by_graph, f"{must:.1f}x" if must else "-") if not backward else ()
            lines.append((
                f"{rows} x {columns}", tokens, f"{graph['ours']:.1f}", f"{floor / graph['ours']:.0%}",
                f"{times['ours']:.1f}", *against_peer(times, 1), *bar, f"{graph['cublas']:.1f}",
                f"{graph['dequantized']:.1f}",
            ))  # fmt: skip
        del layers, ways, work
        device.free()
    bar = ("ours by graph", "must") if not backward else ()
    header = (
        "N x K", "M", "graph us", "of copy", "eager us", "peer us", "ratio", *bar, "cuBLAS us", "deq + cuBLAS us",
    )  # fmt: skip
    return harness.table(header, lines)


def against_peer(times: dict[str, float], digits: int) -> tuple[str, str]:
    if "peer" not in times:
        return "-", "-"
    return f"{times['peer']:.{digits}f}", f"{times['peer'] / times['ours']:.2f}x"


def training(spec: qlora_rs.QuantSpec, repetitions: int) -> str:
    lines = []
    for rows, columns in TRAINING_SHAPES:
        layers = Sets(rows, columns, spec, 2)
        forward = {"ours": layers.ours, "cublas": layers.cublas, "peer": layers.peers}
        backward = {"ours": layers.ours_backward, "cublas": layers.cublas_backward, "peer": layers.peers_backward}
        for tokens in TRAINING_TOKENS:
            for name, ways, width in (("forward", forward, columns), ("dX", backward, rows)):
                x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
                work = {way: partial(call, x) for way, call in ways.items() if way != "peer" or layers.peer is not None}
                times = device.eager_us(work, layers.sets, repetitions)
                lines.append((
                    f"{rows} x {columns}", tokens, name, f"{times['ours']:.0f}", f"{times['cublas']:.0f}",
                    f"{times['ours'] / times['cublas'] - 1:+.0%}", f"<= {MUST_OVER_CUBLAS[tokens]}%",
                    *against_peer(times, 0),
                ))  # fmt: skip
        del layers, forward, backward, ways, work
        device.free()
    header = ("N x K", "M", "what", "ours us", "cuBLAS us", "over", "must", "peer us", "ratio")
    return harness.table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=50, help="of each graph; twice as many eager calls")
    parser.add_argument("--plain", action="store_true", help="scales in float32")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--training", action="store_true", help="training sizes")
    what.add_argument("--backward", action="store_true", help="the gradient of x of few tokens")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    qlora_rs.warmup("cuda")
    spec = qlora_rs.QuantSpec("nf4", 64, not arguments.plain)
    speed = device.copy_speed()
    print(f"{device.machine()}\ncopy {speed / 1e12:.2f} TB/s; weights rotated past {device.L2_ROUNDS}x the L2 cache")
    if arguments.training:
        print(training(spec, arguments.repetitions))
    else:
        print(few_tokens(spec, speed, arguments.repetitions, arguments.backward))


if __name__ == "__main__":
    main()
