"""A Linear layer whose packed blocks run over the ends of its rows."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import qlora_rs
from qlora_rs import Linear4bit, PackedTensor, QuantSpec, reference

SPECS = [QuantSpec(), QuantSpec("fp4", 32, False), QuantSpec("int8", 128), QuantSpec(codebook=[-1, -0.2, 0, 0.4, 1])]
OUT, IN = 37, 131  # 4847 elements: an odd number, and no whole number of blocks


def flat_layer(spec: QuantSpec, dtype: torch.dtype = torch.float32, bias: bool = True) -> Linear4bit:
    generator = torch.Generator().manual_seed(5)
    packed = qlora_rs.quantize(torch.randn(1, OUT * IN, generator=generator), spec)
    values = {name: getattr(packed, name) for name in ("codes", "absmax", "absmax_scale", "absmax_offset")}
    shaped = PackedTensor(**values, spec=spec, shape=(OUT, IN), dtype=dtype, flat=True)
    return Linear4bit.from_packed(shaped, torch.randn(OUT, generator=generator).to(dtype) if bias else None)


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
def test_values_are_those_of_the_flat_weight(spec) -> None:
    layer = flat_layer(spec)
    packed = layer.packed()
    absmax = packed.absmax
    if packed.absmax_scale is not None:
        scale = packed.absmax_scale.repeat_interleave(256)[: absmax.numel()]
        absmax = reference.dynamic_map()[absmax.long()] * scale + packed.absmax_offset
    codes = packed.codes[0] if spec.bits == 8 else reference.unpack(packed.codes, OUT * IN)[0]
    expected = torch.tensor(spec.values)[codes.long()] * absmax[0].repeat_interleave(spec.block_size)[: OUT * IN]
    assert torch.equal(layer.dequantize(), expected.view(OUT, IN))
    assert torch.equal(layer.dequantize(torch.bfloat16), expected.view(OUT, IN).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [(), (1,), (3, 5), (0,)])
def test_product_and_gradients_are_those_of_the_dequantized_weight(dtype, tokens) -> None:
    layer = flat_layer(QuantSpec(), dtype)
    layer.bias.requires_grad_(True)
    linear = torch.nn.Linear(IN, OUT, dtype=dtype)
    linear.weight = torch.nn.Parameter(layer.dequantize(), requires_grad=False)
    linear.bias.data = layer.bias.detach().clone()
    x = torch.randn(*tokens, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(ours), linear(theirs)
    assert torch.equal(y, expected)
    grad = torch.ones_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(layer.bias.grad, linear.bias.grad)


def test_only_packed_tensors_are_kept_for_the_backward_pass() -> None:
    layer = flat_layer(QuantSpec())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, IN, requires_grad=True))
    assert all(not tensor.is_floating_point() for tensor in kept)


def test_gradients_of_gradients() -> None:
    layer = flat_layer(QuantSpec(), bias=False)
    x = torch.randn(2, IN, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    weight = layer.dequantize()
    torch.testing.assert_close(second, (torch.ones_like(x) @ weight.T @ weight) * 2)


def test_autocast_computes_in_its_type() -> None:
    layer = flat_layer(QuantSpec())
    x = torch.randn(3, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(
        y, torch.nn.functional.linear(x.bfloat16(), layer.dequantize(torch.bfloat16), layer.bias.bfloat16())
    )
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # the compiler's own import
def test_compiles_to_one_graph() -> None:
    layer = flat_layer(QuantSpec())
    x = torch.randn(3, IN, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), layer(x)
    assert torch.equal(y, expected)
    (grad,) = torch.autograd.grad(y.sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    assert torch.equal(grad, expected_grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck looks at copies of its inputs
@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
def test_the_operators_keep_what_torch_asks_of_them(spec) -> None:
    layer = flat_layer(spec)
    codebook = None if spec.codebook is None else list(spec.codebook)
    described = (*layer.parts(), OUT, IN, spec.quant_type, spec.block_size, codebook)
    x = torch.randn(3, IN, requires_grad=True)
    torch.library.opcheck(torch.ops.qlora_rs.flat_linear, (x, *described, layer.bias))
    torch.library.opcheck(
        torch.ops.qlora_rs.flat_linear_backward, (torch.randn(3, OUT, requires_grad=True), *described)
    )


def test_state_dicts_copies_and_pickles_keep_it() -> None:
    layer = flat_layer(QuantSpec())
    assert layer.weight.shape == (1, -(-OUT * IN // 2))
    assert "flat" in repr(layer)
    x = torch.randn(2, IN)
    fresh = Linear4bit(IN, OUT, spec=layer.spec, float_dtype=torch.float32, flat=True)
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert other.flat
        assert torch.equal(other(x), layer(x))
    by_rows = Linear4bit(IN, OUT, spec=layer.spec, float_dtype=torch.float32)
    with pytest.raises(RuntimeError, match="size mismatch"):
        by_rows.load_state_dict(layer.state_dict())


def test_an_adapter_merges_into_its_values() -> None:
    model = torch.nn.Sequential(flat_layer(QuantSpec(), bias=False))
    qlora_rs.attach_lora(model, r=2, seed=0)
    torch.nn.init.normal_(model[0].lora_B, generator=torch.Generator().manual_seed(3))
    x = torch.randn(4, IN)
    expected = model(x)
    qlora_rs.merge_adapter(model, dtype=torch.float32)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_paged_it_computes_the_same() -> None:
    model = torch.nn.Sequential(flat_layer(QuantSpec(), bias=False))
    x = torch.randn(3, IN, requires_grad=True)
    expected = model(x)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    weights = qlora_rs.paging.page_weights(model, qlora_rs.paging.PagedPool("64KiB", page_size=4096))
    y = model(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, expected)
    assert torch.equal(grad, expected_grad)
    weights.unpage()
    assert torch.equal(model(x), expected)


def test_a_wrong_width_is_told() -> None:
    with pytest.raises(ValueError, match="in_features = 131"):
        flat_layer(QuantSpec())(torch.randn(2, IN + 1))
