"""The command line `qlora-rs`. Nothing else in the package imports it."""

from __future__ import annotations

from typing import NoReturn


def main() -> NoReturn:
    """Run the command that ``sys.argv`` asks for, and exit with its code."""
    from qlora_rs.cli.app import app

    app()
    raise SystemExit(0)
