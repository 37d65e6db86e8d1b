"""Where output goes, and files written so that a crash leaves them whole or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlora_rs.checkpoint.companions import FOREIGN_SUFFIXES
from qlora_rs.checkpoint.source import CONFIG
from qlora_rs.errors import UnsupportedError
from qlora_rs.report import format_bytes

WEIGHT_SUFFIXES = FOREIGN_SUFFIXES | {".safetensors"}


def resolve_destination(source: Path, destination: Path, overwrite: bool) -> Path:
    """The real path of the output, checked before anything is read or written.

    Raises:
        FileExistsError: it exists, and may not be replaced.
        UnsupportedError: it lies in the source, or around it, or is no model folder.
    """
    real = resolve_outside(source, destination)
    if real in Path(os.path.realpath(source)).parents:
        raise UnsupportedError(f"{destination} contains the source {source}: choose another")
    if not os.path.lexists(real):
        return real
    if not overwrite:
        raise exists_already(destination)
    if not real.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is no folder, so it is not replaced", str(destination))
    if not _may_be_replaced(real):
        raise UnsupportedError(
            f"{destination} holds no model, so --overwrite does not replace it: remove it, or choose another"
        )
    return real


def _may_be_replaced(folder: Path) -> bool:
    """Whether a folder is empty, or a model: everything in it is lost, so one of the two files of a model that strayed
    into a folder of other things does not make it one."""
    files = [Path(name) for name in os.listdir(folder)]
    weights = any(file.suffix in WEIGHT_SUFFIXES and (folder / file).is_file() for file in files)
    return not files or (weights and (folder / CONFIG).is_file())


def resolve_outside(source: Path, destination: Path) -> Path:
    """The real path of an output.

    Raises:
        UnsupportedError: it is the source, or lies in it.
    """
    real, real_source = Path(os.path.realpath(destination)), Path(os.path.realpath(source))
    if real == real_source or real_source in real.parents:
        raise UnsupportedError(f"{destination} lies in the source {source}, which is only read: choose another")
    return real


def exists_already(destination: Path) -> FileExistsError:
    """The error of an output that may not be replaced."""
    return FileExistsError(errno.EEXIST, "exists already; --overwrite replaces it", str(destination))


def require_space(destination: Path, needed: int) -> None:
    """Raise unless ``needed`` bytes are free: a disk that is too small should say so before hours of work, not after.

    Raises:
        OSError: ENOSPC, with both sizes.
    """
    parent = destination.parent
    while not parent.exists():
        parent = parent.parent
    usage = shutil.disk_usage(parent)
    # A file system that counts no blocks (ramfs, some of FUSE) has no size at all.
    if usage.total and needed > usage.free:
        reason = f"{format_bytes(needed)} are needed for the output, {format_bytes(usage.free)} are free"
        raise OSError(errno.ENOSPC, reason, str(parent))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as Hugging Face does (two spaces, keys in their order), and sync it."""
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a new file and sync it."""
    with naming(path), open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, destination: Path) -> None:
    """Copy the content of a file into a new one and sync it."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with naming(destination), open(source, "rb") as reader, open(destination, "xb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())


@contextmanager
def replacing(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """Yields siblings of the targets to write; they replace the targets together if the block ends well.

    Raises:
        OSError: the system failed; the error has a file's name, and what was there before stays.
    """
    partials = tuple(target.with_name(f"{target.name}.partial") for target in targets)
    try:
        with naming(targets[0]):
            yield partials
        for partial in partials:
            with naming(partial), partial.open("rb") as file:
                os.fsync(file.fileno())
        for partial, target in zip(partials, targets, strict=True):
            os.replace(partial, target)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
    sync_folder(targets[0].parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give a nameless system error (a full disk) the name of the file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def sync_folder(path: Path) -> None:
    """Make renames and new names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
