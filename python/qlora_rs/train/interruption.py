"""Ctrl-C at a moment when nothing is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interruption:
    """While active, Ctrl-C raises KeyboardInterrupt at once, except within `held`: there it waits for its end.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self._held = False
        self._pending = False
        self._former: Any = None
        self._active = False

    def __enter__(self) -> Interruption:
        """Take over Ctrl-C."""
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGINT, self._handle)
            self._active = True
        return self

    def __exit__(self, *exception: object) -> None:
        """Give it back."""
        if self._active:
            signal.signal(signal.SIGINT, self._former or signal.SIG_DFL)
            self._active = False

    @contextmanager
    def held(self, *, last: bool = False) -> Iterator[None]:
        """A block that Ctrl-C does not break; ``last``: the end is near anyway, so what came meanwhile is dropped."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        pending, self._pending = self._pending, False
        if pending and not last:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._pending = True
        else:
            raise KeyboardInterrupt
