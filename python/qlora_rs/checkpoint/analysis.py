"""`analyze`: what quantizing did to a model: errors against its source, use of codes, outlier blocks, bits by part."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from qlora_rs import _core
from qlora_rs.checkpoint.dequantized import open_float_source
from qlora_rs.checkpoint.figures import (
    OUTLIER_RATIO,
    Analysis,
    OutlierBlock,
    WeightError,
    WeightFigures,
    parts_of,
)
from qlora_rs.checkpoint.inspection import CheckpointInfo, TensorRow, inspect
from qlora_rs.checkpoint.progress import ByteCounter, Progress
from qlora_rs.checkpoint.slices import (
    VALUE_DTYPES,
    SliceReader,
    element_ranges,
    flat_slice,
    matrices,
    packed_slice,
    sliced_rows,
)
from qlora_rs.checkpoint.source import Source, open_source, require_folder
from qlora_rs.checkpoint.weights import TensorReader, stored_name
from qlora_rs.errors import FormatError, UnsupportedError
from qlora_rs.packed import NESTED_BLOCK_SIZE, PackedTensor
from qlora_rs.quantization import dequantize
from qlora_rs.spec import QuantSpec

# Blocks that are named one by one.
NAMED_OUTLIERS = 20
# Errors beyond two steps exist only where scales lost much in being quantized themselves.
STEP_EDGES = tuple((index - 40) / 20 for index in range(81))


def analyze(
    path: str | os.PathLike[str], source: str | os.PathLike[str] | None = None, *, progress: Progress | None = None
) -> Analysis:
    """Measure what quantizing did to a packed model.

    Weights pass through in slices; only the scales of one matrix are held whole.

    Args:
        path: a packed folder, native or of bitsandbytes in 4 bits.
        source: the 16- or 32-bit folder that it was made from, or what is read as one (GPTQ, AWQ, compressed-tensors, a
            GGUF file): errors are measured against its weights. Without it there are no errors. Its hashes are not
            checked (`verify` does that).
        progress: called with (bytes done, bytes in all) of the packed weights.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        FormatError: a file is damaged; ``source`` lacks a packed weight, or has it in another shape.
        UnsupportedError: the folder is not packed in one way that is known here, or ``source`` is quantized in a way
            that is not read.
        OSError: the system failed, with the file's name.

    >>> analyze("SmolLM2-135M-nf4", "SmolLM2-135M").relative_error  # doctest: +SKIP
    0.0921
    """
    packed_path = Path(path)
    require_folder(packed_path)
    info = inspect(packed_path)
    spec = _packed_spec(info)
    with ExitStack() as files:
        packed_source = open_source(packed_path)
        slices = _slices(info, packed_source, spec, files)
        original = None if source is None else files.enter_context(SliceReader(open_float_source(Path(source))))
        names = {} if original is None else _source_names(info, original.source)
        counter = ByteCounter(progress, sum(row.bytes for row in info.packed))
        outliers: list[OutlierBlock] = []
        step_counts = torch.zeros(len(STEP_EDGES) - 1, dtype=torch.int64)
        weights, notes = [], []
        for row in info.packed:
            try:
                weight = _Weight(row, spec, slices(row), original, names.get(row.name), step_counts)
                weight.add_all(packed_path)
            except UnsupportedError as error:
                notes.append(f"left out: {error}")
            else:
                weights.append(weight.figures())
                outliers = sorted([*outliers, *weight.outliers], key=lambda block: -block.ratio)[:NAMED_OUTLIERS]
            counter.add(row.bytes)
    if not weights:
        raise UnsupportedError("; ".join(notes))
    if source is None:
        notes.append("no source was given, so there is nothing to measure errors against")
    return Analysis(
        path=str(packed_path),
        source=None if source is None else str(source),
        format=info.format,
        spec=spec,
        parameters=info.parameters,
        total_bytes=info.total_bytes,
        weights=tuple(weights),
        outliers=tuple(outliers),
        step_edges=STEP_EDGES,
        step_counts=tuple(step_counts.tolist()) if original is not None else (),
        parts=parts_of(info.tensors, spec),
        notes=tuple(notes),
    )


Slices = Callable[[int, int], PackedTensor]


def _packed_spec(info: CheckpointInfo) -> QuantSpec:
    if info.spec is not None and info.packed:
        return info.spec
    if info.format == "float":
        raise UnsupportedError(
            f"{info.path}: is not packed, so there is nothing to measure: `qlora-rs quantize` packs it"
        )
    raise UnsupportedError(
        f"{info.path}: is quantized by {info.format!r} and holds no weights that are packed in one way known here"
    )


def _slices(info: CheckpointInfo, source: Source, spec: QuantSpec, files: ExitStack) -> Callable[[TensorRow], Slices]:
    """What gives (first, count) elements of a packed weight, in whole rows; of a flat one from a group of scales on."""
    reader, mapped = files.enter_context(SliceReader(source)), TensorReader(source)

    def of_row(row: TensorRow) -> Slices:
        if row.flat:
            return lambda first, count: flat_slice(reader, row, spec, first, count)[1]
        if info.format == "qlora_rs":
            return lambda first, count: packed_slice(reader, row, spec, first, count)
        whole = mapped.packed(row.name, row.shape, spec)
        return lambda first, count: sliced_rows(whole, first, count)

    return of_row


def _source_names(info: CheckpointInfo, source: Source) -> dict[str, str]:
    """The source's name of each packed weight, once all are known to be there."""
    names = {}
    for row in info.packed:
        name = stored_name(row.name, source.tensors)
        if name is None:
            raise FormatError(f"{source.path}: holds no {row.name!r}, which {info.path} has packed: another model?")
        tensor = source.tensors[name]
        if tensor.shape != row.float_shape:
            raise FormatError(
                f"{source.path / tensor.file}: tensor {name!r} has shape {list(tensor.shape)}, but "
                f"{list(row.float_shape)} in {info.path}: another model?"
            )
        if tensor.dtype not in VALUE_DTYPES:
            raise UnsupportedError(
                f"{source.path / tensor.file}: tensor {name!r} is {tensor.dtype}, which holds no floats"
            )
        names[row.name] = name
    return names


