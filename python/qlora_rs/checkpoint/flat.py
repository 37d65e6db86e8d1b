"""bitsandbytes' 4-bit weights: flat runs of the same codes and scales that the native layout keeps by rows.

A weight of shape [out, in] is cut into blocks row-major, regardless of where rows end. Where rows are whole blocks both
layouts are the same bytes under other names, and reading one as the other is a view.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_rs import _core
from qlora_rs.checkpoint.source import Source, StoredTensor, expect_tensor, unique_names
from qlora_rs.errors import FormatError, UnsupportedError
from qlora_rs.packed import NESTED_BLOCK_SIZE, PackedShapes, PackedTensor
from qlora_rs.spec import QuantSpec

METHOD = "bitsandbytes"
STATE = ".quant_state."
QUANT_TYPES = ("nf4", "fp4")
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
# What codes may be stored as: the same bytes, for trainers that shard only floats.
STORAGE = ("U8", "BF16", "F16", "F32")
DTYPES = ("float32", "bfloat16", "float16")

_FIELDS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")
# The longest that is ever written has some 200.
_MAX_STATE_BYTES = 65536


@dataclass(frozen=True)
class FlatWeight:
    """A weight as its ``quant_state`` describes it; the lengths of its parts have been checked.

    Attributes:
        name: of its codes.
        spec: how it is quantized.
        shape: logical shape, or None where the file does not tell.
        dtype: what was quantized, e.g. ``"bfloat16"``.
        offset: the offset of doubly quantized scales, exactly float32, or None.
        parts: names of its tensors.
        nbytes: bytes of all of them.
    """

    name: str
    spec: QuantSpec
    shape: tuple[int, ...] | None
    dtype: str
    offset: float | None
    parts: tuple[str, ...]
    nbytes: int


def is_flat(config: Mapping[str, Any] | None) -> bool:
    """Whether a ``quantization_config`` is that of a bitsandbytes checkpoint in 4 bits."""
    if config is None or config.get("quant_method") != METHOD:
        return False
    return not (config.get("load_in_8bit") or config.get("_load_in_8bit"))


def read_flat_weights(source: Source, stored: Callable[[str], Tensor], *, whole: bool = True) -> dict[str, FlatWeight]:
    """All 4-bit weights of an opened bitsandbytes folder, in the order of its files.

    Args:
        source: the folder.
        stored: reads a tensor; only the small ``quant_state`` ones are asked for.
        whole: a weight that lacks a part is an error. Not so for a single file of several: it is left out there.

    Raises:
        FormatError: parts are missing, have other types or lengths than the others ask for, or a ``quant_state`` is not
            what the format allows.
        UnsupportedError: a block size, or a way to quantize scales, that there is no code for.
    """
    groups: dict[str, list[str]] = {}
    for name in source.tensors:
        base, found, _ = name.partition(STATE)
        if not found:
            base = next((name.removesuffix(part) for part in PARTS if name.endswith(part)), "")
        if base:
            groups.setdefault(base, []).append(name)
    weights = {}
    for name in source.tensors:
        if name in groups and (whole or _is_whole(name, groups[name])):
            weights[name] = _read_weight(source, stored, name, groups[name])
    alone = [name for name in groups if name not in source.tensors]
    if alone and whole:
        raise _error(source, groups[alone[0]][0], f"belongs to {alone[0]!r}, which no file holds")
    return weights


def flat_packed(
    source: Source, weight: FlatWeight, stored: Callable[[str], Tensor], dtype: torch.dtype = torch.float32
) -> PackedTensor:
    """The weight as one row of all its elements, sharing the memory of what ``stored`` reads.

    Raises:
        UnsupportedError: its codes, or the codes of its scales, stand for other values than here.
    """
    name, spec = weight.name, weight.spec
    expect_maps(source, weight, stored)
    scale, offset = None, None
    if weight.offset is not None:
        scale = stored(f"{name}.nested_absmax").reshape(-1)
        offset = torch.tensor([weight.offset], dtype=torch.float32)
    codes = stored(name).contiguous().reshape(-1).view(torch.uint8)
    elements = 2 * codes.numel() if weight.shape is None else math.prod(weight.shape)
    absmax = stored(f"{name}.absmax").reshape(1, -1)
    return PackedTensor(codes.reshape(1, -1), absmax, scale, offset, spec, (1, elements), dtype)


def expect_maps(source: Source, weight: FlatWeight, stored: Callable[[str], Tensor]) -> None:
    """Raise UnsupportedError unless codes, and the codes of scales, stand for the values that they have here."""
    _expect_map(source, weight.name, ".quant_map", stored, code_values(weight.spec))
    if weight.spec.double_quant:
        _expect_map(source, weight.name, ".nested_quant_map", stored, scale_values())


def shaped_packed(
    source: Source, weight: FlatWeight, stored: Callable[[str], Tensor], dtype: torch.dtype = torch.float32
) -> PackedTensor:
    """The weight in its shape, in the same memory: by rows, or flat where its blocks run over their ends.

    Raises:
        UnsupportedError: its shape is unknown, or its codes mean other values.
    """
    if weight.shape is None:
        raise shapeless(source, weight)
    flat, shapes = flat_packed(source, weight, stored, dtype), PackedShapes.of(weight.shape, weight.spec)
    if unaligned(weight.shape, weight.spec) is not None:
        return replace(flat, shape=weight.shape, flat=True)
    scale, offset = flat.absmax_scale, flat.absmax_offset
    return replace(
        flat,
        codes=flat.codes.reshape(shapes.codes),
        absmax=flat.absmax.reshape(shapes.absmax),
        absmax_scale=None if scale is None else scale.reshape(shapes.absmax_scale),
        absmax_offset=None if offset is None else offset.repeat(math.prod(shapes.absmax_offset)),
        shape=weight.shape,
    )


def shapeless(source: Source, weight: FlatWeight) -> UnsupportedError:
    """What to raise where a weight's shape is needed and not told."""
    where = f"{_path(source, weight.name)}: tensor {weight.name!r}"
    return UnsupportedError(f"{where}: its quant_state does not tell its shape, and nothing else does")


