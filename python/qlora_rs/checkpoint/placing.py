"""A model folder's tensors on their way to a CUDA device: their bytes go there straight from the files."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qlora_rs import _bridge
from qlora_rs.checkpoint.source import Source, StoredTensor
from qlora_rs.checkpoint.weights import assemble_packed
from qlora_rs.errors import FormatError, UnsupportedError
from qlora_rs.packed import PackedTensor
from qlora_rs.spec import QuantSpec

# Torch's allocator hands out device memory in multiples of this.
ALLOCATION_BYTES = 512

_PART_DTYPES = {"U8": torch.uint8, "I32": torch.int32, "F32": torch.float32}


class DeviceFolder:
    """The tensors of an opened model folder, for a model on one CUDA device.

    What surely goes there as it is can be fetched while the model is still being built; the rest is mapped, and placed
    when the model has said what it made of it. As a context manager it ends fetching when the block is left.

    Args:
        source: the folder.
        device: a CUDA device, with its index.
        fetch: names of tensors to begin with.

    Attributes:
        mapped: the tensors that are not packed weights' parts, by name: views of the mapped files, whose pages are read
            only where somebody looks.

    Raises:
        FormatError: a part of a packed weight has a type that none has.
        torch.OutOfMemoryError: the device has no room for what is to be fetched.
    """

    def __init__(self, source: Source, device: torch.device, fetch: Iterable[str] = ()) -> None:
        self._source = source
        self._device = device
        parts = packed_parts(source)
        self.mapped = _mapped(source, [tensor for tensor in source.tensors.values() if tensor.name not in parts])
        self._names = {_bridge.span(tensor): name for name, tensor in self.mapped.items() if tensor.nbytes > 0}
        self._fetched: dict[str, Tensor] = {}
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        load = self._load(self._fetched, fetch)
        if self._fetched:
            self._thread = threading.Thread(target=self._run, args=(load,), name="qlora_rs-fetch")
            self._thread.start()

    def __enter__(self) -> DeviceFolder:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End fetching, whether it was waited for or not."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def packed(self, name: str, shape: tuple[int, ...], spec: QuantSpec, dtype: torch.dtype) -> PackedTensor:
        """The fetched packed weight ``name``; its bytes are there once `place` has returned."""
        return assemble_packed(self._fetched.__getitem__, name, shape, spec, dtype)

    def place(self, module: nn.Module) -> None:
        """Move a module to the device, in place, keeping parameters that are shared shared.

        What still is one of `mapped` comes from its file; only what was made or changed since (casts, tables of a
        position encoding) is copied from the host. The device holds each tensor once.

        Raises:
            FormatError: a file changed since its header was read.
            DeviceError, torch.OutOfMemoryError: of the device.
        """
        held: dict[str, list[Tensor]] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            # A fetched tensor's address means nothing here, and no mapped one has it.
            name = self._names.get(_bridge.span(tensor)) if tensor.is_contiguous() else None
            if name is not None:
                held.setdefault(name, []).append(tensor)
        placed = {name: self._fetched[name] for name in held if name in self._fetched}
        load = self._load(placed, [name for name in held if name not in placed])
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None:
            raise self._failure
        load(None)
        for name, tensors in held.items():
            for tensor in tensors:
                tensor.data = placed[name].view(tensor.shape)
        module.to(self._device)

    def _load(self, places: dict[str, Tensor], names: Iterable[str]) -> _bridge.Load:
        """Make room for tensors, in ``places``; returns what fills it."""
        wanted = [self._source.tensors[name] for name in names]
        _reserve(sum(tensor.nbytes + ALLOCATION_BYTES for tensor in wanted), self._device)
        files: dict[str, list[tuple[str, Tensor]]] = {}
        for tensor in wanted:
            view = self.mapped.get(tensor.name)
            dtype = _PART_DTYPES.get(tensor.dtype) if view is None else view.dtype
            if dtype is None:
                path = self._source.path / tensor.file
                raise FormatError(f"{path}: tensor {tensor.name!r} is part of a packed weight, but {tensor.dtype}")
            place = torch.empty(tensor.shape, dtype=dtype, device=self._device)
            places[tensor.name] = place
            files.setdefault(str(self._source.path / tensor.file), []).append((tensor.name, place))
        return _bridge.loader(files, self._device)

    def _run(self, load: _bridge.Load) -> None:
        def check(done: int, total: int) -> None:
            if self._stop.is_set():
                raise InterruptedError

        try:
            load(check)
        except BaseException as error:  # raised by `place`, on the thread that asked
            self._failure = error


def _mapped(source: Source, wanted: Iterable[StoredTensor]) -> dict[str, Tensor]:
    """Views of mapped files, by name. They must stay as they are meanwhile: what is cut off cannot be looked at."""
    files: dict[str, Any] = {}
    tensors = {}
    for tensor in wanted:
        path = source.path / tensor.file
        try:
            if tensor.file not in files:
                files[tensor.file] = safe_open(path, framework="pt")
            tensors[tensor.name] = files[tensor.file].get_tensor(tensor.name)
        except SafetensorError as error:
            raise FormatError(f"{path}: tensor {tensor.name!r} cannot be read: {error}") from None
        except (KeyError, AttributeError) as error:
            raise UnsupportedError(
                f"{path}: tensor {tensor.name!r} is {tensor.dtype}, which torch {torch.__version__} cannot hold "
                f"({error})"
            ) from None
    return tensors


def packed_parts(source: Source) -> set[str]:
    """Names of the tensors that are codes and scales of packed weights."""
    parts = ("", "_absmax", "_absmax_scale", "_absmax_offset")
    packed = [name for name in source.tensors if f"{name}_absmax" in source.tensors]
    return {name + part for name in packed for part in parts if name + part in source.tensors}


def _reserve(nbytes: int, device: torch.device) -> None:
    """Have torch's allocator ask the driver once instead of for each tensor, which takes longer than filling them."""
    if device.type != "cuda":
        return
    try:
        torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return  # in one piece; in many it may fit
