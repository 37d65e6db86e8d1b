"""Stored tensors read in slices: memory grows with neither files nor tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from io import FileIO
from types import TracebackType

import torch
from torch import Tensor

from qlora_rs.checkpoint.flat import FlatWeight, expect_maps, is_flat, read_flat_weights
from qlora_rs.checkpoint.foreign import ForeignWeight, keeping
from qlora_rs.checkpoint.inspection import TensorRow
from qlora_rs.checkpoint.source import Source, find_quantization_config
from qlora_rs.checkpoint.stored import FilePlaces, StoredReader
from qlora_rs.errors import FormatError
from qlora_rs.packed import NESTED_BLOCK_SIZE, PackedTensor
from qlora_rs.quantization import dequantize
from qlora_rs.spec import QuantSpec

SLICE_BYTES = 16 << 20
# Files of a folder that stay open: two folders of hundreds would be more than a process may have (often 1,024).
MOST_OPEN = 16
# Elements whose values are held at a time; a few copies of them are made, in float64.
SLICE_ELEMENTS = 2 << 20

VALUE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class SliceReader:
    """Reads ranges of bytes of an opened folder's tensors. A context manager: it keeps files open.

    Raises:
        FormatError: a file changed since its header was read.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._files: dict[str, tuple[FileIO, int]] = {}
        self._places = FilePlaces(source)
        self._stored = StoredReader(source)
        self._held: tuple[str, dict[str, Tensor]] = ("", {})

    def __enter__(self) -> SliceReader:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        while self._files:
            self._close_oldest()

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Bytes ``start`` to ``start + count`` of a tensor, as uint8; of one that another library quantized, those of
        its values.
        """
        foreign = self.source.foreign.get(name)
        if foreign is not None:
            return self._foreign(foreign, start, count)
        tensor = self.source.tensors[name]
        if tensor.file not in self._files:
            if len(self._files) >= MOST_OPEN:
                self._close_oldest()
            self._files[tensor.file] = self._places.open(tensor.file)
        return self._places.read(self._files[tensor.file], tensor, start, count)

    def _close_oldest(self) -> None:
        file, _ = self._files.pop(next(iter(self._files)))
        file.close()

    @cached_property
    def flat(self) -> dict[str, FlatWeight]:
        """The 4-bit weights of a bitsandbytes folder, by name.

        Raises:
            FormatError, UnsupportedError: as `read_flat_weights`; codes that stand for other values than here.
        """
        if not is_flat(find_quantization_config(self.source.config)):
            return {}

        def stored(name: str) -> Tensor:
            return self._stored.read(self.source.tensors[name])

        weights = read_flat_weights(self.source, stored)
        for weight in weights.values():
            expect_maps(self.source, weight, stored)
        return weights

    def _foreign(self, weight: ForeignWeight, start: int, count: int) -> Tensor:
        row_bytes = weight.row_elements * weight.value_dtype.itemsize
        above = start // row_bytes // weight.row_step * weight.row_step
        below = -(-(start + count) // row_bytes)
        if self._held[0] != weight.name:  # the next slice is mostly of the same weight
            self._held = weight.name, {}
        stored = keeping(self._stored.read, self._held[1])
        content = weight.values(stored, above, below).reshape(-1).view(torch.uint8)
        skipped = start - above * row_bytes
        return content[skipped : skipped + count]


def byte_ranges(total: int) -> Iterator[tuple[int, int]]:
    """(start, count) of slices that cover ``total`` bytes."""
    for start in range(0, total, SLICE_BYTES):
        yield start, min(SLICE_BYTES, total - start)


def element_ranges(shape: tuple[int, ...], whole_rows: bool) -> Iterator[tuple[int, int]]:
    """(first, count) of slices that cover the elements of ``shape``.

    With ``whole_rows`` a slice lies within one expert and starts at a multiple of 256 rows, where a group of doubly
    quantized scales starts too, whatever the block size.
    """
    if not whole_rows:
        total = math.prod(shape)
        yield from ((first, min(SLICE_ELEMENTS, total - first)) for first in range(0, total, SLICE_ELEMENTS))
        return
    if math.prod(shape) == 0:
        return  # a header may claim any number of experts that hold nothing
    experts, rows, columns = matrices(shape)
    step = max(1, SLICE_ELEMENTS // columns // NESTED_BLOCK_SIZE) * NESTED_BLOCK_SIZE
    for expert in range(experts):
        for row in range(0, rows, step):
            yield (expert * rows + row) * columns, min(step, rows - row) * columns


def matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(experts, rows, columns) of a logical shape (..., out, in)."""
    return math.prod(shape[:-2]), shape[-2] if len(shape) > 1 else 1, shape[-1]


def kept_values(reader: SliceReader, row: TensorRow, first: int, count: int) -> Tensor:
    """``count`` elements of a float tensor from ``first`` on, flat."""
    dtype = VALUE_DTYPES[row.dtype]
    return reader.read(row.name, first * dtype.itemsize, count * dtype.itemsize).view(dtype)