def unaligned(shape: tuple[int, ...], spec: QuantSpec) -> str | None:
    """Why a weight's rows are not, flat, the same bytes; None where they are.

    >>> unaligned((3, 128), QuantSpec()), unaligned((3, 100), QuantSpec())
    (None, 'its rows of 100 elements are no whole blocks of 64')
    """
    if len(shape) not in (2, 3):
        return f"its shape {list(shape)} is neither [out, in] nor [experts, out, in]"
    *lead, columns = shape
    if columns % spec.block_size and math.prod(lead) != 1:
        return f"its rows of {columns} elements are no whole blocks of {spec.block_size}"
    blocks = lead[-1] * (columns // spec.block_size)
    if len(shape) == 3 and shape[0] > 1 and spec.double_quant and blocks % NESTED_BLOCK_SIZE:
        return f"the {blocks} blocks of one expert are no multiple of {NESTED_BLOCK_SIZE}, so experts share scales"
    return None


@lru_cache(maxsize=64)
def code_values(spec: QuantSpec) -> Tensor:
    """``quant_map``: the value of each code. FP4's second zero (code 8) is written without a sign."""
    return torch.tensor(spec.values, device="cpu") + 0.0


@lru_cache(maxsize=1)
def scale_values() -> Tensor:
    """``nested_quant_map``: the value of each code of a doubly quantized scale."""
    return torch.tensor(_core.dynamic_map(), device="cpu")


def render_state(spec: QuantSpec, dtype: str, shape: tuple[int, ...], offset: float | None) -> bytes:
    """The content of ``quant_state``, byte for byte as bitsandbytes writes it."""
    values = (spec.quant_type, spec.block_size, dtype, list(shape))
    state: dict[str, Any] = dict(zip(_FIELDS, values, strict=True))
    if offset is not None:
        state |= zip(_NESTED_FIELDS, (NESTED_BLOCK_SIZE, "float32", offset), strict=True)
    return json.dumps(state).encode("ascii")


def _path(source: Source, name: str) -> Path:
    return source.path / source.tensors[name].file


def _error(source: Source, name: str, what: str) -> FormatError:
    return FormatError(f"{_path(source, name)}: tensor {name!r} {what}")


def _is_whole(name: str, parts: list[str]) -> bool:
    """Whether the names are those of a whole weight, whatever they hold."""
    found = {part.removeprefix(name).partition(STATE)[0] for part in parts}
    return found in ({"", ".absmax", ".quant_map"}, {"", *PARTS})


def _read_weight(source: Source, stored: Callable[[str], Tensor], name: str, parts: list[str]) -> FlatWeight:
    states = [part for part in parts if part.startswith(name + STATE)]
    allowed = {f"{name}{STATE}bitsandbytes__{quant_type}": quant_type for quant_type in QUANT_TYPES}
    if len(states) != 1 or states[0] not in allowed:
        got = ", ".join(states) or "none"
        raise _error(source, name, f"needs exactly one of {', '.join(allowed)}; got {got}")
    state = _parse_state(source, source.tensors[states[0]], stored, allowed[states[0]])
    nested = "nested_offset" in state
    try:
        spec = QuantSpec(state["quant_type"], state["blocksize"], nested)
    except (ValueError, TypeError) as error:
        raise UnsupportedError(f"{_path(source, name)}: tensor {states[0]!r}: {error}") from None
    codes = source.tensors[name]
    if codes.dtype not in STORAGE:
        raise _error(source, name, f"holds packed codes, which are {', '.join(STORAGE)}; got {codes.dtype}")
    shape = None if state["shape"] is None else tuple(state["shape"])
    elements = 2 * codes.nbytes if shape is None else math.prod(shape)
    if codes.nbytes != -(-elements // 2):
        raise _error(source, name, f"has {codes.nbytes} bytes; {list(shape or ())} takes {-(-elements // 2)}")
    blocks = -(-elements // spec.block_size)
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        ".absmax": ("U8" if nested else "F32", (blocks,)),
        ".quant_map": ("F32", (16,)),
    }
    if nested:
        expected[".nested_absmax"] = ("F32", (-(-blocks // NESTED_BLOCK_SIZE),))
        expected[".nested_quant_map"] = ("F32", (256,))
    for part, (dtype, part_shape) in expected.items():
        expect_tensor(source, codes.file, name + part, dtype, part_shape, spec.describe())
    extra = [part for part in parts if part not in states and part.removeprefix(name) not in expected]
    if extra:
        raise _error(source, extra[0], f"does not belong to {name!r}: its quant_state has no nested fields")
    names = (name, *(name + part for part in expected), states[0])
    size = sum(source.tensors[part].nbytes for part in names)
    return FlatWeight(name, spec, shape, state["dtype"], state.get("nested_offset"), names, size)


def _parse_state(
    source: Source, tensor: StoredTensor, stored: Callable[[str], Tensor], quant_type: str
) -> dict[str, Any]:
    """The checked content of a ``quant_state``; ``nested_offset`` is there iff scales are doubly quantized."""
    if tensor.dtype != "U8" or len(tensor.shape) != 1 or tensor.nbytes > _MAX_STATE_BYTES:
        what = f"is JSON: expected U8 of at most {_MAX_STATE_BYTES}, got {tensor.dtype} {list(tensor.shape)}"
        raise _error(source, tensor.name, what)
    try:
        text = bytes(stored(tensor.name).tolist()).decode("utf-8")
        state = json.loads(text, object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise _error(source, tensor.name, f"is not valid JSON: {error}") from None
    if not isinstance(state, dict):
        raise _error(source, tensor.name, f"is a JSON {type(state).__name__}, not an object")
    unknown = [key for key in state if key not in (*_FIELDS, *_NESTED_FIELDS)]
    if unknown:
        raise _error(source, tensor.name, f"has fields that the format does not know: {', '.join(unknown)}")
    nested = any(key in state for key in _NESTED_FIELDS)
    missing = [key for key in (*_FIELDS, *(_NESTED_FIELDS if nested else ())) if key not in state]
    if missing:
        raise _error(source, tensor.name, f"lacks {', '.join(missing)}")
    shape = state["shape"]
    sizes_fit = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    checks = {
        "quant_type": state["quant_type"] == quant_type,
        "dtype": state["dtype"] in DTYPES,
        "shape": shape is None or (sizes_fit and len(shape) > 0 and math.prod(shape) < 1 << 62),
    }
    if nested:
        checks["nested_offset"] = _is_float32(state["nested_offset"])
    wrong = [key for key, fits in checks.items() if not fits]
    if wrong:
        raise _error(source, tensor.name, f"has {wrong[0]} {state[wrong[0]]!r}, which it cannot have")
    if nested and (state["nested_blocksize"], state["nested_dtype"]) != (NESTED_BLOCK_SIZE, "float32"):
        raise UnsupportedError(
            f"{_path(source, tensor.name)}: tensor {tensor.name!r}: scales in groups of "
            f"{state['nested_blocksize']!r} of {state['nested_dtype']!r}; only groups of "
            f"{NESTED_BLOCK_SIZE} of 'float32' are read"
        )
    return state


def _is_float32(value: object) -> bool:
    """Whether a JSON number is exactly a float32, which is what it was written from."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return value != value or struct.unpack("<f", struct.pack("<f", value))[0] == value
    except OverflowError:
        return False


def _expect_map(source: Source, name: str, part: str, stored: Callable[[str], Tensor], expected: Tensor) -> None:
    if not torch.equal(stored(name + part), expected):
        raise UnsupportedError(
            f"{_path(source, name + part)}: tensor {name + part!r} gives codes other values than {name!r} has here; "
            "such weights are not read"
        )
