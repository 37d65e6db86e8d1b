"""What every command prints with: results to stdout, messages and progress to stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from qlora_rs.report import as_text


class _PipedConsole(Console):
    """A console whose closed pipe is an error like any other; rich would exit with 1, which says "they differ"."""

    def on_broken_pipe(self) -> None:
        raise


stdout = _PipedConsole()
stderr = _PipedConsole(stderr=True)


def print_json(value: Any) -> None:
    """Print exactly one JSON document; numbers that JSON does not have (infinite, NaN) become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:  # a file's name that is no text, or a terminal of few letters
        text = json.dumps(_finite(value), indent=2)
    print(text, flush=True)


def print_result(text: str) -> None:
    """Print a result as it is; rich would wrap it, and turn tabs into spaces and ``:smile:`` into a picture."""
    print(text, flush=True)


def print_report(text: str) -> None:
    """Print a result in which names out of files occur."""
    print_result(as_text(text))


def message(text: str) -> None:
    """Print a message as it is, above a progress bar where there is one."""
    stderr.print(as_text(text), markup=False, emoji=False, highlight=False, soft_wrap=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def progress_bytes(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar for ``progress=`` of long calls, in bytes with speed and time left; None where stderr is no terminal."""
    if not stderr.is_terminal:
        yield None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(label, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update


@contextmanager
def progress_tokens(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """The same in tokens; None where stderr is no terminal."""
    if not stderr.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(label, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update
