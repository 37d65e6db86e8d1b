"""Model folders, files to files: no model is built and no tensor is held whole.

`quantize` writes a packed checkpoint, `convert` writes it in another format, `inspect` says what a checkpoint holds,
`verify` whether it is what its source gives, `diff` in what two differ, `analyze` what quantizing did to its weights;
`open_weights` reads single tensors.
"""

from __future__ import annotations

from qlora_rs.checkpoint.analysis import analyze
from qlora_rs.checkpoint.comparison import diff
from qlora_rs.checkpoint.conversion import ConvertReport, convert
from qlora_rs.checkpoint.differences import DiffReport, TensorDiff
from qlora_rs.checkpoint.figures import Analysis
from qlora_rs.checkpoint.inspection import CheckpointInfo, TensorRow, inspect
from qlora_rs.checkpoint.packing import quantize
from qlora_rs.checkpoint.source import read_quantization_config
from qlora_rs.checkpoint.verdicts import VerifyReport
from qlora_rs.checkpoint.verification import verify
from qlora_rs.checkpoint.weights import open_weights

__all__ = [
    "Analysis",
    "CheckpointInfo",
    "ConvertReport",
    "DiffReport",
    "TensorDiff",
    "TensorRow",
    "VerifyReport",
    "analyze",
    "convert",
    "diff",
    "inspect",
    "open_weights",
    "quantize",
    "read_quantization_config",
    "verify",
]
