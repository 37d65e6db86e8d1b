"""A checkpointed training step of decoder layers of Llama-8B's shape, with and without kept dequantized weights.

    python benchmarks/device_checkpointing.py                              # 4 layers, 2 x 2048 and 1 x 1024 tokens
    python benchmarks/device_checkpointing.py --layers 8 --tokens 4x4096
    python benchmarks/device_checkpointing.py --tiny                       # the same code on the CPU, in seconds

Forward and backward pass of the layers alone: random NF4 codes with double quantization, LoRA of rank 16 on all Linear
layers, bfloat16. Both ways take turns, step by step, and must give the same bits. "step" is one as it comes, "device"
a replayed graph of one, "host" what queueing one takes: the slower of the two makes the step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import noop_context_fn

import device_harness
import harness
import qlora_rs
from qlora_rs.paging.weights import packed_blocks
from qlora_rs.report import format_bytes
from qlora_rs.train.reproducible import reproducible
from random_llama import build, checkpoint_layers, draw_weights

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WAYS: dict[str, Callable[[], Any]] = {"dequantized again": noop_context_fn, "kept": qlora_rs.keep_dequantized}


class Step:
    """Forward and backward pass of a model's layers over fixed embeddings."""

    def __init__(self, model: Any, batch: int, length: int, device: torch.device) -> None:
        self.model, self.device = model, device
        generator = torch.Generator(device).manual_seed(3)
        shape = (batch, length, model.config.hidden_size)
        self.x = torch.randn(shape, generator=generator, device=device).bfloat16().requires_grad_(True)
        self.parameters = qlora_rs.lora_parameters(model)
        with torch.no_grad():
            self.positions = model.model.rotary_emb(self.x, torch.arange(length, device=device)[None])

    def __call__(self, context_fn: Callable[[], Any], **options: Any) -> list[Tensor]:
        """Loss and gradients."""
        checkpoint_layers(self.model, context_fn=context_fn, **options)
        hidden = self.x
        for layer in self.model.model.layers:  # the model around them asks the device what its mask is, and waits
            hidden = layer(hidden, attention_mask=None, position_embeddings=self.positions)
        loss = hidden.float().square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, [self.x, *self.parameters])]

    def eager(self, context_fn: Callable[[], Any]) -> tuple[float, float]:
        """Milliseconds of a step as it comes, and of the host to queue it."""
        start = time.perf_counter()
        self(context_fn)
        host = (time.perf_counter() - start) * 1e3
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3, host

    def replayed(self, context_fn: Callable[[], Any]) -> Callable[[], float]:
        """What gives the milliseconds of the device alone."""
        if self.device.type != "cuda":
            return lambda: self.eager(context_fn)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self(context_fn, preserve_rng_state=False)

        def replay() -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end)

        return replay

    def peak(self, context_fn: Callable[[], Any]) -> int:
        """Bytes of the device that a step takes beside what is there before."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self(context_fn)
        return torch.cuda.max_memory_allocated() - before


def rows_of(step: Step, tokens: str, layers: int, repetitions: int) -> list[list[object]]:
    results = {name: step(context_fn) for name, context_fn in WAYS.items()}
    first, *others = results.values()
    if not all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)):
        sys.exit("the bits differ")
    del results, first, others
    peaks = {name: step.peak(context_fn) for name, context_fn in WAYS.items()}
    replays = {name: step.replayed(context_fn) for name, context_fn in WAYS.items()}
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in WAYS}
    for _ in range(repetitions):
        for name, context_fn in WAYS.items():
            whole, host = step.eager(context_fn)
            times[name].append((whole, replays[name](), host))
    medians = {name: [statistics.median(column) for column in zip(*own, strict=True)] for name, own in times.items()}
    before = next(iter(medians.values()))
    return [
        [
            tokens,
            name,
            *(f"{value:.2f} ({value / old - 1:+.1%})" for value, old in zip(own, before, strict=True)),
            f"{own[1] / layers:.2f}",
            format_bytes(peaks[name]),
        ]
        for name, own in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", nargs="+", default=None, help="samples x length: 2x2048 1x1024; --tiny 1x64")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="a small shape on the CPU: shows that it works, no times")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("needs a CUDA device; --tiny runs on the CPU")
    device = torch.device("cpu") if options.tiny else torch.device("cuda", 0)
    sizes = [
        tuple(map(int, tokens.split("x")))
        for tokens in options.tokens or (["1x64"] if options.tiny else ["2x2048", "1x1024"])
    ]
    model = build(options.layers, TINY if options.tiny else SHAPE, max(length for _, length in sizes), device)
    load = draw_weights(device)
    for layers in packed_blocks(model).values():
        load(layers)
    model.to(device)
    print(f"{options.layers} layers of hidden size {model.config.hidden_size}")
    print(harness.machine() if options.tiny else device_harness.machine(), flush=True)
    header = ["tokens", "weights", "step ms", "device ms", "host ms", "device ms a layer", "peak of a step"]
    with reproducible(device):
        for batch, length in sizes:
            step = Step(model, batch, length, device)
            rows = rows_of(step, f"{batch} x {length}", options.layers, options.repetitions)
            print(harness.table(header, rows), flush=True)


if __name__ == "__main__":
    main()
