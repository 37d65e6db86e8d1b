"""`convert` to 16 bits: a plain model folder."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_rs.checkpoint import flat
from qlora_rs.checkpoint.choice import FLOAT_DTYPES
from qlora_rs.checkpoint.job import Job
from qlora_rs.checkpoint.plain import STORED_DTYPES, plain_config, plan_plain
from qlora_rs.checkpoint.shards import plan_shards
from qlora_rs.checkpoint.writing import ModelPlan
from qlora_rs.errors import UnsupportedError


def plan_floats(job: Job, dtype: torch.dtype, notes: list[str]) -> ModelPlan:
    """The model with all its float and packed tensors in ``dtype``; ``notes`` gets what that costs.

    Raises:
        UnsupportedError: the source does not tell the shape of a weight.
    """
    rows = {row.name: row for row in job.info.tensors}

    def read(name: str) -> Tensor:
        row = rows[name]
        as_values = row.kind == "packed" or row.dtype in FLOAT_DTYPES
        return job.values(row, dtype) if as_values else job.reader.stored(name)

    for row in job.info.packed:
        if job.info.format == flat.METHOD and job.reader.flat[row.name].shape is None:
            raise UnsupportedError(f"{job.where(row)}: its quant_state does not tell its shape")
    other = {weight.dtype for weight in job.source.foreign.values()} - {STORED_DTYPES[dtype]}
    if other:
        notes.append(
            f"{job.info.format} gives its weights in {' and '.join(sorted(other))}: {STORED_DTYPES[dtype]} rounds them "
            "once more"
        )
    shards = plan_shards([plan_plain(row, dtype) for row in rows.values()], job.max_shard_size)
    return ModelPlan(shards, read, job.read_bytes(), plain_config(job.source.config, dtype))
