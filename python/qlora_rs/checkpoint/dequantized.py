"""A folder that another library quantized, seen as the 16-bit model that it stands for: nothing is held or written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_rs.checkpoint import awq, compressed_tensors, gptq
from qlora_rs.checkpoint.foreign import FolderReader, ForeignWeight
from qlora_rs.checkpoint.gguf_source import is_gguf_file, open_gguf
from qlora_rs.checkpoint.source import (
    CONFIG,
    Source,
    StoredTensor,
    find_quantization_config,
    open_source,
    unquantized_config,
)
from qlora_rs.checkpoint.stored import StoredReader
from qlora_rs.errors import FormatError, UnsupportedError

READERS: Mapping[str, Callable[[FolderReader], dict[str, ForeignWeight]]] = {
    gptq.METHOD: gptq.read_weights,
    awq.METHOD: awq.read_weights,
    compressed_tensors.METHOD: compressed_tensors.read_weights,
}

# As GPT-OSS is published.
_MXFP4 = "mxfp4"


def open_float_source(path: Path) -> Source:
    """Open a folder in 16 or 32 bits, or what is read as if it were: GPTQ, AWQ, packed compressed-tensors, a GGUF file.

    Raises:
        FileNotFoundError, NotADirectoryError, FormatError: as `open_source`; a quantized weight's parts do not fit.
        UnsupportedError: it is quantized in another way.
    """
    if is_gguf_file(path):
        return open_gguf(path)
    source = open_source(path)
    config = find_quantization_config(source.config)
    if config is None:
        return source
    weights = read_foreign(source, config)
    if weights is None:
        raise UnsupportedError(
            f"{source.path}: is quantized already (quant_method {config.get('quant_method')!r}); give the 16-bit model "
            f"that it was made from, or one that {', '.join(READERS)} quantized"
        )
    if not weights:
        method = config.get("quant_method")
        raise FormatError(f"{source.path / CONFIG}: says quant_method {method!r}, but no file holds such a weight")
    return as_float(source, weights)


def read_foreign(source: Source, config: Mapping[str, Any], *, whole: bool = True) -> dict[str, ForeignWeight] | None:
    """The weights that another library quantized, by name, in the order of the files; None if there is no reader.

    Args:
        source: the folder.
        config: its ``quantization_config``.
        whole: a weight that lacks a part is an error, not left out.

    Raises:
        FormatError: parts are missing, or do not fit together.
        UnsupportedError: a variant of the format that is not read.
    """
    method = str(config.get("quant_method"))
    read = READERS.get(method)
    if method == _MXFP4:
        raise UnsupportedError(
            f"{source.path}: its experts are quantized in MXFP4, which is not read. transformers makes a bfloat16 "
            "folder of it: AutoModelForCausalLM.from_pretrained(SRC, quantization_config=Mxfp4Config(dequantize=True))"
            ".save_pretrained(DST); start from that"
        )
    if read is None:
        return None
    return read(FolderReader(source, config, StoredReader(source).read, whole))


def as_float(source: Source, weights: Mapping[str, ForeignWeight]) -> Source:
    """``source`` with float tensors where it has ``weights``, and without its ``quantization_config``.

    `TensorReader` and `SliceReader` give the values that are not stored.
    """
    parts = {part.name for weight in weights.values() for part in weight.parts.values()}
    by_codes = {weight.codes.name: weight for weight in weights.values()}
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in source.tensors.items():
        if name in by_codes:
            weight = by_codes[name]
            tensors[weight.name] = weight.as_float()
        elif name not in parts:
            tensors[name] = tensor
    return replace(
        source, config=unquantized_config(source.config), tensors=tensors, foreign=dict(weights), original=source
    )
