"""`inspect`: what a model folder or a safetensors file holds, from its headers alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qlora_rs.checkpoint.dequantized import read_foreign
from qlora_rs.checkpoint.flat import FlatWeight, is_flat, read_flat_weights, unaligned
from qlora_rs.checkpoint.foreign import ForeignWeight
from qlora_rs.checkpoint.gguf_source import METHOD as GGUF
from qlora_rs.checkpoint.gguf_source import is_gguf_file, open_gguf
from qlora_rs.checkpoint.source import (
    CONFIG,
    Source,
    StoredTensor,
    check_format_version,
    expect_tensor,
    find_quantization_config,
    open_source,
    read_config,
    read_file,
)
from qlora_rs.checkpoint.weights import TensorReader
from qlora_rs.errors import FormatError, UnsupportedError
from qlora_rs.packed import PackedShapes, is_flat_layout
from qlora_rs.spec import QuantSpec

PARTS = ("_absmax", "_absmax_scale", "_absmax_offset")


@dataclass(frozen=True)
class TensorRow:
    """A tensor as a model sees it.

    Attributes:
        name: full name.
        kind: ``"packed"`` (codes with their scales) or ``"kept"``.
        dtype: how a packed tensor's data is called (``"nf4"``), or safetensors' dtype (``"BF16"``).
        shape: logical shape; of a packed tensor (..., out, in).
        bytes: bytes of all its parts.
        file: the file that holds it.
        flat: the blocks of a packed tensor run over the ends of its rows, as bitsandbytes has them.
        transposed: the model in floats holds each matrix of a packed tensor as (in, out).
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: str
    flat: bool = False
    transposed: bool = False

    @property
    def float_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the model in floats."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    @property
    def elements(self) -> int:
        """Number of elements of the logical shape."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Storage bits per element, scales included."""
        return 8 * self.bytes / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds.

    Attributes:
        path: the folder or file.
        format: ``"qlora_rs"`` (native packed), ``"float"`` (not quantized), ``"gguf"``, or the ``quant_method`` of
            another library, whose tensors are then listed as the weights that they make up where the format is read
            here, else as they are stored.
        spec: how packed tensors are quantized; None unless all of them are quantized in one way that is known here.
        schemes: how the weights of a format that is read here, but not computed with, are quantized: each way once.
        unread: why the weights of another library's format are not read.
        tensors: in the order of files and data.
        files: the safetensors files.
        source_sha256: hashes of the files that a packed checkpoint was made from.
        config: ``quantization_config``, or None.
    """

    path: str
    format: str
    spec: QuantSpec | None
    tensors: tuple[TensorRow, ...]
    files: tuple[str, ...]
    source_sha256: dict[str, str]
    config: dict[str, Any] | None
    schemes: tuple[str, ...] = ()
    unread: str | None = None

    @property
    def seen_in_floats(self) -> bool:
        """Whether it is read as the float model that it stands for, since its codes are not ours."""
        return bool(self.schemes) or self.format == GGUF

    @property
    def packed(self) -> tuple[TensorRow, ...]:
        """The packed tensors."""
        return tuple(row for row in self.tensors if row.kind == "packed")

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(row.bytes for row in self.tensors)

    @property
    def parameters(self) -> int:
        """Elements of all tensors, by logical shape."""
        return sum(row.elements for row in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """The same in plain lists and dicts, as ``--json`` prints it."""
        return {
            "path": self.path,
            "format": self.format,
            "spec": None if self.spec is None else self.spec.to_config(),
            "schemes": list(self.schemes),
            "unread": self.unread,
            "files": list(self.files),
            "parameters": self.parameters,
            "total_bytes": self.total_bytes,
            "packed_bytes": sum(row.bytes for row in self.packed),
            "bits_per_weight": 8 * self.total_bytes / self.parameters if self.parameters else 0.0,
            "source_sha256": self.source_sha256,
            "quantization_config": self.config,
            "tensors": [
                {**asdict(row), "shape": list(row.shape), "bits_per_weight": row.bits_per_weight}
                for row in self.tensors
            ],
        }


def inspect(path: str | os.PathLike[str]) -> CheckpointInfo:
    """Read what a model folder, or a single ``.safetensors`` or ``.gguf`` file, holds.

    Only headers are read, and of other libraries' files the few bytes a weight that say how it is quantized.

    A single file is understood as packed only with the ``config.json`` beside it.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        FormatError: a file is damaged, or a packed weight's parts do not fit together.

    >>> inspect("SmolLM2-135M-nf4").spec  # doctest: +SKIP
    QuantSpec(quant_type='nf4', block_size=64, double_quant=True, codebook=None)
    """
    where = Path(path)
    if is_gguf_file(where):
        return _inspect_gguf(where)
    return inspect_source(_open_file(where) if where.is_file() else open_source(where), where)


def inspect_source(source: Source, where: Path | None = None) -> CheckpointInfo:
    """What an opened folder holds; ``where`` is the single file that was opened in place of it."""
    where = source.path if where is None else where
    config = find_quantization_config(source.config)
    method = str(config.get("quant_method", "unknown")) if config is not None else "float"
    spec = unread = None
    hashes: dict[str, str] = {}
    if config is not None and method == "qlora_rs":
        check_format_version(config.get("format_version"), str(source.path / CONFIG))
        spec = _native_spec(source, config)
        hashes = _source_hashes(source)
    weights: dict[str, _Weight] = {}
    whole = not where.is_file()
    if is_flat(config):
        flat = read_flat_weights(source, TensorReader(source).stored, whole=whole)
        specs = {weight.spec for weight in flat.values()}
        spec = specs.pop() if len(specs) == 1 else None
        weights = {name: _Weight.of_flat(source, weight) for name, weight in flat.items()}
    schemes: dict[str, None] = {}
    if config is not None:
        try:
            for weight in (read_foreign(source, config, whole=whole) or {}).values():
                weights[weight.codes.name] = _Weight.of_foreign(weight)
                schemes[weight.scheme] = None
        except UnsupportedError as error:
            unread = str(error)
    rows = _weight_rows(source, weights) if weights else _rows(source, spec)
    return CheckpointInfo(
        str(where), method, spec, rows, source.files, hashes, config, schemes=tuple(schemes), unread=unread
    )


def _native_spec(source: Source, config: Mapping[str, Any]) -> QuantSpec:
    """What ``quantization_config`` says, its errors with the file's name."""
    try:
        spec = QuantSpec.from_config(config)
    except FormatError as error:
        raise FormatError(f"{source.path / CONFIG}: {error}") from None
    modules = config.get("modules_to_not_convert") or []
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        expected = f"a list of names for modules_to_not_convert; got {modules!r}"
        raise FormatError(f"{source.path / CONFIG}: quantization_config: expected {expected}")
    return spec


