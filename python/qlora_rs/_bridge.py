"""Where tensors meet the extension: weights' addresses, dtype codes and streams are handed out here.

Every function takes tensors of one device, CPU or CUDA; `ops` checks what users pass. Work on a CUDA device is
queued on torch's current stream, its memory comes from torch's allocator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from qlora_rs import _core
from qlora_rs._addresses import DTYPE_CODES, memory_of, queue_of
from qlora_rs._core import DeviceWeight
from qlora_rs.packed import PackedShapes
from qlora_rs.spec import QuantSpec


def _optional(tensor: Tensor | None) -> tuple[int, int] | None:
    return None if tensor is None else memory_of(tensor)


def _layout(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(experts, rows, columns) of a logical shape (..., out, in)."""
    rows = shape[-2] if len(shape) > 1 else 1
    return math.prod(shape[:-2]), rows, shape[-1]


def checksum(tensor: Tensor) -> str:
    """XXH3 (128 bits, hex) of the bytes of a contiguous CPU tensor."""
    address, elements = memory_of(tensor)
    return _core.checksum((address, elements * tensor.element_size()))


def quantize(weight: Tensor, spec: QuantSpec, check_finite: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, absmax, group scales and offset of a weight; the last two are empty without double quantization."""
    weight = weight.contiguous()
    device, shapes = weight.device, PackedShapes.of(tuple(weight.shape), spec)
    codes = torch.empty(shapes.codes, dtype=torch.uint8, device=device)
    absmax = torch.empty(shapes.absmax, dtype=torch.float32, device=device)
    nested = absmax
    scale, offset = absmax.new_empty(0), absmax.new_empty(0)  # an operator's outputs must not be one tensor
    if spec.double_quant:
        nested = torch.empty(shapes.absmax, dtype=torch.uint8, device=device)
        scale = torch.empty(shapes.absmax_scale, dtype=torch.float32, device=device)
        offset = torch.empty(shapes.absmax_offset, dtype=torch.float32, device=device)
    run = _quantize_cuda if device.type == "cuda" else _quantize_cpu
    run(weight, spec, check_finite, _Quantized(codes, absmax, nested, scale, offset))
    return codes, nested, scale, offset


class _Quantized(NamedTuple):
    """What quantizing fills; without double quantization ``nested`` is ``absmax`` and the last two are empty."""

    codes: Tensor
    absmax: Tensor
    nested: Tensor
    scale: Tensor
    offset: Tensor


def _quantize_cpu(weight: Tensor, spec: QuantSpec, check_finite: bool, out: _Quantized) -> None:
    layout, threads = _layout(tuple(weight.shape)), torch.get_num_threads()
    _core.quantize(
        spec.core(),
        layout=layout,
        source=memory_of(weight),
        dtype=DTYPE_CODES[weight.dtype],
        codes=memory_of(out.codes),
        absmax=memory_of(out.absmax),
        check_finite=check_finite,
        num_threads=threads,
    )
    if spec.double_quant:
        _core.double_quantize(
            spec.core(),
            layout=layout,
            absmax=memory_of(out.absmax),
            codes=memory_of(out.nested),
            scale=memory_of(out.scale),
            offset=memory_of(out.offset),
            num_threads=threads,
        )


def _quantize_cuda(weight: Tensor, spec: QuantSpec, check_finite: bool, out: _Quantized) -> None:
    core, layout = spec.core(), _layout(tuple(weight.shape))
    scratch = torch.empty(_core.cuda_quantize_scratch(core, layout), dtype=torch.int64, device=weight.device)
    _core.cuda_quantize(
        core,
        queue=queue_of(weight.device),
        layout=layout,
        source=memory_of(weight),
        dtype=DTYPE_CODES[weight.dtype],
        codes=memory_of(out.codes),
        absmax=memory_of(out.absmax),
        nested=(memory_of(out.nested), memory_of(out.scale), memory_of(out.offset)) if spec.double_quant else None,
        scratch=memory_of(scratch),
        check_finite=check_finite,
    )
    if check_finite and scratch.view(torch.int32)[0].item():
        quantize(weight.cpu(), spec, check_finite)  # raises the error that counts and locates them


def dequantize(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    columns: int,
    spec: QuantSpec,
    dtype: torch.dtype,
) -> Tensor:
    """The weight of shape ``codes.shape[:-1] + (columns,)`` in ``dtype``, on the device of the codes."""
    if codes.device.type == "cuda":
        weight = DeviceWeight(spec.core(), (codes, absmax, absmax_scale, absmax_offset), columns, False)
        dense: Tensor = weight.dequantize(dtype)
        return dense
    codes, absmax = codes.contiguous(), absmax.contiguous()
    scale = None if absmax_scale is None else absmax_scale.contiguous()
    offset = None if absmax_offset is None else absmax_offset.contiguous()
    shape = (*codes.shape[:-1], columns)
    out = torch.empty(shape, dtype=dtype)
    _core.dequantize(
        spec.core(),
        layout=_layout(shape),
        codes=memory_of(codes),
        absmax=memory_of(absmax),
        scale=_optional(scale),
        offset=_optional(offset),
        out=memory_of(out),
        dtype=DTYPE_CODES[dtype],
        num_threads=torch.get_num_threads(),
    )
    return out


def linear_cpu(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    spec: QuantSpec,
    bias: Tensor | None,
) -> Tensor:
    """x W^T + bias (of x's dtype) for a packed matrix in CPU memory, which is never dequantized as a whole."""
    x, codes, absmax = x.contiguous(), codes.contiguous(), absmax.contiguous()
    scale = None if absmax_scale is None else absmax_scale.contiguous()
    offset = None if absmax_offset is None else absmax_offset.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty((*x.shape[:-1], codes.shape[0]), dtype=x.dtype)
    _core.linear(
        spec.core(),
        layout=_layout((codes.shape[0], x.shape[-1])),
        codes=memory_of(codes),
        absmax=memory_of(absmax),
        scale=_optional(scale),
        offset=_optional(offset),
        x=memory_of(x),
        bias=_optional(bias),
        y=memory_of(y),
        dtype=DTYPE_CODES[x.dtype],
        num_threads=torch.get_num_threads(),
    )
    return y


def warmup(device: torch.device) -> None:
    """Compile every kernel for a CUDA device now."""
    current = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    _core.cuda_warmup(current if device.index is None else device.index)


# The fastest in benchmarks/device_load.py's sweep; each thread has two buffers, and pinning larger ones costs more time
# than it saves.
_LOAD_THREADS = 8
_LOAD_BUFFER_BYTES = 2 << 20


# Fills tensors; told how far it is by (bytes done, bytes in all) where a function is given.
Load = Callable[[Callable[[int, int], object] | None], None]


def span(tensor: Tensor) -> tuple[int, int]:
    """What tells the memory of one contiguous tensor from that of others."""
    return tensor.data_ptr(), tensor.nbytes


def loader(files: Mapping[str, Sequence[tuple[str, Tensor]]], device: torch.device) -> Load:
    """A call that fills tensors of a CUDA device from safetensors files: by path, names in the file and their places.

    It may be made on any thread, with a function that is told (bytes done, bytes in all) and ends it by raising; all
    values are there when it returns. It waits for what is queued on the stream that is torch's current one now.
    """

    def place(tensor: Tensor) -> tuple[int, int]:
        address, elements = memory_of(tensor)
        return address, elements * tensor.element_size()

    places = [(path, [(name, place(tensor)) for name, tensor in tensors]) for path, tensors in files.items()]
    queue, threads = queue_of(device), min(_LOAD_THREADS, torch.get_num_threads())

    def load(progress: Callable[[int, int], object] | None) -> None:
        _core.cuda_load(places, queue=queue, buffer_bytes=_LOAD_BUFFER_BYTES, num_threads=threads, progress=progress)

    return load


def stream_of(device: torch.device) -> int:
    """Handle of torch's current stream; on the CPU, where work is done when it is asked for, 0."""
    return 0 if device.type == "cpu" else queue_of(device)[1]


# DLPack's (code, bits); other types are taken through as bytes.
_DLPACK_TYPES = {
    torch.float64: (2, 64),
    torch.float32: (2, 32),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.int64: (0, 64),
    torch.int32: (0, 32),
    torch.int16: (0, 16),
    torch.int8: (0, 8),
    torch.uint8: (1, 8),
}


def pool_tensor(
    pool: _core.Pool, address: int, *, host: bool, shape: torch.Size, dtype: torch.dtype, owner: object
) -> Tensor:
    """Contiguous memory of a paged pool, on its device or the host, as a tensor, which keeps its owner alive."""
    known = _DLPACK_TYPES.get(dtype)
    if known is None:
        flat = torch.Size((shape.numel() * dtype.itemsize,))
        return pool_tensor(pool, address, host=host, shape=flat, dtype=torch.uint8, owner=owner).view(dtype).view(shape)
    return from_dlpack(pool.capsule(address, host=host, shape=shape, dtype=known, owner=owner))
