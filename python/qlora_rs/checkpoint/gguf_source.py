"""A GGUF file as input: seen as the Hugging Face model folder that it stands for, its blocks dequantized when asked."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_rs.checkpoint.foreign import ForeignWeight, ReadStored
from qlora_rs.checkpoint.gguf_beside import Beside
from qlora_rs.checkpoint.gguf_config import FAMILIES, model_config
from qlora_rs.checkpoint.gguf_header import check_header
from qlora_rs.checkpoint.gguf_names import ROPE_FACTORS, from_interleaved, require_gguf, rotated_heads, tensor_names
from qlora_rs.checkpoint.gguf_sentencepiece import TokenizerFields
from qlora_rs.checkpoint.source import GGUF_SUFFIX, Source, StoredTensor
from qlora_rs.errors import FormatError, UnsupportedError, first_line

METHOD = "gguf"
FLOATS = ("F32", "F16", "BF16")
# What of a file is no weight of the model.
_NO_WEIGHTS = (ROPE_FACTORS, "rope_factors_long.weight", "rope_factors_short.weight")


def is_gguf_file(path: Path) -> bool:
    """Whether a path is to be read as a GGUF file, by its name."""
    return path.suffix == GGUF_SUFFIX and not path.is_dir()


@dataclass(frozen=True)
class GgufWeight(ForeignWeight):
    """A tensor of a GGUF file. Matrices and vectors, in blocks or in floats.

    Attributes:
        path: the file.
        start: where its bytes begin.
        stored_dtype: of the numbers that it holds, as numpy calls it; bytes where they are blocks.
        stored_row: shape of what it holds of a row, or nothing, of a vector.
        decode: from these to float32.
        head_dim: rows of a head, where the file orders them in its own way; else None.
    """

    path: Path
    start: int
    stored_dtype: Any
    stored_row: tuple[int, ...]
    decode: Callable[[Any], Any]
    head_dim: int | None

    def rows(self, stored: ReadStored, first: int, count: int) -> Tensor:
        """Dequantized rows; of a vector its values."""
        if len(self.shape) == 1:
            whole = self._read(0, self.stored_bytes // self.stored_dtype.itemsize)
            values = torch.from_numpy(np.array(self.decode(whole), dtype=np.float32))[first : first + count]
        else:
            decoded = self.decode(self._read(first, count))
            values = torch.from_numpy(np.ascontiguousarray(decoded, dtype=np.float32))
        if self.head_dim is not None:
            values = from_interleaved(values, count // self.head_dim)
        return values.to(self.value_dtype)

    def _read(self, first: int, count: int) -> Any:
        """What the file holds of rows; read, not mapped, so that a file that was cut off meanwhile can be told."""
        items = math.prod(self.stored_row)
        at = self.start + first * items * self.stored_dtype.itemsize
        data = np.fromfile(self.path, dtype=self.stored_dtype, count=count * items, offset=at)
        if data.size != count * items:
            raise FormatError(f"{self.path}: tensor {self.codes.name!r}: the file changed since its header was read")
        return data.reshape(count, *self.stored_row)


def open_gguf(path: Path) -> Source:
    """Open a GGUF file of a family that is known here. The last one that was opened is not read again, if unchanged.

    Tensors have the names and the row order that transformers gives them; those in blocks have the type F32, in which
    gguf-py dequantizes. ``config`` is made of the file's fields.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: it is damaged, or lacks a tensor or field that its architecture needs.
        UnsupportedError: gguf-py is not installed, or does not know a type in it; another architecture; a split file.
        OSError: the system failed.
    """
    require_gguf("reading GGUF files")
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{path}: not a regular file")
    source, tokenizer = _opened(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    return replace(source, beside=Beside(path, source.config, tokenizer))  # what is made beside it goes with each


@lru_cache(maxsize=1)
def _opened(path: Path, identity: tuple[int, ...]) -> tuple[Source, TokenizerFields]:
    """The file, and what it says of its tokenizer.

    ``identity`` tells a file from another that takes its name later. A header of many tokens takes seconds to read,
    and a command asks for it several times.
    """
    gguf = require_gguf("reading GGUF files")
    check_header(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # whatever gguf-py raises for what it cannot take
        raise FormatError(f"{path}: gguf-py cannot read it: {first_line(error)}") from None
    if fields.get("split.count", 1) not in (0, 1):
        raise UnsupportedError(f"{path}: is one of {fields['split.count']!r} parts; llama.cpp's gguf-split merges them")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config = model_config(path, fields, {name: _shape(tensor) for name, tensor in stored.items()}, _factors(stored))
    family = FAMILIES[str(fields["general.architecture"])]
    names = tensor_names(gguf, config["num_hidden_layers"], family.architecture, family.parts)
    if config["tie_word_embeddings"]:
        names.pop("output.weight")
    missing = [name for name in names if name not in stored]
    if missing:
        raise FormatError(
            f"{path}: {len(missing)} tensors of a {family.model_type} model are missing, e.g. {missing[0]!r}"
        )
    extra = [name for name in stored if name not in names and name not in _NO_WEIGHTS]
    if extra:
        raise UnsupportedError(
            f"{path}: holds {len(extra)} tensors that no {family.model_type} model has, e.g. {extra[0]!r}"
        )
    weights = {}
    for name, tensor in stored.items():
        if name in names:
            ordered = rotated_heads(name, config) if family.interleaved else None
            weight = _weight(gguf, path, names[name], tensor, None if ordered is None else config["head_dim"])
            weights[names[name]] = weight
    _check_shapes(path, weights, config)
    marked = {**config, "quantization_config": {"quant_method": METHOD}}
    original = Source(path.parent, marked, (path.name,), {}, {path.name: {}})
    tensors = {name: weight.as_float() for name, weight in weights.items()}
    seen = replace(original, config=config, tensors=tensors, foreign=weights, original=original)
    return seen, TokenizerFields.of(fields)


def round_kept(source: Source, packed: Collection[str]) -> tuple[Source, int]:
    """The source with blocks that are not ``packed`` given in bfloat16, and how many these are.

    In float32 an embedding would take twice the room of a 16-bit model's.
    """
    chosen = set(packed)
    weights = dict(source.foreign)
    rounded = [
        name
        for name, weight in weights.items()
        if isinstance(weight, GgufWeight) and name not in chosen and weight.scheme and weight.dtype == "F32"
    ]
    for name in rounded:
        weights[name] = replace(weights[name], dtype="BF16")
    tensors = {**source.tensors, **{name: weights[name].as_float() for name in rounded}}
    return replace(source, tensors=tensors, foreign=weights), len(rounded)


def _shape(tensor: Any) -> tuple[int, ...]:
    """As torch has it: the file lists dimensions from the inside."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _factors(stored: Mapping[str, Any]) -> Tensor | None:
    tensor = stored.get(ROPE_FACTORS)
    return None if tensor is None else torch.from_numpy(np.array(tensor.data, dtype=np.float32))


