"""An output folder that is absent or whole: made beside its place, synced, then renamed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlora_rs.errors import UnsupportedError
from qlora_rs.report import format_bytes

# Marks a .partial folder as ours, so that nobody else's is ever cleared.
JOURNAL = ".qlora_rs_journal.json"


def resolve_destination(source: Path, destination: Path, overwrite: bool) -> Path:
    """The real path of the output, checked before anything is read or written.

    Raises:
        FileExistsError: it exists, and may not be replaced.
        UnsupportedError: it lies in the source, or around it, or is no model folder.
    """
    real, real_source = Path(os.path.realpath(destination)), Path(os.path.realpath(source))
    if real == real_source or real_source in real.parents:
        raise UnsupportedError(f"{destination} lies in the source {source}, which is only read: choose another")
    if real in real_source.parents:
        raise UnsupportedError(f"{destination} contains the source {source}: choose another")
    if not os.path.lexists(real):
        return real
    if not overwrite:
        raise FileExistsError(errno.EEXIST, "exists already; --overwrite replaces it", str(destination))
    if not real.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is no folder, so it is not replaced", str(destination))
    names = os.listdir(real)
    if names and "config.json" not in names and not any(name.endswith(".safetensors") for name in names):
        raise UnsupportedError(
            f"{destination} holds no model, so --overwrite does not replace it: remove it, or choose another"
        )
    return real


def require_space(destination: Path, needed: int) -> None:
    """Raise unless ``needed`` bytes are free: a disk that is too small should say so before hours of work, not after.

    Raises:
        OSError: ENOSPC, with both sizes.
    """
    parent = destination.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        reason = f"{format_bytes(needed)} are needed for the output, {format_bytes(free)} are free"
        raise OSError(errno.ENOSPC, reason, str(parent))


@contextmanager
def partial_folder(destination: Path, overwrite: bool, notes: list[str]) -> Iterator[Path]:
    """A folder ``DESTINATION.partial`` to fill; it gets its name when the block ends well.

    An error removes it, so that a full disk does not stay full. Ctrl-C leaves it, and the KeyboardInterrupt
    says so; the next run clears it and starts anew. ``notes`` gets what the user should know.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    path = destination.with_name(destination.name + ".partial")
    lock = _claim(path, notes)
    try:
        yield path
        _commit(path, destination, overwrite)
    except KeyboardInterrupt:
        if path.exists():
            raise KeyboardInterrupt(
                f"interrupted: the unfinished output is left in {path}; the same command starts anew, "
                f"and {destination} was not touched"
            ) from None
        raise
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    finally:
        os.close(lock)


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


def _claim(path: Path, notes: list[str]) -> int:
    """Make the folder, or take over what an interrupted run left; returns the descriptor that is locked."""
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir() or (os.listdir(path) and not (path / JOURNAL).is_file()):
            raise FileExistsError(
                errno.EEXIST, "is in the way, and not of an interrupted run: remove or rename it", str(path)
            ) from None
        notes.append(f"{path} of an interrupted run was cleared: started anew")
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UnsupportedError(f"{path}: another process is writing there; wait for it") from None
    except OSError:
        pass  # a file system without locks: go on, as two writers of one place are the user's own doing
    for name in os.listdir(path):
        entry = path / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    write_json(path / JOURNAL, {"format_version": 1})
    return lock


def _commit(path: Path, destination: Path, overwrite: bool) -> None:
    (path / JOURNAL).unlink()
    for folder, _, _ in os.walk(path):
        sync_folder(Path(folder))
    if overwrite and destination.exists():
        aside = destination.with_name(f".{destination.name}.replaced-{os.getpid()}")
        try:
            os.rename(destination, aside)
            os.rename(path, destination)
        except BaseException:
            if aside.exists() and not destination.exists():
                os.rename(aside, destination)
            raise
        try:
            sync_folder(destination.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(path, destination)  # refuses a folder that appeared meanwhile, unless it is empty
        sync_folder(destination.parent)


def sync_folder(path: Path) -> None:
    """Make renames and new names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
