"""Calls on a CUDA device past torch's dispatcher, where nothing is listening there.

An operator with an autograd formula in Python costs the host some 50 us a call, a product of one token takes the device
7. So a plain eager call goes straight to the kernels; whatever wants to see operators (compilers, tracers, dispatch
modes, functorch, fake tensors) gets them, from `ops`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_rs import _core, ops, recomputation
from qlora_rs._core import DeviceWeight
from qlora_rs.packed import PackedTensor
from qlora_rs.spec import QuantSpec

# Codes, absmax, absmax_scale, absmax_offset.
Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

_PLAIN = (Tensor, torch.nn.Parameter)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def applies(x: Tensor) -> bool:
    """May a product with x skip the dispatcher?"""
    return x.is_cuda and x.dtype in DTYPES and unwatched(x)


def unwatched(tensor: Tensor) -> bool:
    """Is this a tensor like any other, and does nobody watch the operators that are called?"""
    return not torch.compiler.is_compiling() and _core.unwatched(tensor)


def are_plain(parts: Parts) -> bool:
    """Are these tensors what they seem, not sharded ones, say?"""
    return all(part is None or type(part) in _PLAIN for part in parts)


def known_device_weight(packed: PackedTensor) -> DeviceWeight | None:
    """What `device_weight` last gave for a packed tensor, whose memory may have changed since."""
    weight: DeviceWeight | None = packed.__dict__.get("_device_weight")
    return weight


def device_weight(packed: PackedTensor) -> DeviceWeight:
    """What the kernels take of a packed tensor, made once for each."""
    parts = (packed.codes, packed.absmax, packed.absmax_scale, packed.absmax_offset)
    weight = known_device_weight(packed)
    if weight is None or not weight.holds(*parts):
        weight = ops.device_weight(*parts, packed.shape[-1], packed.spec)
        object.__setattr__(packed, "_device_weight", weight)  # beside the frozen fields
    return weight


def product_with_adapter(
    weight: DeviceWeight, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor | None:
    """x W^T + b and ``scaling x A^T B^T`` in one kernel; None where there is none. Nothing is recorded."""
    columns = weight.shape[-1]
    if x.ndim == 0 or x.shape[-1] != columns or not weight.fuses(x.numel() // max(1, columns), x.dtype):
        return None
    bias = None if bias is None else bias.to(x.dtype)
    xa = torch.nn.functional.linear(x, a.to(x.dtype))
    y: Tensor = weight.linear(x, bias, (xa, b.to(x.dtype), scaling))
    return y


class FrozenProduct:
    """x W^T + b and its gradient over one packed weight, whose parameters are looked up anew at each call.

    Attributes:
        columns: length of a row of W.
        spec: how W is quantized.
        known: the packed weight of the last call that looked for it.
    """

    __slots__ = ("columns", "known", "spec")

    def __init__(self, columns: int, spec: QuantSpec) -> None:
        self.columns = columns
        self.spec = spec
        self.known: DeviceWeight | None = None

    def weight(self, parts: Parts) -> DeviceWeight | None:
        """The packed weight of these parameters, checked again only when one of them is another, or has moved.

        None for tensors that are not what they seem (sharded ones, say): the operator knows how to refuse them.
        """
        weight = self.known
        if weight is None or not weight.holds(*parts):
            if not are_plain(parts):
                return None
            codes, absmax, scale, offset = parts
            weight = self.known = ops.device_weight(codes, absmax, scale, offset, self.columns, self.spec)
        return weight

    def __call__(self, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor | None:
        """The product, recorded for autograd where a gradient is wanted; None as `weight`."""
        weight = self.weight(parts)
        if weight is None:
            return None
        x = ops.autocasted(x)
        if ops.wants_gradient(x, bias):
            y: Tensor = _Recorded.apply(x, bias, self, weight, parts)
            return y
        return ops.device_linear(x, weight, bias)

    def with_adapter(
        self, x: Tensor, parts: Parts, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor | None:
        """`product_with_adapter` over the weight of these parameters; None where there is none."""
        weight = self.weight(parts)
        return None if weight is None else product_with_adapter(weight, x, bias, a, b, scaling)


class _Recorded(torch.autograd.Function):
    """Keeps the parameters, not their memory: sharding may free it until the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, product: FrozenProduct, weight: DeviceWeight, parts: Parts
    ) -> Tensor:
        ctx.product, ctx.parts, ctx.versions = product, parts, weight.versions
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.kept = kept = recomputation.kept_weights()
        if kept is None or not ctx.needs_input_grad[0]:
            return ops.device_linear(x, weight, bias)
        return ops.device_linear(x, weight, bias, partial(kept.weight, product, weight.dequantize))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        kept = None if ctx.kept is None else ctx.kept.take(ctx.product, grad.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = _Recorded.grad_x(ctx, grad, kept)
        if ctx.needs_input_grad[1]:
            grad_bias = ops.bias_gradient(grad, ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None

    @staticmethod
    def grad_x(ctx: Any, grad: Tensor, kept: Tensor | None) -> Tensor:
        # Where a gradient of this gradient is wanted, the operator has one.
        if not torch.is_grad_enabled() and applies(grad):
            weight = ctx.product.weight(ctx.parts)
            if weight is not None:
                if weight.versions != ctx.versions:
                    raise RuntimeError(
                        "a packed weight was modified in place between the forward and the backward pass"
                    )
                if kept is not None:
                    return ops.dense_linear_backward(grad, kept)
                return ops.device_linear_backward(grad, weight)
        product = ctx.product
        grad_x: Tensor = torch.ops.qlora_rs.linear_backward(
            grad, *ctx.parts, product.columns, *ops.arguments_of(product.spec)
        )
        return grad_x
