"""``qlora-rs convert SRC DST --to FORMAT``: a packed model folder in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_rs.cli import output


def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Packed model folder; only read.", show_default=False)],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make; absent or whole.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            metavar="native|bitsandbytes|bf16|fp16",
            help="native and bitsandbytes keep the packed bytes; bf16 and fp16 dequantize.",
            show_default=False,
        ),
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST once the new is whole.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document.")] = False,
) -> None:
    """Convert a packed model between this library's format, bitsandbytes' and plain 16 bits.

    SRC is a folder of `qlora-rs quantize`, or one that transformers saved after packing with bitsandbytes in 4 bits.
    One of GPTQ, AWQ or compressed-tensors (packed integers) becomes bf16 or fp16.
    Tensors pass through one at a time: memory does not grow with the model. What the other format cannot hold is
    refused by name.

    Example:

        qlora-rs convert Llama-3.2-1B-nf4 Llama-3.2-1B-bnb --to bitsandbytes

        qlora-rs convert Llama-3.2-1B-bnb-4bit Llama-3.2-1B-bf16 --to bf16
    """
    from qlora_rs import checkpoint

    with output.progress_bytes("converting") as progress:
        report = checkpoint.convert(src, dst, to, overwrite=overwrite, progress=progress)
    if as_json:
        output.print_json(report.to_dict())
        return
    output.print_result(str(report))
    output.message(f"written to {dst}")
