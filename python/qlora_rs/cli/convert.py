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
            metavar="native|bitsandbytes|bf16|fp16|compressed-tensors|gguf",
            help="native and bitsandbytes keep the packed bytes; bf16, fp16 and gguf dequantize; compressed-tensors is "
            "INT4 by groups, which rounds anew.",
            show_default=False,
        ),
    ],
    quant_type: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="Of a GGUF file's matrices: f16 (the default), bf16 or q8_0. Of native weights that are made from "
            "GPTQ's, AWQ's or compressed-tensors': nf4 (the default) or another type of `qlora-rs quantize`.",
            show_default=False,
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Weights that share a scale: 64 by default for those; 32 (the default) or 128 for compressed-tensors.",
            show_default=False,
        ),
    ] = None,
    double_quant: Annotated[
        bool | None,
        typer.Option(
            "--double-quant/--no-double-quant", help="Quantize their scales too (the default).", show_default=False
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=0, help="Threads that dequantize; 0 for all.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST once the new is whole.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written and how large; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document.")] = False,
) -> None:
    """Convert a packed model: native, bitsandbytes, 16 bits, compressed-tensors, GGUF.

    SRC is a folder of `qlora-rs quantize`, one that transformers saved after packing with bitsandbytes in 4 bits, or
    one that GPTQ, AWQ or compressed-tensors (packed integers) quantized. GGUF is one file with tokenizer and chat
    template in it, for models of the Llama family. It and compressed-tensors are also made of a model in 16 bits, as
    `qlora-rs merge` writes it. SRC may be a GGUF file itself.
    What rounds anew says so.

    Tensors pass through one at a time: memory does not grow with the model. What the other format cannot hold is
    refused by name. Interrupted, the same command goes on where it was; a GGUF file is begun anew.

    Example:

        qlora-rs convert Llama-3.2-1B-nf4 Llama-3.2-1B-bnb --to bitsandbytes

        qlora-rs convert Llama-3.2-1B-bnb-4bit Llama-3.2-1B-bf16 --to bf16

        qlora-rs convert merged model.gguf --to gguf --type q8_0

        qlora-rs convert merged Llama-3.2-1B-W4A16 --to compressed-tensors --block-size 128
    """
    from qlora_rs import checkpoint
    from qlora_rs.spec import QuantSpec

    spec = output_type = group_size = None
    if to == "native":
        if (quant_type, block_size, double_quant) != (None, None, None):
            size = 64 if block_size is None else block_size
            spec = QuantSpec(quant_type or "nf4", size, double_quant is not False)
    elif to == "compressed-tensors":
        if quant_type not in (None, "int4") or double_quant:
            raise ValueError("compressed-tensors is written as int4 with plain scales: leave --type and --double-quant")
        group_size = block_size
    else:
        if double_quant is not None:
            raise ValueError(f"--double-quant goes with --to native, not with {to}")
        output_type, group_size = quant_type, block_size
    with output.progress_bytes("converting") as progress:
        report = checkpoint.convert(
            src,
            dst,
            to,
            output_type=output_type,
            spec=spec,
            group_size=group_size,
            overwrite=overwrite,
            dry_run=dry_run,
            num_threads=jobs,
            progress=progress,
        )
    if as_json:
        output.print_json(report.to_dict())
        return
    output.print_report(str(report))
    output.message(f"{'would be written' if dry_run else 'written'} to {dst}")
