"""``qlora-rs verify PACKED --source SRC``: whether a packed folder is what its source gives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_rs.cli import DifferenceFound, output


def verify(
    packed: Annotated[Path, typer.Argument(metavar="PACKED", help="Packed model folder.", show_default=False)],
    source: Annotated[
        Path,
        typer.Option("--source", metavar="SRC", help="The 16-bit folder that it was made from.", show_default=False),
    ],
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Compare the tensors alone; hash no file of SRC.")
    ] = False,
    hashes_only: Annotated[
        bool,
        typer.Option(
            "--hashes-only", help="Hash the files of SRC alone: quick, but says nothing about PACKED's tensors."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document.")] = False,
) -> None:
    """Check a packed model against the 16-bit model that it was made from.

    First SRC's files must have the SHA-256 that PACKED records. Then every weight is quantized from SRC again, and
    codes and scales are compared to the last bit; tensors that stayed in 16 bits are compared byte for byte. The
    tensors decide: SRC may have been cut into other files since. Settings in config.json that differ are noted, other
    files are not looked at. At most one weight is in memory at a time.

    PACKED may also be a folder of bitsandbytes in 4 bits. Its values at the border between two codes may have either;
    these are counted, and are no difference.

    Exit code 0: PACKED is what SRC gives; 1: it is not.

    Example:

        qlora-rs verify Llama-3.2-1B-nf4 --source Llama-3.2-1B
    """
    from qlora_rs import checkpoint

    if requantize and hashes_only:
        raise ValueError("--requantize and --hashes-only exclude each other; without both, all is checked")
    check = "tensors" if requantize else "hashes" if hashes_only else "all"
    with output.progress_bytes("verifying") as progress:
        report = checkpoint.verify(packed, source, check=check, progress=progress)
    if as_json:
        output.print_json(report.to_dict())
    else:
        output.print_report(str(report))
    if not report.same:
        raise DifferenceFound
