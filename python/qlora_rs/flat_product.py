"""Products over a weight whose blocks run over the ends of its rows, as bitsandbytes has them."""

from __future__ import annotations

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

    __slots__ = ("_layout",)

    def __init__(self, shape: tuple[int, int], spec: QuantSpec) -> None:
        codebook = None if spec.codebook is None else list(spec.codebook)
        self._layout: tuple[Any, ...] = (*shape, spec.quant_type, spec.block_size, codebook)

    def __call__(self, x: Tensor, parts: direct.Parts, bias: Tensor | None) -> Tensor:
        """x (..., in), float32, bfloat16 or float16 (under autocast its type) -> (..., out) in that type.

        Only packed tensors are kept for the backward pass.

        Raises:
            ValueError: x has another width, or lies on another device.
        """
        y: Tensor = torch.ops.qlora_rs.flat_linear(x, *parts, *self._layout, bias)
        return y

    def gradient(self, grad: Tensor, parts: direct.Parts) -> Tensor:
        """The gradient of x: dY W."""
        grad_x: Tensor = torch.ops.qlora_rs.flat_linear_backward(grad, *parts, *self._layout)
        return grad_x
