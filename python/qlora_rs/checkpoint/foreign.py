"""Weights that other libraries quantized: what each of their formats has to tell, so that they can be read by rows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_rs.checkpoint.source import CONFIG, Source, StoredTensor
from qlora_rs.errors import FormatError, UnsupportedError

ReadStored = Callable[[StoredTensor], Tensor]

VALUE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Elements that are dequantized at a time; a few copies of them are made.
PIECE_ELEMENTS = 2 << 20


@dataclass(frozen=True)
class ForeignWeight(ABC):
    """A matrix of another library's folder, as its headers describe it; that its parts fit together has been checked.

    Attributes:
        name: of the float weight that it stands for.
        shape: (out, in), or (n,) of a vector.
        dtype: of the values, as safetensors calls it: that in which the library itself dequantizes.
        parts: the stored tensors, by what they are; the first holds the codes.
        kind: what its codes are called, e.g. ``"int4"``.
        scheme: how it is quantized, in a few words.
        row_step: ranges of rows begin at multiples of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: Mapping[str, StoredTensor]
    kind: str
    scheme: str
    row_step: int

    @property
    def codes(self) -> StoredTensor:
        """The part that holds the codes."""
        return next(iter(self.parts.values()))

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def value_dtype(self) -> torch.dtype:
        """Type of the values."""
        return VALUE_DTYPES[self.dtype]

    @property
    def row_elements(self) -> int:
        """Values of a row; a vector's rows are its values."""
        return math.prod(self.shape[1:])

    def as_float(self) -> StoredTensor:
        """The float tensor that it stands for, as if a file held that."""
        size = math.prod(self.shape) * self.value_dtype.itemsize
        return StoredTensor(self.name, self.dtype, self.shape, size, self.codes.file)

    @abstractmethod
    def rows(self, stored: ReadStored, first: int, count: int) -> Tensor:
        """Dequantized rows, [count, in] of `value_dtype`; of a vector, values.

        Args:
            stored: reads a part.
            first: the first of the rows, a multiple of `row_step`.
            count: how many; a multiple of it too, or up to the last row.

        Raises:
            FormatError: the parts hold what the format does not allow (file and tensor are named).
        """

    def values(self, stored: ReadStored, first: int = 0, last: int | None = None) -> Tensor:
        """Rows ``first`` (a multiple of `row_step`) to ``last`` (or the end), made in pieces: [last - first, in]."""
        stored = keeping(stored, {})
        last = self.shape[0] if last is None else last
        end = min(-(-last // self.row_step) * self.row_step, self.shape[0])
        result = torch.empty((end - first, *self.shape[1:]), dtype=self.value_dtype)
        step = max(1, PIECE_ELEMENTS // max(1, self.row_elements) // self.row_step) * self.row_step
        for start in range(first, end, step):
            count = min(step, end - start)
            result[start - first : start - first + count] = self.rows(stored, start, count)
        return result[: last - first]


def keeping(stored: ReadStored, held: dict[str, Tensor]) -> ReadStored:
    """Reads each part once, and keeps it in ``held``."""

    def read(tensor: StoredTensor) -> Tensor:
        if tensor.name not in held:
            held[tensor.name] = stored(tensor)
        return held[tensor.name]

    return read


@dataclass(frozen=True)
class FolderReader:
    """What the readers of all formats need of a folder.

    Attributes:
        source: the folder as it is stored.
        config: its ``quantization_config``.
        stored: reads one of its tensors.
        whole: a weight that lacks a part is an error. Not so for a single file of several: it is left out there.
    """

    source: Source
    config: Mapping[str, Any]
    stored: ReadStored
    whole: bool = True

    def unsupported(self, what: str) -> UnsupportedError:
        """An error about ``quantization_config``."""
        return UnsupportedError(f"{self.source.path / CONFIG}: {what}; start from the 16-bit model")

    def invalid(self, what: str) -> FormatError:
        """An error about ``quantization_config``."""
        return FormatError(f"{self.source.path / CONFIG}: quantization_config: {what}")

    def error(self, tensor: StoredTensor, what: str) -> FormatError:
        """An error about a tensor."""
        return tensor_error(self.source, tensor, what)

    def groups(self, suffixes: tuple[str, ...], required: tuple[str, ...]) -> dict[str, dict[str, StoredTensor]]:
        """The stored tensors ``BASE.SUFFIX`` by base and suffix, in the order of the files; the codes' suffix is first.

        Raises:
            FormatError: one that is required is missing, or a base has a float weight too.
        """
        found: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in self.source.tensors.items():
            base, dot, suffix = name.rpartition(".")
            if dot and suffix in suffixes:
                found.setdefault(base, {})[suffix] = tensor
        groups = {}
        for base, parts in found.items():
            missing = [suffix for suffix in required if suffix not in parts]
            if missing and self.whole:
                first = next(iter(parts.values()))
                raise self.error(first, f"belongs to a quantized weight that lacks {base}.{missing[0]}")
            if f"{base}.weight" in self.source.tensors:
                both = self.source.tensors[f"{base}.weight"]
                raise self.error(both, f"is a weight that {next(iter(parts.values())).name!r} holds once more")
            if not missing:
                groups[base] = {suffix: parts[suffix] for suffix in suffixes if suffix in parts}
        return groups

    def expect(self, tensor: StoredTensor, dtypes: tuple[str, ...], shape: tuple[int, ...], what: str) -> None:
        """Raise FormatError unless ``tensor`` has one of the types and the shape that ``what`` asks for."""
        if tensor.dtype not in dtypes or tensor.shape != shape:
            expected = f"{' or '.join(dtypes)} {list(shape)}"
            raise self.error(tensor, f"expected {expected} for {what}, got {tensor.dtype} {list(tensor.shape)}")

    def expect_matrix(self, tensor: StoredTensor, dtypes: tuple[str, ...]) -> None:
        """Raise FormatError unless ``tensor`` is a matrix that holds something, of one of the types."""
        if tensor.dtype not in dtypes or len(tensor.shape) != 2 or 0 in tensor.shape:
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise self.error(tensor, f"expected a matrix of {' or '.join(dtypes)}, got {got}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A field of ``quantization_config`` that has to be an integer."""
        value = self.config.get(key, default)
        if type(value) is not int:
            raise self.invalid(f"{key} is {value!r}, not an integer")
        return value

    def group_size(self) -> int | None:
        """``group_size``, or None for one group a row."""
        size = self.integer("group_size", -1)
        if size != -1 and size < 1:
            raise self.invalid(f"group_size is {size}; a positive number, or -1 for whole rows")
        return None if size == -1 else size


def tensor_error(source: Source, tensor: StoredTensor, what: str) -> FormatError:
    """A FormatError about a stored tensor, with its file."""
    return FormatError(f"{source.path / tensor.file}: tensor {tensor.name!r}: {what}")
