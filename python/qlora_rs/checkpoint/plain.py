"""A packed model in floats again: types, tensors and config.json of a folder that needs no qlora_rs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_rs.checkpoint.choice import FLOAT_DTYPES
from qlora_rs.checkpoint.inspection import TensorRow
from qlora_rs.checkpoint.shards import PlannedTensor
from qlora_rs.checkpoint.source import unquantized_config
from qlora_rs.errors import FormatError

STORED_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def plan_plain(row: TensorRow, dtype: torch.dtype) -> PlannedTensor:
    """How a tensor is stored: packed and float ones in ``dtype``, others as they are."""
    if row.kind == "packed" or row.dtype in FLOAT_DTYPES:
        return PlannedTensor(row.name, STORED_DTYPES[dtype], row.float_shape, row.elements * dtype.itemsize)
    return PlannedTensor(row.name, row.dtype, row.shape, row.bytes)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype``.

    Raises:
        FormatError: finite values do not fit.
    """
    result = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        lost = torch.isinf(result) & torch.isfinite(tensor)
        if lost.any():
            wider = "float32" if dtype == torch.bfloat16 else "bfloat16"
            name = str(dtype).removeprefix("torch.")
            largest = float(tensor[lost].abs().max())
            raise FormatError(f"values up to {largest:.4g} do not fit {name}; choose {wider}")
    return result


def plain_config(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` without the quantization and with the new type, its own keys in their order."""
    name = str(dtype).removeprefix("torch.")

    def typed(part: Mapping[str, Any]) -> dict[str, Any]:
        return {key: name if key in ("dtype", "torch_dtype") else value for key, value in part.items()}

    parts = typed(unquantized_config(config))
    parts = {key: typed(value) if isinstance(value, dict) else value for key, value in parts.items()}
    return parts if "dtype" in parts or "torch_dtype" in parts else {**parts, "dtype": name}


def stored_dtype(config: Mapping[str, Any]) -> str | None:
    """The float type that ``config.json`` gives the model, e.g. ``"bfloat16"``; None where it gives none."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        name = part.get("dtype", part.get("torch_dtype"))
        if name in FLOAT_DTYPES.values():
            return str(name)
    return None
