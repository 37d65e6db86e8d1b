"""Tensors as the files of an opened folder hold them, mapped."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_rs.checkpoint.source import Source, StoredTensor
from qlora_rs.errors import FormatError, UnsupportedError


class StoredReader:
    """Reads an opened folder's tensors as they are stored, one at a time.

    Files are mapped, not read whole, and stay mapped as long as the reader or one of its tensors lives.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._files: dict[str, Any] = {}

    def read(self, tensor: StoredTensor) -> Tensor:
        """The tensor as its file holds it.

        Raises:
            FormatError: the file changed since its header was read.
            UnsupportedError: torch has no such type.
        """
        path = self.source.path / tensor.file
        try:
            if tensor.file not in self._files:
                self._files[tensor.file] = safe_open(path, framework="pt")
            stored: Tensor = self._files[tensor.file].get_tensor(tensor.name)
        except SafetensorError as error:
            raise FormatError(f"{path}: tensor {tensor.name!r} cannot be read: {error}") from None
        except (KeyError, AttributeError) as error:
            raise UnsupportedError(
                f"{path}: tensor {tensor.name!r} is {tensor.dtype}, which torch {torch.__version__} cannot hold "
                f"({error})"
            ) from None
        return stored
