"""The gradient of x of a packed product on the device, made without dequantizing W: against float64, and its bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qlora_rs
from qlora_rs import Linear4bit, LoraLinear, QuantSpec, direct, ops
from qlora_rs._core import DeviceWeight

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3}
TOKENS = [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 129, 255, 256]
USER = (-1.0, -0.35, 0.1, 0.3, 0.5, 1.0)
SPECS = [
    QuantSpec(),
    QuantSpec("nf4", 64, False),
    QuantSpec("fp4", 128),
    QuantSpec("int4", 4096, False),
    QuantSpec("codebook", 256, True, USER),
]


def packed_weight(out: int, columns: int, spec: QuantSpec | None = None) -> tuple[qlora_rs.PackedTensor, DeviceWeight]:
    """A packed tensor, which owns the memory, and what the kernels take of it."""
    packed = qlora_rs.quantize(torch.randn(out, columns, device="cuda"), spec or QuantSpec())
    return packed, direct.device_weight(packed)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.detach().double() - expected).norm() / expected.norm().clamp_min(1e-300))


def poison(elements: int) -> None:
    """Leave NaN in the memory that the next output is likely to get."""
    torch.full((elements * 2,), 0xFF, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.quant_type}-{spec.block_size}-{spec.double_quant}")
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_gradients_match_float64_and_have_the_same_bits_each_time(spec: QuantSpec, dtype: torch.dtype) -> None:
    torch.seed()
    # Rows that no tile or aligned load divides, fewer than a stage, many; columns of an odd number of blocks.
    few, many = [(33, 64), (40, 128), (257, 320)], [(1000, 1088), (4097, 192), (2304, 8256), (72, 28672)]
    for out, columns in few + many:
        packed, weight = packed_weight(out, columns, spec)
        want = qlora_rs.dequantize(packed, torch.float32).double()
        for tokens in TOKENS:
            grad = torch.randn(tokens, out, device="cuda").to(dtype)
            poison(tokens * columns)
            got = weight.linear_backward(grad)
            where = (out, columns, tokens)
            assert got.shape == (tokens, columns), where
            assert got.dtype == dtype, where
            assert relative(got, grad.double() @ want) < TOLERANCE[dtype], where
            for _ in range(3):  # each of these may overlap the one before
                assert torch.equal(got, weight.linear_backward(grad)), where


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_weights_are_multiplied_as_dequantize_rounds_them(dtype: torch.dtype) -> None:
    packed, weight = packed_weight(64, 256, QuantSpec("fp4", 64))
    want = qlora_rs.dequantize(packed, dtype)
    for tokens in (1, 9, 20, 64, 200):
        rows = torch.randint(64, (tokens,), device="cuda")
        grad = nn.functional.one_hot(rows, 64).to(dtype)
        assert torch.equal(weight.linear_backward(grad), want[rows]), tokens
    packed, weight = packed_weight(1, 192)
    for tokens in (1, 9, 20, 64, 200):
        grad = torch.randn(tokens, 1, device="cuda").to(dtype)
        assert torch.equal(weight.linear_backward(grad), grad * qlora_rs.dequantize(packed, dtype)), tokens


def test_a_block_of_zeros_gives_zero_and_one_of_nan_only_touches_its_columns() -> None:
    source = torch.randn(48, 256, device="cuda")
    source[:, 64:128] = 0
    packed = qlora_rs.quantize(source, QuantSpec("nf4", 64, False))
    packed.absmax.view(48, 4)[7, 3] = float("nan")
    weight = direct.device_weight(packed)
    for tokens in (3, 33, 130):
        got = weight.linear_backward(torch.randn(tokens, 48, device="cuda", dtype=torch.bfloat16))
        assert torch.all(got[:, 64:128] == 0), tokens
        assert torch.isfinite(got[:, :192]).all(), tokens
        assert torch.isnan(got[:, 192:]).all(), tokens


def is_fused(layer: Linear4bit, tokens: int, dtype: torch.dtype) -> bool:
    return direct.device_weight(layer.packed()).fuses_backward(tokens, dtype)


def layer_of(out: int, columns: int) -> Linear4bit:
    with torch.device("cuda"):
        return Linear4bit.from_float(nn.Linear(columns, out))


# Up to 32 tokens are fused for small weights too.
@pytest.mark.parametrize(("shape", "counts"), [((264, 320), (1, 24, 32)), ((8192, 2112), (33, 64, 128))])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_autograd_takes_the_fused_gradient_and_the_bias_its_own(
    shape: tuple[int, int], counts: tuple[int, ...], dtype: torch.dtype
) -> None:
    out, columns = shape
    layer = layer_of(out, columns)
    layer.bias.requires_grad_(True)
    weight = layer.dequantize(torch.float32).double()
    for tokens in counts:
        assert is_fused(layer, tokens, dtype) or torch.cuda.get_device_capability() != (9, 0), tokens
        x = torch.randn(1, tokens, columns, device="cuda").to(dtype).requires_grad_(True)
        upstream = torch.randn(1, tokens, out, device="cuda").to(dtype)
        layer.bias.grad = None
        layer(x).backward(upstream)
        assert x.grad.shape == x.shape
        assert relative(x.grad, upstream.double() @ weight) < TOLERANCE[dtype]
        assert relative(layer.bias.grad, upstream.double().sum((0, 1))) < 1e-2
        parts = (layer.weight, layer.weight_absmax, layer.weight_absmax_scale, layer.weight_absmax_offset)
        operator = torch.ops.qlora_rs.linear_backward(upstream, *parts, columns, "nf4", 64, None)
        assert torch.equal(operator, x.grad)


def test_an_adapters_gradients_stand_beside_the_fused_one() -> None:
    layer = LoraLinear(layer_of(264, 320), r=4, lora_alpha=8)
    nn.init.normal_(layer.lora_B)
    weight = layer.base_layer.dequantize(torch.float32).double() + layer.delta().detach().double()
    x = torch.randn(24, 320, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(24, 264, device="cuda", dtype=torch.bfloat16)
    assert is_fused(layer.base_layer, 24, torch.bfloat16)
    layer(x).backward(upstream)
    assert relative(x.grad, upstream.double() @ weight) < 2e-2
    b = layer.lora_B.detach().double()
    wanted = layer.scaling * (upstream.double() @ b).T @ x.detach().double()
    assert relative(layer.lora_A.grad, wanted) < 2e-2


@pytest.mark.parametrize("tokens", [1, 24, 64, 200])
def test_captured_gradients_are_replayed_on_new_values(tokens: int) -> None:
    qlora_rs.warmup("cuda")
    packed, weight = packed_weight(256, 256)
    grad = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    weight.linear_backward(grad)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = weight.linear_backward(weight.linear_backward(grad))
    for _ in range(3):
        grad.normal_()
        graph.replay()
        assert torch.equal(got, weight.linear_backward(weight.linear_backward(grad)))
    assert packed.codes.is_cuda


def test_a_gradient_waits_for_the_kernel_that_writes_its_input() -> None:
    _packed, weight = packed_weight(4096, 512)
    source = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16)
    want = weight.linear_backward(source)
    side, grad = torch.cuda.Stream(), torch.zeros_like(source)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        grad.copy_(source)
        got = weight.linear_backward(grad)
    side.synchronize()
    assert torch.equal(got, want)


def test_strided_and_unaligned_gradients_give_the_values_of_their_copies() -> None:
    _packed, weight = packed_weight(256, 320)
    wide = torch.randn(50, 520, device="cuda", dtype=torch.bfloat16)
    for tokens in (3, 50):
        flat = wide.flatten()[1 : 1 + tokens * 256].view(tokens, 256)
        for grad in (wide[:tokens, :512:2], wide[:tokens, 1:257], wide[:1, :256].expand(tokens, 256), flat):
            assert torch.equal(weight.linear_backward(grad), weight.linear_backward(grad.contiguous().clone()))


def test_what_no_kernel_takes_is_refused_by_the_kernel_and_computed_by_the_operator() -> None:
    packed, weight = packed_weight(33, 101)
    assert not weight.fuses_backward(2, torch.bfloat16)
    grad = torch.randn(2, 33, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(qlora_rs.UnsupportedError, match="no fused kernel"):
        weight.linear_backward(grad)
    want = qlora_rs.dequantize(packed, torch.bfloat16)
    assert torch.equal(ops.device_linear_backward(grad, weight), grad @ want)
    packed, weight = packed_weight(64, 128)
    assert weight.fuses_backward(2, torch.bfloat16)
    assert not weight.fuses_backward(0, torch.bfloat16)
    assert not weight.fuses_backward(2, torch.float32)
    assert not weight.fuses_backward(257, torch.bfloat16)
    grad = torch.randn(2, 64, device="cuda")
    assert torch.equal(ops.device_linear_backward(grad, weight), grad @ qlora_rs.dequantize(packed, torch.float32))


def test_a_gradient_of_another_width_is_refused_by_name() -> None:
    _packed, weight = packed_weight(64, 128)
    with pytest.raises(ValueError, match="out_features = 64"):
        ops.device_linear_backward(torch.randn(2, 128, device="cuda", dtype=torch.bfloat16), weight)
    with pytest.raises(ValueError, match="grad is on cpu"):
        ops.device_linear_backward(torch.randn(2, 64, dtype=torch.bfloat16), weight)