class _Weight:
    """Adds up the figures of one packed weight, slice by slice."""

    def __init__(
        self,
        row: TensorRow,
        spec: QuantSpec,
        slices: Slices,
        original: SliceReader | None,
        original_name: str | None,
        step_counts: Tensor,
    ) -> None:
        self.row, self.spec, self.slices = row, spec, slices
        self.original, self.original_name, self.step_counts = original, original_name, step_counts
        # Where blocks run over the ends of rows, all is one row.
        self.shape = (1, row.elements) if row.flat else row.shape
        self.codes = torch.zeros(len(spec.values), dtype=torch.int64)
        self.step = _relative_step(spec)
        self.outliers: list[OutlierBlock] = []
        self.blocks = self.outlier_blocks = self.in_steps = 0
        self.largest = self.medians = 0.0
        self.sum_abs = self.squares = self.max_abs = self.source_squares = 0.0
        self.sum_steps = self.squares_steps = self.max_steps = 0.0
        self.matrices = 0
        self._matrix: tuple[int, Tensor] | None = None

    def add_all(self, folder: Path) -> None:
        """Read the weight; ``folder`` is for messages."""
        _, rows, columns = matrices(self.shape)
        scales: list[Tensor] = []
        squares = 0.0
        for first, count in element_ranges(self.shape, whole_rows=not self.row.flat):
            packed = self.slices(first, count)
            absmax = _block_scales(packed)
            try:
                values = dequantize(packed, torch.float32)
            except ValueError as error:
                raise FormatError(f"{folder / self.row.file}: {self.row.name}: {error}") from None
            self.codes += _count_codes(packed)
            scales.append(absmax)
            squares += float(values.double().square().sum())
            if self.original is not None:
                self._add_error(values, absmax, first, count)
            if (first + count) % (rows * columns) == 0:
                expert = first // (rows * columns)
                self._end_matrix(torch.cat(scales, int(self.row.flat)), math.sqrt(squares / (rows * columns)), expert)
                scales, squares = [], 0.0

    def _add_error(self, values: Tensor, absmax: Tensor, first: int, count: int) -> None:
        assert self.original is not None
        assert self.original_name is not None
        tensor = self.original.source.tensors[self.original_name]
        dtype = VALUE_DTYPES[tensor.dtype]
        if self.row.transposed:
            matrix, column = self._turned(self.original, self.original_name, dtype, first)
            source = matrix[:, column : column + len(values)].T.float()
        else:
            size = dtype.itemsize
            stored = self.original.read(self.original_name, first * size, count * size).view(dtype)
            source = stored.view(values.shape).float()
        error = values - source
        steps = (self.step * absmax).repeat_interleave(self.spec.block_size, dim=1)[:, : values.shape[1]]
        in_steps = (error / steps)[steps > 0]
        self.sum_abs += float(error.abs().sum(dtype=torch.float64))
        self.squares += float(error.double().square().sum())
        self.max_abs = max(self.max_abs, float(error.abs().max()))
        self.source_squares += float(source.double().square().sum())
        if in_steps.numel():
            self.sum_steps += float(in_steps.abs().sum(dtype=torch.float64))
            self.squares_steps += float(in_steps.double().square().sum())
            self.max_steps = max(self.max_steps, float(in_steps.abs().max()))
            self.in_steps += in_steps.numel()
            low, high = STEP_EDGES[0], STEP_EDGES[-1]
            inside = in_steps.clamp(low, high)
            self.step_counts += torch.histc(inside, len(self.step_counts), low, high).long()

    def _turned(self, original: SliceReader, name: str, dtype: torch.dtype, first: int) -> tuple[Tensor, int]:
        """The source's matrix (in, out) that holds element ``first`` of the packed one, and the column that begins
        there; it is kept for the next slice.
        """
        _, rows, columns = matrices(self.shape)
        expert, row = divmod(first // columns, rows)
        if self._matrix is None or self._matrix[0] != expert:
            self._matrix = None  # before the next is read
            size = rows * columns * dtype.itemsize
            self._matrix = expert, original.read(name, expert * size, size).view(dtype).view(columns, rows)
        return self._matrix[1], row

    def _end_matrix(self, absmax: Tensor, rms: float, expert: int) -> None:
        self.matrices += 1
        self.blocks += absmax.numel()
        if rms == 0:
            return
        ratios = (absmax.double() / rms).flatten()
        self.medians += float(ratios.median())
        self.largest = max(self.largest, float(ratios.max()))
        beyond = int((ratios > OUTLIER_RATIO).sum())
        self.outlier_blocks += beyond
        top = ratios.topk(min(beyond, NAMED_OUTLIERS))
        for ratio, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            row, block = divmod(index, absmax.shape[1])
            self.outliers.append(self._outlier(expert, row, block, float(absmax[row, block]), ratio))

    def _outlier(self, expert: int, row: int, block: int, absmax: float, ratio: float) -> OutlierBlock:
        _, rows, columns = matrices(self.shape)
        size = self.spec.block_size
        # Slices begin where a group of doubly quantized scales does.
        if self.row.flat:
            start = block - block % NESTED_BLOCK_SIZE
            packed = self.slices(start * size, min((block + 1) * size, columns) - start * size)
            codes = _unpacked(packed)[-1][(block - start) * size :]
            row = block * size // self.row.shape[-1]
        else:
            start = row - row % NESTED_BLOCK_SIZE
            packed = self.slices((expert * rows + start) * columns, (row - start + 1) * columns)
            codes = _unpacked(packed)[-1][block * size : (block + 1) * size]
        values = torch.tensor(self.spec.values)
        nearest = values.abs().min()
        zeros = float((values[codes.long()].abs() == nearest).double().mean())
        return OutlierBlock(self.row.name, expert, row, block, absmax, ratio, zeros)

    def figures(self) -> WeightFigures:
        elements = max(1, self.row.elements)
        error = None
        if self.original is not None:
            in_steps = max(1, self.in_steps)
            norm = math.sqrt(self.source_squares)
            distance = math.sqrt(self.squares)
            error = WeightError(
                mean_abs=self.sum_abs / elements,
                rms=math.sqrt(self.squares / elements),
                max_abs=self.max_abs,
                relative=distance / norm if norm else (math.inf if distance else 0.0),
                mean_steps=self.sum_steps / in_steps,
                rms_steps=math.sqrt(self.squares_steps / in_steps),
                max_steps=self.max_steps,
            )
        return WeightFigures(
            name=self.row.name,
            shape=self.row.shape,
            bits_per_weight=self.row.bits_per_weight,
            code_counts=tuple(self.codes.tolist()),
            blocks=self.blocks,
            outlier_blocks=self.outlier_blocks,
            largest_ratio=self.largest,
            median_ratio=self.medians / max(1, self.matrices),
            error=error,
        )


def _relative_step(spec: QuantSpec) -> float:
    """Mean distance of neighbouring values of the codebook."""
    values = sorted(set(spec.values))
    return (values[-1] - values[0]) / (len(values) - 1)


def _block_scales(packed: PackedTensor) -> Tensor:
    """absmax of each block, float32 (rows, blocks)."""
    if packed.absmax_scale is None or packed.absmax_offset is None:
        return packed.absmax
    per_block = packed.absmax_scale.repeat_interleave(NESTED_BLOCK_SIZE)[: packed.absmax.numel()]
    table = torch.tensor(_core.dynamic_map())
    return table[packed.absmax.long()] * per_block.view(packed.absmax.shape) + packed.absmax_offset


def _unpacked(packed: PackedTensor) -> Tensor:
    """A code per element, uint8 (rows, columns)."""
    if packed.spec.bits == 8:
        return packed.codes
    pairs = torch.stack((packed.codes >> 4, packed.codes & 15), dim=-1)
    return pairs.flatten(-2)[:, : packed.shape[-1]]


def _count_codes(packed: PackedTensor) -> Tensor:
    """How often each code occurs."""
    values = len(packed.spec.values)
    if packed.spec.bits == 8:
        return torch.bincount(packed.codes.flatten(), minlength=values)[:values]
    by_byte = torch.bincount(packed.codes.flatten(), minlength=256).view(16, 16)
    counts = by_byte.sum(1) + by_byte.sum(0)
    if packed.shape[-1] % 2:  # the last low nibble of a row stands for nothing
        counts -= torch.bincount(packed.codes[:, -1] & 15, minlength=16)
    return counts[:values]
