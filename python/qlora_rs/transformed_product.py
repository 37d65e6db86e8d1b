"""Products under `torch.func`'s transforms: they take functions of this kind, and no operators of libraries."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qlora_rs import ops
from qlora_rs.direct import Parts

_KINDS = torch._C._functorch.TransformType
_TRANSFORMS = (_KINDS.Vmap, _KINDS.Grad, _KINDS.Jvp)


class Product(Protocol):
    """x W^T + b over a packed W, and its gradient, by operators."""

    def operator(self, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
        """The product."""

    def gradient(self, grad: Tensor, parts: Parts) -> Tensor:
        """The gradient of x: dY W."""


def is_wanted(*, slopes: bool = False) -> bool:
    """Is a transform under way that differentiates or batches? A compiler has to see the operators.

    ``slopes``: forward-mode gradients without a transform count too.
    """
    if torch.compiler.is_compiling():
        return False
    if slopes and forward_ad._current_level >= 0:
        return True
    transform = torch._C._functorch.peek_interpreter_stack()
    return transform is not None and transform.key() in _TRANSFORMS


def apply(product: Product, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """The product, which any transform may differentiate or batch."""
    y: Tensor = _Forward.apply(x, bias, *parts, product)
    return y


def _batched(function: Any, info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
    """``function`` over a batch: at once where the first input alone has one, which is a dimension like any other."""
    first, *others = in_dims
    if first is not None and all(dim is None for dim in others):
        return function.apply(inputs[0].movedim(first, 0), *inputs[1:]), 0
    results = [
        function.apply(
            *(each if dim is None else each.select(dim, i) for each, dim in zip(inputs, in_dims, strict=True))
        )
        for i in range(info.batch_size)
    ]
    return torch.stack(results), 0


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        absmax: Tensor,
        scale: Tensor | None,
        offset: Tensor | None,
        product: Product,
    ) -> Tensor:
        return product.operator(x, (codes, absmax, scale, offset), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, bias, *parts, ctx.product = inputs
        ctx.save_for_backward(*parts)
        ctx.save_for_forward(*parts)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _Backward.apply(grad, *ctx.saved_tensors, ctx.product)
        if ctx.needs_input_grad[1]:
            grad_bias = ops.bias_gradient(grad, ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
        return apply(ctx.product, x, ctx.saved_tensors, bias)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        return _batched(_Forward, info, in_dims, *inputs)


class _Backward(torch.autograd.Function):
    """dY W is linear in dY: its own gradient is the product with W^T again."""

    @staticmethod
    def forward(
        grad: Tensor, codes: Tensor, absmax: Tensor, scale: Tensor | None, offset: Tensor | None, product: Product
    ) -> Tensor:
        return product.gradient(grad, (codes, absmax, scale, offset))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *parts, ctx.product = inputs
        ctx.save_for_backward(*parts)
        ctx.save_for_forward(*parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return apply(ctx.product, grad, ctx.saved_tensors, None), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad: Tensor, *_: Any) -> Tensor:
        slope: Tensor = _Backward.apply(grad, *ctx.saved_tensors, ctx.product)
        return slope

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        return _batched(_Backward, info, in_dims, *inputs)
