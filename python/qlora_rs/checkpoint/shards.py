"""Safetensors files written tensor by tensor: no shard lies in memory whole, as `safetensors.torch.save_file` needs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_rs import _bridge, _core
from qlora_rs.checkpoint.folder import naming, write_json
from qlora_rs.checkpoint.partial import Partial
from qlora_rs.checkpoint.source import INDEX, SINGLE

# Types of one width in the order in which the format's own writer puts them.
_DTYPE_ORDER = ("C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8")


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write; ``dtype`` is safetensors' name, e.g. ``"BF16"``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class PlannedShard:
    """A file to write.

    Attributes:
        file: its name.
        tensors: in the order of their data.
        due: the same in the order in which they are read: parts of one weight follow each other.
    """

    file: str
    tensors: tuple[PlannedTensor, ...]
    due: tuple[PlannedTensor, ...]

    @classmethod
    def of(cls, file: str, tensors: Sequence[PlannedTensor]) -> PlannedShard:
        """``tensors`` in the order in which they are due, laid out as the format wants them."""
        return cls(file, _aligned(tensors), tuple(tensors))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def plan_shards(tensors: Sequence[PlannedTensor], max_shard_size: int) -> list[PlannedShard]:
    """Files of at most ``max_shard_size`` bytes of tensors (one tensor at least), in the order given."""
    return plan_grouped_shards([[tensor] for tensor in tensors], max_shard_size)


def plan_grouped_shards(together: Sequence[Sequence[PlannedTensor]], max_shard_size: int) -> list[PlannedShard]:
    """The same for tensors that stay ``together`` in one file, as the parts of a weight do."""
    groups: list[list[PlannedTensor]] = [[]]
    held = 0
    for tensors in together:
        size = sum(tensor.nbytes for tensor in tensors)
        if groups[-1] and held + size > max_shard_size:
            groups.append([])
            held = 0
        groups[-1].extend(tensors)
        held += size
    if len(groups) == 1:
        return [PlannedShard.of(SINGLE, groups[0])]
    return [
        PlannedShard.of(f"model-{number:05}-of-{len(groups):05}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def write_shards(
    partial: Partial,
    shards: Sequence[PlannedShard],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    *,
    done: Callable[[str, bool], object] = lambda name, kept: None,
    index_metadata: Mapping[str, int] | None = None,
) -> None:
    """Write the files, and the index where there are several; ``read(name)`` makes each tensor when it is due.

    Tensors that an interrupted run has finished, by the journal and by their checksums, are left as they are.

    Args:
        partial: the folder, and the journal that gets a line for each tensor.
        shards: as they were planned.
        read: gives a tensor by its name.
        metadata: of each file.
        done: called with the name of each finished tensor, and whether it was kept, before its line is written.
        index_metadata: of the index, besides ``total_size``.

    Raises:
        OSError: the system failed, with the file's name.
    """
    for shard in shards:
        path = partial.path / shard.file
        with naming(path), open(path, "r+b" if path.exists() else "x+b") as file:
            header = _header(shard, metadata)
            if file.read(len(header)) != header:
                file.seek(0)
                file.truncate()
                file.write(header)
            file.truncate(len(header) + shard.nbytes)
            starts, start = {}, len(header)
            for planned in shard.tensors:
                starts[planned.name] = start
                start += planned.nbytes
            for planned in shard.due:
                recorded, start = partial.journal.tensors.get(planned.name), starts[planned.name]
                if recorded is not None and recorded == _core.file_checksum(path, start=start, bytes=planned.nbytes):
                    done(planned.name, True)
                    continue
                content = _content(planned, read(planned.name))
                file.seek(start)
                file.write(content.numpy().data)
                file.flush()
                partial.journal.add_tensor(planned.name, _bridge.checksum(content), done(planned.name, False))
            os.fsync(file.fileno())
    if len(shards) > 1:
        weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
        total = sum(shard.nbytes for shard in shards)
        described = {**(index_metadata or {}), "total_size": total}
        write_json(partial.path / INDEX, {"metadata": described, "weight_map": dict(sorted(weight_map.items()))})


def _aligned(tensors: Sequence[PlannedTensor]) -> tuple[PlannedTensor, ...]:
    """In the order of the format's own writer: wide elements first, so that every tensor starts at a multiple of its
    element; then by type and name.
    """

    def key(tensor: PlannedTensor) -> tuple[float, int, str]:
        known = tensor.dtype in _DTYPE_ORDER
        width = tensor.nbytes / max(1, math.prod(tensor.shape))
        return -width, _DTYPE_ORDER.index(tensor.dtype) if known else len(_DTYPE_ORDER), tensor.name

    return tuple(sorted(tensors, key=key))


def _header(shard: PlannedShard, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in shard.tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _content(planned: PlannedTensor, tensor: Tensor) -> Tensor:
    """The tensor's bytes, in the format's order (row-major, little endian), without a copy."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    assert content.nbytes == planned.nbytes, f"{planned.name}: planned {planned.nbytes}, got {content.nbytes}"
    return content
