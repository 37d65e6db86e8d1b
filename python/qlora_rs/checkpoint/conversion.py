"""`convert`: a packed model folder to another format, streamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlora_rs.checkpoint.choice import choose_tensors, require_known_experts
from qlora_rs.checkpoint.companions import companion_files
from qlora_rs.checkpoint.compressed_tensors import METHOD
from qlora_rs.checkpoint.dequantized import open_float_source
from qlora_rs.checkpoint.folder import resolve_destination
from qlora_rs.checkpoint.gguf_names import require_gguf
from qlora_rs.checkpoint.gguf_tokenizer import TOKENIZER_FILES
from qlora_rs.checkpoint.inspection import CheckpointInfo, inspect
from qlora_rs.checkpoint.job import Job
from qlora_rs.checkpoint.journal import Command, describe_command
from qlora_rs.checkpoint.progress import ByteCounter, Progress
from qlora_rs.checkpoint.repacking import mark_packed, plan_repacked
from qlora_rs.checkpoint.source import open_source, require_model
from qlora_rs.checkpoint.to_bitsandbytes import plan_bitsandbytes
from qlora_rs.checkpoint.to_compressed_tensors import GROUP_SIZES, CompressedPlan, plan_compressed
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
TARGETS = ("native", "bitsandbytes", *FLOATS, METHOD, GGUF)


@dataclass(frozen=True)
class ConvertReport:
    """What was converted.

    Attributes:
        source: the format that was read: ``"qlora_rs"``, ``"bitsandbytes"``, ``"gptq"``, ``"awq"``,
            ``"compressed-tensors"``, ``"gguf"`` or ``"float"``.
        target: what was asked for: ``"native"``, ``"bitsandbytes"``, ``"bf16"``, ``"fp16"``,
            ``"compressed-tensors"`` or ``"gguf"`` with the type of its matrices, e.g. ``"gguf f16"``.
        spec: how the source's weights are packed, in one line; ``"not packed"`` where they are not.
        weights: how many packed weights were converted, or packed anew.
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
    spec: QuantSpec | None = None,
    group_size: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    num_threads: int = 0,
    progress: Progress | None = None,
    max_shard_size: int = 5_000_000_000,
) -> ConvertReport:
    """Write a model folder in another format, files to files.

    Between the native format and that of bitsandbytes packed bytes stay what they are; ``"bf16"`` and ``"fp16"``
    dequantize them, and the weights of GPTQ, AWQ and compressed-tensors (packed integers) as those libraries do.
    ``"compressed-tensors"``, and ``"native"`` for what those three quantized, quantize the values anew, and the report
    says so. ``"gguf"`` writes one file, of models of the Llama family alone, with tokenizer and chat template in it.
    Tensors pass through one at a time: memory does not grow with the model. ``dst`` is absent or whole at any time;
    after an interruption the same call goes on where it was, but for a GGUF file, which is begun anew.

    Args:
        src: a packed model folder, native or of transformers with bitsandbytes in 4 bits; one that GPTQ, AWQ or
            compressed-tensors quantized, for all but ``"bitsandbytes"``; one in 16 or 32 bits, for
            ``"compressed-tensors"`` and ``"gguf"``; a GGUF file, for ``"bf16"``, ``"fp16"`` and ``"gguf"``. It is only
            read.
        dst: the folder to make; for ``"gguf"`` the file.
        to: ``"native"``; ``"bitsandbytes"``, as transformers saves it; ``"bf16"`` or ``"fp16"``, a plain model whose
            float tensors all have that type; ``"compressed-tensors"``, symmetric INT4 by groups that compressed-tensors
            calls ``pack-quantized``; ``"gguf"``.
        output_type: of a GGUF file's matrices: ``"f16"`` (the default), ``"bf16"`` or ``"q8_0"``.
        spec: how ``"native"`` quantizes the values of GPTQ, AWQ or compressed-tensors; NF4 in doubly quantized blocks
            of 64 by default.
        group_size: weights of a row that share a scale in ``"compressed-tensors"``: 32 (the default) or 128.
        overwrite: replace an existing model in ``dst`` once the new one is whole.
        dry_run: only report; nothing is written.
        num_threads: threads that dequantize; 0 for all that torch uses.
        progress: called with (bytes done, bytes in all) of what is read.
        max_shard_size: bytes of tensors per file.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        FormatError: a file is damaged, or a value does not fit float16.
        NonFiniteError: a weight that has to be quantized holds NaN or Inf.
        UnsupportedError: ``src`` is not packed, is ``native`` already, or holds what the other format cannot (a data
            type without a name there, rows that end in short blocks, another family or tokenizer than GGUF is written
            of); ``dst`` is no place for a model, or is being made by another command; gguf-py is not installed.
        ValueError: ``to`` or ``output_type`` names no format; an option is given where it means nothing.
        OSError: the system failed, with the file's name; what is finished of a folder stays for the same call.

    >>> print(convert("SmolLM2-135M-nf4", "SmolLM2-135M-bnb", "bitsandbytes"))  # doctest: +SKIP
    """
    if to not in TARGETS:
        raise ValueError(f"convert to one of {', '.join(TARGETS)}; got {to!r}")
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size is at least 1; got {max_shard_size}")
    if output_type is not None and (to != GGUF or output_type not in FILE_TYPES):
        raise ValueError(f"output_type is one of {', '.join(FILE_TYPES)}, for gguf alone; got {output_type!r} for {to}")
    if num_threads < 0:
        raise ValueError(f"num_threads is at least 0; got {num_threads}")
    source_path = Path(src)
    require_model(source_path)
    info = inspect(source_path)
    stored_spec = _stored_spec(info, to)
    _check_asked(info, to, spec, group_size)
    source = open_source(source_path) if stored_spec is not None else open_float_source(source_path)
    if info.format == "qlora_rs":
        require_known_experts(source)
    notes: list[str] = []
    if to == METHOD and info.format == "float":
        choice = choose_tensors(source)
        notes += choice.notes
        matrices = [name for name in choice.packed if len(source.tensors[name].shape) == 2]
        if len(matrices) < len(choice.packed):
            stacks = [name for name in choice.packed if len(source.tensors[name].shape) != 2]
            notes.append(f"{len(stacks)} stacks of experts stay as they are: {METHOD} packs matrices; e.g. {stacks[0]}")
        info = mark_packed(info, matrices)
    job = Job(info, source, TensorReader(source), stored_spec, max_shard_size)
    to_hash = source.file_bytes if source.foreign and to == "native" and not dry_run else 0
    advance = ByteCounter(progress, (source.total_bytes if to_hash else info.total_bytes) + to_hash).add
    if to == GGUF:
        file = resolve_file(source_path, Path(dst), overwrite)
        with _threads(num_threads):
            return _to_gguf(job, file, output_type or "f16", None if dry_run else advance, notes)
    target = resolve_destination(source_path, Path(dst), overwrite)
    command = None
    if not dry_run:
        asked = None if spec is None else spec.to_config()
        options = {"to": to, "spec": asked, "group_size": group_size, "max_shard_size": max_shard_size}
        command = describe_command("convert", source, **options)
    if to == METHOD:
        size = 32 if group_size is None else group_size
        with _threads(num_threads):
            return _to_compressed_tensors(job, target, size, command, overwrite, notes, advance)
    if to in FLOATS:
        plan = plan_floats(job, FLOATS[to], notes)
    elif source.foreign:
        plan = plan_repacked(
            source,
            [row.name for row in info.packed],
            QuantSpec() if spec is None else spec,
            not_converted=None,
            hashed=None if dry_run else advance,
            max_shard_size=max_shard_size,
            notes=notes,
        )
    else:
        plan = plan_native(job, notes) if to == "native" else plan_bitsandbytes(job, notes)
    if command is None:
        _, left_out = companion_files(source)
    else:
        with _threads(num_threads):
            left_out = write_model(source, target, plan, command, overwrite=overwrite, notes=notes, advance=advance)
    return _report(job, to, plan.nbytes, plan.files, left_out, notes)


