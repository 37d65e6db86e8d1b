"""Whether a 16-bit model folder is the one that a packed checkpoint was made from: by the recorded hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from qlora_rs.checkpoint.inspection import CheckpointInfo
from qlora_rs.checkpoint.source import open_source
from qlora_rs.checkpoint.weights import open_weights
from qlora_rs.errors import FormatError, UnsupportedError


def open_recorded_source(
    packed: CheckpointInfo, source: Path, hashed: Callable[[int], object]
) -> Callable[[str], Tensor]:
    """Reads weights of ``source`` by name (see `open_weights`) once all its files have the hashes in ``packed``.

    Args:
        packed: what `inspect` said of the packed checkpoint.
        source: the 16-bit model folder.
        hashed: called with the bytes of each piece that was read.

    Raises:
        FormatError: another file, or another hash, than recorded.
        UnsupportedError: ``packed`` records no hashes, or ``source`` is quantized.
    """
    recorded = packed.source_sha256
    if not recorded:
        raise UnsupportedError(
            f"{packed.path} records no hashes of its source, so {source} cannot be checked: quantize the source "
            "again, or merge over the dequantized base"
        )
    read = open_weights(source)
    files = open_source(source).files
    if set(files) != set(recorded):
        raise FormatError(
            f"{source}: its weight files are {', '.join(sorted(files))}, but {packed.path} was made from "
            f"{', '.join(sorted(recorded))}: this is another model, or another version of it"
        )
    for file, expected in recorded.items():
        found = file_sha256(source / file, hashed)
        if found != expected:
            raise FormatError(
                f"{source / file}: SHA-256 is {found}, but {packed.path} was made from {expected}: this is another "
                "model, or another version of it"
            )
    return read


def recorded_source_bytes(packed: CheckpointInfo, source: Path) -> int:
    """Bytes that `open_recorded_source` will read."""
    files = (source / file for file in packed.source_sha256)
    return sum(file.stat().st_size for file in files if file.is_file())


def file_sha256(path: Path, hashed: Callable[[int], object]) -> str:
    """SHA-256 of a file in hex; ``hashed`` is called with the bytes of each piece that was read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            hashed(len(chunk))
    return digest.hexdigest()
