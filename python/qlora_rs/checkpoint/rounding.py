"""Where bitsandbytes rounds in its own way: codes that differ from ours although neither is a fault.

A value at the border between two codes takes either: bitsandbytes' CUDA code approximates the reciprocal of a block's
scale, its CPU code rounds FP4 at midpoints, and it does not always find the nearest code of a scale (docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from qlora_rs import reference
from qlora_rs.checkpoint.flat import scale_values
from qlora_rs.checkpoint.verdicts import PartDifference
from qlora_rs.packed import NESTED_BLOCK_SIZE, PackedTensor
from qlora_rs.quantization import quantize
from qlora_rs.spec import QuantSpec

# Of a normalized value, relative: a few units in the last place of float32, as an approximate reciprocal gives.
VALUE_TOLERANCE = 2.0**-21
# Of a scale's distance to its code over that to the nearest one; scales are normalized to [-1, 1]. Its CPU code looks
# codes up by the nearest of 65536 places, which moves both distances by up to half of what lies between two places; a
# hundredth is for its float32 arithmetic.
SCALE_TOLERANCE = 1.01 * 2 / 65535
# Of the offset, relative: a mean that is summed in float32, in whatever order. A group's scale is a largest distance
# from it, and moves as far.
MEAN_TOLERANCE = 1e-6


def with_borders(
    found: Sequence[PartDifference], weight: Tensor, made: PackedTensor, theirs: Mapping[str, Tensor], spec: QuantSpec
) -> list[PartDifference]:
    """The same differences, each with how many of them lie at a border.

    Args:
        found: by part.
        weight: the finite values, flat.
        made: the weight as it is packed here, as one row.
        theirs: bytes of the parts in the file.
        spec: how it is packed.
    """
    absmax = made.absmax.flatten()
    if made.absmax_scale is not None:
        absmax = quantize(weight.view(1, -1), replace(spec, double_quant=False)).absmax.flatten()
    result = []
    for each in found:
        count = 0
        if each.differing and each.part == "codes":
            count = codes_at_borders(weight, absmax, made.codes.flatten(), theirs["codes"], spec)
        elif each.differing and made.absmax_scale is not None and made.absmax_offset is not None:
            ours = made.absmax_scale.flatten(), made.absmax_offset
            scale, offset = (theirs[part].view(torch.float32) for part in ("absmax_scale", "absmax_offset"))
            if each.part == "absmax":
                differing = made.absmax.flatten() != theirs["absmax"]
                count = scales_at_borders(absmax, theirs["absmax"], scale, offset, ours, differing)
            else:
                pair = (scale, ours[0]) if each.part == "absmax_scale" else (offset, ours[1])
                count = int(torch.count_nonzero(_is_close(*pair, ours[1]) & (pair[0] != pair[1])))
        result.append(replace(each, at_border=count))
    return result


def codes_at_borders(weight: Tensor, absmax: Tensor, ours: Tensor, theirs: Tensor, spec: QuantSpec) -> int:
    """How many of the differing codes belong to a value at the border between the two.

    Args:
        weight: the values, flat, of whole blocks but for the last.
        absmax: float32 scales of their blocks.
        ours: packed codes of the values, uint8, two in a byte.
        theirs: the same from the file.
        spec: NF4 or FP4, and the block size.
    """
    places = (ours != theirs).nonzero().flatten()
    elements = torch.stack([2 * places, 2 * places + 1], dim=1).flatten()
    a, b = (
        torch.stack([packed[places] >> 4, packed[places] & 15], dim=1).flatten().long() for packed in (ours, theirs)
    )
    real = (a != b) & (elements < weight.numel())
    a, b, elements = a[real], b[real], elements[real]
    x = weight[elements].float() * (1 / absmax[elements // spec.block_size])
    if spec.quant_type == "fp4":
        rank = reference.FP4_BY_RANK.argsort()
        zero = (a % 8 == 0) | (b % 8 == 0)  # whose sign is free
        same_sign = zero | (a // 8 == b // 8)
        a, b, x = rank[a % 8], rank[b % 8], x.abs()
    else:
        same_sign = torch.ones_like(a, dtype=torch.bool)
    low, high = _borders(spec.quant_type)
    border = torch.minimum(a, b).clamp(max=len(low) - 1)
    slack = x.abs() * VALUE_TOLERANCE
    within = (x >= low[border] - slack) & (x <= high[border] + slack)
    return int(torch.count_nonzero((a == b) | (same_sign & ((a - b).abs() == 1) & within)))


def scales_at_borders(
    absmax: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, ours: tuple[Tensor, Tensor], differing: Tensor
) -> int:
    """How many of the differing codes of doubly quantized scales are as near to their scale as the nearest, or almost.

    Args:
        absmax: the scales, float32, flat.
        codes: their codes in the file.
        scale: group scales in the file.
        offset: in the file.
        ours: group scales and offset that were made again; if those of the file are others, nothing is explained.
        differing: which of the codes differ from ours.
    """
    if not (bool(_is_close(scale, ours[0], ours[1]).all()) and bool(_is_close(offset, ours[1], ours[1]).all())):
        return 0
    places = differing.nonzero().flatten()
    group = scale[places // NESTED_BLOCK_SIZE].double()
    x = (absmax[places].double() - offset.double()) / group
    table = scale_values().double()
    nearest = torch.searchsorted(table, x).clamp(1, len(table) - 1)
    best = torch.minimum((table[nearest - 1] - x).abs(), (table[nearest] - x).abs())
    # Where all scales of a group are the offset every code means the same.
    return int(torch.count_nonzero(((table[codes[places].long()] - x).abs() - best < SCALE_TOLERANCE) | (group == 0)))


def _is_close(theirs: Tensor, ours: Tensor, offset: Tensor) -> Tensor:
    """Whether an offset, or scales of groups, differ by no more than `offset` does in another order of summation."""
    slack = MEAN_TOLERANCE * torch.maximum(ours.double().abs(), offset.double().abs())
    return (theirs.double() - ours.double()).abs() <= slack


@lru_cache(maxsize=2)
def _borders(quant_type: str) -> tuple[Tensor, Tensor]:
    """Between neighbouring codes, from where to where a value may take either."""
    if quant_type == "fp4":
        magnitudes = reference.FP4[reference.FP4_BY_RANK]
        midpoints = (magnitudes[:-1] + magnitudes[1:]) / 2
        typed = reference.FP4_THRESHOLDS
        return torch.minimum(midpoints, typed), torch.maximum(midpoints, typed)
    midpoints = (reference.NF4[:-1] + reference.NF4[1:]) / 2
    return midpoints, midpoints
