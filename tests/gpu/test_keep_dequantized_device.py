"""`keep_dequantized` where it is made for: memory, streams, captures; tests/layers has what the CPU shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

import qlora_rs
from qlora_rs import Linear4bit, LoraLinear, _core, keep_dequantized

TOKENS = 300


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = LoraLinear(Linear4bit.from_float(nn.Linear(width, inner, bias=False)), r=4)
        self.down = LoraLinear(Linear4bit.from_float(nn.Linear(inner, width, bias=False)), r=4)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.lora_B, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def stack(blocks: int, width: int = 192, inner: int = 320) -> nn.ModuleList:
    with torch.device("cuda"):
        return nn.ModuleList(Block(width, inner) for _ in range(blocks))


def run(model: nn.ModuleList, x: Tensor, context_fn: Any, **options: Any) -> Tensor:
    for block in model:
        x = checkpoint(block, x, use_reentrant=False, context_fn=context_fn, **options)
    return x


def gradients(model: nn.ModuleList, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.float().square().mean(), [x, *qlora_rs.lora_parameters(model)]))


def input_of(width: int = 192, tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)


@pytest.mark.parametrize(("context_fn", "expected"), [(noop_context_fn, 5), (keep_dequantized, 4)])
def test_the_last_product_of_a_block_is_not_made_again(monkeypatch, context_fn, expected) -> None:
    made: list[int] = []
    dequantize = _core.DeviceWeight.dequantize
    monkeypatch.setattr(_core.DeviceWeight, "dequantize", lambda self, dtype: made.append(1) or dequantize(self, dtype))
    model, x = stack(3), input_of()
    gradients(model, x, run(model, x, context_fn))
    assert len(made) == expected * len(model)


def test_the_peak_is_higher_by_no_more_than_the_weights_of_one_block() -> None:
    model, x = stack(4, 2048, 4096), input_of(2048)
    weights = 2 * 2048 * 4096 * 2
    peaks = []
    for context_fn in (noop_context_fn, keep_dequantized):
        gradients(model, x, run(model, x, context_fn))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(model, x, run(model, x, context_fn))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert torch.cuda.memory_allocated() == before
    assert peaks[1] - peaks[0] <= weights


def test_a_weight_that_is_written_to_before_the_backward_pass_is_noticed() -> None:
    model, x = stack(1), input_of()
    y = run(model, x, keep_dequantized)
    with torch.no_grad():
        model[0].up.base_layer.weight.zero_()
    with pytest.raises(RuntimeError, match="modified in place"):
        gradients(model, x, y)


def test_another_stream_gives_the_same() -> None:
    model, x = stack(3), input_of()
    want = gradients(model, x, run(model, x, noop_context_fn))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = run(model[:2], x, keep_dequantized)
    torch.cuda.current_stream().wait_stream(side)
    got = gradients(model, x, run(model[2:], y, keep_dequantized))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_captured_step_is_replayed_on_new_values() -> None:
    qlora_rs.warmup("cuda")
    model, x = stack(2), input_of()

    def step(context_fn: Any) -> list[Tensor]:
        return gradients(model, x, run(model, x, context_fn, preserve_rng_state=False))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(keep_dequantized)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(keep_dequantized)
    for _ in range(2):
        with torch.no_grad():
            x.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, step(noop_context_fn), strict=True))
