"""The torch operators `qlora_rs::*`: schema, fake implementation, kernels, autograd, autocast.

Scales may come as float32 or as the same bits in int32, which is how modules hold them: an integer tensor is left
alone by autocast and by ``.to(dtype)``. A weight is doubly quantized iff ``absmax_scale`` is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qlora_rs import _bridge
from qlora_rs._addresses import DTYPE_CODES
from qlora_rs._core import DeviceWeight
from qlora_rs.packed import FLOAT_DTYPES, PackedShapes
from qlora_rs.spec import QuantSpec

DEVICES = ("cpu", "cuda", "meta")
# Gives a weight in some type: the same values that dequantizing it anew would give.
Dequantize = Callable[[torch.dtype], Tensor]

_library = torch.library.Library("qlora_rs", "DEF")
_PACKED = "Tensor codes, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset, SymInt columns"
_SPEC = "str quant_type, int block_size, float[]? codebook"
_library.define(
    "quantize(Tensor weight, str quant_type, int block_size, bool double_quant, float[]? codebook, "
    "bool check_finite) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(f"dequantize({_PACKED}, {_SPEC}, ScalarType dtype) -> Tensor")
_library.define(f"linear(Tensor x, {_PACKED}, {_SPEC}, Tensor? bias) -> Tensor")
_library.define(f"linear_backward(Tensor grad, {_PACKED}, {_SPEC}) -> Tensor")
_FLAT = _PACKED.replace("SymInt columns", "SymInt rows, SymInt columns")
_library.define(f"flat_linear(Tensor x, {_FLAT}, {_SPEC}, Tensor? bias) -> Tensor")
_library.define(f"flat_linear_backward(Tensor grad, {_FLAT}, {_SPEC}) -> Tensor")


def _spec(quant_type: str, block_size: int, double_quant: bool, codebook: Sequence[float] | None) -> QuantSpec:
    """A spec of the arguments that operators take."""
    return _known_spec(quant_type, block_size, double_quant, None if codebook is None else tuple(codebook))


@lru_cache(maxsize=256)
def _known_spec(quant_type: str, block_size: int, double_quant: bool, codebook: tuple[float, ...] | None) -> QuantSpec:
    return QuantSpec(quant_type, block_size, double_quant, codebook)


def arguments_of(spec: QuantSpec) -> tuple[str, int, list[float] | None]:
    """A spec as operators take it; whether scales are doubly quantized their tensors tell."""
    return spec.quant_type, spec.block_size, None if spec.codebook is None else list(spec.codebook)


def _checked(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    columns: int,
    quant_type: str,
    block_size: int,
    codebook: Sequence[float] | None,
) -> QuantSpec:
    """The spec, once every part is known to have the shape and type that the kernels rely on."""
    if (absmax_scale is None) != (absmax_offset is None):
        raise ValueError("absmax_scale and absmax_offset come together or not at all")
    nested = absmax_scale is not None
    spec = _spec(quant_type, block_size, nested, codebook)
    shapes = PackedShapes.of((*codes.shape[:-1], columns), spec)
    scales = (torch.float32, torch.int32)
    device = codes.device
    _expect("codes", codes, (torch.uint8,), shapes.codes, device)
    _expect("absmax", absmax, (torch.uint8,) if nested else scales, shapes.absmax, device)
    if absmax_scale is not None and absmax_offset is not None:
        _expect("absmax_scale", absmax_scale, scales, shapes.absmax_scale, device)
        _expect("absmax_offset", absmax_offset, scales, shapes.absmax_offset, device)
    return spec


def _expect(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], device: torch.device
) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the codes are on {device}: move all parts to one device")
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name}: expected {' or '.join(map(str, dtypes))} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )


def _kernel(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers one implementation for every device that has kernels: `_bridge` chooses by the tensors' device."""

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        for key in ("CPU", "CUDA"):
            torch.library.impl(_library, name, key)(implementation)
        return implementation

    return register


# quantize


