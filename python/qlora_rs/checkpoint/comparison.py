"""`diff`: in what two checkpoints differ, by their bytes and by the values that these stand for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qlora_rs.checkpoint.dequantized import open_float_source
from qlora_rs.checkpoint.differences import DiffReport, TensorDiff
from qlora_rs.checkpoint.flat import FlatWeight, is_flat
from qlora_rs.checkpoint.inspection import CheckpointInfo, TensorRow, inspect
from qlora_rs.checkpoint.parts import StoredPart, stored_parts
from qlora_rs.checkpoint.progress import ByteCounter, Progress
from qlora_rs.checkpoint.slices import (
    VALUE_DTYPES,
    SliceReader,
    byte_ranges,
    count_differing,
    element_ranges,
    kept_values,
    matrices,
    packed_values,
)
from qlora_rs.checkpoint.source import open_source, require_model
from qlora_rs.checkpoint.verdicts import PartDifference
from qlora_rs.errors import UnsupportedError
from qlora_rs.spec import QuantSpec

NATIVE = ("qlora_rs", "float")
# Elements whose differences are taken at a time: they pass through the processor's cache several times, and torch does
# not split so few between threads, which would wait for each other most of the time.
CACHED_ELEMENTS = 1 << 15


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str], *, progress: Progress | None = None) -> DiffReport:
    """Compare the tensors of two model folders, each packed or not, by name. Other files are not looked at.

    Tensors that are stored alike are compared byte for byte: codes and scales of packed weights, bytes of the others.
    Where they differ, and where they are stored in different ways, so are the values that they stand for: packed ones
    dequantized to float32, all compared in float64. A weight of bitsandbytes in 4 bits is stored like a native one if
    its rows are whole blocks. Weights of GPTQ, AWQ and compressed-tensors are compared as the floats that those
    libraries make of them. Tensors pass through in slices.

    Args:
        a: a model folder; relative errors are relative to its values.
        b: another one.
        progress: called with (bytes done, bytes in all) of both folders' tensors.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        FormatError: a file is damaged.
        UnsupportedError: one folder is quantized in a way that is not read, and the other is not by the same library.
        OSError: the system failed, with the file's name.

    >>> report = diff("SmolLM2-135M", "SmolLM2-135M-nf4")  # doctest: +SKIP
    >>> report.same, report.relative_error  # doctest: +SKIP
    (False, 0.0921)
    """
    paths = Path(a), Path(b)
    for path in paths:
        require_model(path)
    infos = inspect(paths[0]), inspect(paths[1])
    unread = [info for info in infos if info.format not in NATIVE and not info.seen_in_floats]
    foreign = [info for info in unread if not is_flat(info.config)]
    if foreign and infos[0].format != infos[1].format:
        raise UnsupportedError(
            f"{foreign[0].path}: is quantized by {foreign[0].format!r}; it can be compared with its like only"
        )
    opens = [open_float_source if info.seen_in_floats else open_source for info in infos]
    sources = [open_folder(path) for open_folder, path in zip(opens, paths, strict=True)]
    with SliceReader(sources[0]) as reader_a, SliceReader(sources[1]) as reader_b:
        sides = _Side.of(infos[0], reader_a), _Side.of(infos[1], reader_b)
        counter = ByteCounter(progress, sum(row.bytes for side in sides for row in side.rows.values()))
        names = [*sides[0].rows, *(name for name in sides[1].rows if name not in sides[0].rows)]
        tensors = tuple(_compare(name, *sides, counter) for name in names)
    formats, specs = [info.format for info in infos], [side.spec for side in sides]
    return DiffReport(str(paths[0]), str(paths[1]), formats[0], formats[1], specs[0], specs[1], tensors)


@dataclass(frozen=True)
class _Side:
    """One of the two folders."""

    rows: dict[str, TensorRow]
    spec: QuantSpec | None
    reader: SliceReader

    @classmethod
    def of(cls, info: CheckpointInfo, reader: SliceReader) -> _Side:
        if info.format in NATIVE or is_flat(info.config):
            return cls({row.name: row for row in info.tensors}, info.spec, reader)
        stored = reader.source.tensors.values()
        return cls(
            {t.name: TensorRow(t.name, "kept", t.dtype, t.shape, t.nbytes, t.file) for t in stored}, None, reader
        )

    def flat(self, row: TensorRow) -> FlatWeight | None:
        """How bitsandbytes packed a weight."""
        return self.reader.flat.get(row.name)

    def spec_of(self, row: TensorRow) -> QuantSpec | None:
        """How a tensor is packed; a bitsandbytes folder may hold weights of several kinds."""
        flat = self.flat(row)
        return (self.spec if flat is None else flat.spec) if row.kind == "packed" else None

    def values(self, row: TensorRow, first: int, count: int) -> Tensor:
        spec = self.spec_of(row)
        if spec is not None:
            return packed_values(self.reader, row, spec, first, count)
        return kept_values(self.reader, row, first, count)

    def matrix(self, row: TensorRow, number: int) -> Tensor:
        """One of a stack of matrices as the model in floats lays it out, flat."""
        _, rows, columns = matrices(row.shape)
        above = number * rows * columns
        ranges = element_ranges((rows, columns), whole_rows=True)
        found = torch.cat([self.values(row, above + first, count) for first, count in ranges])
        return found.view(rows, columns).T.flatten() if row.transposed else found


def _compare(name: str, a: _Side, b: _Side, counter: ByteCounter) -> TensorDiff:
    row_a, row_b = a.rows.get(name), b.rows.get(name)
    if row_a is None or row_b is None:
        counter.add(sum(row.bytes for row in (row_a, row_b) if row is not None))
        return TensorDiff(name, "only_in_a" if row_b is None else "only_in_b", row_a, row_b)
    reasons = _reasons(row_a, row_b, a, b)
    end = counter.done + row_a.bytes + row_b.bytes
    alike = row_a.float_shape == row_b.float_shape
    parts = _parts(row_a, row_b, a, b, counter) if alike and row_a.shape == row_b.shape else []
    counter.add(end - counter.done)
    if not reasons and not any(part.differing for part in parts):
        return TensorDiff(name, "same", row_a, row_b, tuple(parts))
    distance = None
    if alike and all(row.kind == "packed" or row.dtype in VALUE_DTYPES for row in (row_a, row_b)):
        distance = _Distance()
        whole_rows = any(
            row.kind == "packed" and not row.flat and side.flat(row) is None for row, side in ((row_a, a), (row_b, b))
        )
        if row_a.transposed != row_b.transposed:
            for number in range(math.prod(row_a.shape[:-2]) if row_a.elements else 0):
                distance.add(a.matrix(row_a, number), b.matrix(row_b, number))
        else:
            for first, count in element_ranges(row_a.shape, whole_rows):
                distance.add(a.values(row_a, first, count), b.values(row_b, first, count))
    if distance is None:
        return TensorDiff(name, "different", row_a, row_b, tuple(parts), tuple(reasons))
    return TensorDiff(
        name,
        "different",
        row_a,
        row_b,
        tuple(parts),
        tuple(reasons),
        differing_values=distance.differing,
        max_abs_difference=distance.largest,
        norm_a=distance.squares_a**0.5,
        norm_difference=distance.squares_difference**0.5,
        nonfinite=distance.nonfinite,
    )


def _reasons(row_a: TensorRow, row_b: TensorRow, a: _Side, b: _Side) -> list[str]:
    """How two tensors of one name differ before their data is looked at."""
    reasons = []
    if row_a.float_shape != row_b.float_shape:
        reasons.append(f"shape {list(row_a.float_shape)} / {list(row_b.float_shape)}")
    spec_a, spec_b = a.spec_of(row_a), b.spec_of(row_b)
    if spec_a is not None and spec_b is not None:
        for field in fields(QuantSpec):
            of_a, of_b = getattr(spec_a, field.name), getattr(spec_b, field.name)
            if of_a != of_b:
                reasons.append("other codebooks" if field.name == "codebook" else f"{field.name} {of_a} / {of_b}")
        reasons += _layout_reasons(row_a, row_b, a, b)
    elif row_a.dtype != row_b.dtype:
        reasons.append(f"{row_a.dtype} / {row_b.dtype}")
    return reasons


def _layout_reasons(row_a: TensorRow, row_b: TensorRow, a: _Side, b: _Side) -> Iterator[str]:
    """How the layouts of two packed weights differ."""
    flat_a, flat_b = a.flat(row_a), b.flat(row_b)
    if flat_a is not None and flat_b is not None:
        if flat_a.dtype != flat_b.dtype:
            yield f"quantized from {flat_a.dtype} / {flat_b.dtype}"
        types = [side.reader.source.tensors[row.name].dtype for side, row in ((a, row_a), (b, row_b))]
        if types[0] != types[1]:
            yield f"codes stored as {types[0]} / {types[1]}"
    elif row_a.transposed != row_b.transposed:
        layouts = ["transposed" if row.transposed else "as it is" for row in (row_a, row_b)]
        yield f"packed {layouts[0]} / {layouts[1]}"
    elif row_a.flat != row_b.flat:
        layouts = ["flat" if row.flat else "by rows" for row in (row_a, row_b)]
        yield f"blocks {layouts[0]} / {layouts[1]}"


def _parts(row_a: TensorRow, row_b: TensorRow, a: _Side, b: _Side, counter: ByteCounter) -> list[PartDifference]:
    """How much differs of what is stored alike in both."""
    spec_a, spec_b = a.spec_of(row_a), b.spec_of(row_b)
    if spec_a is None and spec_b is None:
        if row_a.dtype != row_b.dtype:
            return []
        size = row_a.bytes
        whole = [
            StoredPart("bytes", 8, size, partial(side.reader.read, row.name)) for side, row in ((a, row_a), (b, row_b))
        ]
        return [_part(whole[0], whole[1], counter)]
    if spec_a is None or spec_b is None or spec_a.values != spec_b.values:
        return []
    if row_a.transposed != row_b.transposed:
        return []
    if row_a.flat != row_b.flat and (a.flat(row_a) is None or b.flat(row_b) is None):
        return []
    pairs = zip(stored_parts(a.reader, row_a, spec_a), stored_parts(b.reader, row_b, spec_b), strict=False)
    return [_part(*pair, counter) for pair in pairs if pair[0].part == "codes" or spec_a == spec_b]


def _part(a: StoredPart, b: StoredPart, counter: ByteCounter) -> PartDifference:
    differing = 0
    for start, count in byte_ranges(a.nbytes):
        differing += count_differing(a.read(start, count), b.read(start, count), a.bits)
        counter.add(2 * count)
    return PartDifference(a.part, differing, 8 * a.nbytes // a.bits)


class _Distance:
    """How far apart the values of two tensors are, added up slice by slice."""

    def __init__(self) -> None:
        self.differing, self.nonfinite = 0, 0
        self.largest, self.squares_a, self.squares_difference = 0.0, 0.0, 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        """A slice of each, flat. Differences with NaN or infinite values are counted and left out of the rest."""
        for pair in zip(a.split(CACHED_ELEMENTS), b.split(CACHED_ELEMENTS), strict=True):
            self._add(*(values.double() for values in pair))

    def _add(self, a: Tensor, b: Tensor) -> None:
        difference = b - a
        squares_a, squares = _squares(a), _squares(difference)
        if not math.isfinite(squares_a + squares):
            unlike = (a != b) & ~(torch.isnan(a) & torch.isnan(b))  # NaN is NaN, whatever its bits
            finite = torch.isfinite(difference)
            self.nonfinite += int(torch.count_nonzero(unlike & ~finite))
            self.differing += int(torch.count_nonzero(unlike & ~finite))
            difference = torch.where(finite, difference, 0)
            a = torch.where(torch.isfinite(a), a, 0)
            squares_a, squares = _squares(a), _squares(difference)
        self.differing += int(torch.count_nonzero(difference))
        self.largest = max(self.largest, *(abs(float(value)) for value in torch.aminmax(difference)))
        self.squares_a += squares_a
        self.squares_difference += squares


def _squares(values: Tensor) -> float:
    """Sum of the squares; `torch.dot` would start threads for it."""
    norm = float(torch.linalg.vector_norm(values))
    return norm * norm
