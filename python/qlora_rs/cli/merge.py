"""``qlora-rs merge MODEL ADAPTER DST``: a plain 16-bit model again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_rs.cli import output

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def merge(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Packed model folder; only read.", show_default=False)],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter folder; only read.", show_default=False)],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make; absent or whole.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="Type of the merged model: bf16, fp16 or fp32.")] = "bf16",
    base: Annotated[
        str,
        typer.Option(
            metavar="dequantized|PATH",
            help="Merge over the dequantized weights, which the adapter was trained on, or over those of the 16-bit "
            "model that MODEL was made from (checked by its recorded hashes).",
        ),
    ] = "dequantized",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST once the new is whole.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document.")] = False,
) -> None:
    """Merge an adapter into a plain 16-bit model folder.

    The result loads without qlora-rs. Each weight becomes base + (alpha / r) B A, summed in float32 and rounded once;
    the report says how much the rounding cost. Tensors pass through one at a time: memory does not grow with the model.

    Example:

        qlora-rs merge Llama-3.2-1B-nf4 adapter merged

        qlora-rs merge Llama-3.2-1B-nf4 adapter merged --base Llama-3.2-1B --dtype fp16
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is one of {', '.join(DTYPES)}; got {dtype!r}")
    import torch

    from qlora_rs.merge import merge as merge_folders

    with output.progress_bytes("merging") as progress:
        report = merge_folders(
            model,
            adapter,
            dst,
            dtype=getattr(torch, DTYPES[dtype]),
            base=None if base == "dequantized" else base,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        output.print_json(report.to_dict())
        return
    output.print_report(str(report))
    output.message(f"written to {dst}")
