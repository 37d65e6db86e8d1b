"""`convert`: a packed model folder to another format, streamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_rs.checkpoint.companions import companion_files
from qlora_rs.checkpoint.dequantized import open_float_source
from qlora_rs.checkpoint.folder import resolve_destination
from qlora_rs.checkpoint.gguf_names import require_gguf
from qlora_rs.checkpoint.gguf_tokenizer import TOKENIZER_FILES
from qlora_rs.checkpoint.inspection import CheckpointInfo, inspect
from qlora_rs.checkpoint.job import Job
from qlora_rs.checkpoint.journal import describe_command
from qlora_rs.checkpoint.progress import ByteCounter, Progress
from qlora_rs.checkpoint.source import open_source, require_folder
from qlora_rs.checkpoint.to_bitsandbytes import plan_bitsandbytes
from qlora_rs.checkpoint.to_floats import plan_floats
from qlora_rs.checkpoint.to_gguf import FILE_TYPES, resolve_file, write_gguf
from qlora_rs.checkpoint.to_native import plan_native
from qlora_rs.checkpoint.weights import TensorReader
from qlora_rs.checkpoint.writing import write_model
from qlora_rs.errors import UnsupportedError
from qlora_rs.report import SkippedEntry, format_bytes, left_out_lines
from qlora_rs.spec import QuantSpec

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
GGUF = "gguf"
TARGETS = ("native", "bitsandbytes", *FLOATS, GGUF)


@dataclass(frozen=True)
class ConvertReport:
    """What was converted.

    Attributes:
        source: the format that was read: ``"qlora_rs"``, ``"bitsandbytes"``, ``"gptq"``, ``"awq"``,
            ``"compressed-tensors"`` or ``"float"``.
        target: what was asked for: ``"native"``, ``"bitsandbytes"``, ``"bf16"``, ``"fp16"`` or ``"gguf"``.
        spec: how the source's weights are packed, in one line; ``"not packed"`` where they are not.
        weights: how many packed weights were converted.
        kept: how many other tensors there are.
        bytes_before: bytes of the source's tensors.
        bytes_after: bytes of the tensors that were written.
        files: the weight files that were written.
        left_out: files of the source that were not carried over.
        notes: anything else worth knowing.
    """

    source: str
    target: str
    spec: str
    weights: int
    kept: int
    bytes_before: int
    bytes_after: int
    files: tuple[str, ...]
    left_out: tuple[SkippedEntry, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """A few lines."""
        sizes = f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)}"
        held = f"{self.weights} weights ({self.spec})" if self.weights else f"{self.kept} tensors"
        others = f", {self.kept} other tensors" if self.weights else ""
        lines = [
            f"{held} from {self.source} to {self.target}{others}",
            f"all tensors: {sizes}",
            *left_out_lines(self.left_out),
        ]
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str,
    *,
    output_type: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    num_threads: int = 0,
    progress: Progress | None = None,
    max_shard_size: int = 5_000_000_000,
) -> ConvertReport:
    """Write a model folder in another format, files to files.

    Between the native format and that of bitsandbytes packed bytes stay what they are; ``"bf16"`` and ``"fp16"``
    dequantize them, and the weights of GPTQ, AWQ and compressed-tensors (packed integers) as those libraries do.
    ``"gguf"`` writes one file, of models of the Llama family alone, with tokenizer and chat template in it.
    Tensors pass through one at a time: memory does not grow with the model. ``dst`` is absent or whole at any time;
    after an interruption the same call goes on where it was, but for a GGUF file, which is begun anew.

    Args:
        src: a packed model folder, native or of transformers with bitsandbytes in 4 bits; or one that GPTQ, AWQ or
            compressed-tensors quantized, for ``"bf16"``, ``"fp16"`` and ``"gguf"``; for ``"gguf"`` also one in 16 or
            32 bits. It is only read.
        dst: the folder to make; for ``"gguf"`` the file.
        to: ``"native"``; ``"bitsandbytes"``, as transformers saves it; ``"bf16"`` or ``"fp16"``, a plain model whose
            float tensors all have that type; ``"gguf"``.
        output_type: of a GGUF file's matrices: ``"f16"`` (the default), ``"bf16"`` or ``"q8_0"``.
        overwrite: replace an existing model in ``dst`` once the new one is whole.
        dry_run: only report; nothing is written.
        num_threads: threads that dequantize; 0 for all that torch uses.
        progress: called with (bytes done, bytes in all) of what is read.
        max_shard_size: bytes of tensors per file.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        FormatError: a file is damaged, or a value does not fit float16.
        UnsupportedError: ``src`` is not packed, is ``native`` already, or holds what the other format cannot (a data
            type without a name there, rows that are no whole blocks, another family or tokenizer than GGUF is written
            of); ``dst`` is no place for a model, or is being made by another command; gguf-py is not installed.
        ValueError: ``to`` or ``output_type`` names no format.
        OSError: the system failed, with the file's name; what is finished of a folder stays for the same call.

    >>> print(convert("SmolLM2-135M-nf4", "SmolLM2-135M-bnb", "bitsandbytes"))  # doctest: +SKIP
    """
    if to not in TARGETS or max_shard_size < 1:
        raise ValueError(
            f"convert to one of {', '.join(TARGETS)} in files of 1 byte at least; got {to!r} and {max_shard_size}"
        )
    if output_type is not None and (to != GGUF or output_type not in FILE_TYPES):
        raise ValueError(f"output_type is one of {', '.join(FILE_TYPES)}, for gguf alone; got {output_type!r} for {to}")
    if num_threads < 0:
        raise ValueError(f"num_threads is at least 0; got {num_threads}")
    source_path = Path(src)
    require_folder(source_path)
    info = inspect(source_path)
    spec = None if to == GGUF and info.format == "float" else _packed_spec(info)
    source = open_source(source_path) if spec is not None else open_float_source(source_path)
    job = Job(info, source, TensorReader(source), spec, max_shard_size)
    advance = ByteCounter(progress, info.total_bytes).add
    notes: list[str] = []
    if to == GGUF:
        file = resolve_file(source_path, Path(dst), overwrite)
        with _threads(num_threads):
            return _to_gguf(job, file, output_type or "f16", None if dry_run else advance, notes)
    target = resolve_destination(source_path, Path(dst), overwrite)
    if to in FLOATS:
        plan = plan_floats(job, FLOATS[to], notes)
    elif spec is None:
        raise UnsupportedError(
            f"{info.path}: {info.format}'s codes mean other values than those of {to}: `qlora-rs quantize` packs the "
            "values anew, `--to fp16` and `--to bf16` keep them"
        )
    else:
        plan = plan_native(job, notes) if to == "native" else plan_bitsandbytes(job, notes)
    if dry_run:
        _, left_out = companion_files(source)
    else:
        command = describe_command("convert", source, to=to, max_shard_size=max_shard_size)
        with _threads(num_threads):
            left_out = write_model(source, target, plan, command, overwrite=overwrite, notes=notes, advance=advance)
    return _report(job, to, plan.nbytes, plan.files, left_out, notes)


def _to_gguf(
    job: Job, target: Path, output_type: str, advance: Callable[[int], None] | None, notes: list[str]
) -> ConvertReport:
    """``advance`` is None where nothing is to be written."""
    gguf = require_gguf("writing GGUF files")
    size = write_gguf(job, target, output_type, gguf, notes, advance)
    carried, left_out = companion_files(job.source)
    places = {name: job.source.path / name for name in carried if name not in TOKENIZER_FILES}
    reason = "a GGUF file has no place for it"
    left_out += [SkippedEntry(name, reason, path.stat().st_size) for name, path in places.items()]
    return _report(job, f"{GGUF} {output_type}", size, (target.name,), left_out, notes)


def _report(
    job: Job, target: str, size: int, files: tuple[str, ...], left_out: Sequence[SkippedEntry], notes: Sequence[str]
) -> ConvertReport:
    info = job.info
    schemes = [job.stored_spec.describe()] if job.stored_spec is not None else list(info.schemes)
    return ConvertReport(
        source=info.format,
        target=target,
        spec="; ".join(schemes) or "not packed",
        weights=len(info.packed),
        kept=len(info.tensors) - len(info.packed),
        bytes_before=info.total_bytes,
        bytes_after=size,
        files=files,
        left_out=tuple(left_out),
        notes=tuple(notes),
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch, and with it the extension, computes on so many threads meanwhile; 0 changes nothing."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count:
            torch.set_num_threads(before)


def _packed_spec(info: CheckpointInfo) -> QuantSpec | None:
    """How the weights are packed; None where another library's codes are read as values."""
    if info.spec is not None or info.schemes:
        return info.spec
    if info.unread is not None:
        raise UnsupportedError(info.unread)
    if info.format == "float":
        raise UnsupportedError(f"{info.path}: is not packed; `qlora-rs quantize` packs it")
    ways = sorted({row.dtype for row in info.packed})
    held = f"holds weights that are packed in several ways ({', '.join(ways)})" if ways else "holds no 4-bit weight"
    raise UnsupportedError(f"{info.path}: is quantized by {info.format!r} and {held}, which is not converted")