def _inspect_gguf(path: Path) -> CheckpointInfo:
    source = open_gguf(path)
    weights = source.foreign.values()
    rows = tuple(
        TensorRow(each.name, "packed" if each.scheme else "kept", each.kind, each.shape, each.stored_bytes, path.name)
        for each in weights
    )
    schemes = dict.fromkeys(each.scheme for each in weights if each.scheme)
    return CheckpointInfo(str(path), GGUF, None, rows, source.files, {}, None, schemes=tuple(schemes))


@dataclass(frozen=True)
class _Weight:
    """A weight that several stored tensors make up: what it is called, how, and their names."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    parts: frozenset[str]
    flat: bool = False

    @classmethod
    def of_flat(cls, source: Source, weight: FlatWeight) -> _Weight:
        shape = (2 * source.tensors[weight.name].nbytes,) if weight.shape is None else weight.shape
        flat = weight.shape is None or unaligned(shape, weight.spec) is not None
        return cls(weight.name, weight.spec.quant_type, shape, weight.nbytes, frozenset(weight.parts), flat)

    @classmethod
    def of_foreign(cls, weight: ForeignWeight) -> _Weight:
        parts = frozenset(part.name for part in weight.parts.values())
        return cls(weight.name, weight.kind, weight.shape, weight.stored_bytes, parts)


def _open_file(path: Path) -> Source:
    tensors, metadata = read_file(path.parent, path.name)
    config = read_config(path.parent) if (path.parent / CONFIG).is_file() else {}
    return Source(path.parent, config, (path.name,), {t.name: t for t in tensors}, {path.name: metadata})


def _source_hashes(source: Source) -> dict[str, str]:
    for file, metadata in source.metadata.items():
        if "source_sha256" in metadata:
            try:
                hashes = json.loads(metadata["source_sha256"])
            except (ValueError, RecursionError):
                hashes = None
            if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
                raise FormatError(f"{source.path / file}: source_sha256 is not an object of hashes")
            return hashes
    return {}


def _rows(source: Source, spec: QuantSpec | None) -> tuple[TensorRow, ...]:
    tensors = source.tensors
    is_packed = {name for name in tensors if spec is not None and f"{name}_absmax" in tensors}
    parts = {name + part for name in is_packed for part in PARTS}
    rows = []
    for name, tensor in tensors.items():
        if name in parts:
            continue
        if name in is_packed and spec is not None:
            rows.append(_packed_row(source, tensor, spec))
        else:
            rows.append(_kept_row(tensor))
    return tuple(rows)


def _weight_rows(source: Source, weights: Mapping[str, _Weight]) -> tuple[TensorRow, ...]:
    """Rows in the order of the files; ``weights`` by the names of their codes."""
    parts = {part for weight in weights.values() for part in weight.parts}
    rows = []
    for name, tensor in source.tensors.items():
        if name in weights:
            weight = weights[name]
            described = weight.name, "packed", weight.dtype, weight.shape, weight.nbytes, tensor.file, weight.flat
            rows.append(TensorRow(*described))
        elif name not in parts:
            rows.append(_kept_row(tensor))
    return tuple(rows)


def _kept_row(tensor: StoredTensor) -> TensorRow:
    return TensorRow(tensor.name, "kept", tensor.dtype, tensor.shape, tensor.nbytes, tensor.file)


def _packed_row(source: Source, codes: StoredTensor, spec: QuantSpec) -> TensorRow:
    shape = logical_shape(source.path, codes, source.metadata[codes.file], spec)
    flat = is_flat_layout(codes.shape, shape, spec)
    shapes = PackedShapes.of(shape, spec, flat=flat)
    expected = {
        "": ("U8", shapes.codes),
        "_absmax": ("U8" if spec.double_quant else "I32", shapes.absmax),
    }
    if spec.double_quant:
        expected["_absmax_scale"] = ("I32", shapes.absmax_scale)
        expected["_absmax_offset"] = ("I32", shapes.absmax_offset)
    total = sum(
        expect_tensor(source, codes.file, codes.name + part, dtype, part_shape, spec.describe()).nbytes
        for part, (dtype, part_shape) in expected.items()
    )
    transposed = _is_transposed(source, codes, shape, flat)
    return TensorRow(codes.name, "packed", spec.quant_type, shape, total, codes.file, flat, transposed)


def _is_transposed(source: Source, codes: StoredTensor, shape: tuple[int, ...], flat: bool) -> bool:
    """Whether the metadata says that the model in floats holds the weight's matrices as (in, out)."""
    key = f"{codes.name}.transposed"
    recorded = source.metadata[codes.file].get(key)
    if recorded is not None and (recorded != "true" or flat or len(shape) < 2):
        raise FormatError(
            f"{source.path / codes.file}: metadata {key!r}: expected 'true', of matrices that are packed by rows; got "
            f"{recorded!r} of shape {list(shape)}"
        )
    return recorded is not None


