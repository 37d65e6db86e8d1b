"""An output folder that is absent or whole: made beside its place, synced, renamed; resumed if that was interrupted."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qlora_rs import _core
from qlora_rs.checkpoint.folder import sync_folder
from qlora_rs.checkpoint.journal import JOURNAL, VERSION, Command, Journal
from qlora_rs.errors import UnsupportedError


@dataclass(frozen=True)
class Partial:
    """An output folder in work.

    Attributes:
        path: the folder; of what an interrupted run left in it, only weight files that were asked for are there.
        journal: what of them is said to be finished.
    """

    path: Path
    journal: Journal


@contextmanager
def partial_folder(
    destination: Path, command: Command, weight_files: Collection[str], *, overwrite: bool, notes: list[str]
) -> Iterator[Partial]:
    """A folder ``DESTINATION.partial`` to fill; it gets its name when the block ends well.

    Ctrl-C, and a failing system once something is finished (a full disk), leave it and say so in the error; the same
    command then resumes it. Any other error removes it.

    Args:
        destination: the folder to make.
        command: what makes it, see `describe_command`; only the same one resumes.
        weight_files: names of the files whose parts a resumed run takes over.
        overwrite: replace an existing model in ``destination`` once the new one is whole.
        notes: gets what the user should know.

    Raises:
        FileExistsError: the partial folder is somebody else's.
        UnsupportedError: another command, or another version of this library, has left it, or another process is
            writing to it.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    path = destination.with_name(destination.name + ".partial")
    lock, journal = _claim(path, destination, command, weight_files, notes)
    try:
        yield Partial(path, journal)
        _commit(path, destination, overwrite)
    except KeyboardInterrupt:
        if path.exists():
            raise KeyboardInterrupt(
                f"interrupted: the unfinished output is left in {path}; the same command resumes it, "
                f"and {destination} was not touched"
            ) from None
        raise
    except OSError as error:
        found = Journal.read(path / JOURNAL)
        if found is None or not found.tensors:
            shutil.rmtree(path, ignore_errors=True)
            raise
        reason = f"{error.strerror or error} (what is finished is left in {path}; the same command resumes it)"
        raise OSError(error.errno, reason, error.filename) from None
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def kept_bytes(destination: Path) -> int:
    """Bytes on the disk that an unfinished output of ``destination`` takes already."""
    files = destination.with_name(destination.name + ".partial").glob("*.safetensors")
    return sum(512 * file.lstat().st_blocks for file in files if file.is_file())


def _marker(destination: Path) -> Path:
    """Where the journal is for the moment between a whole folder and its name."""
    return destination.with_name(f"{destination.name}.partial.journal")


def _claim(
    path: Path, destination: Path, command: Command, weight_files: Collection[str], notes: list[str]
) -> tuple[int, Journal]:
    """Make the folder, or take over what an interrupted run left; returns the descriptor that is locked."""
    with suppress(FileExistsError):
        path.mkdir()
    if path.is_symlink() or not path.is_dir():
        raise _in_the_way(path)
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(lock, path)
        marker = _marker(destination)
        if Journal.read(marker) is not None:
            if (path / JOURNAL).exists():
                marker.unlink()
            else:
                os.replace(marker, path / JOURNAL)
        journal = Journal.read(path / JOURNAL)
        if journal is None:
            if set(os.listdir(path)) - {JOURNAL, f"{JOURNAL}.draft"}:
                raise _in_the_way(path)
            journal = Journal(path / JOURNAL, command)
        elif journal.version != VERSION:
            raise UnsupportedError(
                f"{path} is the unfinished output of another version of qlora-rs, whose journal is of format "
                f"{journal.version}, and not {VERSION} as this one's: finish it with that version, or remove {path} "
                f"to start anew"
            )
        elif differences := journal.differences(command):
            raise UnsupportedError(
                f"{path} is the unfinished output of another command: {'; '.join(differences[:5])}"
                f"{'; ...' if len(differences) > 5 else ''}. Give that command again to finish it, or remove {path}"
            )
        else:
            notes.append(f"{path} of an interrupted run was resumed: {len(journal.tensors)} tensors were finished")
        _clear(path, weight_files)
        journal.write()
    except BaseException:
        os.close(lock)
        raise
    return lock, journal


def _lock(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UnsupportedError(f"{path}: another process is writing there; wait for it") from None
    except OSError:
        pass  # a file system without locks: go on, as two writers of one place are the user's own doing


def _in_the_way(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "is in the way, and not of an interrupted run: remove or rename it", str(path))


def _clear(path: Path, weight_files: Collection[str]) -> None:
    """Remove all but the journal and the weight files that can be written on: our own, and under this name only."""
    for name in os.listdir(path):
        entry = path / name
        status = entry.lstat()
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif name not in (JOURNAL, *weight_files) or not entry.is_file() or entry.is_symlink() or status.st_nlink > 1:
            entry.unlink()


def _commit(path: Path, destination: Path, overwrite: bool) -> None:
    for folder, _, _ in os.walk(path):
        sync_folder(Path(folder))
    # NOTE: a kill between any two of these steps leaves a whole destination, or the marker beside a folder that can be
    # resumed (after the swap that is the old model, of which nothing is kept).
    marker = _marker(destination)
    os.replace(path / JOURNAL, marker)
    aside = destination.with_name(f".{destination.name}.replaced-{os.getpid()}")
    try:
        swapped = False
        if overwrite and destination.exists():
            _remove_replaced(destination)
            swapped = _core.swap_paths(path, destination)
            if not swapped:  # there is a moment without a destination, where the file system cannot do better
                os.rename(destination, aside)
        if not swapped:
            os.rename(path, destination)  # refuses a folder that appeared meanwhile, unless it is empty
    except BaseException:
        if aside.exists() and not destination.exists():
            os.rename(aside, destination)
        with suppress(FileNotFoundError):  # it has its name already
            os.replace(marker, path / JOURNAL)
        raise
    if swapped:
        _put_aside(path, aside)
    marker.unlink()
    sync_folder(destination.parent)
    _remove_replaced(destination)


def _put_aside(path: Path, aside: Path) -> None:
    """The old model, which has the name of the partial folder, out of the way of the next command at once."""
    try:
        os.rename(path, aside)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


def _remove_replaced(destination: Path) -> None:
    """Remove what was put aside for a destination that is whole, be it by a run that was killed over it."""
    for old in destination.parent.glob(f".{glob.escape(destination.name)}.replaced-*"):
        shutil.rmtree(old, ignore_errors=True)
