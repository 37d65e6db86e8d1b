"""Integer codes with a scale and a zero point for each group of columns, which is how GPTQ, AWQ and compressed-tensors
quantize: they differ only in where the bits lie.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_rs.checkpoint.foreign import ForeignWeight, ReadStored, tensor_error
from qlora_rs.checkpoint.source import Source, StoredTensor

# Codes of any width start a word again after so many.
PERIOD = 32


@dataclass(frozen=True)
class GroupedWeight(ForeignWeight):
    """Dequantizes as ``scale * (code - zero_point)``, one product rounded once to the scales' type.

    Attributes:
        source: the folder, for messages.
        bits: of a code.
        groups: how many there are in a row.
        group_size: columns that follow each other and share a scale; the last group of a row may have fewer.
    """

    source: Source
    bits: int
    groups: int
    group_size: int

    @abstractmethod
    def integers(self, stored: ReadStored, first: int, count: int) -> tuple[Tensor, Tensor | int, Tensor]:
        """Codes [count, in] and zero points [count, groups] (or one for all) as uint8, scales [count, groups]."""

    def group_indices(self, stored: ReadStored) -> Tensor | None:
        """The group of each column, int64 [in]; None where columns are in order."""
        part = self.parts.get("g_idx", self.parts.get("weight_g_idx"))
        return None if part is None else self.checked_indices(part, stored(part))

    def checked_indices(self, part: StoredTensor, indices: Tensor) -> Tensor | None:
        """The stored indices if they are groups of this weight, or None where they say nothing new.

        Raises:
            FormatError: one is none of the groups.
        """
        low, high = (int(value) for value in torch.aminmax(indices))
        if low < 0 or high >= self.groups:
            wrong = low if low < 0 else high
            raise tensor_error(self.source, part, f"holds group {wrong}, but there are {self.groups}")
        columns = torch.arange(self.shape[1], dtype=indices.dtype)
        return None if torch.equal(indices, columns // self.group_size) else indices.long()

    def rows(self, stored: ReadStored, first: int, count: int) -> Tensor:
        """See `ForeignWeight.rows`."""
        codes, zeros, scales = self.integers(stored, first, count)
        indices = self.group_indices(stored)
        columns, size = self.shape[1], self.group_size
        if indices is None and columns == self.groups * size:
            shape = (count, self.groups, size)
            zeros = zeros if isinstance(zeros, int) else zeros.unsqueeze(2)
            return _scaled(codes.view(shape), zeros, scales.unsqueeze(2)).view(count, columns)
        if indices is None:
            indices = torch.arange(columns) // size
        zeros = zeros if isinstance(zeros, int) else zeros.index_select(1, indices)
        return _scaled(codes, zeros, scales.index_select(1, indices))


def _scaled(codes: Tensor, zeros: Tensor | int, scales: Tensor) -> Tensor:
    wide = zeros if isinstance(zeros, int) else zeros.short()
    return (codes.short() - wide).to(scales.dtype) * scales


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The codes of 32-bit words, each row a stream of bits that starts with the lowest: uint8 [rows, count].

    Args:
        words: int32 [rows, at least ceil(count * bits / 32)]; for 3 bits a multiple of three words.
        bits: 2, 3, 4 or 8.
        count: codes a row.

    >>> unpack(torch.tensor([[0x76543210]], dtype=torch.int32), 4, 7).tolist()
    [[0, 1, 2, 3, 4, 5, 6]]
    """
    rows = words.shape[0]
    stream = words.contiguous().view(torch.uint8)
    if bits == 3:
        three = stream.view(rows, -1, 3).int()
        together = (three[..., 0] | (three[..., 1] << 8) | (three[..., 2] << 16)).unsqueeze(-1)
        codes = (together >> torch.arange(0, 24, 3, dtype=torch.int32)) & 7
        return codes.to(torch.uint8).view(rows, -1)[:, :count]
    if bits == 8:
        return stream[:, :count]
    top = (1 << bits) - 1
    codes = torch.stack([(stream >> shift) & top for shift in range(0, 8, bits)], dim=-1)
    return codes.view(rows, -1)[:, :count]


def words_of(codes: int, bits: int) -> int:
    """32-bit words that so many codes take."""
    return -(-codes * bits // 32)


def groups_in_words(groups: int, size: int) -> str:
    """How a row's columns are grouped, for `ForeignWeight.scheme`."""
    return "one group a row" if groups == 1 else f"groups of {size}"