class PackedLayout(NamedTuple):
    """How a packed weight is laid out.

    Attributes:
        shape: logical shape, (..., out, in).
        flat: its blocks run over the ends of its rows.
        transposed: the model in floats holds each matrix as (in, out).
    """

    shape: tuple[int, ...]
    flat: bool
    transposed: bool = False


def packed_layouts(source: Source, spec: QuantSpec) -> dict[str, PackedLayout]:
    """How the packed weights, native ones or bitsandbytes', are laid out, by name.

    Raises:
        FormatError, UnsupportedError: of what describes them.
    """
    layouts = {}
    for name, tensor in source.tensors.items():
        if f"{name}_absmax" in source.tensors:
            shape = logical_shape(source.path, tensor, source.metadata[tensor.file], spec)
            flat = is_flat_layout(tensor.shape, shape, spec)
            layouts[name] = PackedLayout(shape, flat, _is_transposed(source, tensor, shape, flat))
    if layouts:
        return layouts
    weights = TensorReader(source).flat.items()
    return {
        name: PackedLayout(each.shape or (), unaligned(each.shape or (), spec) is not None) for name, each in weights
    }


def logical_shape(folder: Path, codes: StoredTensor, metadata: Mapping[str, str], spec: QuantSpec) -> tuple[int, ...]:
    """Shape of the weight that ``codes`` of a file with ``metadata`` stand for.

    Raises:
        FormatError: the metadata records something that is no shape.
    """
    recorded = metadata.get(f"{codes.name}.shape")
    if recorded is None:
        *lead, last = codes.shape or (0,)
        return (*lead, last if spec.bits == 8 else 2 * last)
    try:
        shape = json.loads(recorded)
    except (ValueError, RecursionError):
        shape = None
    sizes = shape if isinstance(shape, list) else [None]
    if not sizes or not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes):
        raise FormatError(
            f"{folder / codes.file}: metadata {codes.name + '.shape'!r}: expected sizes, got {recorded!r}"
        )
    return tuple(sizes)
