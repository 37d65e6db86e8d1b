"""What importing costs after torch, and how large the package is, beside the peer.

python benchmarks/import_time.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import subprocess
import sys
from pathlib import Path

import harness

IMPORT_LIMIT_SECONDS = 0.5
WHEEL_LIMIT_MB = 5.0

PROGRAM = """
import time, torch
start = time.perf_counter()
{statement}
print(time.perf_counter() - start)
"""


def import_seconds(statement: str, repetitions: int) -> float:
    """Median over fresh processes; the first, which may read from a cold disk, is left out."""
    command = [sys.executable, "-c", PROGRAM.format(statement=statement)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(repetitions + 1)]
    return statistics.median(float(run.stdout) for run in runs[1:])


def installed_megabytes(distribution: str) -> float:
    files = importlib.metadata.files(distribution) or []
    return sum(path.stat().st_size for file in files if (path := Path(str(file.locate()))).is_file()) / 1e6


def built_wheel() -> Path | None:
    wheels = sorted((harness.ROOT / "dist").glob("qlora_rs-*.whl"), key=lambda path: path.stat().st_mtime)
    return wheels[-1] if wheels else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    print(harness.machine(("torch", "bitsandbytes")), flush=True)
    ours = import_seconds("from qlora_rs import *", options.repetitions)  # all that is loaded on demand
    peer = import_seconds("import bitsandbytes", options.repetitions)
    wheel = built_wheel()
    rows = [
        ("import after torch, s", f"{ours:.3f}", f"{peer:.3f}", limit(ours, IMPORT_LIMIT_SECONDS)),
        (
            "wheel, MB",
            "run `make wheel` first" if wheel is None else f"{wheel.stat().st_size / 1e6:.2f}",
            f"({installed_megabytes('bitsandbytes'):.0f} installed)",
            "" if wheel is None else limit(wheel.stat().st_size / 1e6, WHEEL_LIMIT_MB),
        ),
    ]
    print()
    print(harness.table(("", "ours", "bitsandbytes", "must reach"), rows))


def limit(value: float, bound: float) -> str:
    return f"<= {bound:g}{'' if value <= bound else ' MISSED'}"


if __name__ == "__main__":
    main()
