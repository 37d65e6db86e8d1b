"""``qlora-rs inspect PATH``: what a model folder or a safetensors file holds."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_rs.cli import output
from qlora_rs.report import as_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from qlora_rs.checkpoint import Analysis, CheckpointInfo


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="Model folder, packed or not, or a .safetensors or .gguf file.", show_default=False
        ),
    ],
    every: Annotated[bool, typer.Option("--all", help="One row per tensor, no layers folded into one.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE.html|.png",
            help="Measure a packed model, and write what was found to look at; an earlier file is replaced.",
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--source",
            metavar="SRC",
            help="The model it was made from, 16-bit, GPTQ, AWQ, ... or .gguf: errors are against it.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON document.")] = False,
) -> None:
    """Show what a checkpoint holds, tensor by tensor.

    Packed and kept tensors, sizes, bits per weight, and the hashes of the files that it was made from. Only
    headers are read, so this takes no time however large the model is.

    With --report or --source a packed model is read whole, in slices, and measured: how often each code occurs,
    outlier blocks, bits per parameter by part of the model; with --source the error of each weight, absolute, relative
    and in steps of its block. The report is one HTML page that needs no network, or one picture.

    Example:

        qlora-rs inspect Llama-3.2-1B-nf4

        qlora-rs inspect Llama-3.2-1B-nf4 --source Llama-3.2-1B --report report.html
    """
    from qlora_rs import checkpoint

    write = None if report is None else _writer(report)
    info = checkpoint.inspect(path)
    analysis = None
    if report is not None or source is not None:
        with output.progress_bytes("measuring") as progress:
            analysis = checkpoint.analyze(path, source, progress=progress)
    if write is not None and report is not None and analysis is not None:
        write(analysis, report)
    if as_json:
        document = info.to_dict()
        output.print_json(document if analysis is None else {**document, "analysis": analysis.to_dict()})
    else:
        _print_table(info, every)
        if analysis is not None:
            _print_analysis(analysis)
    if report is not None:
        output.message(f"report written to {report}")


def _writer(report: Path) -> Callable[[Analysis, Path], None]:
    """What writes a report of this name; asked for before the work, not after it."""
    from qlora_rs.pictures import analysis, canvas, page

    writers = {".html": page.write_page, ".png": analysis.draw_analysis}
    if report.suffix not in writers:
        raise ValueError(f"--report {report}: a report is an .html page or a .png picture, by the end of its name")
    canvas.require_matplotlib(analysis.EXTRA, analysis.PURPOSE)
    if report.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file to write", str(report))
    if not report.absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder to write the report into", str(report.parent))
    return writers[report.suffix]


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
        table.add_row(*(Text(as_text(cell)) for cell in cells))

    def say(label: str, value: str) -> None:
        output.stdout.print(Text(as_text(f"{label:<10} {value}")), soft_wrap=True)

    say("path", info.path)
    schemes = [info.spec.describe()] if info.spec is not None else list(info.schemes)
    say("format", f"{info.format}: {'; '.join(schemes)}" if schemes else info.format)
    if info.unread is not None:
        say("not read", info.unread)
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


def _print_analysis(analysis: Analysis) -> None:
    from rich.text import Text

    def say(label: str, value: str) -> None:
        output.stdout.print(Text(as_text(f"{label:<10} {value}")), soft_wrap=True)

    weights = analysis.weights
    say("codes", f"{analysis.entropy:.3f} of {analysis.spec.bits} bits are information")
    found, blocks = (sum(counts) for counts in zip(*((w.outlier_blocks, w.blocks) for w in weights), strict=True))
    largest = max(weights, key=lambda weight: weight.largest_ratio)
    outliers = f"{found:,} of {blocks:,} blocks ({100 * found / max(1, blocks):.2g} %)"
    say("outliers", f"{outliers}; the largest value is {largest.largest_ratio:.1f} times the rms in {largest.name}")
    if analysis.relative_error is not None:
        worst, error = max(((w, w.error) for w in weights if w.error), key=lambda pair: pair[1].relative)
        steps = f"{error.rms_steps:.3f} steps, {error.rms:.3g} absolute (rms)"
        say("error", f"{analysis.relative_error:.4f} relative, against {analysis.source}")
        say("worst", f"{error.relative:.4f} relative, {steps}, in {worst.name}")
    for note in analysis.notes:
        say("note", note)
