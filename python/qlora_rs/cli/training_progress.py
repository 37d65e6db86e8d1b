"""How a run of training shows itself on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qlora_rs.cli import output
from qlora_rs.report import format_bytes

if TYPE_CHECKING:
    from qlora_rs.train import StepEntry

LINES = 20  # of a whole run, where there is no bar
SECONDS = 60.0  # without a line at most
RECENT = 10  # steps that the shown speed is the mean of


@contextmanager
def training_progress() -> Iterator[Callable[[StepEntry, int], None]]:
    """Yields what to call after every step."""
    if output.stderr.is_terminal:
        with _bar() as show:
            yield show
    else:
        yield _lines()


@contextmanager
def _bar() -> Iterator[Callable[[StepEntry, int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(compact=True),
    )
    speed = _Speed()
    with Progress(*columns, console=output.stderr, transient=True, expand=True) as bar:
        task = bar.add_task("", total=None, visible=False)

        def show(entry: StepEntry, total: int) -> None:
            text = (
                f"loss {entry.loss:.3f}  {speed.after(entry):,.0f} tokens/s  {format_bytes(_memory())}{_stall(entry)}"
            )
            bar.update(task, completed=entry.step, total=total, description=text, visible=True)

        yield show


def _lines() -> Callable[[StepEntry, int], None]:
    speed = _Speed()
    last = time.monotonic()

    def show(entry: StepEntry, total: int) -> None:
        nonlocal last
        tokens_per_second = speed.after(entry)
        due = entry.step % max(1, total // LINES) == 0 or time.monotonic() - last >= SECONDS
        if due or entry.step in (1, total):
            last = time.monotonic()
            output.message(
                f"step {entry.step:{len(str(total))}}/{total}  loss {entry.loss:.4f}  lr {entry.learning_rate:.2e}  "
                f"{tokens_per_second:,.0f} tokens/s  memory {format_bytes(_memory())}{_stall(entry)}"
            )

    return show


def _stall(entry: StepEntry) -> str:
    """What a step waited for paged memory, where that shows."""
    return f"  stalled {entry.stall_seconds:.2f} s" if entry.stall_seconds >= 0.005 else ""


class _Speed:
    """Tokens per second over the last steps."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)

    def after(self, entry: StepEntry) -> float:
        self._recent.append((entry.tokens, entry.seconds))
        tokens, seconds = map(sum, zip(*self._recent, strict=True))
        return tokens / seconds if seconds else 0.0


def _memory() -> int:
    """Bytes that this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