@torch.library.register_fake("qlora_rs::quantize", lib=_library)
def _(
    weight: Tensor,
    quant_type: str,
    block_size: int,
    double_quant: bool,
    codebook: Sequence[float] | None,
    check_finite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spec = _spec(quant_type, block_size, double_quant, codebook)
    shapes = PackedShapes.of(tuple(weight.shape), spec)
    codes = weight.new_empty(shapes.codes, dtype=torch.uint8)
    absmax = weight.new_empty(shapes.absmax, dtype=torch.uint8 if double_quant else torch.float32)
    scale = weight.new_empty(shapes.absmax_scale if double_quant else 0, dtype=torch.float32)
    offset = weight.new_empty(shapes.absmax_offset if double_quant else 0, dtype=torch.float32)
    return codes, absmax, scale, offset


@_kernel("quantize")
def _quantize(
    weight: Tensor,
    quant_type: str,
    block_size: int,
    double_quant: bool,
    codebook: Sequence[float] | None,
    check_finite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if weight.ndim == 0 or weight.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"expected a float32, bfloat16 or float16 weight of shape (..., out, in), got {weight.dtype} "
            f"{list(weight.shape)}"
        )
    spec = _spec(quant_type, block_size, double_quant, codebook)
    return _bridge.quantize(weight, spec, check_finite)


# dequantize


@torch.library.register_fake("qlora_rs::dequantize", lib=_library)
def _(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    columns: int,
    quant_type: str,
    block_size: int,
    codebook: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], columns), dtype=dtype)