def _to_compressed_tensors(
    job: Job,
    target: Path,
    group_size: int,
    command: Command | None,
    overwrite: bool,
    notes: list[str],
    advance: Callable[[int], None],
) -> ConvertReport:
    """``command`` is None where nothing is to be written."""
    compressed = plan_compressed(job, group_size, notes)
    if command is None:
        _, left_out = companion_files(job.source)
    else:
        plan = compressed.plan
        left_out = write_model(job.source, target, plan, command, overwrite=overwrite, notes=notes, advance=advance)
        notes.append(_cost(job.info, compressed))
    report = _report(job, METHOD, compressed.plan.nbytes, compressed.plan.files, left_out, notes)
    weights = len(compressed.packed)
    return replace(report, weights=weights, kept=report.kept + report.weights - weights)


def _to_gguf(
    job: Job, target: Path, output_type: str, advance: Callable[[int], None] | None, notes: list[str]
) -> ConvertReport:
    """``advance`` is None where nothing is to be written."""
    gguf = require_gguf("writing GGUF files")
    size = write_gguf(job, target, output_type, gguf, notes, advance)
    carried, left_out = companion_files(job.source)
    places = {name: job.source.companions_folder() / name for name in carried if name not in TOKENIZER_FILES}
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


def _stored_spec(info: CheckpointInfo, to: str) -> QuantSpec | None:
    """How the weights are packed; None where they are floats, or another library's codes are read as values."""
    if info.spec is not None:
        return info.spec
    if info.format == GGUF:
        if to in (*FLOATS, GGUF):
            return None
        raise UnsupportedError(
            f"{info.path}: a GGUF file becomes {', '.join(FLOATS)} or another GGUF file; `qlora-rs quantize` makes a "
            "packed folder of it"
        )
    if info.schemes:
        if to == "bitsandbytes":
            raise UnsupportedError(
                f"{info.path}: {info.format}'s codes mean other values than those of bitsandbytes: `--to native` packs "
                "the values anew, and what it writes converts"
            )
        return None
    if info.unread is not None:
        raise UnsupportedError(info.unread)
    if info.format == "float":
        if to in (METHOD, GGUF):
            return None
        raise UnsupportedError(f"{info.path}: is not packed; `qlora-rs quantize` packs it")
    ways = sorted({row.dtype for row in info.packed})
    held = f"holds weights that are packed in several ways ({', '.join(ways)})" if ways else "holds no 4-bit weight"
    raise UnsupportedError(f"{info.path}: is quantized by {info.format!r} and {held}, which is not converted")


