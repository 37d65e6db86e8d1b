"""QLoRA: quantize a model's weights to 4 bits, pack them, and fine-tune through LoRA adapters.

>>> import torch, qlora_rs
>>> packed = qlora_rs.quantize(torch.ones(2, 64))
>>> qlora_rs.dequantize(packed).shape
torch.Size([2, 64])
"""

from __future__ import annotations

from qlora_rs import checkpoint, reference
from qlora_rs._core import __version__
from qlora_rs.adapter_merge import MergeReport, merge_adapter
from qlora_rs.adapters import load_adapter, read_adapter, save_adapter
from qlora_rs.errors import DeviceError, FormatError, NonFiniteError, QloraError, UnsupportedError
from qlora_rs.integrations import register_when_imported
from qlora_rs.linear import Linear4bit
from qlora_rs.lora import (
    AttachReport,
    LoraLinear,
    adapters_disabled,
    attach_lora,
    lora_modules,
    lora_parameters,
)
from qlora_rs.model import from_pretrained, quantize_model
from qlora_rs.packed import PackedTensor
from qlora_rs.quantization import dequantize, quantize
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
    "QloraError",
    "QuantSpec",
    "QuantizeReport",
    "UnsupportedError",
    "__version__",
    "adapters_disabled",
    "attach_lora",
    "checkpoint",
    "dequantize",
    "from_pretrained",
    "load_adapter",
    "lora_modules",
    "lora_parameters",
    "merge_adapter",
    "quantize",
    "quantize_model",
    "read_adapter",
    "reference",
    "save_adapter",
]

register_when_imported()
