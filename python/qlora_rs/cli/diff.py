"""``qlora-rs diff A B``: in what two checkpoints differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_rs.cli import DifferenceFound, output
from qlora_rs.report import as_text

if TYPE_CHECKING:
    from qlora_rs.checkpoint import DiffReport, TensorDiff

MEANINGS = {"only_in_a": "only in A", "only_in_b": "only in B"}


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="Model folder, packed or not.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    every: Annotated[bool, typer.Option("--all", help="One row per tensor, those that are the same too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON document.")] = False,
) -> None:
    """Compare two models tensor by tensor: packed or 16 bit, in whatever files they lie.

    What is stored alike is compared byte for byte. Where tensors differ, so are the values that they stand for, packed
    ones dequantized: the largest absolute difference, and the error relative to A (Frobenius norms). Tensors pass
    through in slices. Only tensors are compared, no other files.

    Exit code 0: the same tensors in the same bytes; 1: they differ.

    Example:

        qlora-rs diff Llama-3.2-1B Llama-3.2-1B-nf4
    """
    from qlora_rs import checkpoint

    with output.progress_bytes("comparing") as progress:
        report = checkpoint.diff(a, b, progress=progress)
    if as_json:
        output.print_json(report.to_dict())
    else:
        _print_table(report, every)
    if not report.same:
        raise DifferenceFound


def _print_table(report: DiffReport, every: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from qlora_rs.report import fold

    for label, path, form, spec in (
        ("A", report.a, report.format_a, report.spec_a),
        ("B", report.b, report.format_b, report.spec_b),
    ):
        described = form if spec is None else f"{form}: {spec.describe()}"
        output.stdout.print(Text(as_text(f"{label}  {path} ({described})")), soft_wrap=True)
    shown = [tensor for tensor in report.tensors if every or tensor.status != "same"]
    rows = [(tensor.name, [tensor]) for tensor in shown]
    if not every:
        rows = fold(shown, lambda each: (each.status, each.reasons))
    if rows:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("tensor", overflow="fold")
        table.add_column("count", justify="right")
        table.add_column("found", overflow="fold")
        table.add_column("largest", justify="right")
        table.add_column("relative", justify="right")
        for name, group in rows:
            cells = (name, str(len(group)), _found(group), *_figures(group))
            table.add_row(*(Text(as_text(cell)) for cell in cells))
        output.stdout.print(table)
    output.stdout.print(Text(_summary(report)), soft_wrap=True)


def _found(group: Sequence[TensorDiff]) -> str:
    """What was found of tensors in one row, their counts added up."""
    from qlora_rs.checkpoint.verdicts import add_parts

    first = group[0]
    words = [MEANINGS[first.status]] if first.status in MEANINGS else list(first.reasons)
    words.extend(str(part) for part in add_parts(each for row in group for each in row.parts) if part.differing)
    if first.status == "same":
        words.append("same")
    nonfinite = sum(tensor.nonfinite or 0 for tensor in group)
    if nonfinite:
        words.append(f"{nonfinite:,} NaN or infinite on one side")
    return ", ".join(words)


def _figures(tensors: Sequence[TensorDiff]) -> tuple[str, str]:
    """Largest absolute difference and relative error, as far as values were compared."""
    from qlora_rs.checkpoint.differences import relative_error

    largest = max((t.max_abs_difference for t in tensors if t.max_abs_difference is not None), default=None)
    relative = relative_error(tensors)
    return "" if largest is None else f"{largest:.4g}", "" if relative is None else f"{relative:.4g}"


def _summary(report: DiffReport) -> str:
    counts = [f"{report.count('same')} same"]
    for status in ("different", "only_in_a", "only_in_b"):
        if report.count(status):
            counts.append(f"{report.count(status)} {MEANINGS.get(status, status)}")
    text = f"{len(report.tensors)} tensors: {', '.join(counts)}"
    if report.same:
        return f"{text}; A and B hold the same tensors in the same bytes"
    largest, relative = _figures(report.tensors)
    if relative:
        text += f"; where they differ: largest absolute difference {largest}, relative error {relative}"
    return text
