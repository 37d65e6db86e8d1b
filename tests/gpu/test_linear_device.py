"""`Linear4bit` on the device: values and gradients against float64, on every way that a call can take."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import qlora_rs
from qlora_rs import Linear4bit, LoraLinear, QuantSpec, direct

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 2e-3}
SHAPES = [(33, 101), (48, 64), (257, 320), (96, 4160), (5, 65), (130, 256)]  # (out, in)
TOKENS = [1, 2, 7, 8, 9, 16, 31, 32, 33, 64, 100, 129, 300]


def make(out: int, columns: int, spec: QuantSpec | None = None, bias: bool = True) -> Linear4bit:
    with torch.device("cuda"):
        return Linear4bit.from_float(nn.Linear(columns, out, bias=bias), spec)


def relative(got: torch.Tensor, expected: torch.Tensor, usual: torch.Tensor | float = 0.0) -> float:
    """The error as a share of what is expected, or of what is usual where that is more: few terms can cancel."""
    size = max(float(expected.norm()), float(usual), 1e-300)
    return float((got.detach().double() - expected).norm()) / size


def usual_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The norm of x W^T that is to be expected of random operands."""
    return x.detach().double().norm() * weight.norm() / weight.shape[1] ** 0.5


@pytest.mark.parametrize(
    "spec", [QuantSpec(), QuantSpec("nf4", 64, False), QuantSpec("fp4", 128), QuantSpec("int8", 32)]
)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_products_and_gradients_match_float64_at_every_number_of_tokens(spec: QuantSpec, dtype: torch.dtype) -> None:
    torch.seed()
    for out, columns in SHAPES:
        layer = make(out, columns, spec)
        layer.bias.requires_grad_(True)
        weight = layer.dequantize(torch.float32).double()
        for tokens in TOKENS:
            x = torch.randn(tokens, columns, device="cuda").to(dtype).requires_grad_(True)
            upstream = torch.randn(tokens, out, device="cuda").to(dtype)
            assert direct.applies(x)
            torch.full((tokens * out * 4,), 0xFF, dtype=torch.uint8, device="cuda")  # NaN for what is not written
            y = layer(x)
            layer.bias.grad = None
            y.backward(upstream)
            where = (out, columns, tokens)
            assert y.dtype == dtype
            expected = x.detach().double() @ weight.T + layer.bias.detach().to(dtype).double()
            assert relative(y, expected, usual_norm(x, weight)) < TOLERANCE[dtype], where
            expected = upstream.double() @ weight
            assert relative(x.grad, expected, usual_norm(upstream, weight.T)) < TOLERANCE[dtype], where
            assert relative(layer.bias.grad, upstream.double().sum(0)) < 1e-2, where
            with torch.no_grad():
                assert torch.equal(layer(x), y), where


@pytest.mark.parametrize(
    "spec", [QuantSpec(), QuantSpec("nf4", 64, False), QuantSpec("fp4", 128), QuantSpec("int4", 256)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fused_products_match_float64_also_where_they_are_not_the_fastest(spec: QuantSpec, dtype: torch.dtype) -> None:
    torch.seed()
    # The tall ones give a CTA several row tiles, the wide one several rounds over the columns.
    for out, columns in [(17, 64), (33, 128), (257, 1088), (2300, 8256), (4300, 64), (17000, 128), (28672, 64)]:
        layer = make(out, columns, spec)
        weight = direct.device_weight(layer.packed())
        want = layer.dequantize(torch.float32).double()
        bias = torch.randn(out, device="cuda").to(dtype)
        for tokens in [*TOKENS[:-1], 255, 256]:
            x = torch.randn(tokens, columns, device="cuda").to(dtype)
            torch.full((tokens * out * 2,), 0xFF, dtype=torch.uint8, device="cuda")  # NaN for what is not written
            got = weight.linear(x, bias)
            where = (out, columns, tokens)
            assert relative(got, x.double() @ want.T + bias.double()) < TOLERANCE[dtype], where
            assert torch.equal(got, weight.linear(x, bias)), where


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [128, 384, 2432])  # the widest is shared by two CTAs from 17 tokens on
@pytest.mark.parametrize("rows", [22_017, 65_537])  # the fewest that any kernel for very many rows takes, or all do
def test_products_with_a_weight_of_as_many_rows_as_a_vocabulary_match_float64(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    torch.seed()
    layer = make(rows, columns)
    weight = direct.device_weight(layer.packed())
    want = layer.dequantize(torch.float32).double()
    bias, b = torch.randn(rows, device="cuda").to(dtype), torch.randn(rows, 21, device="cuda").to(dtype)
    for tokens in (8, 9, 16, 17, 29, 32):
        x = torch.randn(tokens, columns, device="cuda").to(dtype)
        xa = torch.randn(tokens, 21, device="cuda").to(dtype)
        torch.full((tokens * rows * 2,), 0xFF, dtype=torch.uint8, device="cuda")  # NaN for what is not written
        got = weight.linear(x, bias, (xa, b, 0.5))
        expected = x.double() @ want.T + bias.double() + 0.5 * xa.double() @ b.double().T
        assert relative(got, expected) < TOLERANCE[dtype], tokens
        for _ in range(3):  # each of these may overlap the one before
            assert torch.equal(got, weight.linear(x, bias, (xa, b, 0.5))), tokens


def test_a_shape_without_a_fused_kernel_is_refused_by_the_kernel_and_computed_by_the_layer() -> None:
    layer = make(33, 101)
    x = torch.randn(2, 101, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(qlora_rs.UnsupportedError, match="no fused kernel"):
        direct.device_weight(layer.packed()).linear(x, None)
    assert layer(x).shape == (2, 33)


def test_the_operator_and_the_direct_call_give_the_same_bits() -> None:
    layer = make(130, 256)
    for tokens in (1, 8, 40, 300):
        x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        grad, x.grad = x.grad, None
        parts = (layer.weight, layer.weight_absmax, layer.weight_absmax_scale, layer.weight_absmax_offset)
        again = torch.ops.qlora_rs.linear(x, *parts, 256, "nf4", 64, None, layer.bias)
        again.sum().backward()
        assert torch.equal(y, again)
        assert torch.equal(grad, x.grad)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,), (2, 3, 64)])
