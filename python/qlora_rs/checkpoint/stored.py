"""Tensors as the files of an opened folder hold them, read into memory.

NOTE: read, not mapped. Where another process cuts a mapped file off, the next look at it kills this one; a read comes
back short, which can be told.
"""

from __future__ import annotations

import os
from io import FileIO
from typing import Any

import torch
from torch import Tensor

from qlora_rs.checkpoint.source import Source, StoredTensor
from qlora_rs.errors import FormatError, UnsupportedError

# By their names in safetensors; some are missing in older versions of torch.
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}


class FilePlaces:
    """Where the tensors of an opened folder lie in its files: of one that is seen in floats, what they really hold."""

    def __init__(self, source: Source) -> None:
        source = source.original or source
        self._folder = source.path
        self._starts: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        # NOTE: a header that `read_header` accepts lists tensors that cover the data without gaps, in their order.
        for name, tensor in source.tensors.items():
            self._starts[name] = self._ends.get(tensor.file, 0)
            self._ends[tensor.file] = self._starts[name] + tensor.nbytes

    def open(self, name: str) -> tuple[FileIO, int]:
        """A file, and where its data begins: behind the header and its length.

        Raises:
            FormatError: its size is another than its header said.
        """
        file = FileIO(self._folder / name)
        try:
            data_start = 8 + int.from_bytes(file.read(8), "little")
            if os.fstat(file.fileno()).st_size != data_start + self._ends[name]:
                raise self._changed(name)
        except BaseException:
            file.close()
            raise
        return file, data_start

    def read(self, opened: tuple[FileIO, int], tensor: StoredTensor, start: int, count: int) -> Tensor:
        """Bytes ``start`` to ``start + count`` of a tensor, as uint8.

        Raises:
            FormatError: the file ends before them.
        """
        file, data_start = opened
        content = torch.empty(count, dtype=torch.uint8, device="cpu")  # where a model is built, meta may be the default
        file.seek(data_start + self._starts[tensor.name] + start)
        view: Any = content.numpy()
        done = 0
        while done < count:
            got = file.readinto(view[done:])
            if not got:
                raise self._changed(tensor.file)
            done += got
        return content

    def _changed(self, file: str) -> FormatError:
        return FormatError(f"{self._folder / file}: the file changed since its header was read")


class StoredReader:
    """Reads an opened folder's tensors as they are stored, one at a time, each into memory of its own."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._places = FilePlaces(source)

    def read(self, tensor: StoredTensor) -> Tensor:
        """The tensor as its file holds it.

        Raises:
            FormatError: the file changed since its header was read.
            UnsupportedError: torch has no such type.
        """
        return self._read(tensor, 0, tensor.nbytes, tensor.shape)

    def read_matrix(self, tensor: StoredTensor, number: int) -> Tensor:
        """Matrix ``number`` of a tensor (matrices, rows, columns); raises as `read`."""
        size = tensor.nbytes // tensor.shape[0]
        return self._read(tensor, number * size, size, tensor.shape[1:])

    def _read(self, tensor: StoredTensor, start: int, count: int, shape: tuple[int, ...]) -> Tensor:
        dtype = getattr(torch, _DTYPES.get(tensor.dtype, ""), None)
        if dtype is None:
            raise UnsupportedError(
                f"{self.source.path / tensor.file}: tensor {tensor.name!r} is {tensor.dtype}, which torch "
                f"{torch.__version__} cannot hold"
            )
        opened = self._places.open(tensor.file)
        with opened[0]:
            content = self._places.read(opened, tensor, start, count)
        return content.view(dtype).reshape(shape)
