"""One map from what can go wrong in a command to a message and an exit code."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import typer

from qlora_rs.cli import BAD_INPUT, INTERRUPTED, OUR_FAULT, SYSTEM, output
from qlora_rs.errors import DeviceError, QloraError

PACKAGE = Path(__file__).resolve().parent.parent
# What another argument would have avoided: our own errors, and those of the system that speak of paths.
AVOIDABLE = (
    QloraError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)

P = ParamSpec("P")
T = TypeVar("T")


def guarded(command: Callable[P, T]) -> Callable[P, T]:
    """The command, with every exception turned into a message on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt as interruption:
            output.message(str(interruption) or "interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read our output is gone; Python's own flush at exit must not complain once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(SYSTEM) from None
        except Exception as error:
            code = exit_code(error)
            if code == OUR_FAULT:
                output.message("".join(traceback.format_exception(error)).rstrip())
                output.message(
                    "this is a fault of qlora-rs: please report it with the lines above and `qlora-rs doctor`"
                )
            else:
                output.message(f"error: {describe(error)}")
            raise typer.Exit(code) from None

    return run


def exit_code(error: Exception) -> int:
    """2 for what another input would have avoided, 3 for the system's failures, 70 for the rest."""
    if isinstance(error, DeviceError | MemoryError) or _is_out_of_memory(error):
        return SYSTEM
    if isinstance(error, AVOIDABLE):
        return BAD_INPUT
    if isinstance(error, OSError):
        return SYSTEM
    if isinstance(error, ValueError | TypeError) and _raised_by_us(error):
        return BAD_INPUT
    return OUR_FAULT


def describe(error: Exception) -> str:
    """One line or more for the user, with the file where the system's error has one."""
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return f"out of memory: {str(error) or 'the system gave no more'}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _is_out_of_memory(error: Exception) -> bool:
    """Torch says it with a RuntimeError on the CPU, and with a class of its own on devices."""
    torch = sys.modules.get("torch")  # it is not imported for this: an error of torch comes after torch
    return (torch is not None and isinstance(error, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _raised_by_us(error: Exception) -> bool:
    """Whether a check of this package raised it, in Python or in the extension.

    Any other ValueError, of another library or of Python itself within our code, is a bug that must not look like bad
    input.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or PACKAGE not in Path(frames[-1].filename).resolve().parents:
        return False
    line = frames[-1].line or ""
    return line.startswith("raise ") or "_core." in line
