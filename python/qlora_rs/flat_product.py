"""Products over a weight whose blocks run over the ends of its rows, as bitsandbytes has them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qlora_rs import direct
from qlora_rs.spec import QuantSpec


class FlatProduct:
    """x W^T + b and its gradient over a flat W, which is dequantized for each: no kernel multiplies with it as it is.

    Args:
        shape: (out, in) of W.
        spec: how it is quantized.
    """

    __slots__ = ("_format", "shape")

    def __init__(self, shape: tuple[int, int], spec: QuantSpec) -> None:
        self.shape = shape
        codebook = None if spec.codebook is None else list(spec.codebook)
        self._format = math.prod(shape), spec.quant_type, spec.block_size, codebook

    def weight(self, parts: direct.Parts, dtype: torch.dtype) -> Tensor:
        """W in ``dtype``."""
        row: Tensor = torch.ops.qlora_rs.dequantize(*parts, *self._format, dtype)
        return row.view(self.shape)

    def __call__(self, x: Tensor, parts: direct.Parts, bias: Tensor | None) -> Tensor:
        """x (..., in), float32, bfloat16 or float16 (under autocast its type) -> (..., out) in that type.

        Raises:
            ValueError: x has another width, or lies on another device.
        """
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype in direct.DTYPES:
            x = x.to(torch.get_autocast_dtype(kind))
        y: Tensor = _Recorded.apply(x, bias, self, *parts)
        return y

    def product(self, x: Tensor, parts: direct.Parts, bias: Tensor | None) -> Tensor:
        """x W^T + b, of which nothing is kept."""
        if x.ndim == 0 or x.shape[-1] != self.shape[1]:
            raise ValueError(f"x has shape {list(x.shape)}; its last dimension must be in_features = {self.shape[1]}")
        if x.device != parts[0].device:
            raise ValueError(f"x is on {x.device}, the weight is on {parts[0].device}: move one of them")
        return torch.nn.functional.linear(x, self.weight(parts, x.dtype), None if bias is None else bias.to(x.dtype))

    def gradient(self, grad: Tensor, parts: direct.Parts) -> Tensor:
        """The gradient of x: dY W."""
        return grad @ self.weight(parts, grad.dtype)


class _Recorded(torch.autograd.Function):
    """Keeps the packed parts only: W is made again where it is needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, product: FlatProduct, *parts: Any) -> Tensor:
        ctx.product = product
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*parts)
        codes, absmax, scale, offset = parts
        return product.product(x, (codes, absmax, scale, offset), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.product.gradient(grad, ctx.saved_tensors)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum_to_size(grad.shape[-1:]).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None, None, None
