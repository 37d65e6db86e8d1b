"""Products on the device beside other work: other streams, other threads, graphs."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import qlora_rs
from qlora_rs import Linear4bit, LoraLinear, PackedTensor

BF16 = torch.bfloat16
# A fused kernel each, and dequantizing.
TOKENS = [1, 8, 16, 32, 64, 256, 300]


def packed(rows: int, columns: int) -> PackedTensor:
    return qlora_rs.quantize(torch.randn(rows, columns, device="cuda", dtype=BF16))


def write(layer: Linear4bit, new: PackedTensor, *, counted: bool) -> None:
    """Into the layer's parameters, in place; torch counts no writes through ``.data``."""
    with torch.no_grad():
        for part, value in zip(
            layer.parts(), (new.codes, new.absmax, new.absmax_scale, new.absmax_offset), strict=True
        ):
            assert part is not None
            assert value is not None
            (part if counted else part.data).copy_(value.view(part.dtype))


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_weight_and_an_input_that_come_late_on_other_streams_are_waited_for(tokens: int) -> None:
    layer = Linear4bit.from_packed(packed(2048, 2048))
    sources = [packed(2048, 2048) for _ in range(2)]
    given = torch.randn(tokens, 2048, device="cuda", dtype=BF16)
    wanted = [Linear4bit.from_packed(source)(given) for source in sources]
    x = torch.zeros_like(given)
    compute, weights, inputs = (torch.cuda.Stream() for _ in range(3))
    torch.cuda.synchronize()
    for step in range(8):
        with torch.cuda.stream(weights):
            torch.cuda._sleep(random.randrange(200_000, 3_000_000))
            write(layer, sources[step % 2], counted=step % 4 != 3)
        with torch.cuda.stream(inputs):
            torch.cuda._sleep(random.randrange(200_000, 2_000_000))
            x.copy_(given)
        compute.wait_stream(weights)
        compute.wait_stream(inputs)
        with torch.cuda.stream(compute), torch.no_grad():
            y, again = layer(x), layer(x)
        inputs.wait_stream(compute)
        with torch.cuda.stream(inputs):
            x.zero_()
        torch.cuda.synchronize()
        assert torch.equal(y, wanted[step % 2]), step
        assert torch.equal(again, wanted[step % 2]), step


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_product_does_not_overtake_the_kernel_that_writes_its_weight(tokens: int) -> None:
    sources = [packed(2048, 2048) for _ in range(3)]
    layer = Linear4bit.from_packed(packed(2048, 2048))
    x = torch.randn(tokens, 2048, device="cuda", dtype=BF16)
    with torch.no_grad():
        wanted = [Linear4bit.from_packed(source)(x) for source in sources]
        got = []
        for step in range(30):
            write(layer, sources[step % 3], counted=step % 2 == 0)
            got.append(layer(x))
    for step, y in enumerate(got):
        assert torch.equal(y, wanted[step % 3]), step


def test_eight_threads_with_streams_of_their_own_share_a_layer() -> None:
    layer = LoraLinear(Linear4bit.from_packed(packed(1031, 1024)), r=8)
    nn.init.normal_(layer.lora_B)
    layer.requires_grad_(False)
    inputs = [torch.randn(tokens, 1024, device="cuda", dtype=BF16) for tokens in (1, 3, 9, 20, 40, 100, 260, 8)]

    def compute(x: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            y = layer(x)
        trained = x.clone().requires_grad_(True)
        layer(trained).float().sum().backward()
        assert trained.grad is not None
        return [y, trained.grad, qlora_rs.dequantize(qlora_rs.quantize(x))]

    wanted = [compute(x) for x in inputs]
    torch.cuda.synchronize()
    faults: list[object] = []

    def work(number: int) -> None:
        try:
            stream = torch.cuda.Stream()
            for _ in range(30):
                with torch.cuda.stream(stream):
                    got = compute(inputs[number])
                stream.synchronize()
                for what, (mine, theirs) in enumerate(zip(got, wanted[number], strict=True)):
                    if not torch.equal(mine, theirs):
                        faults.append((number, what))
        except Exception as error:
            faults.append((number, error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 12, 24, 64, 300])
def test_a_captured_forward_and_backward_pass_is_replayed_on_new_values(tokens: int, dtype: torch.dtype) -> None:
    qlora_rs.warmup("cuda")
    layer = LoraLinear(Linear4bit.from_packed(packed(130, 256)), r=3)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(tokens, 256, device="cuda").to(dtype).requires_grad_(True)

    def step(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = layer(x)
        y.float().square().sum().backward()
        return y.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(x)
            x.grad = layer.lora_A.grad = layer.lora_B.grad = None
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(x)
    captured = x.grad, layer.lora_A.grad, layer.lora_B.grad
    for number in range(3):
        with torch.no_grad():
            x.normal_()
            if number == 2:
                layer.base_layer.weight.random_(0, 255)
        graph.replay()
        twin = x.detach().clone().requires_grad_(True)
        layer.lora_A.grad = layer.lora_B.grad = None
        assert torch.equal(y, step(twin)), number
        for ours, theirs in zip(captured, (twin.grad, layer.lora_A.grad, layer.lora_B.grad), strict=True):
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours, theirs), number


@pytest.mark.parametrize("tokens", [4, 64, 300])
def test_a_kernel_may_be_compiled_while_a_graph_is_captured(tokens: int) -> None:
    program = f"""
import torch, qlora_rs
layer = qlora_rs.Linear4bit.from_packed(qlora_rs.quantize(torch.randn(130, 256))).to("cuda")
x = torch.randn({tokens}, 256, device="cuda", dtype=torch.bfloat16)
torch.nn.functional.linear(x, x)  # cuBLAS allocates at its first use
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.no_grad(), torch.cuda.graph(graph):
    y = layer(x)
x.normal_()
graph.replay()
assert torch.equal(y, layer(x))
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=dict(os.environ))
