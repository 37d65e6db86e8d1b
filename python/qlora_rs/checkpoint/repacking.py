"""Quantizing the values of a folder that another library quantized: files to files, one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from qlora_rs.checkpoint.inspection import CheckpointInfo, TensorRow, inspect_source
from qlora_rs.checkpoint.job import Job
from qlora_rs.checkpoint.provenance import file_sha256
from qlora_rs.checkpoint.source import Source, find_quantization_config
from qlora_rs.checkpoint.to_native import plan_native
from qlora_rs.checkpoint.weights import TensorReader
from qlora_rs.checkpoint.writing import ModelPlan
from qlora_rs.errors import NonFiniteError
from qlora_rs.experts import quantize_transposed
from qlora_rs.packed import PackedTensor
from qlora_rs.quantization import quantize
from qlora_rs.spec import QuantSpec


class Quantizer:
    """Quantizes tensors by name, and keeps the last one: a file asks for the parts of a weight one after another.

    Args:
        values: gives a float tensor by its name.
        spec: how to quantize.
        transposed: names of those whose matrices are (in, out).
    """

    def __init__(self, values: Callable[[str], Tensor], spec: QuantSpec, transposed: Collection[str] = ()) -> None:
        self.values, self.spec, self.transposed = values, spec, frozenset(transposed)
        self._last: tuple[str, PackedTensor] | None = None

    def packed(self, name: str, place: str) -> PackedTensor:
        """The packed weight.

        Raises:
            NonFiniteError: it holds NaN or Inf; ``place`` names it.
        """
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next is made
            try:
                pack = quantize_transposed if name in self.transposed else quantize
                self._last = name, pack(self.values(name), self.spec)
            except NonFiniteError as error:
                raise NonFiniteError(f"{place}: {error}") from None
        return self._last[1]


@dataclass(frozen=True)
class QuantizingJob(Job):
    """A job whose packed weights are made from float ones when they are due."""

    quantizer: Quantizer

    @property
    def spec(self) -> QuantSpec:
        """How they are quantized."""
        return self.quantizer.spec

    @property
    def is_made(self) -> bool:
        """Whether packed weights are made when they are asked for."""
        return True

    def packed(self, row: TensorRow) -> PackedTensor:
        """The weight, quantized."""
        return self.quantizer.packed(row.name, self.where(row))


def plan_repacked(
    source: Source,
    names: Collection[str],
    spec: QuantSpec,
    *,
    transposed: Collection[str] = (),
    not_converted: Sequence[str] | None,
    hashed: Callable[[int], object] | None,
    max_shard_size: int,
    notes: list[str],
) -> ModelPlan:
    """A native packed folder of ``source``, which is seen in floats.

    Args:
        source: what is quantized.
        names: of the tensors to pack.
        spec: how.
        transposed: names of those whose matrices are (in, out) in floats.
        not_converted: the Linear modules that stay in floats; None: found out.
        hashed: hash the files now, so that the plan records what it is made from; called with the bytes of each piece
            that was read. None: it does not record that.
        max_shard_size: bytes of tensors per file.
        notes: gets what the user should know.
    """
    original = source.original or source
    requantizing = _describe_requantizing(source)
    if requantizing is not None:
        notes.append(requantizing)
    info = mark_packed(inspect_source(source), names, transposed)
    reader = TensorReader(source)
    job = QuantizingJob(
        info=info,
        source=source,
        reader=reader,
        stored_spec=None,
        max_shard_size=max_shard_size,
        quantizer=Quantizer(reader.stored, spec, transposed),
    )
    hashes = None if hashed is None else {file: file_sha256(source.path / file, hashed) for file in original.files}
    return plan_native(job, notes, not_converted=not_converted, hashes=hashes)


def mark_packed(info: CheckpointInfo, names: Collection[str], transposed: Collection[str] = ()) -> CheckpointInfo:
    """``info`` with the float tensors of these names told as packed, some of them ``transposed``: what they will be."""
    chosen, turned = set(names), set(transposed)

    def marked(row: TensorRow) -> TensorRow:
        if row.name not in chosen:
            return row
        # The other layout's shape is what the weight has in floats, and the other way round.
        row = replace(row, kind="packed", transposed=row.name in turned)
        return replace(row, shape=row.float_shape)

    return replace(info, tensors=tuple(marked(row) for row in info.tensors))


def _describe_requantizing(source: Source) -> str | None:
    """What quantizing the values of another library's folder means, in one sentence; None if it holds floats alone."""
    config = find_quantization_config((source.original or source).config) or {}
    weights = [weight for weight in source.foreign.values() if weight.scheme]
    if not weights:
        return None
    method, schemes = config.get("quant_method"), sorted({weight.scheme for weight in weights})
    return (
        f"{len(weights)} weights were quantized by {method} ({'; '.join(schemes)}): their values are quantized "
        "anew, and the errors of both add up"
    )