def test_leading_shapes_and_empty_batches(shape: tuple[int, ...]) -> None:
    layer = make(33, 64)
    x = torch.randn(shape, device="cuda", requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 33)
    y.sum().backward()
    assert x.grad.shape == shape


def test_strided_and_expanded_inputs_give_the_values_of_their_copies() -> None:
    layer = make(48, 256)
    for tokens in (3, 50):
        wide = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        for x in (wide[:, ::2], wide[:, 1:257], wide[:1, :256].expand(tokens, 256), wide.t()[:256].t()):
            assert torch.equal(layer(x), layer(x.contiguous().clone()))


def test_moving_a_layer_finds_its_new_memory() -> None:
    layer = make(48, 256)
    x = torch.randn(4, 256, device="cuda")
    want = layer(x)
    layer.cpu()
    junk = [torch.full((1 << 20,), 0xEE, dtype=torch.uint8, device="cuda") for _ in range(8)]
    layer.cuda()
    assert torch.equal(layer(x), want)
    del junk
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
    assert not torch.equal(layer(x), want)


def test_copies_and_pickles_compute_the_same() -> None:
    layer = make(48, 256)
    x = torch.randn(4, 256, device="cuda")
    want = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), want)


def test_autocast_computes_in_its_type() -> None:
    layer = make(48, 256)
    x = torch.randn(4, 256, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.float16):
        y = layer(x)
    assert y.dtype == torch.float16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_modes_that_watch_operators_see_them() -> None:
    layer = make(48, 256)
    x = torch.randn(4, 256, device="cuda")
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        assert not direct.applies(x)
        layer(x)
    assert any("qlora_rs.linear" in name for name in seen)
    assert direct.applies(x)
    with torch.device("cuda"):
        assert direct.applies(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    layer = LoraLinear(make(48, 256), r=4)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 256, device="cuda", requires_grad=True)
    layer(x).square().sum().backward()
    want = x.grad, layer.lora_A.grad
    x.grad = layer.lora_A.grad = None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, want[0])
    assert torch.equal(layer.lora_A.grad, want[1])


