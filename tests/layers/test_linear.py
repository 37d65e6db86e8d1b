"""`Linear4bit`: products and gradients against float64, and everything a module must survive."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import qlora_rs
from qlora_rs import Linear4bit, QuantSpec, reference

pytestmark = pytest.mark.usefixtures("device")

SPECS = [
    QuantSpec(),
    QuantSpec("nf4", 32, False),
    QuantSpec("fp4", 128),
    QuantSpec("int4", 64, False),
    QuantSpec("int8", 64),
    QuantSpec("dynamic8", 256),
    QuantSpec("udynamic8", 32, False),
    QuantSpec(codebook=[-1, -0.4, 0.1, 0.9]),
    QuantSpec(codebook=[k / 99 - 1 for k in range(199)]),
]
# Largest relative error of a product, by the type it is computed in.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def make(out: int = 37, columns: int = 101, spec: QuantSpec | None = None, bias: bool = True) -> Linear4bit:
    torch.manual_seed(0)
    return Linear4bit.from_float(nn.Linear(columns, out, bias=bias), spec)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.detach().double() - expected).norm() / expected.norm().clamp_min(1e-300))


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_product_and_gradients_are_those_of_the_dequantized_weight(spec: QuantSpec, dtype: torch.dtype) -> None:
    layer = make(spec=spec)
    layer.bias.requires_grad_(True)
    x = torch.randn(3, 5, 101).to(dtype).requires_grad_(True)
    upstream = torch.randn(3, 5, 37).to(dtype)
    y = layer(x)
    y.backward(upstream)
    weight = layer.dequantize(torch.float32 if dtype == torch.float64 else dtype)
    tolerance = TOLERANCE[dtype]
    assert y.dtype == dtype
    assert relative(y, reference.linear(x.detach(), weight, layer.bias.detach().to(dtype))) < tolerance
    assert relative(x.grad, upstream.double() @ weight.double()) < tolerance
    assert relative(layer.bias.grad, upstream.double().sum((0, 1))) < max(tolerance, 1e-6)  # the bias is float32
    assert layer.weight.grad is None


def test_gradcheck_and_gradgradcheck_pass_in_float64() -> None:
    layer = make(7, 33)
    x = torch.randn(2, 33, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


@pytest.mark.parametrize("shape", [(101,), (0, 101), (2, 0, 101), (1, 101), (2, 3, 5, 101)])
def test_any_leading_shape_works_and_empty_ones_too(shape: tuple[int, ...]) -> None:
    layer = make()
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 37)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_strided_and_expanded_inputs_give_the_values_of_their_copies() -> None:
    layer = make()
    wide = torch.randn(9, 202)[:, ::2]
    assert torch.equal(layer(wide), layer(wide.contiguous()))
    one = torch.randn(1, 101).expand(4, 101)
    assert torch.allclose(layer(one), layer(one.contiguous()))


def test_a_wrong_width_or_type_is_an_error_that_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match="in_features = 101"):
        make()(torch.randn(2, 100))
    with pytest.raises(TypeError, match="float32"):
        make()(torch.ones(2, 101, dtype=torch.int64))


def test_state_dict_holds_the_native_files_names_and_loads_weights_only() -> None:
    layer = make()
    state = layer.state_dict()
    assert {key: value.dtype for key, value in state.items()} == {
        "weight": torch.uint8,
        "weight_absmax": torch.uint8,
        "weight_absmax_scale": torch.int32,
        "weight_absmax_offset": torch.int32,
        "bias": torch.float32,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    fresh = Linear4bit(101, 37, spec=layer.spec, float_dtype=torch.float32)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(2, 101)
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "bf16", "half", "double"])
def test_copies_and_casts_keep_every_packed_bit(how: str) -> None:
    layer = make()
    before = {name: p.clone() for name, p in layer.named_parameters() if name != "bias"}
    if how == "deepcopy":
        layer = copy.deepcopy(layer)
    elif how == "pickle":
        layer = pickle.loads(pickle.dumps(layer))
    else:
        layer = layer.to({"bf16": torch.bfloat16, "half": torch.float16, "double": torch.float64}[how])
    for name, value in before.items():
        assert torch.equal(layer.get_parameter(name), value)
        assert not layer.get_parameter(name).requires_grad


def test_autocast_computes_in_its_type_and_gives_gradients_in_the_inputs(device: str) -> None:
    layer = make()
    x = torch.randn(5, 101, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert relative(x.grad, torch.ones(5, 37).double() @ layer.dequantize(torch.bfloat16).double()) < 2e-2


def test_training_after_an_evaluation_pass_keeps_its_gradients() -> None:
    first, second = make(101, 101), make(37, 101)
    model = nn.Sequential(first, second)
    x = torch.randn(4, 101)

    def gradient() -> torch.Tensor:
        start = x.clone().requires_grad_(True)
        model.train()(start).square().sum().backward()
        return start.grad

    before = gradient()
    with torch.no_grad():
        model.eval()(x)
    with torch.inference_mode():
        model(x)
    assert torch.equal(gradient(), before)
    assert before.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # the compiler's own import
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec("nf4", double_quant=False), QuantSpec(codebook=[-1, 0.2, 1])])
def test_compiles_to_one_graph_forward_and_backward(spec: QuantSpec) -> None:
    layer = make(spec=spec)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 101, requires_grad=True)
    y = compiled(x)
    y.sum().backward()
    expected = x.detach().clone().requires_grad_(True)
    layer(expected).sum().backward()
    assert torch.equal(x.grad, expected.grad)


def packed_arguments(spec: QuantSpec) -> tuple:
    layer = make(spec=spec)
    return (
        layer.weight.detach(),
        layer.weight_absmax.detach(),
        None if layer.weight_absmax_scale is None else layer.weight_absmax_scale.detach(),
        None if layer.weight_absmax_offset is None else layer.weight_absmax_offset.detach(),
        101,
        spec.quant_type,
        spec.block_size,
        None if spec.codebook is None else list(spec.codebook),
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck looks at copies of its inputs
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec("int8", 32, False), QuantSpec(codebook=[-1, 0.2, 1])])
def test_every_op_passes_opcheck(spec: QuantSpec) -> None:
    ops = torch.ops.qlora_rs
    packed = packed_arguments(spec)
    codebook = packed[-1]
    weight = torch.randn(37, 101)
    torch.library.opcheck(
        ops.quantize.default, (weight, spec.quant_type, spec.block_size, spec.double_quant, codebook, True)
    )
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(ops.dequantize.default, (*packed, dtype))
    x = torch.randn(3, 101, requires_grad=True)
    for bias in (None, torch.randn(37, requires_grad=True)):
        torch.library.opcheck(ops.linear.default, (x, *packed, bias))
    torch.library.opcheck(ops.linear_backward.default, (torch.randn(3, 37, requires_grad=True), *packed))


def test_ops_refuse_parts_that_do_not_fit_together() -> None:
    codes, absmax, scale, offset, *rest = packed_arguments(QuantSpec())
    dequantize = torch.ops.qlora_rs.dequantize
    with pytest.raises(ValueError, match="absmax: expected"):
        dequantize(codes, absmax[:-1], scale, offset, *rest, torch.float32)
    with pytest.raises(ValueError, match="codes: expected"):
        dequantize(codes[:, :-1], absmax, scale, offset, *rest, torch.float32)
    with pytest.raises(ValueError, match="come together"):
        dequantize(codes, absmax, scale, None, *rest, torch.float32)


def test_prints_what_it_is() -> None:
    assert (
        repr(Linear4bit(4096, 14336, bias=False, device="meta"))
        == "Linear4bit(in_features=4096, out_features=14336, bias=False, nf4, block_size=64, double_quant=True)"
    )


def test_names_that_peft_looks_for_are_there() -> None:
    layer = make()
    assert layer.W_q is layer.weight
    assert layer.dequantize().dtype == torch.float32
    assert isinstance(layer, nn.Linear)


def test_only_packed_tensors_are_kept_for_the_backward_pass() -> None:
    layer = make(256, 512, bias=False)
    saved: list[int] = []
    x = torch.randn(3, 512, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        layer(x)
    assert sum(saved) <= layer.packed().nbytes


def test_quantize_model_free_function_accepts_parameters_that_require_grad() -> None:
    weight = nn.Parameter(torch.randn(5, 64))
    assert not qlora_rs.dequantize(qlora_rs.quantize(weight)).requires_grad


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func's own import
@pytest.mark.parametrize("wants_grad", [False, True])
def test_forward_mode_gradients_are_products_too(wants_grad):
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    layer = Linear4bit.from_float(nn.Linear(66, 35))
    weight, bias = layer.dequantize(torch.float32), layer.bias
    x, tangent = torch.randn(2, 3, 66), torch.randn(2, 3, 66)
    y, slope = torch.func.jvp(layer, (x,), (tangent,))
    close(y, x @ weight.T + bias)
    close(slope, tangent @ weight.T)
    x.requires_grad_(wants_grad)
    with forward_ad.dual_level():
        y, slope = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
        close(slope, tangent @ weight.T)
        close(layer(x), y)
    if wants_grad:
        y.sum().backward()
        close(x.grad, weight.sum(0).expand_as(x))
