"""`verify`: whether a packed folder is what quantizing a source folder gives, to the last bit."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qlora_rs.checkpoint.choice import FLOAT_DTYPES
from qlora_rs.checkpoint.dequantized import open_float_source
from qlora_rs.checkpoint.flat import FlatWeight, is_flat
from qlora_rs.checkpoint.gguf_source import round_kept
from qlora_rs.checkpoint.inspection import CheckpointInfo, TensorRow, inspect
from qlora_rs.checkpoint.parts import made_parts, stored_parts
from qlora_rs.checkpoint.progress import ByteCounter, Progress
from qlora_rs.checkpoint.provenance import file_sha256
from qlora_rs.checkpoint.rounding import with_borders
from qlora_rs.checkpoint.slices import VALUE_DTYPES, SliceReader, byte_ranges, count_differing, matrices
from qlora_rs.checkpoint.source import (
    CONFIG,
    Source,
    StoredTensor,
    open_source,
    read_config,
    require_folder,
    unquantized_config,
)
from qlora_rs.checkpoint.verdicts import FileHash, PartDifference, TensorVerdict, VerifyReport, add_parts
from qlora_rs.errors import UnsupportedError
from qlora_rs.packed import PackedTensor
from qlora_rs.quantization import quantize
from qlora_rs.spec import QuantSpec

CHECKS = ("all", "hashes", "tensors")
NONFINITE = "the source weight holds NaN or infinite values, which quantize refuses"


def verify(
    packed: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    check: str = "all",
    progress: Progress | None = None,
) -> VerifyReport:
    """Check a packed folder against the 16- or 32-bit folder (or one that is read as such) that it was made from.

    First the source's files are hashed and compared with the hashes that the packed files record. Then every weight is
    quantized from the source again, and codes, scales, group scales and offset are compared byte for byte, as are the
    tensors that stayed in floats. The tensors decide: a source that was cut into other files since is the same model.
    At most one matrix of the source is in memory at a time. Of the other files ``config.json`` alone is looked at: what
    it says otherwise than the source's is noted.

    A folder of bitsandbytes in 4 bits is checked alike. It records no hashes, and differs from what quantizing gives
    where a value lies at the border between two codes: there bitsandbytes rounds in its own way. Such differences are
    counted, and are no fault; nor are they in weights of a native folder whose blocks run over the ends of rows, which
    come from there.

    Args:
        packed: the packed folder.
        source: the folder that it is said to be made from.
        check: ``"all"``; ``"hashes"``: only whether the source is the recorded one, which is quicker but says nothing
            about the packed tensors; ``"tensors"``: without hashing. Where no hashes are recorded ``"all"`` compares
            the tensors alone, and says so.
        progress: called with (bytes done, bytes in all) of what is read.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        FormatError: a file is damaged.
        UnsupportedError: ``packed`` is not packed by this library, ``source`` is quantized, or there are no hashes to
            check alone.
        ValueError: ``check`` is none of the three.
        OSError: the system failed, with the file's name.

    >>> verify("SmolLM2-135M-nf4", "SmolLM2-135M").same  # doctest: +SKIP
    True
    """
    if check not in CHECKS:
        raise ValueError(f"check is one of {', '.join(CHECKS)}; got {check!r}")
    packed_path, source_path = Path(packed), Path(source)
    require_folder(packed_path)
    info = inspect(packed_path)
    _require_packed(info, check)
    original, _ = round_kept(open_float_source(source_path), [row.name for row in info.packed])
    hashed = check != "tensors" and bool(info.source_sha256)
    # A file that is not recorded is not hashed, nor is one that the metadata names outside the folder.
    to_hash = [file for file in original.files if hashed and file in info.source_sha256]
    total = sum((original.path / file).stat().st_size for file in to_hash)
    if check != "hashes":
        total += info.total_bytes
    counter = ByteCounter(progress, total)
    found = {file: file_sha256(original.path / file, counter.add) for file in to_hash}
    names = sorted({*info.source_sha256, *original.files}) if hashed else []
    files = tuple(FileHash(file, info.source_sha256.get(file), found.get(file)) for file in names)
    tensors: tuple[TensorVerdict, ...] = ()
    if check != "hashes":
        with SliceReader(original) as originals, SliceReader(open_source(packed_path)) as packeds:
            tensors = tuple(_Comparison(info, originals, packeds, counter).verdicts())
    notes = []
    if check == "all" and not hashed:
        notes.append(f"{packed_path} records no hashes of its source: only the tensors were compared")
    notes += _other_settings(packed_path, original)
    return VerifyReport(str(packed_path), str(source_path), info.spec, files, tensors, tuple(notes))


def _require_packed(info: CheckpointInfo, check: str) -> None:
    if not (info.packed if is_flat(info.config) else info.spec is not None and info.format == "qlora_rs"):
        state = "not quantized" if info.format == "float" else f"quantized by {info.format!r}"
        raise UnsupportedError(
            f"{info.path}: is {state}; verify checks a folder that qlora-rs packed, or bitsandbytes in 4 bits (diff "
            "compares any two)"
        )
    if check == "hashes" and not info.source_sha256:
        raise UnsupportedError(f"{info.path}: records no hashes of its source; compare the tensors instead")


def _other_settings(packed: Path, original: Source) -> list[str]:
    """A note on settings of the model that are not the source's: equal tensors do not make it the same model."""
    ours, theirs = (unquantized_config(config) for config in (read_config(packed), original.config))
    names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    if not names:
        return []
    told = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
    return [f"{packed / CONFIG} has other settings than the source's: {told}; only tensors are compared"]


