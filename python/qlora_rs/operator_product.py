"""Products by torch's operators: on the CPU, where somebody watches, and over flat weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_rs import direct, ops, recomputation, transformed_product
from qlora_rs.recomputation import KeptWeights
from qlora_rs.spec import QuantSpec


class OperatorProduct:
    """x W^T + b and its gradient over one packed weight, whose parameters come with each call.

    Only packed tensors are kept for the backward pass, and what a recomputation leaves to it where it may
    (`recomputation.keep_dequantized`).

    Args:
        shape: (out, in) of W.
        spec: how it is quantized.
        flat: whether its blocks run over the ends of rows, as bitsandbytes has them.
    """

    __slots__ = ("_layout", "flat")

    def __init__(self, shape: tuple[int, int], spec: QuantSpec, *, flat: bool = False) -> None:
        known_by_rows = shape if flat else shape[1:]
        self._layout: tuple[Any, ...] = (*known_by_rows, *ops.arguments_of(spec))
        self.flat = flat

    def __call__(self, x: Tensor, parts: direct.Parts, bias: Tensor | None) -> Tensor:
        """x (..., in), float32, bfloat16 or float16 (under autocast its type) -> (..., out) in that type.

        Raises:
            ValueError: x has another width, or lies on another device.
        """
        if transformed_product.is_wanted():
            return transformed_product.apply(self, ops.autocasted(x), parts, bias)
        kept = recomputation.kept_weights()
        if kept is not None and _recorded_here(x, parts, bias):
            y: Tensor = _Recorded.apply(ops.autocasted(x), bias, *parts, self, kept)
            return y
        return self.operator(x, parts, bias)

    def product(self, x: Tensor, parts: direct.Parts, bias: Tensor | None, dequantize: ops.Dequantize | None) -> Tensor:
        """The same past the operator, with another way to the weight; nothing is recorded for autograd."""
        multiply = ops.flat_linear if self.flat else ops.linear
        return multiply(x, (*parts, *self._layout), bias, dequantize)

    def gradient(self, grad: Tensor, parts: direct.Parts) -> Tensor:
        """The gradient of x: dY W."""
        operators = torch.ops.qlora_rs
        operator = operators.flat_linear_backward if self.flat else operators.linear_backward
        grad_x: Tensor = operator(grad, *parts, *self._layout)
        return grad_x

    def dequantize(self, parts: direct.Parts, dtype: torch.dtype) -> Tensor:
        """W (out, in)."""
        weight = ops.flat_dequantized if self.flat else ops.dequantized
        return weight((*parts, *self._layout), dtype)

    def operator(self, x: Tensor, parts: direct.Parts, bias: Tensor | None) -> Tensor:
        """The same by the operator, whoever watches."""
        operator = torch.ops.qlora_rs.flat_linear if self.flat else torch.ops.qlora_rs.linear
        y: Tensor = operator(x, *parts, *self._layout, bias)
        return y


def _recorded_here(x: Tensor, parts: direct.Parts, bias: Tensor | None) -> bool:
    """Is this a product to record, whose operator nobody would miss?"""
    here = x.device.type in ("cpu", "cuda")
    return ops.wants_gradient(x, bias) and here and direct.unwatched(x) and direct.are_plain(parts)


class _Recorded(torch.autograd.Function):
    """In a checkpointed call. It saves what the operator saves: one of both may be recomputed as the other."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        absmax: Tensor,
        scale: Tensor | None,
        offset: Tensor | None,
        product: OperatorProduct,
        kept: KeptWeights,
    ) -> Tensor:
        parts = (codes, absmax, scale, offset)
        ctx.save_for_backward(*parts)
        ctx.product, ctx.kept = product, kept
        ctx.bias_dtype = None if bias is None else bias.dtype
        dequantize = partial(product.dequantize, parts)
        if ctx.needs_input_grad[0]:
            dequantize = partial(kept.weight, product, dequantize)
        with torch.autocast(x.device.type, enabled=False):
            return product.product(x, parts, bias, dequantize)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors  # NOTE: first; this is what recomputes
        weight = ctx.kept.take(ctx.product, grad.dtype)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            # Where a gradient of this gradient is wanted, the operator has one.
            if weight is None or torch.is_grad_enabled() or not direct.unwatched(grad):
                grad_x = ctx.product.gradient(grad, parts)
            else:
                grad_x = ops.dense_linear_backward(grad, weight)
        if ctx.needs_input_grad[1]:
            grad_bias = ops.bias_gradient(grad, ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None, None, None, None
