"""The command line `qlora-rs`. Nothing else in the package imports it.

What takes long to import is imported by the commands, where the guard answers Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import NoReturn

DIFFERENT, BAD_INPUT, SYSTEM, OUR_FAULT, INTERRUPTED = 1, 2, 3, 70, 130


class DifferenceFound(SystemExit):
    """The end of a check that found a difference: a type of its own, since typer too ends with 1."""

    def __init__(self) -> None:
        super().__init__(DIFFERENT)


def main() -> NoReturn:
    """Run the command that ``sys.argv`` asks for, and exit with its code."""
    # Read once, when torch is imported. Its threads would go on spinning after each operator, and keep the cores from
    # ours: on two of them products with packed weights take nearly twice as long (benchmarks/README.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if isinstance(sys.stdout, TextIOWrapper):
        # What a terminal has no letters for is spelled out, as stderr does it: names of files may be any bytes.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from qlora_rs.cli.app import app

        app()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except DifferenceFound:
        raise
    except SystemExit as end:
        # Typer's 1: whoever read a help text is gone. Commands answer that themselves, with this code too.
        raise SystemExit(SYSTEM if end.code == 1 else end.code) from None
    raise SystemExit(0)