class _Comparison:
    """Compares a packed folder's tensors, one after another, with what the source gives."""

    def __init__(
        self, info: CheckpointInfo, originals: SliceReader, packeds: SliceReader, counter: ByteCounter
    ) -> None:
        self.info, self.originals, self.packeds, self.counter = info, originals, packeds, counter

    def verdicts(self) -> Iterator[TensorVerdict]:
        """Of the packed folder's tensors in its order, then of those that it lacks."""
        sources = self.originals.source.tensors
        for row in self.info.tensors:
            tensor = sources.get(row.name)
            if tensor is None:
                yield TensorVerdict(row.name, row.kind, "extra", reason="the source has no such tensor")
                self.counter.add(row.bytes)
            elif reason := _mismatch(row, tensor, self.packeds.flat.get(row.name)):
                yield TensorVerdict(row.name, row.kind, "different", reason=reason)
                self.counter.add(row.bytes)
            else:
                yield self._compared(row, tensor)
        present = {row.name for row in self.info.tensors}
        for name in sources:
            if name not in present:
                yield TensorVerdict(name, None, "missing", reason="the packed folder has no such tensor")

    def _compared(self, row: TensorRow, tensor: StoredTensor) -> TensorVerdict:
        if row.kind != "packed":
            return self._kept(row)
        flat = self.packeds.flat.get(row.name)
        if flat is not None:
            return self._flat(row, tensor, flat.spec)
        assert self.info.spec is not None
        return (self._flat if row.flat else self._packed)(row, tensor, self.info.spec)

    def _kept(self, row: TensorRow) -> TensorVerdict:
        differing = 0
        for start, count in byte_ranges(row.bytes):
            original = self.originals.read(row.name, start, count)
            differing += count_differing(self.packeds.read(row.name, start, count), original, 8)
            self.counter.add(count)
        return _verdict(row, [PartDifference("bytes", differing, row.bytes)])

    def _packed(self, row: TensorRow, tensor: StoredTensor, spec: QuantSpec) -> TensorVerdict:
        experts, rows, columns = matrices(row.shape)
        size = tensor.nbytes // max(1, experts)
        found: list[PartDifference] = []
        reason = ""
        # A header may claim any number of experts that hold nothing.
        for expert in range(experts if row.bytes else 0):
            weight = self.originals.read(row.name, expert * size, size).view(VALUE_DTYPES[tensor.dtype])
            # What a source with NaN gives is compared too: the report then tells more than an error would.
            matrix = weight.view(columns, rows).T if row.transposed else weight.view(rows, columns)
            made = quantize(matrix, spec, nonfinite="propagate")
            parts = list(self._parts(row, made, expert))
            if any(part.differing for part in parts) and not bool(torch.isfinite(weight).all()):
                reason = NONFINITE
            found += parts
        return _verdict(row, found, reason)

    def _flat(self, row: TensorRow, tensor: StoredTensor, spec: QuantSpec) -> TensorVerdict:
        """A weight that bitsandbytes packed, or `convert` in its format: one run of blocks over all its rows."""
        weight = self.originals.read(row.name, 0, tensor.nbytes).view(VALUE_DTYPES[tensor.dtype])
        finite = bool(torch.isfinite(weight).all())
        made = quantize(weight.view(1, -1), spec, nonfinite="propagate")
        stored = {part.part: part for part in stored_parts(self.packeds, row, spec)}
        theirs: dict[str, Tensor] = {}
        found = []
        for part, values in made_parts(made):
            expected = values.flatten().view(torch.uint8)
            theirs[part] = stored[part].read(0, expected.numel())
            bits = stored[part].bits
            differing = count_differing(theirs[part], expected, bits)
            found.append(PartDifference(part, differing, 8 * expected.numel() // bits))
        if finite and any(part.differing for part in found):
            found = with_borders(found, weight, made, theirs, spec)
        self.counter.add(row.bytes)
        return _verdict(row, found, "" if finite or not any(part.differing for part in found) else NONFINITE)

    def _parts(self, row: TensorRow, made: PackedTensor, expert: int) -> Iterator[PartDifference]:
        """What differs between one expert's stored parts and those that were made again."""
        for part, values in made_parts(made):
            expected = values.flatten().view(torch.uint8)
            bits = made.spec.bits if part == "codes" else 8 * values.element_size()
            name = row.name if part == "codes" else f"{row.name}_{part}"
            differing = 0
            for start, count in byte_ranges(expected.numel()):
                stored = self.packeds.read(name, expert * expected.numel() + start, count)
                differing += count_differing(stored, expected[start : start + count], bits)
                self.counter.add(count)
            yield PartDifference(part, differing, 8 * expected.numel() // bits)


def _mismatch(row: TensorRow, tensor: StoredTensor, flat: FlatWeight | None) -> str:
    """Why two tensors of one name cannot be compared, or nothing."""
    if flat is not None and flat.shape is None:
        elements = math.prod(tensor.shape)
        if -(-elements // 2) * 2 != row.elements:
            return f"{row.elements} codes, but {elements} elements in the source"
    elif row.float_shape != tensor.shape:
        return f"shape {list(row.float_shape)}, but {list(tensor.shape)} in the source"
    if row.kind == "packed" and tensor.dtype not in FLOAT_DTYPES:
        return f"packed, but {tensor.dtype} in the source, which quantize does not pack"
    if row.kind != "packed" and row.dtype != tensor.dtype:
        return f"{row.dtype}, but {tensor.dtype} in the source"
    return ""


def _verdict(row: TensorRow, parts: list[PartDifference], reason: str = "") -> TensorVerdict:
    status = "same"
    if any(part.differing for part in parts):
        status = "rounding" if all(part.differing == part.at_border for part in parts) else "different"
    return TensorVerdict(row.name, row.kind, status, add_parts(parts), reason)
