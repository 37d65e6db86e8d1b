"""``qlora-rs convert SRC DST --to FORMAT``: a packed model folder in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_rs.cli import output


def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Model folder; only read.", show_default=False)],
    dst: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder, or GGUF file, to make; absent or whole.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="native|bitsandbytes|bf16|fp16|gguf",
            help="native and bitsandbytes keep the packed bytes; bf16, fp16 and gguf dequantize.",
            show_default=False,
        ),
    ],
    output_type: Annotated[
        str | None,
        typer.Option("--type", metavar="f16|bf16|q8_0", help="Of a GGUF file's matrices.", show_default="f16"),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=0, help="Threads that dequantize; 0 for all.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST once the new is whole.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written and how large; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document.")] = False,
) -> None:
    """Convert a packed model between this library's format, bitsandbytes' and plain 16 bits, or any to GGUF.

    SRC is a folder of `qlora-rs quantize`, or one that transformers saved after packing with bitsandbytes in 4 bits.
    One of GPTQ, AWQ or compressed-tensors (packed integers) becomes bf16, fp16 or gguf. GGUF is one file with tokenizer
    and chat template in it, for models of the Llama family; it is also made of a model in 16 bits, as `qlora-rs merge`
    writes it.

    Tensors pass through one at a time: memory does not grow with the model. What the other format cannot hold is
    refused by name. Interrupted, the same command goes on where it was; a GGUF file is begun anew.

    Example:

        qlora-rs convert Llama-3.2-1B-nf4 Llama-3.2-1B-bnb --to bitsandbytes

        qlora-rs convert Llama-3.2-1B-bnb-4bit Llama-3.2-1B-bf16 --to bf16

        qlora-rs convert merged model.gguf --to gguf --type q8_0
    """
    from qlora_rs import checkpoint

    with output.progress_bytes("converting") as progress:
        report = checkpoint.convert(
            src,
            dst,
            to,
            output_type=output_type,
            overwrite=overwrite,
            dry_run=dry_run,
            num_threads=jobs,
            progress=progress,
        )
    if as_json:
        output.print_json(report.to_dict())
        return
    output.print_result(str(report))
    output.message(f"{'would be written' if dry_run else 'written'} to {dst}")
