"""What every command prints with: results to stdout, messages and progress to stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

stdout = Console()
stderr = Console(stderr=True)


def print_json(value: Any) -> None:
    """Print exactly one JSON document."""
    print(json.dumps(value, indent=2, ensure_ascii=False), flush=True)


def print_result(text: str) -> None:
    """Print a result as it is: no markup, no wrapping."""
    stdout.print(text, markup=False, highlight=False, soft_wrap=True)


def message(text: str) -> None:
    """Print a message as it is."""
    stderr.print(text, markup=False, highlight=False, soft_wrap=True)


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
