"""The log of a run: a JSON object a line, written as the steps are done."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from qlora_rs.checkpoint.folder import naming
from qlora_rs.errors import FormatError

LOG_FILE = "log.jsonl"


@dataclass(frozen=True)
class StepEntry:
    """A step.

    Attributes:
        step: its number, from 1.
        loss: mean over the counted tokens, in nats, before the step's update.
        learning_rate: of the update.
        grad_norm: of all gradients together, before clipping.
        tokens: that went through the model, without padding.
        counted_tokens: those that the loss counts.
        seconds: that the step took.
        stall_seconds: of them, how long computing waited for paged memory (on a device as far as it is known by then).
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    counted_tokens: int
    seconds: float
    stall_seconds: float = 0.0


@dataclass(frozen=True)
class EvalEntry:
    """A measurement of the held-out samples.

    Attributes:
        step: steps done before it.
        eval_loss: mean over their counted tokens, in nats.
        eval_counted_tokens: how many these are.
        seconds: that it took.
    """

    step: int
    eval_loss: float
    eval_counted_tokens: int
    seconds: float


class Log:
    """The file, open for appending.

    Args:
        path: the file.
        keep: bytes of it that stay; what stands behind them is of steps that will be done again.

    Raises:
        FormatError: it is shorter than that.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        have = path.stat().st_size if path.exists() else 0
        if have < keep:
            raise FormatError(
                f"{path}: has {have} bytes, but the saved state knows of {keep}: it was changed since; put it back, or "
                "start anew with --overwrite"
            )
        self._path = path
        self._file = open(path, "ab")  # noqa: SIM115 - closed by __exit__
        try:
            self._file.truncate(keep)
            self._file.seek(0, os.SEEK_END)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Log:
        """Is open already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        with naming(self._path):
            self._file.close()

    def append(self, entry: StepEntry | EvalEntry) -> None:
        """Write a line."""
        with naming(self._path):
            self._file.write(json.dumps(asdict(entry), allow_nan=False).encode() + b"\n")
            self._file.flush()

    def sync(self) -> int:
        """Make what is written durable; returns the bytes so far."""
        with naming(self._path):
            os.fsync(self._file.fileno())
        return self._file.tell()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log: `StepEntry` and `EvalEntry` as dicts.

    Raises:
        FormatError: a line is no JSON object.
    """
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise FormatError(f"{path}, line {number}: is not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise FormatError(f"{path}, line {number}: expected a JSON object")
        entries.append(entry)
    return entries
