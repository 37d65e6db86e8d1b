"""The application: every command, one file each, under one guard."""

from __future__ import annotations

from typing import Annotated

import typer

from qlora_rs.cli.compare_types import compare_types
from qlora_rs.cli.convert import convert
from qlora_rs.cli.diff import diff
from qlora_rs.cli.doctor import doctor
from qlora_rs.cli.eval import evaluate
from qlora_rs.cli.generate import generate
from qlora_rs.cli.guard import guarded
from qlora_rs.cli.inspect import inspect
from qlora_rs.cli.merge import merge
from qlora_rs.cli.quantize import quantize
from qlora_rs.cli.train import train
from qlora_rs.cli.verify import verify

EPILOG = (
    "Exit codes: 0 done, 1 verify or diff found a difference, 2 wrong use or bad input, 3 the system failed, "
    "70 a fault of ours, 130 interrupted."
)

app = typer.Typer(
    name="qlora-rs",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)

for _name, _function in (
    ("quantize", quantize),
    ("inspect", inspect),
    ("verify", verify),
    ("diff", diff),
    ("convert", convert),
    ("train", train),
    ("eval", evaluate),
    ("compare-types", compare_types),
    ("generate", generate),
    ("merge", merge),
    ("doctor", doctor),
):
    app.command(_name)(guarded(_function))


def _print_version(wanted: bool) -> None:
    if wanted:
        from qlora_rs._core import __version__

        print(f"qlora-rs {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune language models in 4 bits: quantize once, train LoRA adapters over the frozen 4-bit base.

    The main job takes two commands:

        qlora-rs quantize MODEL PACKED

        qlora-rs train --model PACKED --data CHATS.jsonl --output ADAPTER
    """