def _weight(gguf: Any, path: Path, name: str, tensor: Any, head_dim: int | None) -> GgufWeight:
    kind, shape = tensor.tensor_type, _shape(tensor)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        # A block of zeros: gguf-py knows more types than it can dequantize.
        gguf.dequantize(np.zeros((1, size), dtype=np.uint8), kind)
    except NotImplementedError:
        raise UnsupportedError(
            f"{path}: tensor {tensor.name!r} is {kind.name}, which gguf-py cannot dequantize"
        ) from None
    in_floats = kind.name in FLOATS
    scheme = "" if in_floats else f"{kind.name}: blocks of {block}, {8 * size / block:.3g} bits a weight"
    return GgufWeight(
        name=name,
        shape=shape,
        dtype=kind.name if in_floats else "F32",
        parts={"data": StoredTensor(tensor.name, kind.name, shape, int(tensor.n_bytes), path.name)},
        kind=kind.name if in_floats else kind.name.lower(),
        scheme=scheme,
        row_step=1 if head_dim is None else head_dim,
        path=path,
        start=int(tensor.data_offset),
        stored_dtype=tensor.data.dtype,
        stored_row=tuple(tensor.data.shape[1:]),
        decode=lambda data: gguf.dequantize(data, kind),
        head_dim=head_dim,
    )


def _check_shapes(path: Path, weights: Mapping[str, GgufWeight], config: Mapping[str, Any]) -> None:
    hidden, inner, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    rows = {"q_proj": config["num_attention_heads"] * width, "k_proj": config["num_key_value_heads"] * width}
    rows["v_proj"] = rows["k_proj"]
    sizes: dict[str, tuple[int, ...]] = {
        **{name: (size, hidden) for name, size in rows.items()},
        "embed_tokens": (config["vocab_size"], hidden),
        "lm_head": (config["vocab_size"], hidden),
        "o_proj": (hidden, rows["q_proj"]),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "q_norm": (width,),
        "k_norm": (width,),
    }
    for name, weight in weights.items():
        part, _, leaf = name.rpartition(".")
        part = part.rpartition(".")[2]
        expected = (rows[part],) if leaf == "bias" else sizes.get(part, (hidden,))
        if weight.shape != expected or math.prod(expected) == 0:
            raise FormatError(
                f"{path}: tensor {weight.codes.name!r} has shape {list(weight.shape)}, but its fields ask for "
                f"{list(expected)}"
            )
