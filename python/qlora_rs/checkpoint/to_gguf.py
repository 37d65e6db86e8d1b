"""`convert` to GGUF: a Llama model in one file, tokenizer and chat template included."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_rs.checkpoint.choice import FLOAT_DTYPES
from qlora_rs.checkpoint.folder import exists_already, naming, replacing, require_space, resolve_outside
from qlora_rs.checkpoint.gguf_names import ARCHITECTURE, ROPE_FACTORS, rotated_heads, tensor_names, to_interleaved
from qlora_rs.checkpoint.gguf_rope import llama3_factors, rope_parameters
from qlora_rs.checkpoint.gguf_tokenizer import add_tokenizer
from qlora_rs.checkpoint.inspection import TensorRow
from qlora_rs.checkpoint.job import NONFINITE, Job
from qlora_rs.checkpoint.plain import cast
from qlora_rs.checkpoint.slices import SLICE_ELEMENTS, SliceReader, element_ranges, kept_values, sliced_rows
from qlora_rs.checkpoint.source import CONFIG
from qlora_rs.errors import FormatError, UnsupportedError
from qlora_rs.packed import PackedTensor
from qlora_rs.quantization import dequantize
from qlora_rs.report import as_text

# gguf.LlamaFileType of files that are mostly of a type.
FILE_TYPES = {"f16": 1, "q8_0": 7, "bf16": 32}
MODEL_TYPES = ("llama", "mistral")
ALIGNMENT = 32
QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class PlannedRow:
    """A tensor of the file.

    Attributes:
        name: in the file.
        row: what it is made from; None for one that is computed.
        kind: ``"F32"``, ``"F16"``, ``"BF16"`` or ``"Q8_0"``.
        shape: row-major, as torch has it.
        heads: how many heads its rows are ordered by; None where they stay in their order.
        content: of a computed one.
    """

    name: str
    row: TensorRow | None
    kind: str
    shape: tuple[int, ...]
    heads: int | None = None
    content: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        elements = math.prod(self.shape)
        return elements // 32 * 34 if self.kind == "Q8_0" else elements * (4 if self.kind == "F32" else 2)


def write_gguf(
    job: Job, target: Path, output_type: str, gguf: Any, notes: list[str], advance: Callable[[int], None] | None
) -> int:
    """Write the model of ``job`` as a GGUF file, which is absent or whole at any time.

    Tensors pass through in slices of rows, queries and keys one at a time.

    Args:
        job: the source.
        target: as `resolve_file` gave it.
        output_type: of matrices, one of `FILE_TYPES`; norms are float32.
        gguf: the package gguf-py.
        notes: gets what the user should know.
        advance: called with the bytes of the source that are done; None: only plan, write nothing.

    Returns:
        Bytes of all tensors.

    Raises:
        UnsupportedError: a model or tokenizer of a kind that is not written.
        FormatError: tensors are missing, have other shapes than ``config.json`` says, or hold values that do not fit.
        OSError: the disk is too small, or the system failed; what was written so far is removed.
    """
    config = _checked_config(job)
    planned = _plan(job, config, output_type, gguf, notes)
    size = sum(each.nbytes for each in planned)
    if advance is None:
        return size
    require_space(target, size)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as (partial,):
        with _quiet(), naming(target):
            writer = gguf.GGUFWriter(partial, ARCHITECTURE)
            try:
                _add_fields(writer, job, config, output_type, gguf, planned, notes)
                for each in planned:
                    kind = getattr(gguf.GGMLQuantizationType, each.kind)
                    # Of numpy's types only bytes matter to it: it would take the shape for one in bytes.
                    writer.add_tensor_info(each.name, each.shape, np.dtype(np.float32), each.nbytes, kind)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
            finally:
                writer.close()
        with naming(target), open(partial, "ab") as file:
            for each in planned:
                file.write(bytes(-file.tell() % ALIGNMENT))
                for piece in _pieces(job, each):
                    file.write(_encoded(job, each, piece, gguf))
                if each.row is not None:
                    advance(each.row.bytes)
            file.write(bytes(-file.tell() % ALIGNMENT))
    return size


def _checked_config(job: Job) -> dict[str, Any]:
    """``config.json``, of a model whose every part the format can hold."""
    config, path = job.source.config, job.source.path / CONFIG
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise UnsupportedError(
            f"{path}: model_type {kind!r}; only {' and '.join(MODEL_TYPES)} models are written as GGUF, since other "
            "families name and order tensors in ways of their own: `--to bf16`, then llama.cpp's convert_hf_to_gguf.py"
        )
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    for key in (*needed, "max_position_embeddings"):
        if type(config.get(key)) is not int or config[key] < 1:
            raise FormatError(f"{path}: {key} is {config.get(key)!r}, not a positive integer")
    if config["num_hidden_layers"] > len(job.info.tensors):  # before names are made for as many
        layers, tensors = config["num_hidden_layers"], len(job.info.tensors)
        raise FormatError(f"{path}: num_hidden_layers is {layers}, but its files hold {tensors} tensors")
    refused = {key: config.get(key) for key in ("attention_bias", "mlp_bias") if config.get(key)}
    if config.get("hidden_act", "silu") != "silu":
        refused["hidden_act"] = config["hidden_act"]
    window = config.get("sliding_window")
    if window is not None and window < config["max_position_embeddings"]:
        refused["sliding_window"] = window
    if refused:
        what = ", ".join(f"{key} {value!r}" for key, value in refused.items())
        raise UnsupportedError(f"{path}: {what}: GGUF's {ARCHITECTURE!r} models have no such thing")
    return config


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _plan(job: Job, config: Mapping[str, Any], output_type: str, gguf: Any, notes: list[str]) -> list[PlannedRow]:
    """Every tensor of the file, in the order of the model."""
    rows = {_with_prefix(row.name): row for row in job.info.tensors}
    tied = bool(config.get("tie_word_embeddings", False))
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    hidden, inner, width = config["hidden_size"], config["intermediate_size"], _head_dim(config)
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (config["vocab_size"], hidden),
        "lm_head": (config["vocab_size"], hidden),
        "q_proj": (heads * width, hidden),
        "k_proj": (kv_heads * width, hidden),
        "v_proj": (kv_heads * width, hidden),
        "o_proj": (hidden, heads * width),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    planned, missing, wide = [], [], 0
    for gguf_name, name in tensor_names(gguf, config["num_hidden_layers"]).items():
        if name == "lm_head.weight" and tied:
            rows.pop(name, None)  # transformers reads the embedding in its place
            continue
        row = rows.pop(name, None)
        if row is None:
            missing.append(name)
            continue
        shape = shapes.get(name.split(".")[-2], (hidden,))
        if row.shape != shape:
            raise FormatError(f"{job.where(row)}: has shape {list(row.shape)}, but {CONFIG} asks for {list(shape)}")
        if row.kind != "packed" and row.dtype not in FLOAT_DTYPES:
            raise UnsupportedError(f"{job.where(row)}: is {row.dtype}, which holds no floats")
        kind = "F32" if len(shape) == 1 else output_type.upper()
        if kind == "Q8_0" and shape[-1] % 32:
            kind, wide = "F16", wide + 1
        planned.append(PlannedRow(gguf_name, row, kind, shape, rotated_heads(name, config)))
    if missing:
        raise FormatError(
            f"{job.info.path}: {len(missing)} tensors of a {config['model_type']} model are in none of its files, "
            f"e.g. {missing[0]!r}"
        )
    buffers = [name for name in rows if name.endswith("rotary_emb.inv_freq")]
    others = [name for name in rows if name not in buffers]
    if others:
        raise UnsupportedError(
            f"{job.where(rows[others[0]])} and {len(others) - 1} others are no part of a {config['model_type']} model"
        )
    if buffers:
        notes.append(f"{len(buffers)} rotary_emb.inv_freq tensors are left out: readers compute them from {CONFIG}")
    if wide:
        notes.append(f"{wide} matrices are F16: their rows are no multiples of 32, as Q8_0 needs them")
    rope = rope_parameters(config)
    if rope["rope_type"] == "llama3":
        factors = llama3_factors(rope, width)
        planned.insert(0, PlannedRow(ROPE_FACTORS, None, "F32", tuple(factors.shape), content=factors))
    return planned


def _with_prefix(name: str) -> str:
    """The name in a causal language model; files of a base model alone lack its prefix."""
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def _add_fields(
    writer: Any,
    job: Job,
    config: Mapping[str, Any],
    output_type: str,
    gguf: Any,
    planned: list[PlannedRow],
    notes: list[str],
) -> None:
    width, heads = _head_dim(config), config["num_attention_heads"]
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(as_text(Path(job.info.path).resolve().name.removesuffix(".gguf")))
    writer.add_file_type(FILE_TYPES[output_type])
    if any(each.kind == "Q8_0" for each in planned):
        writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(width)
    if width * heads != config["hidden_size"]:
        writer.add_key_length(width)
        writer.add_value_length(width)
    _add_rope(writer, job, rope_parameters(config), gguf)
    folder = job.source.companions_folder()
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=config["vocab_size"])
    add_tokenizer(writer, special, folder, config["vocab_size"], notes)


def _add_rope(writer: Any, job: Job, rope: Mapping[str, Any], gguf: Any) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind not in ("default", "llama3"):
        raise UnsupportedError(
            f"{job.source.path / CONFIG}: rope_type {kind!r}; default, linear and llama3 are written as GGUF"
        )


def _pieces(job: Job, planned: PlannedRow) -> Iterator[Tensor]:
    """The tensor in slices of rows, float32."""
    row = planned.row
    if row is None:
        assert planned.content is not None
        yield planned.content
        return
    if planned.heads is not None:
        yield to_interleaved(job.values(row, torch.float32), planned.heads)
        return
    packed = _by_rows(job, row)
    if packed is not None:
        for first, count in element_ranges(row.shape, whole_rows=True):
            try:
                yield dequantize(sliced_rows(packed, first, count), torch.float32)
            except ValueError as error:
                raise FormatError(f"{job.where(row)}: {error}") from None
        return
    if row.kind == "packed" and job.stored_spec is not None:
        step = max(1, SLICE_ELEMENTS // max(1, row.shape[-1]))
        yield from job.values(row, torch.float32).split(step)
        return
    seen = job.source.tensors[row.name]
    floats = replace(row, dtype=seen.dtype)
    with SliceReader(job.source) as reader:
        for first, count in element_ranges(row.shape, whole_rows=True):
            yield kept_values(reader, floats, first, count).view(-1, *row.shape[1:]).float()


def _by_rows(job: Job, row: TensorRow) -> PackedTensor | None:
    """A packed weight whose rows can be taken one by one, or None."""
    if row.kind != "packed" or job.stored_spec is None:
        return None
    return None if row.flat else job.packed(row)


def _encoded(job: Job, planned: PlannedRow, piece: Tensor, gguf: Any) -> Any:
    """Bytes of a slice in the type of the file."""
    try:
        made = planned.kind == "Q8_0" or (planned.row is not None and planned.row.kind == "packed")
        if made and not bool(torch.isfinite(torch.stack(torch.aminmax(piece))).all()):
            raise FormatError(NONFINITE)
        if planned.kind == "Q8_0":
            return gguf.quantize(piece.numpy(), gguf.GGMLQuantizationType.Q8_0).data
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[planned.kind]
        return cast(piece, dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data
    except FormatError as error:
        assert planned.row is not None
        raise FormatError(f"{job.where(planned.row)}: {error}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what gguf-py logs of every step."""
    logger = logging.getLogger("gguf")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def resolve_file(source: Path, destination: Path, overwrite: bool) -> Path:
    """The real path of the file to make, checked before anything is read or written.

    Raises:
        FileExistsError: it exists, and may not be replaced.
        UnsupportedError: it lies in the source, is a folder, or is no GGUF file.
    """
    real = resolve_outside(source, destination)
    if not os.path.lexists(real):
        return real
    if real.is_dir():
        raise UnsupportedError(
            f"{destination} is a folder; GGUF is one file: name it, e.g. {destination / 'model.gguf'}"
        )
    if not overwrite:
        raise exists_already(destination)
    if not real.is_file() or not is_gguf(real):
        raise UnsupportedError(f"{destination} is no GGUF file, so --overwrite does not replace it")
    return real
