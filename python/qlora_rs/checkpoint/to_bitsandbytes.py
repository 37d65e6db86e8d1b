"""`convert` to bitsandbytes' 4-bit format, as transformers saves it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_rs.checkpoint import flat
from qlora_rs.checkpoint.inspection import TensorRow
from qlora_rs.checkpoint.job import Job
from qlora_rs.checkpoint.plain import STORED_DTYPES, stored_dtype
from qlora_rs.checkpoint.shards import PlannedTensor, plan_shards
from qlora_rs.checkpoint.source import CONFIG, unquantized_config
from qlora_rs.checkpoint.writing import ModelPlan
from qlora_rs.errors import FormatError, UnsupportedError
from qlora_rs.packed import PackedShapes
from qlora_rs.selection import HEADS
from qlora_rs.spec import QuantSpec

# In a native `quantization_config`: what that of the bitsandbytes folder it was made from said otherwise than
# `_quantization` does.
KEPT_SETTINGS = "bitsandbytes"
_STORAGE_SETTING = "bnb_4bit_quant_storage"
# What codes may be stored as, by its name in config.json.
_STORAGE = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.uint8, *STORED_DTYPES)}
# Settings that follow from how the weights are packed.
_FIXED = ("quant_method", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")

# The end of the name of the part that says what a weight is.
STATE_OF = {quant_type: f"{flat.STATE}bitsandbytes__{quant_type}" for quant_type in flat.QUANT_TYPES}


def plan_bitsandbytes(job: Job, notes: list[str]) -> ModelPlan:
    """The packed bytes under bitsandbytes' names; its own tensors stay as they are.

    Raises:
        UnsupportedError: the format has no name for how they are packed, or cannot hold some weight's bytes.
    """
    return _plan_same(job) if job.info.format == flat.METHOD else _plan_flat(job, notes)


def _plan_same(job: Job) -> ModelPlan:
    """bitsandbytes' own tensors once more: whatever they hold stays as it is."""
    stored = sorted(job.source.tensors.values(), key=lambda tensor: tensor.name)
    planned = [PlannedTensor(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in stored]
    shards = plan_shards(planned, job.max_shard_size)
    total = {"total_parameters": job.info.parameters}
    read_bytes = {tensor.name: tensor.nbytes for tensor in stored}
    return ModelPlan(shards, job.reader.stored, read_bytes, job.source.config, index_metadata=total)


def _plan_flat(job: Job, notes: list[str]) -> ModelPlan:
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
    quantization = _quantization(job, dtype)
    storage = _STORAGE[quantization[_STORAGE_SETTING]]
    # Of bytes; the others are float32.
    codes = {STATE_OF[spec.quant_type], *([".absmax"] if spec.double_quant else [])}
    planned: list[PlannedTensor] = []
    parts: dict[str, Callable[[], Tensor]] = {}
    for row in job.info.tensors:
        if row.kind != "packed":
            planned.append(PlannedTensor(row.name, row.dtype, row.shape, row.bytes))
            parts[row.name] = job.stored(row.name)
            continue
        for part, shape, read in _flat_parts(job, row, dtype, storage):
            stored = storage if part == "" else torch.uint8 if part in codes else torch.float32
            size = math.prod(shape) * stored.itemsize
            planned.append(PlannedTensor(row.name + part, STORED_DTYPES.get(stored, "U8"), shape, size))
            parts[row.name + part] = read
    job.require_distinct(planned)
    planned.sort(key=lambda tensor: tensor.name)
    shards = plan_shards(planned, job.max_shard_size)
    config = _with_quantization(unquantized_config(job.source.config), quantization)
    total = {"total_parameters": job.info.parameters}
    return ModelPlan(shards, lambda name: parts[name](), job.read_bytes(), config, index_metadata=total)


def _flat_parts(
    job: Job, row: TensorRow, dtype: str, storage: torch.dtype
) -> list[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """The parts of a weight: the end of their names, their shapes, and what reads or makes them."""
    spec = job.spec
    reason = None if row.flat else flat.unaligned(row.shape, spec)
    if row.transposed:
        reason = "its experts are packed transposed, which bitsandbytes has no mark for"
    offset = None
    if spec.double_quant:
        bits = job.reader.stored(f"{row.name}_absmax_offset")
        offset = float(bits.view(torch.float32)[0])
        if reason is None and not torch.equal(bits, bits[:1].expand_as(bits)):
            reason = "its experts have scales of their own, of which bitsandbytes holds one set for all"
    if reason is not None:
        raise UnsupportedError(
            f"{job.where(row)}: {reason}; bitsandbytes' format cannot hold the same bytes (`--to bf16` dequantizes)"
        )
    shapes = PackedShapes.of(row.shape, spec, flat=row.flat)
    state = torch.tensor(list(flat.render_state(spec, dtype, row.shape, offset)), dtype=torch.uint8)
    codes, blocks = (math.prod(shape) for shape in (shapes.codes, shapes.absmax))
    if codes % storage.itemsize:
        raise UnsupportedError(
            f"{job.where(row)}: has {codes} bytes of codes, which are no whole elements of {storage}, as which "
            f"{KEPT_SETTINGS} in {job.source.path / CONFIG} says that they were stored: remove it there"
        )
    parts: list[tuple[str, tuple[int, ...], Callable[[], Tensor]]] = [
        ("", (codes // storage.itemsize, 1), lambda: job.packed(row).codes.reshape(-1).view(storage).reshape(-1, 1)),
        (".absmax", (blocks,), lambda: job.packed(row).absmax.reshape(-1)),
        (".quant_map", (16,), partial(flat.code_values, spec)),
        (STATE_OF[spec.quant_type], (state.numel(),), lambda: state),
    ]
    if spec.double_quant:
        groups = math.prod(shapes.absmax_scale)
        parts.append((".nested_absmax", (groups,), partial(_group_scales, job, row)))
        parts.append((".nested_quant_map", (256,), flat.scale_values))
    return parts


def _group_scales(job: Job, row: TensorRow) -> Tensor:
    scale = job.packed(row).absmax_scale
    assert scale is not None
    return scale.reshape(-1)


def _quantization(job: Job, dtype: str) -> dict[str, Any]:
    """The ``quantization_config`` to write: a `BitsAndBytesConfig`, with what an earlier one said."""
    config = job.info.config or {}
    return {
        **_default_quantization(job.spec, dtype, config.get("modules_to_not_convert") or []),
        **_kept(config, str(job.source.path / CONFIG)),
    }


def _default_quantization(spec: QuantSpec, dtype: str, stays: Sequence[str]) -> dict[str, Any]:
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        _STORAGE_SETTING: "uint8",
        "bnb_4bit_quant_type": spec.quant_type,
        "bnb_4bit_use_double_quant": spec.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if _is_default(stays) else list(stays),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": flat.METHOD,
    }


def settings_to_keep(job: Job, stays: Sequence[str]) -> dict[str, Any]:
    """What a native ``quantization_config`` holds, so that a bitsandbytes folder comes back as it was.

    Args:
        job: the source; nothing is kept of one in another format.
        stays: what ``modules_to_not_convert`` of the native folder says.
    """
    if job.info.format != flat.METHOD or job.info.config is None:
        return {}
    default = _default_quantization(job.spec, stored_dtype(job.source.config) or "bfloat16", stays)
    kept = {
        name: value
        for name, value in job.info.config.items()
        if name not in _FIXED and (name not in default or default[name] != value)
    }
    if kept.get(_STORAGE_SETTING, "uint8") not in _STORAGE:
        del kept[_STORAGE_SETTING]  # no codes that were read are stored so
    return {KEPT_SETTINGS: kept} if kept else {}


def _kept(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What `settings_to_keep` gave."""
    kept = config.get(KEPT_SETTINGS, {})
    known = isinstance(kept, dict) and kept.get(_STORAGE_SETTING, "uint8") in _STORAGE
    if not known or any(name in kept for name in _FIXED):
        raise FormatError(
            f"{where}: quantization_config: expected settings of bitsandbytes as {KEPT_SETTINGS}, without "
            f"{', '.join(_FIXED)}, and {_STORAGE_SETTING} one of {', '.join(_STORAGE)}; got {kept!r}"
        )
    return dict(kept)


def _with_quantization(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    result = {**config, "quantization_config": dict(quantization)}
    return dict(sorted(result.items())) if list(config) == sorted(config) else result


def _is_default(stays: Sequence[str]) -> bool:
    """Whether transformers leaves exactly these to floats unasked: it does so with output heads."""
    return all(HEADS.intersection(name.split(".")) for name in stays)
