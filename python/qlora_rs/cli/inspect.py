"""``qlora-rs inspect PATH``: what a model folder or a safetensors file holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_rs.cli import output

if TYPE_CHECKING:
    from qlora_rs.checkpoint import CheckpointInfo


def inspect(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="Model folder, packed or not, or a .safetensors file.", show_default=False),
    ],
    every: Annotated[bool, typer.Option("--all", help="One row per tensor, no layers folded into one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON document.")] = False,
) -> None:
    """Show what a checkpoint holds, tensor by tensor.

    Packed and kept tensors, sizes, bits per weight, and the hashes of the files that it was made from. Only
    headers are read, so this takes no time however large the model is.

    Example:

        qlora-rs inspect Llama-3.2-1B-nf4
    """
    from qlora_rs import checkpoint

    info = checkpoint.inspect(path)
    if as_json:
        output.print_json(info.to_dict())
    else:
        _print_table(info, every)


def _print_table(info: CheckpointInfo, every: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from qlora_rs.report import fold, format_bytes

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="fold")
    for title in ("kind", "dtype", "shape"):
        table.add_column(title)
    for title in ("count", "bytes", "bits/weight"):
        table.add_column(title, justify="right")
    rows = [(row.name, [row]) for row in info.tensors]
    if not every:
        rows = fold(info.tensors, lambda row: (row.dtype, row.shape))
    for name, group in rows:
        row, size = group[0], sum(each.bytes for each in group)
        shape = " x ".join(map(str, row.shape)) or "scalar"
        cells = (
            name,
            row.kind,
            row.dtype,
            shape,
            str(len(group)),
            format_bytes(size),
            f"{row.bits_per_weight:.3f}",
        )
        table.add_row(*(Text(cell) for cell in cells))

    def say(label: str, value: str) -> None:
        output.stdout.print(Text(f"{label:<10} {value}"), soft_wrap=True)

    say("path", info.path)
    say("format", info.format if info.spec is None else f"{info.format}: {info.spec.describe()}")
    output.stdout.print(table)
    packed = info.packed
    packed_bytes, packed_elements = sum(row.bytes for row in packed), sum(row.elements for row in packed)
    if packed:
        bits = 8 * packed_bytes / max(1, packed_elements)
        say("packed", f"{len(packed)} weights, {format_bytes(packed_bytes)}, {bits:.3f} bits per weight")
    say("kept", f"{len(info.tensors) - len(packed)} tensors, {format_bytes(info.total_bytes - packed_bytes)}")
    bits = 8 * info.total_bytes / max(1, info.parameters)
    files = f"{len(info.files)} file{'s' if len(info.files) != 1 else ''}"
    total = f"{format_bytes(info.total_bytes)} in {files}"
    say("total", f"{info.parameters:,} parameters, {total}, {bits:.3f} bits per weight")
    for file, digest in info.source_sha256.items():
        say("made from", f"{file} sha256 {digest}")
