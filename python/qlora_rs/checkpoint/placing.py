"""Modules whose tensors are mapped from files, moved to a CUDA device: the bytes go there straight from the files."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlora_rs import _bridge
from qlora_rs.checkpoint.source import Source
from qlora_rs.checkpoint.weights import TensorReader

# Torch's allocator hands out device memory in multiples of this.
ALLOCATION_BYTES = 512


class MappedFolder:
    """The tensors of an opened model folder, none of them read yet.

    Attributes:
        tensors: by their names in the files: views of the mapped files, whose pages are read where somebody looks.
    """

    def __init__(self, source: Source) -> None:
        reader = TensorReader(source)
        self.tensors: dict[str, Tensor] = {name: reader.stored(name) for name in source.tensors}
        self._source = source
        self._names = {_bridge.span(tensor): name for name, tensor in self.tensors.items() if tensor.nbytes > 0}

    def place(self, module: nn.Module, device: torch.device) -> None:
        """Move a module to a device, in place, keeping parameters that are shared shared.

        What still is one of `tensors` is read from its file into the device's memory; only what was made or changed
        since (casts, tables of a position encoding) is copied from the host. The device holds each tensor once.

        Raises:
            FormatError: a file changed since its header was read.
            DeviceError, torch.OutOfMemoryError: of the device.
        """
        held: dict[str, list[Tensor]] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            name = self._names.get(_bridge.span(tensor)) if tensor.is_contiguous() else None
            if name is not None:
                held.setdefault(name, []).append(tensor)
        _reserve(sum(self.tensors[name].nbytes + ALLOCATION_BYTES for name in held), device)
        files: dict[str, list[tuple[str, Tensor]]] = {}
        placed: dict[str, Tensor] = {}
        for name in held:
            stored = self.tensors[name]
            placed[name] = torch.empty(stored.nbytes, dtype=torch.uint8, device=device)
            path = self._source.path / self._source.tensors[name].file
            files.setdefault(str(path), []).append((name, placed[name]))
        _bridge.load(files, device)
        for name, tensors in held.items():
            for tensor in tensors:
                tensor.data = placed[name].view(tensor.dtype).view(tensor.shape)
        module.to(device)


def _reserve(nbytes: int, device: torch.device) -> None:
    """Have torch's allocator ask the driver once instead of for each tensor, which takes longer than filling them."""
    if device.type != "cuda":
        return
    try:
        torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return  # in one piece; in many it may fit
