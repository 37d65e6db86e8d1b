"""``qlora-rs quantize SRC DST``: a model folder to a packed one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qlora_rs.cli import output


def quantize(
    src: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="Hugging Face model folder, or a GGUF file; only read.", show_default=False),
    ],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make; absent or whole.", show_default=False)],
    quant_type: Annotated[
        str,
        typer.Option(
            "--type", help="Data type: nf4, fp4 or int4; in 8 bits int8, dynamic8 or udynamic8 (no negative values)."
        ),
    ] = "nf4",
    codebook: Annotated[
        str | None,
        typer.Option(
            metavar="VALUES",
            help="A data type of your own: 2 to 256 ascending values in [-1, 1], separated by commas, or a JSON file "
            "that lists them. Up to 16 take 4 bits a weight, more take 8.",
            show_default=False,
        ),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64, 128, ... 4096.")] = 64,
    double_quant: Annotated[
        bool,
        typer.Option("--double-quant/--no-double-quant", help="Quantize the scales too: 4.13, not 4.5 bits a weight."),
    ] = True,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip",
            metavar="PATTERN",
            help="Leave these layers besides the defaults: full name, last part or glob. Repeatable.",
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            metavar="PATTERN",
            help="Pack these weights although the defaults leave them; needed where transformers does not "
            "know the architecture. Repeatable.",
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            min=0,
            help="Threads that quantize; 0 for all. Source files hashed side by side: as many, up to 4.",
        ),
    ] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST once the new is whole.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be packed; write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document.")] = False,
) -> None:
    """Quantize a model to 4 bits, files to files.

    The weights of all Linear layers are packed; output heads, routers, embeddings and norms stay in 16 bits,
    and tokenizer and other files are carried over. Of a GPTQ, AWQ or compressed-tensors folder, or a GGUF file, the
    values are quantized anew, and the report says so. Weights pass through in slices: memory does not grow with the
    model. Interrupted, the same command goes on where it was.

    Example:

        qlora-rs quantize Llama-3.2-1B Llama-3.2-1B-nf4

        qlora-rs quantize Llama-3.2-1B out --type int8 --block-size 128 --skip 'model.layers.0.*'

        qlora-rs quantize Llama-3.2-1B out --codebook=-1,-0.3,0,0.3,1
    """
    from qlora_rs import checkpoint
    from qlora_rs.spec import QuantSpec

    spec = QuantSpec(quant_type, block_size, double_quant, None if codebook is None else _values(codebook))
    with output.progress_bytes("quantizing") as progress:
        report = checkpoint.quantize(
            src,
            dst,
            spec,
            skip_modules=skip,
            include=include,
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


def _values(codebook: str) -> list[float]:
    """The numbers of ``--codebook``: listed, or in a JSON file."""
    path = Path(codebook)
    try:
        if path.suffix == ".json":
            listed = json.loads(path.read_text(encoding="utf-8"))
        else:
            listed = [float(value) for value in codebook.split(",")]
    except OSError as error:
        raise ValueError(f"--codebook {codebook}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(
            f"--codebook takes numbers separated by commas, or a JSON file that lists them; {codebook!r}: {error}"
        ) from None
    if not isinstance(listed, list) or not all(type(value) in (int, float) for value in listed):
        raise ValueError(f"--codebook {codebook}: expected a JSON list of numbers")
    return [float(value) for value in listed]