@_kernel("dequantize")
def _dequantize(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    columns: int,
    quant_type: str,
    block_size: int,
    codebook: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    spec = _checked(codes, absmax, absmax_scale, absmax_offset, columns, quant_type, block_size, codebook)
    if dtype == torch.float64:
        # The value is a float32 product; widening it is exact and lets gradcheck run.
        return _bridge.dequantize(codes, absmax, absmax_scale, absmax_offset, columns, spec, torch.float32).double()
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dequantize to float32, bfloat16, float16 or float64, not {dtype}")
    return _bridge.dequantize(codes, absmax, absmax_scale, absmax_offset, columns, spec, dtype)


# linear: y = x W^T + b with a frozen packed W


@torch.library.register_fake("qlora_rs::linear", lib=_library)
def _(x: Tensor, codes: Tensor, *packed_and_bias: Any) -> Tensor:
    columns = packed_and_bias[3]
    torch._check(x.shape[-1] == columns, lambda: _mismatch("x", "in_features", x, columns))
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _mismatch(name: str, meaning: str, x: Tensor, expected: int) -> str:
    return f"{name} has shape {list(x.shape)}; its last dimension must be {meaning} = {expected}"


@_kernel("linear")
def _linear(x: Tensor, *packed_and_bias: Any) -> Tensor:
    *packed, bias = packed_and_bias
    return linear(x, packed, bias)


def linear(x: Tensor, packed: Sequence[Any], bias: Tensor | None, dequantize: Dequantize | None = None) -> Tensor:
    """x W^T + b of the operator's arguments; ``dequantize`` is called where no kernel multiplies with W as it is.

    Nothing is recorded for autograd.
    """
    if x.is_cuda and x.dtype in FLOAT_DTYPES:
        return device_linear(x, _device_weight(*packed), bias, dequantize)
    _expect_width("x", "in_features", x, packed[4])
    if _fuses_on_cpu(x, packed):
        spec = _checked(*packed)
        codes, absmax, scale, offset = packed[:4]
        return _bridge.linear_cpu(x, codes, absmax, scale, offset, spec, None if bias is None else bias.to(x.dtype))
    return dense_linear(x, dequantized(packed, x.dtype) if dequantize is None else dequantize(x.dtype), bias)


def dequantized(packed: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of the operator's arguments."""
    weight: Tensor = _dequantize(*packed, dtype=dtype)
    return weight


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b over a weight in x's type."""
    # Contiguous, so that a strided x goes the way of its copy.
    return torch.nn.functional.linear(x.contiguous(), weight, None if bias is None else bias.to(x.dtype))


def dense_linear_backward(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x of `dense_linear`: dY W."""
    return grad.contiguous() @ weight


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a bias of ``dtype``: dY summed over all but its last dimension."""
    return grad.sum_to_size(grad.shape[-1:]).to(dtype)


def wants_gradient(x: Tensor, bias: Tensor | None) -> bool:
    """Is a product of x and this bias to be recorded for a backward pass?"""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def autocasted(x: Tensor) -> Tensor:
    """x in the type that a product computes in: under autocast the lower one."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


@lru_cache(maxsize=256)
def most_fused_tokens(spec: QuantSpec, dtype: torch.dtype) -> int:
    """Most tokens of float32, bfloat16 or float16 that the CPU multiplies with the codes themselves.

    From there on the matrix product of torch makes up for the time that dequantizing takes.
    """
    return spec.core().most_fused_tokens(DTYPE_CODES[dtype])


def _fuses_on_cpu(x: Tensor, packed: Sequence[Any]) -> bool:
    """Is a product made without dequantizing the weight first?"""
    codes, _, scale, _, columns, quant_type, block_size, codebook = packed
    if x.dtype not in FLOAT_DTYPES or not x.device.type == codes.device.type == "cpu" or codes.ndim != 2:
        return False
    spec = _spec(quant_type, block_size, scale is not None, codebook)
    few: bool = 0 < x.numel() <= most_fused_tokens(spec, x.dtype) * columns
    return few


def _expect_width(name: str, meaning: str, x: Tensor, expected: int) -> None:
    if x.ndim == 0 or x.shape[-1] != expected:
        raise ValueError(_mismatch(name, meaning, x, expected))


@torch.library.register_fake("qlora_rs::linear_backward", lib=_library)
def _(grad: Tensor, codes: Tensor, *packed: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], packed[3]))


@_kernel("linear_backward")
def _linear_backward(grad: Tensor, codes: Tensor, *packed: Any) -> Tensor:
    if grad.is_cuda and grad.dtype in FLOAT_DTYPES:
        return device_linear_backward(grad, _device_weight(codes, *packed))
    return dense_linear_backward(grad, dequantized((codes, *packed), grad.dtype))


def _device_weight(
    codes: Tensor, absmax: Tensor, scale: Tensor | None, offset: Tensor | None, *rest: Any, moves: bool = False
) -> DeviceWeight:
    if not codes.is_cuda:
        raise ValueError(f"x is on a CUDA device, the packed weight is on {codes.device}: move one of them")
    spec = _checked(codes, absmax, scale, offset, *rest)
    return DeviceWeight(spec.core(), (codes, absmax, scale, offset), rest[0], moves)


def device_weight(
    codes: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    columns: int,
    spec: QuantSpec,
    *,
    moves: bool = False,
) -> DeviceWeight:
    """A packed weight on a CUDA device, its parts checked, for `device_linear`; ``moves``: copies bring it there."""
    return _device_weight(codes, absmax, scale, offset, columns, *arguments_of(spec), moves=moves)


def device_linear(x: Tensor, weight: DeviceWeight, bias: Tensor | None, dequantize: Dequantize | None = None) -> Tensor:
    """x W^T + b on a CUDA device, x float32, bfloat16 or float16; nothing is recorded for autograd.

    ``dequantize`` is called where no kernel multiplies with W as it is.
    """
    _expect_width("x", "in_features", x, weight.shape[-1])
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, the weight is on {weight.device}: move one of them")
    columns = weight.shape[-1]
    if columns and weight.fuses(x.numel() // columns, x.dtype):
        y: Tensor = weight.linear(x, None if bias is None else bias.to(x.dtype))
        return y
    return dense_linear(x, (weight.dequantize if dequantize is None else dequantize)(x.dtype), bias)


def device_linear_backward(grad: Tensor, weight: DeviceWeight) -> Tensor:
    """The gradient of x of `device_linear`: dY W, of one kernel where it is faster than dequantizing W first."""
    rows = weight.shape[-2]
    _expect_width("grad", "out_features", grad, rows)
    if rows and weight.fuses_backward(grad.numel() // rows, grad.dtype):
        grad_x: Tensor = weight.linear_backward(grad)
        return grad_x
    return dense_linear_backward(grad, weight.dequantize(grad.dtype))


def _save_packed(ctx: Any, inputs: tuple[Any, ...]) -> None:
    """Keep the packed tensors only: the dequantized weight is made again where it is needed."""
    _, codes, absmax, scale, offset, *ctx.rest = inputs
    ctx.save_for_backward(codes, absmax, scale, offset)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *inputs_, bias = inputs
    _save_packed(ctx, tuple(inputs_))
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qlora_rs.linear_backward(grad, *ctx.saved_tensors, *ctx.rest)
    if ctx.needs_input_grad[9]:
        grad_bias = bias_gradient(grad, ctx.bias_dtype)
    return grad_x, None, None, None, None, None, None, None, None, grad_bias


def _linear_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save_packed(ctx, inputs)


def _linear_backward_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # dX = dY W is linear in dY: its own gradient is the product with W^T again.
    grad_grad = torch.ops.qlora_rs.linear(grad, *ctx.saved_tensors, *ctx.rest, None)
    return grad_grad, None, None, None, None, None, None, None, None


torch.library.register_autograd("qlora_rs::linear", _linear_grad, setup_context=_linear_setup, lib=_library)
torch.library.register_autograd(
    "qlora_rs::linear_backward", _linear_backward_grad, setup_context=_linear_backward_setup, lib=_library
)


# flat_linear: the same over a W that is packed as one row of all its elements, as bitsandbytes has it


@torch.library.register_fake("qlora_rs::flat_linear", lib=_library)
def _(x: Tensor, codes: Tensor, absmax: Tensor, scale: Tensor | None, offset: Tensor | None, *rest: Any) -> Tensor:
    rows, columns = rest[:2]
    torch._check(x.shape[-1] == columns, lambda: _mismatch("x", "in_features", x, columns))
    return x.new_empty((*x.shape[:-1], rows))


@_kernel("flat_linear")
def _flat_linear(x: Tensor, *packed_and_bias: Any) -> Tensor:
    *packed, bias = packed_and_bias
    return flat_linear(x, packed, bias)


def flat_linear(x: Tensor, packed: Sequence[Any], bias: Tensor | None, dequantize: Dequantize | None = None) -> Tensor:
    """As `linear`, over a flat weight: no kernel multiplies with it as it is."""
    _expect_width("x", "in_features", x, packed[5])
    _expect_device(x, packed)
    return dense_linear(x, flat_dequantized(packed, x.dtype) if dequantize is None else dequantize(x.dtype), bias)


@torch.library.register_fake("qlora_rs::flat_linear_backward", lib=_library)
def _(grad: Tensor, *packed: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], packed[5]))


@_kernel("flat_linear_backward")
def _flat_linear_backward(grad: Tensor, *packed: Any) -> Tensor:
    _expect_device(grad, packed)
    return dense_linear_backward(grad, flat_dequantized(packed, grad.dtype))


def _expect_device(x: Tensor, packed: Sequence[Any]) -> None:
    if x.device != packed[0].device:
        raise ValueError(f"x is on {x.device}, the weight is on {packed[0].device}: move one of them")


def flat_dequantized(packed: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of the flat operator's arguments."""
    *parts, rows, columns, quant_type, block_size, codebook = packed
    row: Tensor = _dequantize(*parts, rows * columns, quant_type, block_size, codebook, dtype=dtype)
    return row.view(rows, columns)


def _flat_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *inputs_, bias = inputs
    _save_packed(ctx, tuple(inputs_))
    ctx.bias_dtype = None if bias is None else bias.dtype


def _flat_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qlora_rs.flat_linear_backward(grad, *ctx.saved_tensors, *ctx.rest)
    if ctx.needs_input_grad[10]:
        grad_bias = bias_gradient(grad, ctx.bias_dtype)
    return grad_x, *([None] * 9), grad_bias


def _flat_backward_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_grad = torch.ops.qlora_rs.flat_linear(grad, *ctx.saved_tensors, *ctx.rest, None)
    return grad_grad, *([None] * 9)


torch.library.register_autograd("qlora_rs::flat_linear", _flat_grad, setup_context=_flat_setup, lib=_library)
torch.library.register_autograd(
    "qlora_rs::flat_linear_backward", _flat_backward_grad, setup_context=_linear_backward_setup, lib=_library
)


def _register_autocast(name: str, device: str, key: str) -> None:
    @torch.library.impl(_library, name, key)
    def _autocast(x: Tensor, *packed_and_bias: Any) -> Tensor:
        if x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            y: Tensor = getattr(torch.ops.qlora_rs, name)(x, *packed_and_bias)
        return y


for _name in ("linear", "flat_linear"):
    _register_autocast(_name, "cpu", "AutocastCPU")
    _register_autocast(_name, "cuda", "AutocastCUDA")
