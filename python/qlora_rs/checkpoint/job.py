"""What every target of a conversion needs: the source, a way to read it, and what is made of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qlora_rs.checkpoint.inspection import CheckpointInfo, TensorRow
from qlora_rs.checkpoint.plain import cast
from qlora_rs.checkpoint.shards import PlannedTensor
from qlora_rs.checkpoint.source import Source
from qlora_rs.checkpoint.weights import TensorReader
from qlora_rs.errors import FormatError
from qlora_rs.packed import PackedTensor
from qlora_rs.spec import QuantSpec

NONFINITE = "holds NaN or infinite values: it is damaged, or was made from a model that is"


@dataclass(frozen=True)
class Job:
    """A source that is being converted.

    Attributes:
        info: what it holds.
        source: the opened folder; seen in floats where the codes of its weights are not ours.
        reader: of ``source``.
        stored_spec: how its packed weights are stored; None where the source is one of floats, or is seen as such.
        max_shard_size: bytes of tensors per file of the output.
    """

    info: CheckpointInfo
    source: Source
    reader: TensorReader
    stored_spec: QuantSpec | None
    max_shard_size: int

    @property
    def spec(self) -> QuantSpec:
        """How the packed weights are stored, where that is known to be one of our ways."""
        assert self.stored_spec is not None
        return self.stored_spec

    @property
    def is_made(self) -> bool:
        """Whether packed weights are made when they are asked for, which takes work; else they are views of files."""
        return False

    def where(self, row: TensorRow) -> str:
        """File and name of a tensor, for messages."""
        return f"{self.source.path / row.file}: tensor {row.name!r}"

    def packed(self, row: TensorRow) -> PackedTensor:
        """A packed weight."""
        return self.reader.packed(row.name, row.shape, self.spec)

    def require_packed(self, row: TensorRow) -> None:
        """Raise what `packed` would, as far as that can be told without reading the weight."""
        self.reader.require_packed(row.name)

    def stored(self, name: str) -> Callable[[], Tensor]:
        """Reads a tensor as it is stored."""
        return partial(self.reader.stored, name)

    def require_distinct(self, planned: Iterable[PlannedTensor]) -> None:
        """Raise FormatError where two of the tensors to write have one name."""
        found = set()
        for tensor in planned:
            if tensor.name in found:
                raise FormatError(
                    f"{self.source.path}: tensor {tensor.name!r} would be written twice: the source has one of the "
                    "name that a part of a packed weight gets"
                )
            found.add(tensor.name)

    def read_bytes(self) -> dict[str, int]:
        """What of the source each tensor takes, in bytes; a packed weight's parts count with its codes."""
        return {row.name: row.bytes for row in self.info.tensors}

    def exact_values(self, row: TensorRow) -> Tensor:
        """A float or packed tensor's values, laid out as in the model in floats, in a type that rounds none of them."""
        if self._is_stored(row):
            return self.reader.stored(row.name)
        try:
            return self._dequantized(row, torch.float32)
        except FormatError as error:
            raise FormatError(f"{self.where(row)}: {error}") from None

    def _is_stored(self, row: TensorRow) -> bool:
        """Whether the source, as it is seen, holds floats under this name."""
        return row.kind != "packed" or self.stored_spec is None

    def _dequantized(self, row: TensorRow, dtype: torch.dtype) -> Tensor:
        return self.reader.dequantized(row.name, row.shape, self.spec, dtype, transposed=row.transposed)

    def values(self, row: TensorRow, dtype: torch.dtype) -> Tensor:
        """A float or packed tensor's values in ``dtype``, as the model in floats lays them out.

        Raises:
            FormatError: they do not fit ``dtype``, those of a packed weight are not finite, or the file holds what its
                format does not allow.
        """
        stored = self.exact_values(row) if self._is_stored(row) else None
        try:
            if stored is not None and row.kind != "packed":
                return cast(stored, dtype)
            tensor = self._dequantized(row, dtype) if stored is None else cast(stored, dtype)
            if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
                if stored is None:
                    # Seldom: the values in float32, which take much more memory, tell whether they did not fit.
                    cast(self._dequantized(row, torch.float32), dtype)
                raise FormatError(NONFINITE)
            return tensor
        except FormatError as error:
            raise FormatError(f"{self.where(row)}: {error}") from None
