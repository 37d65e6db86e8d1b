"""Training a model of Llama-70B's shape inside 24 GiB of device memory, beside the same run with all weights resident.

    python benchmarks/paged_70b.py                               # 80 layers, 1 x 8192 tokens, a CUDA device
    python benchmarks/paged_70b.py --batch 4 --length 2048
    python benchmarks/paged_70b.py --layers 8 --budget 6GiB      # a small trial
    python benchmarks/paged_70b.py --tiny                        # the same code on the CPU, in seconds
    python benchmarks/paged_70b.py --spans step.json             # record one more step of the paged run
    python benchmarks/paged_70b.py --draw step.json --plot docs/paging-timeline.svg

Weights are random NF4 codes with double quantization, drawn on the device layer by layer; LoRA of rank 16 on all Linear
layers, gradient checkpointing, 8-bit AdamW, the loss in chunks, deterministic algorithms. The paged run comes first:
torch's allocator is held to what the budget leaves beside the pool and the CUDA context, and what the device says is
used is printed. Both runs start from the same adapters and see the same tokens: their losses must be the same bits.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

import harness
import qlora_rs
from qlora_rs.chunked_loss import causal_lm_loss
from qlora_rs.errors import UnsupportedError
from qlora_rs.paging import Fitted, fit
from qlora_rs.report import format_bytes, parse_bytes
from qlora_rs.train.reproducible import reproducible
from random_llama import build, draw_weights

SHAPE = {
    "vocab_size": 128_256,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
TINY = {
    "vocab_size": 509,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def optimizer_of(name: str, parameters: list[nn.Parameter], fitted: Fitted | None) -> Any:
    if name == "paged_adamw8bit" and fitted is not None and fitted.pool is not None:
        return qlora_rs.optim.PagedAdamW8bit(parameters, lr=1e-4, pool=fitted.pool)
    if name == "torch":
        return torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    return qlora_rs.optim.AdamW8bit(parameters, lr=1e-4)


def known_optimizer(name: str, device: torch.device) -> str:
    """The one that is asked for, or torch's where it has no update on this device."""
    probe = nn.Parameter(torch.ones(4096, device=device))
    probe.grad = torch.ones_like(probe)
    try:
        optimizer_of(name, [probe], None).step()
    except UnsupportedError as error:
        print(f"torch.optim.AdamW in place of {name}: {error}")
        return "torch"
    return name


