"""``qlora-rs compare-types MODEL TEXT``: what each data type costs a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_rs.cli import output
from qlora_rs.cli.arguments import Arithmetic, Device, MaxTokens, ResultAsJson, TextFile, Window
from qlora_rs.report import as_text

if TYPE_CHECKING:
    from qlora_rs.eval import TypeComparison


def compare_types(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Model folder in 16 or 32 bits; only read.", show_default=False)
    ],
    text: TextFile,
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="A data type; +dq behind it quantizes its scales too. Repeatable.",
            show_default="int8, nf4, nf4+dq, fp4, int4",
        ),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64, 128, ... 4096.")] = 64,
    window: Window = 512,
    max_tokens: MaxTokens = None,
    dtype: Arithmetic = "auto",
    device: Device = "auto",
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Draw it too; an earlier file is replaced."),
    ] = None,
    as_json: ResultAsJson = False,
) -> None:
    """Measure what each data type costs: perplexity on a text against bits per parameter.

    The model is evaluated as it is, then with its Linear layers packed in each type, quantized on the way in; nothing
    is written but the picture. Perplexity is that of `qlora-rs eval`.

    Example:

        qlora-rs compare-types Llama-3.2-1B article.txt --max-tokens 16384 --plot types.png

        qlora-rs compare-types Llama-3.2-1B article.txt --type nf4+dq --type int4 --block-size 32 --json
    """
    from qlora_rs import eval as evaluation
    from qlora_rs.cli.loading import (
        load_tokenizer,
        quiet_transformers,
        read_text,
        text_tokens,
        warnings_as_messages,
    )
    from qlora_rs.eval.types import DEFAULT_TYPES, parse_type

    wanted = types or list(DEFAULT_TYPES)
    for name in wanted:
        parse_type(name, block_size)
    if plot is not None:
        from qlora_rs.pictures.canvas import require_matplotlib
        from qlora_rs.pictures.types import EXTRA, PURPOSE, draw_types

        if plot.suffix != ".png":
            raise ValueError(f"--plot {plot}: pictures are PNG files, with a name that ends in .png")
        require_matplotlib(EXTRA, PURPOSE)
    content = read_text(text)
    with warnings_as_messages():
        tokenizer = load_tokenizer(quiet_transformers("running a model"), model)
        tokens = text_tokens(tokenizer, content, text, max_tokens)
        with output.progress_tokens("evaluating") as progress:
            result = evaluation.compare_types(
                model,
                tokens,
                wanted,
                block_size=block_size,
                window=window,
                dtype=dtype,
                device=device,
                progress=progress,
            )
    if plot is not None:
        draw_types(result, plot)
    if as_json:
        output.print_json({"text": str(text), **result.to_dict()})
    else:
        _print_table(result)
    if plot is not None:
        output.message(f"drawn to {plot}")


def _print_table(result: TypeComparison) -> None:
    from rich.table import Table
    from rich.text import Text

    from qlora_rs.report import format_bytes

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("type")
    for title in (
        "bits per\nweight",
        "bits per\nparameter",
        "model",
        "perplexity",
        "nats per\ntoken",
        "lost",
        "seconds",
    ):
        table.add_column(title, justify="right")
    for row in result.results:
        cells = (
            row.name,
            f"{row.bits_per_weight:.3f}",
            f"{row.bits_per_parameter:.3f}",
            format_bytes(row.bytes),
            f"{row.perplexity:.4g}" if row.perplexity >= 1000 else f"{row.perplexity:.2f}",
            f"{row.nats_per_token:.4f}",
            "" if row.spec is None else f"{row.nats_over_stored:+.4f}",
            f"{row.seconds:.1f}",
        )
        table.add_row(*(Text(as_text(cell)) for cell in cells))
    output.stdout.print(table)
    base = result.results[0].name
    block = next((row.spec.block_size for row in result.results if row.spec is not None), None)
    described = (
        f"{result.tokens:,} tokens scored in windows of {result.window}, arithmetic in {result.dtype} "
        f"on {result.device}; lost: nats per token over {base}; blocks of {block}"
    )
    output.stdout.print(Text(as_text(described)), soft_wrap=True)
