"""A file that is replaced only by a whole new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_rs.checkpoint.folder import naming, sync_folder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a sibling's path to write; it is synced and renamed to ``path`` if the block ends well, else removed.

    Raises:
        OSError: the system failed; the error has a file's name, and what was there before stays.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path):
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
