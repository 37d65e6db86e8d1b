"""Optimizer steps on the CPU, beside torch: 448 LoRA tensors of a small model, and the host's share of a step.

python benchmarks/cpu_optimizer.py
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import harness
from qlora_rs import optim

TENSORS = 448
# Bytes moved for a float32 parameter; 8-bit state: two codes, read and written, and their scales.
BYTES = {"AdamW": 28, "AdamW8bit": 16 + 4 * 4 / 256, "torch AdamW": 28}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, nargs="+", default=[16, 40_000], help="elements of a tensor")
    sizes = parser.parse_args().elements
    print(harness.machine())
    speed = harness.copy_speed()
    rows = []
    for size in sizes:
        params = [nn.Parameter(torch.randn(size)) for _ in range(TENSORS)]
        for param in params:
            param.grad = torch.randn_like(param) * 1e-3
        optimizers = {
            "AdamW": optim.AdamW(params),
            "AdamW8bit": optim.AdamW8bit(params),
            "torch AdamW": torch.optim.AdamW(params),
        }
        times = harness.interleaved({name: one.step for name, one in optimizers.items()}, 15)
        for name, seconds in times.items():
            share = size * TENSORS * BYTES[name] / seconds / speed
            ratio = times["torch AdamW"] / seconds
            rows.append((f"{size}", name, f"{seconds * 1e3:.2f}", f"{share:.0%}", f"{ratio:.1f}x"))
    print(harness.table(("elements of each", "optimizer", "step ms", "of copy speed", "against torch"), rows))


if __name__ == "__main__":
    main()
