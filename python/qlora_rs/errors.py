"""The exceptions that qlora_rs raises, and the one way to ask for an optional dependency."""

from __future__ import annotations

import importlib
from types import ModuleType


class QloraError(Exception):
    """Base of every error that qlora_rs raises on purpose (wrong arguments are ValueError or TypeError)."""


class FormatError(QloraError):
    """A file is not what it says it is. The message names file, tensor, what was expected and what was found."""


class UnsupportedError(QloraError):
    """A wish that cannot be met. The message says what can."""


class DeviceError(QloraError):
    """The device or its driver failed."""


class PageError(QloraError):
    """A paged buffer cannot be used so: too large, no room beside what is acquired, freed, or frozen."""


class NonFiniteError(QloraError, ValueError):
    """A weight holds NaN or infinite values. The message gives their count and the first index."""


def first_line(error: Exception) -> str:
    """``KeyError: ...``: another library's error on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


def require_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: module to import, e.g. ``"transformers"``.
        extra: the extra of this package that brings it.
        purpose: what it is needed for, for the message.

    Raises:
        UnsupportedError: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise UnsupportedError(
            f"{purpose} needs the package {module!r}, which is not installed: pip install 'qlora-rs[{extra}]'"
        ) from None
