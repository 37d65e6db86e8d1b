"""Quantize one tensor and bring it back."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_rs import _bridge, direct, ops
from qlora_rs.errors import UnsupportedError, first_line
from qlora_rs.packed import FLOAT_DTYPES, PackedTensor
from qlora_rs.spec import QuantSpec

NONFINITE = ("raise", "propagate")
_DEFAULT_SPEC = QuantSpec()


def quantize(weight: Tensor, spec: QuantSpec | None = None, *, nonfinite: str = "raise") -> PackedTensor:
    """Quantize a weight blockwise along its last dimension.

    Args:
        weight: float32, bfloat16 or float16 of shape ``(..., out, in)``; strided and empty tensors are fine.
        spec: data type, block size, double quantization; NF4 in doubly quantized blocks of 64 by default.
        nonfinite: ``"raise"``, or ``"propagate"``: a block with NaN or Inf comes back as a block of NaN (doubly
            quantized: its whole group of 256 blocks, since 8-bit scales share one float32 scale).

    Raises:
        NonFiniteError: the weight holds NaN or Inf (count and first flat index are named).
        TypeError, ValueError: wrong dtype or arguments.
        UnsupportedError: the tensor's device has no kernel.

    >>> packed = quantize(torch.tensor([[10.0, -3, 5, 4]]), QuantSpec(codebook=[-1, 0.3, 0.5, 1], double_quant=False))
    >>> dequantize(packed).tolist()
    [[10.0, 3.0, 5.0, 5.0]]
    """
    spec = _DEFAULT_SPEC if spec is None else spec
    if nonfinite not in NONFINITE:
        raise ValueError(f"nonfinite is one of {', '.join(NONFINITE)}; got {nonfinite!r}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a torch.Tensor; got {type(weight).__name__}")
    if weight.ndim == 0 or weight.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"weight is float32, bfloat16 or float16 of shape (..., out, in); got {weight.dtype} {list(weight.shape)}"
        )
    _require_device(weight)
    codebook = None if spec.codebook is None else list(spec.codebook)
    codes, absmax, scale, offset = torch.ops.qlora_rs.quantize(
        weight.detach(), spec.quant_type, spec.block_size, spec.double_quant, codebook, nonfinite == "raise"
    )
    return PackedTensor(
        codes=codes,
        absmax=absmax,
        absmax_scale=scale if spec.double_quant else None,
        absmax_offset=offset if spec.double_quant else None,
        spec=spec,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
    )


def dequantize(packed: PackedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of ``packed.shape`` in ``dtype`` (by default what was quantized): one float32 product, rounded once.

    Raises:
        TypeError: ``dtype`` is not a floating type that has a kernel.
        ValueError: a code lies outside the codebook (on a CUDA device, where asking would wait for it: NaN there).
    """
    dtype = packed.dtype if dtype is None else dtype
    known = None if torch.compiler.is_compiling() else direct.known_device_weight(packed)
    if known is not None:
        plain: Tensor | None = known.plain_dequantize(
            dtype, packed.codes, packed.absmax, packed.absmax_scale, packed.absmax_offset
        )
        if plain is not None:
            return plain
    if packed.flat:
        return dequantize(packed.as_row(), dtype).view(packed.shape)
    if packed.codes.is_cuda and dtype in FLOAT_DTYPES and direct.unwatched(packed.codes):
        dense: Tensor = direct.device_weight(packed).dequantize(dtype)
        return dense
    _require_device(packed.codes)
    weight: Tensor = torch.ops.qlora_rs.dequantize(
        packed.codes,
        packed.absmax,
        packed.absmax_scale,
        packed.absmax_offset,
        packed.shape[-1],
        *ops.arguments_of(packed.spec),
        dtype,
    )
    return weight


def warmup(device: torch.device | str = "cuda") -> None:
    """Compile every kernel for a CUDA device now, so that none is compiled in a graph capture or a timed step.

    Otherwise the driver compiles a kernel when it is first used; it keeps the result on disk for later processes.

    Raises:
        DeviceError: there is no such device, or its driver cannot compile the kernels.
        ValueError: it is not a CUDA device, or none that torch knows.
    """
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r}: {first_line(error)}; it is cuda or cuda:N") from None
    if device.type != "cuda":
        raise ValueError(f"only kernels of CUDA devices are compiled; got {device}")
    _bridge.warmup(device)


def _require_device(tensor: Tensor) -> None:
    if tensor.device.type not in ops.DEVICES:
        raise UnsupportedError(
            f"no kernel for tensors on {tensor.device}: this version computes on {', '.join(ops.DEVICES)}; "
            "move the tensor there"
        )
