"""`convert` to the native format."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from qlora_rs import _core
from qlora_rs.checkpoint.choice import meta_model, parameter_names
from qlora_rs.checkpoint.inspection import PARTS, TensorRow
from qlora_rs.checkpoint.job import Job
from qlora_rs.checkpoint.shards import PlannedTensor, plan_grouped_shards
from qlora_rs.checkpoint.source import FORMAT_VERSION, unquantized_config
from qlora_rs.checkpoint.to_bitsandbytes import settings_to_keep
from qlora_rs.checkpoint.writing import ModelPlan
from qlora_rs.errors import UnsupportedError
from qlora_rs.packed import PackedShapes

NATIVE = "qlora_rs"


def plan_native(
    job: Job,
    notes: list[str],
    *,
    not_converted: Sequence[str] | None = None,
    hashes: Mapping[str, str] | None = None,
) -> ModelPlan:
    """The packed bytes under native names.

    Args:
        job: the source.
        notes: gets what the user should know.
        not_converted: the Linear modules that stay in floats; None: found out.
        hashes: of the files that the weights were quantized from, to be recorded.

    Raises:
        UnsupportedError: the source is native already, or holds weights whose shape is unknown.
    """
    if job.info.format == NATIVE:
        raise UnsupportedError(f"{job.info.path}: is in the native format already")
    parts: dict[str, Callable[[], Tensor]] = {}
    together: list[list[PlannedTensor]] = []
    metadata = {"format": "pt", "qlora_rs_version": _core.__version__}
    if hashes is not None:
        metadata["source_sha256"] = json.dumps(dict(hashes))
    for row in job.info.tensors:
        if row.kind != "packed":
            parts[row.name] = job.stored(row.name)
            together.append([PlannedTensor(row.name, row.dtype, row.shape, row.bytes)])
            continue
        if not job.is_made:
            job.require_packed(row)  # everything that could be refused is refused before anything is written
        group = []
        shapes = PackedShapes.of(row.shape, job.spec, flat=row.flat)
        sizes = (shapes.codes, shapes.absmax, shapes.absmax_scale, shapes.absmax_offset)
        for part, shape in zip(("", *PARTS), sizes, strict=True):
            if job.spec.double_quant or part in ("", "_absmax"):
                dtype = "U8" if part == "" or (part == "_absmax" and job.spec.double_quant) else "I32"
                size = torch.Size(shape).numel() * (1 if dtype == "U8" else 4)
                group.append(PlannedTensor(row.name + part, dtype, shape, size))
                parts[row.name + part] = _native_part(job, row, part)
        together.append(group)
        if row.flat or row.shape[-1] % 2:
            metadata[f"{row.name}.shape"] = json.dumps(list(row.shape))
        if row.transposed:
            metadata[f"{row.name}.transposed"] = "true"
    job.require_distinct(tensor for group in together for tensor in group)
    stays = list(not_packed(job, notes) if not_converted is None else not_converted)
    config = {
        **unquantized_config(job.source.config),
        "quantization_config": {
            "quant_method": NATIVE,
            **job.spec.to_config(),
            "modules_to_not_convert": stays,
            "format_version": FORMAT_VERSION,
            **settings_to_keep(job, stays),
        },
    }
    shards = plan_grouped_shards(together, job.max_shard_size)
    return ModelPlan(shards, lambda name: parts[name](), job.read_bytes(), config, metadata)


def _native_part(job: Job, row: TensorRow, part: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor = getattr(job.packed(row), part.removeprefix("_") or "codes")
        assert isinstance(tensor, Tensor)
        return tensor

    return read


def not_packed(job: Job, notes: list[str], names: Collection[str] | None = None) -> list[str]:
    """Names of the Linear modules that stay in floats, where weights of these ``names`` are packed (None: all are)."""
    names = {row.name for row in job.info.packed} if names is None else names
    try:
        model = meta_model(job.source)
    except UnsupportedError as error:
        notes.append(f"modules_to_not_convert lists all matrices that are not packed: {error}")
        kept = (row for row in job.info.tensors if row.name not in names and len(row.shape) == 2)
        return [row.name.removesuffix(".weight") for row in kept if row.name.endswith(".weight")]
    in_model, _ = parameter_names(job.source, model)
    packed = {in_model.get(name) for name in names}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if f"{name}.weight" not in packed]
