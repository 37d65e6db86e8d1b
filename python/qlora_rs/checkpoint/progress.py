"""Bytes that are done, added up for the ``progress=`` of long calls."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], object]


class ByteCounter:
    """Calls ``progress`` with (bytes done, bytes in all) as bytes are added."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, count: int) -> None:
        """``count`` more bytes are done."""
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)