def packed_values(reader: SliceReader, row: TensorRow, spec: QuantSpec, first: int, count: int) -> Tensor:
    """``count`` dequantized float32 elements of a packed weight; of one that is packed by rows in a native folder
    ``first`` is of `element_ranges` in whole rows.

    Raises:
        FormatError: a code lies outside the codebook, or a file changed since its header was read.
    """
    try:
        if row.flat or row.name in reader.flat:
            skipped, packed = flat_slice(reader, row, spec, first, count)
            return dequantize(packed).flatten()[skipped : skipped + count]
        return dequantize(packed_slice(reader, row, spec, first, count)).flatten()
    except ValueError as error:
        raise FormatError(f"{reader.source.path / row.file}: {row.name}: {error}") from None


def packed_slice(reader: SliceReader, row: TensorRow, spec: QuantSpec, first: int, count: int) -> PackedTensor:
    """The same elements as they are packed: whole rows of one expert, from a native file."""
    _, rows, columns = matrices(row.shape)
    expert, start = divmod(first // columns, rows)
    taken, blocks = count // columns, -(-columns // spec.block_size)
    above = expert * rows + start

    def part(suffix: str, offset: int, size: int, width: int) -> Tensor:
        return reader.read(row.name + suffix, offset * width, size * width)

    packed_columns = columns if spec.bits == 8 else -(-columns // 2)
    codes = part("", above * packed_columns, taken * packed_columns, 1).view(taken, packed_columns)
    scale = offset = None
    if spec.double_quant:
        absmax = part("_absmax", above * blocks, taken * blocks, 1)
        groups = -(-rows * blocks // NESTED_BLOCK_SIZE)
        first_group = expert * groups + start * blocks // NESTED_BLOCK_SIZE
        scale = part("_absmax_scale", first_group, -(-taken * blocks // NESTED_BLOCK_SIZE), 4).view(torch.float32)
        offset = part("_absmax_offset", expert, 1, 4).view(torch.float32)
    else:
        absmax = part("_absmax", above * blocks, taken * blocks, 4).view(torch.float32)
    return PackedTensor(codes, absmax.view(taken, blocks), scale, offset, spec, (taken, columns), torch.float32)


def flat_slice(
    reader: SliceReader, row: TensorRow, spec: QuantSpec, first: int, count: int
) -> tuple[int, PackedTensor]:
    """Elements of a weight that is packed as one row, from where their group of scales begins; how many of them come
    before ``first``.
    """
    weight = reader.flat.get(row.name)
    absmax_name, scale_name = (
        row.name + suffix
        for suffix in (("_absmax", "_absmax_scale") if weight is None else (".absmax", ".nested_absmax"))
    )
    start = first - first % (spec.block_size * NESTED_BLOCK_SIZE)
    taken = first + count - start
    block, blocks = start // spec.block_size, -(-taken // spec.block_size)
    codes = reader.read(row.name, start * spec.bits // 8, -(-taken * spec.bits // 8))
    scale = offset = None
    if not spec.double_quant:
        absmax = reader.read(absmax_name, 4 * block, 4 * blocks).view(torch.float32)
    else:
        absmax = reader.read(absmax_name, block, blocks)
        groups = -(-blocks // NESTED_BLOCK_SIZE)
        scale = reader.read(scale_name, block // NESTED_BLOCK_SIZE * 4, 4 * groups).view(torch.float32)
        if weight is None:
            offset = reader.read(f"{row.name}_absmax_offset", 0, 4).view(torch.float32)
        else:
            offset = torch.tensor([weight.offset], dtype=torch.float32)
    packed = PackedTensor(codes.view(1, -1), absmax.view(1, -1), scale, offset, spec, (1, taken), torch.float32)
    return first - start, packed


def sliced_rows(packed: PackedTensor, first: int, count: int) -> PackedTensor:
    """The same elements of a whole packed weight; views of its memory."""
    _, rows, columns = matrices(packed.shape)
    expert, start = divmod(first // columns, rows)
    taken, spec = count // columns, packed.spec
    whole = slice(expert * rows + start, expert * rows + start + taken)
    codes = packed.codes.reshape(-1, packed.codes.shape[-1])[whole]
    absmax = packed.absmax.reshape(-1, packed.absmax.shape[-1])[whole]
    scale = offset = None
    if packed.absmax_scale is not None and packed.absmax_offset is not None:
        blocks = absmax.shape[-1]
        group = start * blocks // NESTED_BLOCK_SIZE
        scales = packed.absmax_scale.reshape(-1, -(-rows * blocks // NESTED_BLOCK_SIZE))[expert]
        scale = scales[group : group + -(-taken * blocks // NESTED_BLOCK_SIZE)]
        offset = packed.absmax_offset.reshape(-1)[expert : expert + 1]
    return PackedTensor(codes, absmax, scale, offset, spec, (taken, columns), packed.dtype)


def count_differing(a: Tensor, b: Tensor, bits: int) -> int:
    """How many elements of 4, 8 or 32 bits differ between equally many bytes."""
    if torch.equal(a, b):
        return 0
    if bits == 4:
        mixed = a ^ b
        return int(torch.count_nonzero(mixed & 0xF0)) + int(torch.count_nonzero(mixed & 0x0F))
    dtype = {8: torch.uint8, 32: torch.int32}[bits]
    return int(torch.count_nonzero(a.view(dtype) != b.view(dtype)))
