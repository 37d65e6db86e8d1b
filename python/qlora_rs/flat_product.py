"""Products over a weight whose blocks run over the ends of its rows, as bitsandbytes has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_rs import direct
from qlora_rs.spec import QuantSpec

# Rows and columns of the weight, quant_type, block_size, codebook.
Layout = tuple[int, int, str, int, Sequence[float] | None]


class FlatProduct:
    """x W^T + b and its gradient over a flat W, which is dequantized for each: no kernel multiplies with it as it is.

    Args:
        shape: (out, in) of W.
        spec: how it is quantized.
    """

    __slots__ = ("_layout",)

    def __init__(self, shape: tuple[int, int], spec: QuantSpec) -> None:
        self._layout: Layout = (*shape, spec.quant_type, spec.block_size, spec.codebook)

    def __call__(self, x: Tensor, parts: direct.Parts, bias: Tensor | None) -> Tensor:
        """x (..., in), float32, bfloat16 or float16 (under autocast its type) -> (..., out) in that type.

        Raises:
            ValueError: x has another width, or lies on another device.
        """
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype in direct.DTYPES:
            x = x.to(torch.get_autocast_dtype(kind))
        y: Tensor = _Recorded.apply(x, bias, *self._layout, *parts)
        return y

    def product(self, x: Tensor, parts: direct.Parts, bias: Tensor | None) -> Tensor:
        """x W^T + b, of which nothing is kept."""
        return _product(x, parts, bias, self._layout)

    def gradient(self, grad: Tensor, parts: direct.Parts) -> Tensor:
        """The gradient of x: dY W."""
        return grad @ _weight(parts, grad.dtype, self._layout)


def _weight(parts: Any, dtype: torch.dtype, layout: Layout) -> Tensor:
    rows, columns, quant_type, block_size, codebook = layout
    values = None if codebook is None else list(codebook)
    row: Tensor = torch.ops.qlora_rs.dequantize(*parts, rows * columns, quant_type, block_size, values, dtype)
    return row.view(rows, columns)


def _product(x: Tensor, parts: Any, bias: Tensor | None, layout: Layout) -> Tensor:
    columns = layout[1]
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"x has shape {list(x.shape)}; its last dimension must be in_features = {columns}")
    if x.device != parts[0].device:
        raise ValueError(f"x is on {x.device}, the weight is on {parts[0].device}: move one of them")
    return torch.nn.functional.linear(x, _weight(parts, x.dtype, layout), None if bias is None else bias.to(x.dtype))


class _Recorded(torch.autograd.Function):
    """Keeps the packed parts only: W is made again where it is needed. Plain arguments, which compilers can follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *layout_and_parts: Any) -> Tensor:
        layout, parts = layout_and_parts[:5], layout_and_parts[5:]
        ctx.layout = layout
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*parts)
        return _product(x, parts, bias, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _weight(ctx.saved_tensors, grad.dtype, ctx.layout)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum_to_size(grad.shape[-1:]).to(ctx.bias_dtype)
        return grad_x, grad_bias, *([None] * 9)