class Run:
    """Steps over fixed tokens."""

    def __init__(self, model: Any, fitted: Fitted | None, options: argparse.Namespace, device: torch.device) -> None:
        self.model, self.fitted, self.device = model, fitted, device
        self.parameters = qlora_rs.lora_parameters(model)
        self.options = options
        self.optimizer = optimizer_of(options.optimizer, self.parameters, fitted)
        self.optimizer_name = type(self.optimizer).__name__
        self.losses: list[torch.Tensor] = []
        self.seconds: list[float] = []
        self.moved: list[tuple[int, int, float]] = []
        self.exceeded = False

    def step(self, number: int) -> None:
        options, pool = self.options, None if self.fitted is None else self.fitted.pool
        generator = torch.Generator().manual_seed(number)
        vocabulary = self.model.config.vocab_size
        ids = torch.randint(vocabulary, (options.batch, options.length), generator=generator).to(self.device)
        before = None if pool is None else pool.stats()
        synchronize(self.device)
        start = time.perf_counter()
        with nullcontext() if self.fitted is None else self.fitted.step():
            loss = causal_lm_loss(self.model, ids, ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.detach().cpu())
        if pool is not None and before is not None:
            after = pool.stats()
            stall = after.stall_seconds - before.stall_seconds
            self.moved.append((after.bytes_in - before.bytes_in, after.bytes_out - before.bytes_out, stall))
        print(f"  step {number}: loss {self.losses[-1].item():.6f}, {self.seconds[-1]:.2f} s", flush=True)

    def tokens_per_second(self) -> float:
        """Of the steps behind the first, in which the pool has learned their order."""
        tokens: int = self.options.batch * self.options.length
        return tokens / statistics.median(self.seconds[1:] or self.seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def used(device: torch.device) -> int:
    """Bytes that the device has given away."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def paged_run(model: Any, options: argparse.Namespace, device: torch.device) -> tuple[Run, Fitted]:
    budget, cuda = parse_bytes(options.budget), device.type == "cuda"
    synchronize(device)
    base = used(device) - torch.cuda.memory_reserved(device) if cuda else 0
    start = time.perf_counter()
    fitted = fit(
        model,
        budget,
        device,
        tokens=options.batch * options.length,
        optimizer="adamw" if options.optimizer == "torch" else options.optimizer,
        load=draw_weights(device),
        progress=Progress("drawn and paged"),
    )
    print(f"paged in {time.perf_counter() - start:.0f} s\n{fitted}", flush=True)
    pool = fitted.pool
    if pool is None:
        sys.exit("everything fits: take a smaller --budget")
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        context = next(part.nbytes for part in fitted.plan.parts if part.name == "CUDA context")
        torch.cuda.set_per_process_memory_fraction((budget - pool.budget - max(base, context)) / total, device)
        torch.cuda.reset_peak_memory_stats(device)
    run = Run(model, fitted, options, device)
    for number in range(options.steps):
        run.step(number)
    stats = pool.stats()
    print(stats)
    if cuda:
        reserved, allocated = torch.cuda.max_memory_reserved(device), torch.cuda.max_memory_allocated(device)
        rows = [
            ["torch, allocated at most", format_bytes(allocated)],
            ["torch, reserved at most", format_bytes(reserved)],
            ["the pool's frames", format_bytes(stats.committed_bytes)],
            [
                "CUDA context, libraries",
                format_bytes(used(device) - torch.cuda.memory_reserved(device) - stats.committed_bytes),
            ],
            ["the device says", format_bytes(used(device))],
            ["budget", format_bytes(budget)],
        ]
        print("Device memory of the paged run")
        print(harness.table(["part", "bytes"], rows), flush=True)
        run.exceeded = used(device) > budget
    if options.spans is not None:  # an own step: events that are timed cost time
        with pool.record_timeline() as spans:
            run.step(options.steps)
        rows = [[span.lane, span.buffer, round(span.begin, 5), round(span.end, 5)] for span in spans]
        options.spans.write_text(json.dumps(rows))
        for of_steps in (run.losses, run.seconds, run.moved):
            of_steps.pop()
    if cuda:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    return run, fitted


class Progress:
    """A line now and then."""

    def __init__(self, what: str) -> None:
        self.what, self.next = what, 0.25

    def __call__(self, done: int, total: int) -> None:
        if done >= self.next * total:
            print(f"  {format_bytes(done)} of {format_bytes(total)} {self.what}", flush=True)
            self.next += 0.25


def compare(options: argparse.Namespace) -> None:
    cuda = not options.tiny
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    shape = SHAPE if cuda else TINY
    print(f"{options.layers} layers, {options.batch} x {options.length} tokens, budget {options.budget}")
    options.optimizer = known_optimizer(options.optimizer, device)
    start = time.perf_counter()
    model = build(options.layers, shape, options.length, device)
    initial = [parameter.detach().cpu().clone() for parameter in qlora_rs.lora_parameters(model)]
    print(f"built in {time.perf_counter() - start:.0f} s", flush=True)
    with reproducible(device):
        torch.use_deterministic_algorithms(True)  # with a warning alone cuDNN's attention is not
        paged, fitted = paged_run(model, options, device)
        runs = {"paged": paged}
        if not options.no_resident:
            start = time.perf_counter()
            weights, pool = fitted.weights, fitted.pool
            assert weights is not None
            assert pool is not None
            paged.optimizer = None
            weights.unpage(device)
            pool.give_back(pool.budget)
            for parameter, value in zip(paged.parameters, initial, strict=True):
                parameter.data.copy_(value)
                parameter.grad = None
            print(f"all weights on the device in {time.perf_counter() - start:.0f} s", flush=True)
            resident = Run(model, None, options, device)
            for number in range(options.steps):
                resident.step(number)
            runs["resident"] = resident
    report(runs, options, device)


def report(runs: Mapping[str, Run], options: argparse.Namespace, device: torch.device) -> None:
    best = runs.get("resident", runs["paged"]).tokens_per_second()
    rows = []
    for name, run in runs.items():
        moved = run.moved[1:] or run.moved or [(0, 0, 0.0)]
        bytes_in, bytes_out, stall = (statistics.median(column) for column in zip(*moved, strict=True))
        speed = run.tokens_per_second()
        rows.append(
            [
                name,
                f"{statistics.median(run.seconds[1:] or run.seconds):.2f}",
                f"{speed:,.0f}",
                f"{speed / best:.0%}",
                f"{bytes_in / 1e9:.1f}",
                f"{bytes_out / 1e9:.1f}",
                f"{stall:.3f}",
                run.losses[0].item().hex(),
            ]
        )
    header = ["run", "step s", "tokens/s", "of resident", "GB in", "GB out", "stalled s", "first loss"]
    print(f"{options.layers} layers, {options.batch} x {options.length} tokens, {options.budget}")
    print(harness.table(header, rows))
    print(runs["paged"].optimizer_name)
    if "resident" in runs:
        equal = [torch.equal(a, b) for a, b in zip(runs["paged"].losses, runs["resident"].losses, strict=True)]
        print(f"losses of the same bits: {sum(equal)} of {len(equal)} steps")
        if device.type == "cuda":
            import device_harness

            print(device_harness.machine())
        if not all(equal):
            sys.exit("the losses differ")
    if runs["paged"].exceeded:
        sys.exit("the budget was exceeded")


def draw(spans: Path, plot: Path) -> None:
    """The timeline of a recorded step."""
    from matplotlib.figure import Figure

    rows = json.loads(spans.read_text())
    colors = {"weights": "#0072B2", "saved activations": "#E69F00", "optimizer state": "#009E73", "waiting": "#D55E00"}
    lanes = {"compute": 3, "wait": 3, "in": 2, "out": 1}
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    for kind, bars in sorted(_bars(rows).items()):
        name, lane = kind
        shades = (colors[name], "#56B4E9") if name == "weights" else (colors[name],)  # layer by layer
        axes.broken_barh(bars, (lanes[lane] - 0.36, 0.72), facecolors=shades, linewidth=0)
    for name, color in colors.items():
        if any(kind[0] == name for kind in _bars(rows)):
            axes.bar(0, 0, color=color, label=name)
    axes.set_yticks([3, 2, 1], ["compute", "in", "out"])
    axes.set_xlabel("seconds of the step")
    axes.set_xlim(0, max(row[3] for row in rows))
    axes.set_ylim(0.5, 3.5)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=4, frameon=False, fontsize=8.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(plot, metadata={"Date": None})
    print(f"{plot}: {len(rows)} spans")


def _bars(rows: list[list[Any]]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Spans by what they are and their lane; those of one buffer in a row are one."""
    bars: dict[tuple[str, str], list[tuple[float, float]]] = {}
    last: dict[str, tuple[str, float]] = {}
    for lane, buffer, begin, end in sorted(rows, key=lambda row: row[2]):
        kind = "waiting" if lane == "wait" else _kind(buffer)
        found = bars.setdefault((kind, lane), [])
        known, until = last.get(lane, ("", 0.0))
        if found and known == buffer and begin - until < 0.05:
            found[-1] = (found[-1][0], max(end, until) - found[-1][0])
        else:
            found.append((begin, end - begin))
        last[lane] = (buffer, end)
    return bars


def _kind(buffer: str) -> str:
    if buffer.startswith("saved activation"):
        return "saved activations"
    return "weights" if "layers" in buffer or "head" in buffer else "optimizer state"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=None, help="80; with --tiny 6")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=None, help="tokens of a sample: 8192; with --tiny 64")
    parser.add_argument("--budget", default=None, help="24GiB; with --tiny what makes half of the layers wait")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--optimizer", choices=["adamw8bit", "paged_adamw8bit", "torch"], default="adamw8bit")
    parser.add_argument("--no-resident", action="store_true", help="only the paged run")
    parser.add_argument("--tiny", action="store_true", help="a small shape on the CPU: shows that it works, no times")
    parser.add_argument("--spans", type=Path, help="record a step there (JSON)")
    parser.add_argument("--draw", type=Path, help="draw a recorded step and end")
    parser.add_argument("--plot", type=Path, default=Path("docs/paging-timeline.svg"))
    options = parser.parse_args()
    if options.draw is not None:
        draw(options.draw, options.plot)
        return
    options.layers = options.layers or (6 if options.tiny else 80)
    options.length = options.length or (64 if options.tiny else 8192)
    options.budget = options.budget or ("2.4MB" if options.tiny else "24GiB")
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("needs a CUDA device; --tiny runs on the CPU")
    compare(options)


if __name__ == "__main__":
    main()
