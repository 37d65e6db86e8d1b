"""Arguments that several commands take in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TextFile = Annotated[Path, typer.Argument(metavar="TEXT", help="Text file, UTF-8.", show_default=False)]
Window = Annotated[int, typer.Option(min=2, help="Tokens per window; figures of different windows do not compare.")]
MaxTokens = Annotated[int | None, typer.Option(min=2, help="Only the first tokens of the text.", show_default="all")]
Arithmetic = Annotated[
    str,
    typer.Option(help="Arithmetic: float32, bfloat16, float16, or auto (bfloat16 where the device is fast at it)."),
]
Device = Annotated[
    str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:N, or auto (a CUDA device if there is one).")
]
ResultAsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