def _check_asked(info: CheckpointInfo, to: str, spec: QuantSpec | None, group_size: int | None) -> None:
    if group_size is not None and (to != METHOD or group_size not in GROUP_SIZES):
        sizes = " or ".join(map(str, GROUP_SIZES))
        raise ValueError(f"a group size, {sizes}, goes with {METHOD} alone; got {group_size} for {to}")
    if spec is not None and (to != "native" or not info.schemes):
        raise ValueError(
            f"a data type goes with what GPTQ, AWQ or {METHOD} quantized, to native; {info.path} is "
            f"{'not packed' if info.format == 'float' else 'quantized by ' + repr(info.format)}, to {to}"
        )


def _cost(info: CheckpointInfo, compressed: CompressedPlan) -> str:
    """What writing packed INT4 changed, in one sentence."""
    total, unchanged = len(compressed.packed), compressed.unchanged
    kept = f"{unchanged} of {total} weights keep their codes and scales"
    if unchanged == total:
        return kept
    changed = f"rounding to packed INT4 changed the weights by {compressed.relative_error:.4f} of their norm"
    changed = f"{kept}; of the others, {changed}" if unchanged else changed
    if info.format == "float":
        return changed
    how = info.spec.describe() if info.spec is not None else "; ".join(info.schemes)
    before = f"{info.format} ({how})"
    return f"{changed}, on top of what {before} had changed before; from the 16-bit model the sum would be less"