@pytest.mark.parametrize("rank", [1, 3, 16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_adapter_inside_the_product_is_the_sum_of_both(dtype: torch.dtype, rank: int) -> None:
    layer = LoraLinear(make(130, 320), r=rank, lora_alpha=2 * rank)
    nn.init.normal_(layer.lora_B)
    weight = layer.base_layer.dequantize(torch.float32).double() + layer.delta().double()
    for tokens in TOKENS:
        x = torch.randn(tokens, 320, device="cuda").to(dtype)
        with torch.no_grad():
            fused = layer.base_layer.fused_with_adapter(x, layer.lora_A, layer.lora_B, layer.scaling)
            assert (fused is None) == (tokens > 32)
            y = layer(x)
        assert relative(y, x.double() @ weight.T + layer.bias.detach().double()) < 2 * TOLERANCE[dtype], tokens
        assert relative(y, layer(x).detach().double()) < 2 * TOLERANCE[dtype], tokens


def test_a_second_derivative_is_that_of_a_linear_map() -> None:
    layer = make(33, 64)
    x = torch.randn(3, 64, device="cuda", requires_grad=True)
    y = layer(x).square().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    first.sum().backward()
    weight = layer.dequantize(torch.float32).double()
    want = (2 * (torch.ones(3, 64, device="cuda").double() @ weight.T)) @ weight
    assert relative(x.grad, want) < 1e-5


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("tokens", [4, 300])
def test_compiles_to_one_graph_forward_and_backward(tokens: int) -> None:
    torch._dynamo.reset()
    layer = make(130, 256)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    compiled(x).sum().backward()
    grad, x.grad = x.grad, None
    layer(x).sum().backward()
    assert torch.equal(grad, x.grad)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("tokens", [1, 8, 64, 300])
def test_captured_products_are_replayed_on_new_values(tokens: int) -> None:
    qlora_rs.warmup("cuda")
    layer = make(130, 256)
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(layer(x)[:, :130].repeat(1, 2)[:, :256])
    for _ in range(3):
        x.normal_()
        graph.replay()
        with torch.no_grad():
            assert torch.equal(y, layer(layer(x)[:, :130].repeat(1, 2)[:, :256]))


def test_products_run_on_the_callers_stream() -> None:
    layer = make(130, 256)
    x = torch.randn(8, 256, device="cuda")
    want = layer(x)
    side, source = torch.cuda.Stream(), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        source.copy_(x)
        got = layer(source)
    side.synchronize()
    assert torch.equal(got, want)


def test_an_input_elsewhere_or_of_another_width_is_refused_by_name() -> None:
    layer = make(48, 256)
    with pytest.raises(ValueError, match="in_features = 256"):
        layer(torch.randn(2, 255, device="cuda"))
    with pytest.raises((ValueError, RuntimeError), match="cpu"):
        layer(torch.randn(2, 256))
    layer.bias = nn.Parameter(layer.bias.cpu(), requires_grad=False)
    with pytest.raises(ValueError, match="bias is on cpu"):
        layer(torch.randn(2, 256, device="cuda", dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="the packed weight is on cpu"):
        layer.cpu()(torch.randn(2, 256, device="cuda", dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["x", "bias", "weight"])
def test_freed_memory_is_told_also_where_the_plain_call_is_known(name: str) -> None:
    layer = make(48, 256).bfloat16()
    x = torch.randn(2, 256, device="cuda", dtype=torch.bfloat16)
    layer(x)
    storage = (x if name == "x" else getattr(layer, name)).untyped_storage()
    size = storage.size()
    storage.resize_(0)
    with pytest.raises(ValueError, match="has no memory"):
        layer(x)
    storage.resize_(size)
    assert layer(x).shape == (2, 48)


def test_replaced_weights_are_not_kept_alive() -> None:
    layer = make(48, 256)
    layer(torch.randn(4, 256, device="cuda"))
    old = weakref.ref(layer.weight)
    layer.to("meta")
    gc.collect()
    assert old() is None


def test_a_weight_that_is_cut_or_written_to_is_noticed() -> None:
    layer = make(48, 256, bias=False)
    x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
    before = layer(x)
    with torch.no_grad():
        layer.weight.zero_()
        assert not torch.equal(layer(x), before)
    want = qlora_rs.quantize(torch.randn(48, 256, device="cuda"))
    for _ in range(20):  # written by the kernel just before, which a product must not overtake
        with torch.no_grad():
            for part, new in zip(
                (layer.weight, layer.weight_absmax, layer.weight_absmax_scale, layer.weight_absmax_offset),
                (want.codes, want.absmax, want.absmax_scale, want.absmax_offset),
                strict=True,
            ):
                part.random_(0, 9)
                part.copy_(new.view(part.dtype))
            assert torch.equal(layer(x), Linear4bit.from_packed(want)(x))
    trained = x.clone().requires_grad_(True)
    y = layer(trained)
    with torch.no_grad():
        layer.weight.zero_()
    with pytest.raises(RuntimeError, match="modified in place"):
        y.sum().backward()


def test_only_packed_tensors_live_between_forward_and_backward() -> None:
    layer = make(4096, 4096, bias=False)
    x = torch.randn(2, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x)
    before = torch.cuda.memory_allocated()
    y = layer(x)
    assert torch.cuda.memory_allocated() - before <= 2 * y.nbytes + 4096
