"""Where tensors meet the extension: the only module that hands out addresses, dtype codes and thread counts.

Everything here works on dense CPU memory; `ops` dispatches by device and checks what users pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qlora_rs import _core
from qlora_rs.packed import PackedShapes
from qlora_rs.spec import QuantSpec

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _memory(tensor: Tensor) -> tuple[int, int]:
    """(address, number of elements) of a contiguous CPU tensor."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"expected contiguous CPU memory, got {tensor.device} with strides {tensor.stride()}")
    return tensor.data_ptr(), tensor.numel()


def _layout(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(experts, rows, columns) of a logical shape (..., out, in)."""
    rows = shape[-2] if len(shape) > 1 else 1
    return math.prod(shape[:-2]), rows, shape[-1]


def quantize(weight: Tensor, spec: QuantSpec, check_finite: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, absmax, group scales and offset of a CPU weight; the last two are empty without double quantization."""
    weight = weight.contiguous()
    layout = _layout(tuple(weight.shape))
    shapes = PackedShapes.of(tuple(weight.shape), spec)
    threads = torch.get_num_threads()
    codes = torch.empty(shapes.codes, dtype=torch.uint8)
    absmax = torch.empty(shapes.absmax, dtype=torch.float32)
    _core.quantize(
        spec.core(),
        layout=layout,
        source=_memory(weight),
        dtype=_DTYPE_CODES[weight.dtype],
        codes=_memory(codes),
        absmax=_memory(absmax),
        check_finite=check_finite,
        num_threads=threads,
    )
    if not spec.double_quant:
        return codes, absmax, torch.empty(0), torch.empty(0)
    nested = torch.empty(shapes.absmax, dtype=torch.uint8)
    scale = torch.empty(shapes.absmax_scale, dtype=torch.float32)
    offset = torch.empty(shapes.absmax_offset, dtype=torch.float32)
    _core.double_quantize(
        spec.core(),
        layout=layout,
        absmax=_memory(absmax),
        codes=_memory(nested),
        scale=_memory(scale),
        offset=_memory(offset),
        num_threads=threads,
    )
    return codes, nested, scale, offset


def dequantize(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    columns: int,
    spec: QuantSpec,
    dtype: torch.dtype,
) -> Tensor:
    """The weight of shape ``codes.shape[:-1] + (columns,)`` in ``dtype``, on the CPU."""
    shape = (*codes.shape[:-1], columns)
    codes, absmax = codes.contiguous(), absmax.contiguous()
    nested = absmax_scale is not None and absmax_offset is not None
    scale = absmax_scale.contiguous() if absmax_scale is not None else None
    offset = absmax_offset.contiguous() if absmax_offset is not None else None
    out = torch.empty(shape, dtype=dtype)
    _core.dequantize(
        spec.core(),
        layout=_layout(shape),
        codes=_memory(codes),
        absmax=_memory(absmax),
        scale=_memory(scale) if nested and scale is not None else None,
        offset=_memory(offset) if nested and offset is not None else None,
        out=_memory(out),
        dtype=_DTYPE_CODES[dtype],
        num_threads=torch.get_num_threads(),
    )
    return out
