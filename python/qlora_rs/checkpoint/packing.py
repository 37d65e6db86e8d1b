"""`quantize`: a 16- or 32-bit model folder to a packed one, streamed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_rs import _core
from qlora_rs.checkpoint.choice import FLOAT_DTYPES, Choice, choose_tensors
from qlora_rs.checkpoint.companions import companion_files
from qlora_rs.checkpoint.dequantized import open_float_source
from qlora_rs.checkpoint.folder import copy_file, require_space, resolve_destination, write_json
from qlora_rs.checkpoint.gguf_source import round_kept
from qlora_rs.checkpoint.journal import describe_command
from qlora_rs.checkpoint.partial import Partial, kept_bytes, partial_folder
from qlora_rs.checkpoint.progress import ByteCounter
from qlora_rs.checkpoint.repacking import plan_repacked
from qlora_rs.checkpoint.source import CONFIG, FORMAT_VERSION, INDEX, Source
from qlora_rs.checkpoint.writing import write_model
from qlora_rs.report import PackedEntry, QuantizeReport, SkippedEntry
from qlora_rs.spec import QuantSpec


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    spec: QuantSpec | None = None,
    *,
    skip_modules: Sequence[str] | None = None,
    include: Sequence[str] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    num_threads: int = 0,
    max_shard_size: int = 5_000_000_000,
    slice_bytes: int = 2 << 20,
    progress: Callable[[int, int], object] | None = None,
) -> QuantizeReport:
    """Quantize a Hugging Face model folder (safetensors in bfloat16, float16 or float32) into a packed one.

    One that GPTQ, AWQ or compressed-tensors (packed integers) quantized, or a GGUF file, is taken too: the values that
    its codes stand for are quantized anew, one matrix at a time, and the report says that both errors add up.

    The weights of all Linear layers and experts are packed; output heads, routers, embeddings and norms are copied
    byte for byte, like every other file. Weights pass through in slices of rows, experts that are stored transposed
    one matrix at a time: memory does not grow with the model. ``dst`` is absent or whole at any time; after an
    interruption the same call goes on where it was.

    Args:
        src: the model folder; it is only read.
        dst: the folder to make.
        spec: data type, block size, double quantization; NF4 in doubly quantized blocks of 64 by default.
        skip_modules: patterns (full name, last component or glob) of layers that stay besides the defaults.
        include: patterns of weights to pack although the defaults leave them; they alone decide where
            transformers is not installed or does not know the architecture.
        overwrite: replace an existing model in ``dst`` once the new one is whole.
        dry_run: only report; nothing is written.
        num_threads: threads that quantize, and most files that are hashed side by side (up to four); 0 for all. What
            another library quantized takes all.
        max_shard_size: bytes of tensors per file.
        slice_bytes: bytes that pass at a time; the output does not depend on it.
        progress: called with (bytes done, bytes in all) of the source (of its values, and to hash it, where another
            library quantized it).

    Raises:
        FormatError: a file of ``src`` is not what it says, or changed meanwhile.
        UnsupportedError: ``src`` is quantized in a way that is not read, its architecture is unknown, ``dst`` is no
            place, or is being made by another command.
        NonFiniteError: a weight holds NaN or Inf (file, tensor, count and first index are named).
        ValueError: a pattern matches nothing.
        OSError: the system failed, with the file's name; what is finished stays for the same call.

    >>> report = quantize("Llama-3.2-1B", "Llama-3.2-1B-nf4")  # doctest: +SKIP
    >>> print(report)  # doctest: +SKIP
    """
    spec = QuantSpec() if spec is None else spec
    source_path, asked = Path(src), Path(dst)
    if max_shard_size < 1 or slice_bytes < 1 or num_threads < 0:
        raise ValueError(
            "max_shard_size and slice_bytes are at least 1 and num_threads at least 0; "
            f"got {max_shard_size}, {slice_bytes} and {num_threads}"
        )
    source = open_float_source(source_path)
    destination = resolve_destination(source_path, asked, overwrite)
    choice = choose_tensors(source, skip_modules, include)
    carried, left_out = companion_files(source)

    def pack(partial: Partial | None) -> Any:
        return _core.pack_checkpoint(
            spec.core(),
            source=str(source.path),
            files=list(source.files),
            packed=list(choice.packed),
            transposed=list(choice.transposed),
            destination=None if partial is None else str(partial.path),
            journal=None if partial is None else str(partial.journal.path),
            finished_tensors={} if partial is None else partial.journal.tensors,
            finished_files={} if partial is None else partial.journal.files,
            max_shard_size=max_shard_size,
            slice_bytes=slice_bytes,
            num_threads=num_threads,
            progress=progress if partial is not None else None,
        )

    notes = list(choice.notes)
    command = describe_command(
        "quantize",
        source,
        spec=spec.to_config(),
        packed=hashlib.sha256("\n".join(choice.packed).encode()).hexdigest(),
        transposed=list(choice.transposed),
        skip=list(skip_modules or ()),
        include=list(include or ()),
        max_shard_size=max_shard_size,
    )
    if source.foreign:
        source, rounded = round_kept(source, choice.packed)
        if rounded:
            notes.append(f"tensors in blocks that are not packed are rounded to bfloat16: {rounded}")
        advance = ByteCounter(progress, source.total_bytes + source.file_bytes).add
        repacked = plan_repacked(
            source,
            choice.packed,
            spec,
            transposed=choice.transposed,
            not_converted=choice.not_converted,
            hashed=None if dry_run else advance,
            max_shard_size=max_shard_size,
            notes=notes,
        )
        if not dry_run:
            write_model(source, destination, repacked, command, overwrite=overwrite, notes=notes, advance=advance)
        sizes = {tensor.name: tensor.nbytes for shard in repacked.shards for tensor in shard.tensors}
        return _report(source, spec, choice, sizes, left_out, notes)
    plan = pack(None)
    if not dry_run:
        others = sum((source.path / name).stat().st_size for name in carried)
        require_space(destination, _packed_bytes(plan) + others - kept_bytes(destination))
        files = [shard["name"] for shard in plan["shards"]]
        with partial_folder(destination, command, files, overwrite=overwrite, notes=notes) as partial:
            plan = pack(partial)
            if len(plan["shards"]) > 1:
                write_json(partial.path / INDEX, _index(plan))
            for name in carried:
                copy_file(source.path / name, partial.path / name)
            write_json(partial.path / CONFIG, _config(source, spec, choice))
    sizes = {name: end - start for shard in plan["shards"] for name, _, _, start, end in shard["tensors"]}
    return _report(source, spec, choice, sizes, left_out, notes)


def _packed_bytes(plan: Any) -> int:
    return sum(end - start for shard in plan["shards"] for *_, start, end in shard["tensors"])


def _index(plan: Any) -> dict[str, Any]:
    weight_map = {name: shard["name"] for shard in plan["shards"] for name, *_ in shard["tensors"]}
    return {"metadata": {"total_size": _packed_bytes(plan)}, "weight_map": dict(sorted(weight_map.items()))}


def _config(source: Source, spec: QuantSpec, choice: Choice) -> dict[str, Any]:
    quantization = {
        "quant_method": "qlora_rs",
        **spec.to_config(),
        "modules_to_not_convert": list(choice.not_converted),
        "format_version": FORMAT_VERSION,
    }
    return {**source.config, "quantization_config": quantization}


def _report(
    source: Source,
    spec: QuantSpec,
    choice: Choice,
    sizes: Mapping[str, int],
    left_out: Sequence[SkippedEntry],
    notes: Sequence[str],
) -> QuantizeReport:
    parts = ("", "_absmax", "_absmax_scale", "_absmax_offset")
    packed = []
    for name in choice.packed:
        tensor = source.tensors[name]
        after = sum(sizes[name + part] for part in (parts if spec.double_quant else parts[:2]))
        dtype = FLOAT_DTYPES[tensor.dtype]
        shape = choice.packed_shape(tensor)
        packed.append(PackedEntry(name, shape, dtype, spec.describe(), tensor.nbytes, after))
    return QuantizeReport(
        packed=tuple(packed),
        skipped=tuple(
            SkippedEntry(name, reason, source.tensors[name].nbytes) for name, reason in choice.reasons.items()
        ),
        bytes_before=source.total_bytes,
        bytes_after=sum(sizes.values()),
        left_out=tuple(left_out),
        notes=tuple(notes),
    )
