"""A quantized tensor as a value."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from qlora_rs import _core
from qlora_rs.spec import QuantSpec

NESTED_BLOCK_SIZE: int = _core.NESTED_BLOCK_SIZE
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PackedShapes:
    """Shapes of the four tensors of a packed weight of logical shape (..., out, in)."""

    codes: tuple[int, ...]
    absmax: tuple[int, ...]
    absmax_scale: tuple[int, ...]
    absmax_offset: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], spec: QuantSpec, *, flat: bool = False) -> PackedShapes:
        """Shapes for a weight of ``shape`` under ``spec`` (rows aligned: a block never crosses a row).

        A ``flat`` weight is packed as one row of all its elements.
        """
        *lead, columns = (1, math.prod(shape)) if flat else shape
        blocks = -(-columns // spec.block_size)
        blocks_per_expert = (lead[-1] if lead else 1) * blocks
        experts = tuple(lead[:-1])
        return cls(
            codes=(*lead, columns if spec.bits == 8 else -(-columns // 2)),
            absmax=(*lead, blocks),
            absmax_scale=(*experts, -(-blocks_per_expert // NESTED_BLOCK_SIZE)),
            absmax_offset=experts or (1,),
        )


def is_flat_layout(codes: tuple[int, ...], shape: tuple[int, ...], spec: QuantSpec) -> bool:
    """Whether codes of this shape are those of a weight of ``shape`` that is packed as one row.

    >>> is_flat_layout((1, 150), (3, 100), QuantSpec()), is_flat_layout((3, 50), (3, 100), QuantSpec())
    (True, False)
    """
    by_rows, flat = PackedShapes.of(shape, spec), PackedShapes.of(shape, spec, flat=True)
    return codes == flat.codes != by_rows.codes


@dataclass(frozen=True)
class PackedTensor:
    """A weight of logical shape (..., out, in), quantized blockwise along ``in``.

    Attributes:
        codes: uint8 ``[..., out, ceil(in/2)]``, even element in the high nibble; 8-bit types ``[..., out, in]``.
        absmax: float32 ``[..., out, ceil(in/block)]``, or uint8 codes of the same shape when doubly quantized.
        absmax_scale: float32 ``[..., ceil(blocks/256)]``, a scale per 256 consecutive blocks, or None.
        absmax_offset: float32 ``[...]`` (one per expert; ``[1]`` for a 2-D weight), or None.
        spec: how it was quantized.
        shape: logical shape of the weight.
        dtype: what was quantized (float32, bfloat16 or float16).
        flat: blocks run over the ends of rows, as bitsandbytes has them: the parts are those of a weight (1, elements).

    Raises:
        ValueError: the parts do not fit together.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    absmax_scale: torch.Tensor | None
    absmax_offset: torch.Tensor | None
    spec: QuantSpec
    shape: tuple[int, ...]
    dtype: torch.dtype
    flat: bool = False

    def __post_init__(self) -> None:
        """Check once; inner code takes valid tensors."""
        if not self.shape:
            raise ValueError("a packed tensor has at least one dimension")
        if self.dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype is float32, bfloat16 or float16; got {self.dtype}")
        shapes = PackedShapes.of(tuple(self.shape), self.spec, flat=self.flat)
        _expect("codes", self.codes, torch.uint8, shapes.codes)
        _expect("absmax", self.absmax, torch.uint8 if self.spec.double_quant else torch.float32, shapes.absmax)
        if self.spec.double_quant:
            _expect("absmax_scale", self.absmax_scale, torch.float32, shapes.absmax_scale)
            _expect("absmax_offset", self.absmax_offset, torch.float32, shapes.absmax_offset)
        elif self.absmax_scale is not None or self.absmax_offset is not None:
            raise ValueError("absmax_scale and absmax_offset belong to doubly quantized tensors only")

    def __getstate__(self) -> dict[str, Any]:
        """Only the fields: what has been derived from this object's memory does not travel."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def device(self) -> torch.device:
        """Device of the codes; all parts are on it."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        parts = (self.codes, self.absmax, self.absmax_scale, self.absmax_offset)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def bits_per_weight(self) -> float:
        """Storage bits per element: 4.127 for large NF4 weights in blocks of 64, doubly quantized."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def as_row(self) -> PackedTensor:
        """A flat weight as the one row of all its elements that it is packed as, in the same memory."""
        return replace(self, shape=(1, math.prod(self.shape)), flat=False) if self.flat else self

    def to(self, device: torch.device | str) -> PackedTensor:
        """The same tensor with every part on ``device``."""
        return replace(
            self,
            codes=self.codes.to(device),
            absmax=self.absmax.to(device),
            absmax_scale=None if self.absmax_scale is None else self.absmax_scale.to(device),
            absmax_offset=None if self.absmax_offset is None else self.absmax_offset.to(device),
        )


def _expect(name: str, tensor: torch.Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor is None:
        raise ValueError(f"{name} is missing; expected {dtype} {list(shape)}")
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
