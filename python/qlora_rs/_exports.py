"""The public names of the package, in one place; they are loaded when `qlora_rs` is first asked for one of them."""

from __future__ import annotations

from qlora_rs import checkpoint, optim, paging, reference
from qlora_rs.adapter_merge import MergeReport, merge_adapter
from qlora_rs.adapters import load_adapter, read_adapter, save_adapter
from qlora_rs.errors import DeviceError, FormatError, NonFiniteError, PageError, QloraError, UnsupportedError
from qlora_rs.linear import Linear4bit
from qlora_rs.lora import (
    AttachReport,
    LoraLinear,
    adapters_disabled,
    attach_lora,
    lora_modules,
    lora_parameters,
)
from qlora_rs.model import from_pretrained
from qlora_rs.model_quantization import quantize_model
from qlora_rs.packed import PackedTensor
from qlora_rs.quantization import dequantize, quantize, warmup
from qlora_rs.recomputation import keep_dequantized
from qlora_rs.report import QuantizeReport
from qlora_rs.spec import QuantSpec

__all__ = [
    "AttachReport",
    "DeviceError",
    "FormatError",
    "Linear4bit",
    "LoraLinear",
    "MergeReport",
    "NonFiniteError",
    "PackedTensor",
    "PageError",
    "QloraError",
    "QuantSpec",
    "QuantizeReport",
    "UnsupportedError",
    "adapters_disabled",
    "attach_lora",
    "checkpoint",
    "dequantize",
    "from_pretrained",
    "keep_dequantized",
    "load_adapter",
    "lora_modules",
    "lora_parameters",
    "merge_adapter",
    "optim",
    "paging",
    "quantize",
    "quantize_model",
    "read_adapter",
    "reference",
    "save_adapter",
    "warmup",
]
