"""`convert`: a packed model folder to another format, streamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_rs import _core
from qlora_rs.checkpoint import flat
from qlora_rs.checkpoint.choice import FLOAT_DTYPES, meta_model, parameter_names
from qlora_rs.checkpoint.folder import resolve_destination
from qlora_rs.checkpoint.inspection import PARTS, CheckpointInfo, TensorRow, inspect
from qlora_rs.checkpoint.plain import cast, plain_config, plan_plain, stored_dtype, unquantized_config
from qlora_rs.checkpoint.progress import ByteCounter, Progress
from qlora_rs.checkpoint.shards import PlannedTensor, plan_grouped_shards, plan_shards
from qlora_rs.checkpoint.source import FORMAT_VERSION, Source, open_source, require_folder
from qlora_rs.checkpoint.weights import TensorReader
from qlora_rs.checkpoint.writing import ModelPlan, write_model
from qlora_rs.errors import FormatError, UnsupportedError
from qlora_rs.packed import PackedShapes, PackedTensor
from qlora_rs.report import SkippedEntry, format_bytes, left_out_lines
from qlora_rs.selection import HEADS
from qlora_rs.spec import QuantSpec

NATIVE = "qlora_rs"
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
TARGETS = ("native", "bitsandbytes", *FLOATS)


@dataclass(frozen=True)
class ConvertReport:
    """What was converted.

    Attributes:
        source: the format that was read, ``"qlora_rs"`` or ``"bitsandbytes"``.
        target: what was asked for: ``"native"``, ``"bitsandbytes"``, ``"bf16"`` or ``"fp16"``.
        spec: how the source's weights are packed, in one line.
        weights: how many packed weights were converted.
        kept: how many other tensors there are.
        bytes_before: bytes of the source's tensors.
        bytes_after: bytes of the tensors that were written.
        files: the weight files that were written.
        left_out: files of the source that were not carried over.
        notes: anything else worth knowing.
    """

    source: str
    target: str
    spec: str
    weights: int
    kept: int
    bytes_before: int
    bytes_after: int
    files: tuple[str, ...]
    left_out: tuple[SkippedEntry, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """A few lines."""
        sizes = f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)}"
        lines = [
            f"{self.weights} weights ({self.spec}) from {self.source} to {self.target}, {self.kept} other tensors",
            f"all tensors: {sizes}",
            *left_out_lines(self.left_out),
        ]
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    max_shard_size: int = 5_000_000_000,
) -> ConvertReport:
    """Write a packed model folder in another format, files to files.

    Between the native format and that of bitsandbytes packed bytes stay what they are; ``"bf16"`` and ``"fp16"``
    dequantize them. Tensors pass through one at a time: memory does not grow with the model. ``dst`` is absent or whole
    at any time.

    Args:
        src: a packed model folder, native or of transformers with bitsandbytes in 4 bits; it is only read.
        dst: the folder to make.
        to: ``"native"``; ``"bitsandbytes"``, as transformers saves it; ``"bf16"`` or ``"fp16"``, a plain model whose
            float tensors all have that type.
        overwrite: replace an existing model in ``dst`` once the new one is whole.
        progress: called with (bytes done, bytes in all) of what is read.
        max_shard_size: bytes of tensors per file.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        FormatError: a file is damaged, or a value does not fit float16.
        UnsupportedError: ``src`` is not packed, is ``native`` already, or holds what the other format cannot (a data
            type without a name there, rows that are no whole blocks); ``dst`` is no place for a model.
        ValueError: ``to`` names no format.
        OSError: the system failed, with the file's name; what was written so far is removed.

    >>> print(convert("SmolLM2-135M-nf4", "SmolLM2-135M-bnb", "bitsandbytes"))  # doctest: +SKIP
    """
    if to not in TARGETS or max_shard_size < 1:
        raise ValueError(
            f"convert to one of {', '.join(TARGETS)} in files of 1 byte at least; got {to!r} and {max_shard_size}"
        )
    source_path = Path(src)
    require_folder(source_path)
    info = inspect(source_path)
    source = open_source(source_path)
    spec = _packed_spec(info)
    target = resolve_destination(source_path, Path(dst), overwrite)
    counter = ByteCounter(progress, info.total_bytes)
    job = _Job(info, source, TensorReader(source), spec, counter.add, max_shard_size)
    notes: list[str] = []
    if to in FLOATS:
        plan = _plan_floats(job, FLOATS[to])
    elif to == "native":
        plan = _plan_native(job, notes)
    else:
        plan = _plan_same(job) if info.format == flat.METHOD else _plan_flat(job, notes)
    left_out = write_model(source, target, plan, overwrite=overwrite, notes=notes)
    return ConvertReport(
        source=info.format,
        target=to,
        spec=spec.describe(),
        weights=len(info.packed),
        kept=len(info.tensors) - len(info.packed),
        bytes_before=info.total_bytes,
        bytes_after=plan.nbytes,
        files=plan.files,
        left_out=tuple(left_out),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Job:
    """What every target needs.

    Attributes:
        advance: to be called with the bytes that were read.
    """

    info: CheckpointInfo
    source: Source
    reader: TensorReader
    spec: QuantSpec
    advance: Callable[[int], None]
    max_shard_size: int

    def where(self, row: TensorRow) -> str:
        """File and name of a tensor, for messages."""
        return f"{self.source.path / row.file}: tensor {row.name!r}"

    def packed(self, row: TensorRow) -> PackedTensor:
        """A packed weight by rows; a view of the files."""
        return self.reader.packed(row.name, row.shape, self.spec)


def _packed_spec(info: CheckpointInfo) -> QuantSpec:
    if info.spec is not None:
        return info.spec
    if info.format == "float":
        raise UnsupportedError(f"{info.path}: is not packed; `qlora-rs quantize` packs it")
    ways = sorted({row.dtype for row in info.packed})
    held = f"holds weights that are packed in several ways ({', '.join(ways)})" if ways else "holds no 4-bit weight"
    raise UnsupportedError(f"{info.path}: is quantized by {info.format!r} and {held}, which is not converted")


def _plan_floats(job: _Job, dtype: torch.dtype) -> ModelPlan:
    rows = {row.name: row for row in job.info.tensors}

    def read(name: str) -> Tensor:
        row = rows[name]
        try:
            if row.kind == "packed":
                tensor = job.reader.dequantized(name, row.shape, job.spec, dtype)
                # Seldom: the values in float32, which take much more memory, tell whether they were finite.
                if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
                    tensor = cast(job.reader.dequantized(name, row.shape, job.spec), dtype)
            else:
                tensor = job.reader.stored(name)
                tensor = cast(tensor, dtype) if row.dtype in FLOAT_DTYPES else tensor
        except FormatError as error:
            raise FormatError(f"{job.where(row)}: {error}") from None
        job.advance(row.bytes)
        return tensor

    for row in job.info.packed:
        if job.info.format == flat.METHOD and job.reader.flat[row.name].shape is None:
            raise UnsupportedError(f"{job.where(row)}: its quant_state does not tell its shape")
    shards = plan_shards([plan_plain(row, dtype) for row in rows.values()], job.max_shard_size)
    return ModelPlan(shards, read, plain_config(job.source.config, dtype))


def _plan_native(job: _Job, notes: list[str]) -> ModelPlan:
    if job.info.format == NATIVE:
        raise UnsupportedError(f"{job.info.path}: is in the native format already")
    parts: dict[str, Callable[[], Tensor]] = {}
    together: list[list[PlannedTensor]] = []
    metadata = {"format": "pt", "qlora_rs_version": _core.__version__}
    for row in job.info.tensors:
        if row.kind != "packed":
            parts[row.name] = _stored(job, row.name)
            together.append([PlannedTensor(row.name, row.dtype, row.shape, row.bytes)])
            continue
        job.packed(row)  # everything that could be refused is refused before anything is written
        group = []
        shapes = PackedShapes.of(row.shape, job.spec)
        sizes = (shapes.codes, shapes.absmax, shapes.absmax_scale, shapes.absmax_offset)
        for part, shape in zip(("", *PARTS), sizes, strict=True):
            if job.spec.double_quant or part in ("", "_absmax"):
                dtype = "U8" if part == "" or (part == "_absmax" and job.spec.double_quant) else "I32"
                size = torch.Size(shape).numel() * (1 if dtype == "U8" else 4)
                group.append(PlannedTensor(row.name + part, dtype, shape, size))
                parts[row.name + part] = _native_part(job, row, part)
        together.append(group)
        if row.shape[-1] % 2:
            metadata[f"{row.name}.shape"] = json.dumps(list(row.shape))
    config = {
        **unquantized_config(job.source.config),
        "quantization_config": {
            "quant_method": NATIVE,
            **job.spec.to_config(),
            "modules_to_not_convert": _not_packed(job, notes),
            "format_version": FORMAT_VERSION,
        },
    }
    shards = plan_grouped_shards(together, job.max_shard_size)
    return ModelPlan(shards, lambda name: parts[name](), config, metadata)


def _plan_same(job: _Job) -> ModelPlan:
    """bitsandbytes' own tensors once more: whatever they hold stays as it is."""
    stored = sorted(job.source.tensors.values(), key=lambda tensor: tensor.name)
    planned = [PlannedTensor(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in stored]
    shards = plan_shards(planned, job.max_shard_size)
    total = {"total_parameters": job.info.parameters}
    return ModelPlan(shards, lambda name: _stored(job, name)(), job.source.config, index_metadata=total)


def _plan_flat(job: _Job, notes: list[str]) -> ModelPlan:
    """As transformers saves a model that bitsandbytes packed: tensors by name, and shards cut between any two."""
    spec = job.spec
    if spec.quant_type not in flat.QUANT_TYPES:
        raise UnsupportedError(
            f"{job.info.path}: is packed as {spec.describe()}, which bitsandbytes has no name for; it holds "
            f"{' and '.join(flat.QUANT_TYPES)} (`--to bf16` dequantizes)"
        )
    dtype = stored_dtype(job.source.config)
    if dtype is None:
        dtype = "bfloat16"
        notes.append(f"config.json tells no float type: {dtype} is written as the one that was quantized")
    planned: list[PlannedTensor] = []
    parts: dict[str, Callable[[], Tensor]] = {}
    for row in job.info.tensors:
        if row.kind != "packed":
            planned.append(PlannedTensor(row.name, row.dtype, row.shape, row.bytes))
            parts[row.name] = _stored(job, row.name)
            continue
        for part, tensor in _flat_parts(job, row, dtype).items():
            stored = "U8" if tensor.dtype == torch.uint8 else "F32"
            planned.append(PlannedTensor(row.name + part, stored, tuple(tensor.shape), tensor.nbytes))
            parts[row.name + part] = _counted(job, tensor, row.bytes if part == "" else 0)
    planned.sort(key=lambda tensor: tensor.name)
    shards = plan_shards(planned, job.max_shard_size)
    config = _flat_config(job, dtype)
    total = {"total_parameters": job.info.parameters}
    return ModelPlan(shards, lambda name: parts[name](), config, index_metadata=total)


def _flat_parts(job: _Job, row: TensorRow, dtype: str) -> dict[str, Tensor]:
    """The parts of a weight by the end of their names; views of the files, or small."""
    reason = flat.unaligned(row.shape, job.spec)
    packed = job.packed(row)
    offset = None
    if packed.absmax_offset is not None:
        bits = packed.absmax_offset.view(torch.int32)
        offset = float(packed.absmax_offset[0])
        if reason is None and not torch.equal(bits, bits[:1].expand_as(bits)):
            reason = "its experts have scales of their own, of which bitsandbytes holds one set for all"
    if reason is not None:
        raise UnsupportedError(
            f"{job.where(row)}: {reason}; bitsandbytes' format cannot hold the same bytes (`--to bf16` dequantizes)"
        )
    parts = {
        "": packed.codes.reshape(-1, 1),
        ".absmax": packed.absmax.reshape(-1),
        ".quant_map": flat.code_values(job.spec),
    }
    if packed.absmax_scale is not None:
        parts[".nested_absmax"] = packed.absmax_scale.reshape(-1)
        parts[".nested_quant_map"] = flat.scale_values()
    state = flat.render_state(job.spec, dtype, row.shape, offset)
    name = f"{flat.STATE}bitsandbytes__{job.spec.quant_type}"
    return {**parts, name: torch.tensor(list(state), dtype=torch.uint8)}


def _counted(job: _Job, tensor: Tensor, count: int) -> Callable[[], Tensor]:
    def read() -> Tensor:
        job.advance(count)
        return tensor

    return read


def _stored(job: _Job, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor = job.reader.stored(name)
        job.advance(job.source.tensors[name].nbytes)
        return tensor

    return read


def _native_part(job: _Job, row: TensorRow, part: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        packed = job.packed(row)
        if part == "":
            job.advance(row.bytes)
            return packed.codes
        tensor = getattr(packed, part.removeprefix("_"))
        assert isinstance(tensor, Tensor)
        return tensor

    return read


def _not_packed(job: _Job, notes: list[str]) -> list[str]:
    """Names of the Linear modules that stay in floats."""
    try:
        model = meta_model(job.source)
    except UnsupportedError as error:
        notes.append(f"modules_to_not_convert lists all matrices that are not packed: {error}")
        kept = (row for row in job.info.tensors if row.kind == "kept" and len(row.shape) == 2)
        return [row.name.removesuffix(".weight") for row in kept if row.name.endswith(".weight")]
    in_model, _ = parameter_names(job.source, model)
    packed = {in_model.get(row.name) for row in job.info.packed}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if f"{name}.weight" not in packed]


def _flat_config(job: _Job, dtype: str) -> dict[str, Any]:
    """``config.json`` with the ``quantization_config`` of a `BitsAndBytesConfig`; sorted where the rest is sorted."""
    stays = (job.info.config or {}).get("modules_to_not_convert") or []
    quantization = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": job.spec.quant_type,
        "bnb_4bit_use_double_quant": job.spec.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if _is_default(stays) else list(stays),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": flat.METHOD,
    }
    return _with_quantization(unquantized_config(job.source.config), quantization)


def _with_quantization(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    result = {**config, "quantization_config": dict(quantization)}
    return dict(sorted(result.items())) if list(config) == sorted(config) else result


def _is_default(stays: Sequence[str]) -> bool:
    """Whether transformers leaves exactly these to floats unasked: it does so with output heads."""
    return all(HEADS.intersection(name.split(".")) for name in stays)
