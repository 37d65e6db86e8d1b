"""The parts of a packed weight as ranges of bytes, whether it is stored by rows or in bitsandbytes' flat layout."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_rs.checkpoint.inspection import TensorRow
from qlora_rs.checkpoint.slices import SliceReader
from qlora_rs.packed import PackedTensor
from qlora_rs.spec import QuantSpec

_NATIVE = {"absmax": "_absmax", "absmax_scale": "_absmax_scale", "absmax_offset": "_absmax_offset"}
_FLAT = {"absmax": ".absmax", "absmax_scale": ".nested_absmax"}


@dataclass(frozen=True)
class StoredPart:
    """Codes, scales, group scales or offsets of a weight.

    Attributes:
        part: ``"codes"``, ``"absmax"``, ``"absmax_scale"`` or ``"absmax_offset"``.
        bits: of an element.
        nbytes: bytes of all.
        read: bytes from the first of two numbers on, as many as the second, as uint8.
    """

    part: str
    bits: int
    nbytes: int
    read: Callable[[int, int], Tensor]


def stored_parts(reader: SliceReader, row: TensorRow, spec: QuantSpec) -> list[StoredPart]:
    """The parts of a packed weight in the order of their names above.

    A weight of bitsandbytes has one offset for all experts; where its blocks end with its rows it is given once for
    each, as the native layout has it.
    """
    flat = reader.flat.get(row.name)
    suffixes = _NATIVE if flat is None else _FLAT
    widths = {"absmax": 8 if spec.double_quant else 32, "absmax_scale": 32, "absmax_offset": 32}
    parts = [_part(reader, row.name, "codes", spec.bits)]
    for part, suffix in suffixes.items():
        if row.name + suffix in reader.source.tensors:
            parts.append(_part(reader, row.name + suffix, part, widths[part]))
    if flat is not None and flat.offset is not None:
        # A shape may claim any number of experts that hold nothing.
        experts = 1 if row.flat or not row.elements else math.prod(row.shape[:-2])
        offsets = struct.pack("<f", flat.offset) * experts
        content = torch.frombuffer(bytearray(offsets), dtype=torch.uint8)
        parts.append(StoredPart("absmax_offset", 32, len(offsets), lambda start, count: content[start : start + count]))
    return parts


def _part(reader: SliceReader, name: str, part: str, bits: int) -> StoredPart:
    size = reader.source.tensors[name].nbytes
    return StoredPart(part, bits, size, lambda start, count: reader.read(name, start, count))


def made_parts(packed: PackedTensor) -> list[tuple[str, Tensor]]:
    """The parts of a packed weight in memory, by the same names in the same order."""
    names = ("codes", "absmax", "absmax_scale", "absmax_offset")
    parts = (packed.codes, packed.absmax, packed.absmax_scale, packed.absmax_offset)
    return [(name, part) for name, part in zip(names, parts, strict=True) if part is not None]
