"""What every benchmark shares: interleaved medians, the machine's own ceiling, what it ran on, tables."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def interleaved(
    work: Mapping[str, Callable[[], object]],
    repetitions: int,
    warm_up: int = 2,
    summary: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Seconds of each function, summed up; in turns, so that a slow moment of the machine meets all."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(warm_up + repetitions):
        for name, function in work.items():
            start = time.perf_counter()
            function()
            elapsed = time.perf_counter() - start
            if repetition >= warm_up:
                seconds[name].append(elapsed)
    return {name: summary(values) for name, values in seconds.items()}


def copy_speed(
    megabytes: int = 256, repetitions: int = 9, summary: Callable[[list[float]], float] = statistics.median
) -> float:
    """Bytes a second, read and written together, of a plain copy in memory by torch's threads."""
    import torch

    source = torch.empty(megabytes << 20, dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, repetitions, summary=summary)["copy"]
    return 2 * source.nbytes / seconds


def limit_to_cores(count: int) -> None:
    """Run this process on the first ``count`` of the cores it may use; call before importing torch."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def machine(packages: Sequence[str] = ("torch",)) -> str:
    """One line: processor, cores, SIMD level, versions, commit."""
    from qlora_rs import __version__, _core

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return (
        f"{_processor()}, {os.cpu_count()} cores, qlora-rs {__version__} ({_core.simd_level()}), "
        f"Python {platform.python_version()}, {versions}, commit {_commit()}"
    )


def installed(*packages: str) -> list[str]:
    """Those of the packages that are there, for `machine`."""
    return [name for name in packages if importlib.util.find_spec(name) is not None]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, columns padded so that it also reads well in a terminal."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
