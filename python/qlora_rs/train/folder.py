"""The output folder of a run: what may be written where, checked before anything is loaded."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_rs.adapters import CONFIG_FILE, WEIGHTS_FILE
from qlora_rs.errors import UnsupportedError
from qlora_rs.train.curve import CURVE_FILE
from qlora_rs.train.log import LOG_FILE
from qlora_rs.train.options import TrainOptions
from qlora_rs.train.state import STATE_FILE

FILES = (CONFIG_FILE, WEIGHTS_FILE, LOG_FILE, CURVE_FILE, STATE_FILE)


def check_output(options: TrainOptions) -> None:
    """Refuse an output folder that cannot or must not be written.

    Raises:
        FileExistsError: it holds something, and neither ``resume`` nor ``overwrite`` is asked for.
        FileNotFoundError: there is nothing to resume.
        NotADirectoryError, PermissionError: no folder can be there.
        UnsupportedError: it lies in the model's folder, or a file of ours would replace the data.
    """
    output = options.output
    real, model, data = (Path(os.path.realpath(path)) for path in (output, options.model, options.data))
    if real == model or model in real.parents:
        raise UnsupportedError(
            f"{output} lies in the model's folder {options.model}, which is only read: choose another"
        )
    if data.parent == real and data.name in FILES:
        raise UnsupportedError(
            f"{options.data} is where the run would write its own {data.name}: choose another output"
        )
    existing = real
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is no folder", str(output if existing == real else existing))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "may not be written to", str(existing))
    if options.resume:
        if not (real / STATE_FILE).is_file():
            raise FileNotFoundError(
                errno.ENOENT,
                "no saved state, so there is nothing to resume: run without --resume",
                str(output / STATE_FILE),
            )
    elif not options.overwrite and existing == real and not _is_vacant(real):
        hint = (
            "; --resume goes on with the run in it, --overwrite replaces that"
            if (real / STATE_FILE).is_file()
            else ": choose another, or --overwrite to replace files of a run in it"
        )
        raise FileExistsError(errno.EEXIST, f"exists and is not empty{hint}", str(output))


@contextmanager
def claimed(folder: Path, *, resume: bool) -> Iterator[None]:
    """Make the folder and hold it against a second run; what an earlier run left is cleared unless it is resumed.

    The earlier adapter stays until the first one of this run replaces it.

    Raises:
        UnsupportedError: another process is training into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnsupportedError(
                f"{folder}: another process is training into it; wait for it, or choose another"
            ) from None
        except OSError:
            pass  # a file system without locks: two runs into one place are the user's own doing
        for name in FILES:
            (folder / f"{name}.partial").unlink(missing_ok=True)
        if not resume:
            for name in (STATE_FILE, LOG_FILE, CURVE_FILE):
                (folder / name).unlink(missing_ok=True)
        yield
        with suppress(OSError):
            os.fsync(lock)
    finally:
        os.close(lock)


def _is_vacant(folder: Path) -> bool:
    """Empty, or with nothing but the log of a run that failed before it saved anything."""
    leftovers = {LOG_FILE, *(f"{name}.partial" for name in FILES)}
    return set(os.listdir(folder)) <= leftovers
