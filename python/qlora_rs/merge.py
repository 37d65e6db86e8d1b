"""`merge`: a model folder and an adapter to a plain 16-bit model folder, streamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_rs.adapter_merge import MergedLayer, MergeReport, check_dtype, merge_weight, relative_error
from qlora_rs.adapters import CONFIG_FILE, WEIGHTS_FILE, adapter_delta, read_adapter
from qlora_rs.checkpoint import CheckpointInfo, inspect
from qlora_rs.checkpoint.choice import FLOAT_DTYPES, ExpertPlace, expert_places, require_known_experts
from qlora_rs.checkpoint.dequantized import READERS, open_float_source
from qlora_rs.checkpoint.folder import resolve_destination
from qlora_rs.checkpoint.journal import describe_command, describe_files
from qlora_rs.checkpoint.plain import cast, plain_config, plan_plain
from qlora_rs.checkpoint.progress import ByteCounter, Progress
from qlora_rs.checkpoint.provenance import open_recorded_source, recorded_source_bytes
from qlora_rs.checkpoint.shards import plan_shards
from qlora_rs.checkpoint.source import Source, open_source, require_model
from qlora_rs.checkpoint.weights import TensorReader, stored_name
from qlora_rs.checkpoint.writing import ModelPlan, write_model
from qlora_rs.errors import FormatError, UnsupportedError
from qlora_rs.report import SkippedEntry, format_bytes, left_out_lines

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class FolderMergeReport(MergeReport):
    """What merging did, layer by layer in the order of the files, and what it wrote.

    Attributes:
        bytes_before: bytes of the model's tensors.
        bytes_after: bytes of the merged model's tensors.
        files: the weight files that were written.
        left_out: files of the model folder that were not carried over.
        notes: anything else worth knowing.
    """

    bytes_before: int
    bytes_after: int
    files: tuple[str, ...]
    left_out: tuple[SkippedEntry, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            **super().to_dict(),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "files": list(self.files),
            "left_out": [asdict(entry) for entry in self.left_out],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """A few lines."""
        sizes = f"all tensors: {format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)}"
        lines = [super().__str__(), sizes, *left_out_lines(self.left_out)]
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)


def merge(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    max_shard_size: int = 5_000_000_000,
) -> FolderMergeReport:
    """Merge an adapter into a packed model, files to files: a plain model folder that needs no qlora_rs any more.

    A weight becomes ``base + (alpha / r) B A``, summed in float32 and rounded once; packed weights without an adapter
    are dequantized. All other float32, bfloat16 and float16 tensors (embeddings, norms, biases) are cast to ``dtype``,
    so that the model has one type; tensors of other types and all other files are copied. Tensors pass through one at a
    time: memory does not grow with the model. ``destination`` is absent or whole at any time.

    Args:
        model: a packed model folder. One in 16 bits is taken too, and one that GPTQ, AWQ or compressed-tensors
            quantized: the adapter is then added to its weights.
        adapter: a folder with PEFT's two files.
        destination: the folder to make.
        dtype: of the merged model: bfloat16, float16 or float32.
        base: None merges over the dequantized weights, which is what the adapter was trained on. The path of the
            16-bit model that ``model`` was made from merges over its weights instead: they are better, but the
            adapter was trained to mend the packed ones. It must have the hashes that ``model`` has recorded.
        overwrite: replace an existing model in ``destination`` once the new one is whole.
        progress: called with (bytes done, bytes in all) of what is read.
        max_shard_size: bytes of tensors per file.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such model or adapter.
        FormatError: a file is damaged; the adapter names a layer that the model lacks or has in another shape; a file
            of ``base`` has another hash than the recorded one; a value does not fit ``dtype``.
        UnsupportedError: the model is quantized by another library; the adapter sits on a tied output head; ``base``
            cannot be checked; ``destination`` is no place for a model.
        ValueError: ``dtype`` is not a float type, or ``base`` is given for a model in 16 bits.
        OSError: the system failed, with the file's name; what is finished stays for the same call.

    >>> print(merge("SmolLM2-135M-nf4", "adapter", "merged"))  # doctest: +SKIP
    """
    check_dtype(dtype)
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size is at least 1; got {max_shard_size}")
    model_path, adapter_path, asked = Path(model), Path(adapter), Path(destination)
    base_path = None if base is None else Path(base)
    require_model(model_path)
    info = inspect(model_path)
    source = open_float_source(model_path) if info.seen_in_floats else open_source(model_path)
    if info.format == "qlora_rs":
        require_known_experts(source)
    notes = _check_model(info, base_path)
    config, pairs = read_adapter(adapter_path)
    adapted = _adapted_tensors(info, source, adapter_path, pairs)
    target = resolve_destination(model_path, asked, overwrite)
    for other in (adapter_path, *(() if base_path is None else (base_path,))):
        resolve_destination(other, asked, overwrite)
    shards = plan_shards([plan_plain(row, dtype) for row in info.tensors], max_shard_size)
    hashed_bytes = 0 if base_path is None else recorded_source_bytes(info, base_path)
    counter = ByteCounter(progress, info.total_bytes + hashed_bytes)
    read_base = None if base_path is None else open_recorded_source(info, base_path, counter.add)
    merger = _Merger(info, TensorReader(source), read_base, config, adapted, dtype)
    plan = ModelPlan(
        shards,
        merger.tensor,
        {row.name: row.bytes for row in info.tensors},
        plain_config(source.config, dtype),
        result=merger.result,
        restore=merger.restore,
    )
    command = describe_command(
        "merge",
        source,
        adapter=describe_files(adapter_path, (CONFIG_FILE, WEIGHTS_FILE)),
        dtype=str(dtype),
        base=None if base_path is None else os.path.realpath(base_path),
        max_shard_size=max_shard_size,
    )
    left_out = write_model(source, target, plan, command, overwrite=overwrite, notes=notes, advance=counter.add)
    described = "its 16-bit weights" if info.format == "float" else "the dequantized base"
    order = {row.name: number for number, row in enumerate(info.tensors)}
    return FolderMergeReport(
        layers=tuple(row for _, row in sorted(merger.layers.items(), key=lambda item: order[item[0]])),
        dtype=dtype,
        base=described if base_path is None else f"the weights of {base_path}",
        bytes_before=info.total_bytes,
        bytes_after=plan.nbytes,
        files=plan.files,
        left_out=tuple(left_out),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Adapted:
    """An adapter of a stored tensor, or of one of its matrices.

    Attributes:
        layer: the model's name of the layer.
        pair: A and B.
        place: where its weight is stored.
    """

    layer: str
    pair: Pair
    place: ExpertPlace


class _Merger:
    """Makes the tensors of the merged model, one at a time, and keeps what is to be reported."""

    def __init__(
        self,
        info: CheckpointInfo,
        reader: TensorReader,
        base: Callable[[str], Tensor] | None,
        config: Mapping[str, Any],
        adapted: Mapping[str, Sequence[_Adapted]],
        dtype: torch.dtype,
    ) -> None:
        self.info, self.reader, self.base = info, reader, base
        self.config, self.adapted, self.dtype = config, adapted, dtype
        self.rows = {row.name: row for row in info.tensors}
        self.layers: dict[str, MergedLayer] = {}

    def tensor(self, name: str) -> Tensor:
        """The merged tensor ``name``."""
        try:
            return self._make(name)
        except FormatError as error:
            place = str(Path(self.info.path) / self.rows[name].file)
            raise FormatError(str(error) if str(error).startswith(place) else f"{place}: {name}: {error}") from None

    def result(self, name: str) -> dict[str, Any] | None:
        """What is to be reported of a tensor that was merged, as plain JSON values."""
        layer = self.layers.get(name)
        return None if layer is None else asdict(layer)

    def restore(self, name: str, result: Mapping[str, Any] | None) -> None:
        """Report what an interrupted run has found."""
        if result is not None:
            self.layers[name] = MergedLayer(**result)

    def _make(self, name: str) -> Tensor:
        row = self.rows[name]
        adapters = self.adapted.get(name, ())
        base_error = None
        if row.kind == "packed":
            start = self._dequantized(name)
            if self.base is not None:
                dequantized, start = start, self.base(name)
                if start.shape != dequantized.shape:
                    raise FormatError(f"has shape {list(dequantized.shape)}, but {list(start.shape)} in the base")
                base_error = relative_error(dequantized, start)
        elif not adapters:
            stored = self.reader.stored(name)
            return cast(stored, self.dtype) if row.dtype in FLOAT_DTYPES else stored
        else:
            start = self.reader.stored(name)
        if any(each.place.number is not None for each in adapters):
            merged, error = self._merge_stack(start, adapters)
            layer = name.removesuffix(".weight")
        else:
            delta = adapter_delta(self.config, adapters[0].pair) if adapters else None
            merged, error = merge_weight(start, delta, self.dtype)
            layer = adapters[0].layer if adapters else name.removesuffix(".weight")
        self.layers[name] = MergedLayer(layer, error, base_error)
        return merged

    def _merge_stack(self, start: Tensor, adapters: Sequence[_Adapted]) -> tuple[Tensor, float]:
        """A stack of matrices with the adapters of some, and the largest rounding error of one."""
        by_number = {each.place.number: each for each in adapters}
        merged, largest = torch.empty(start.shape, dtype=self.dtype), 0.0
        for number, matrix in enumerate(start):
            each = by_number.get(number)
            delta = None if each is None else adapter_delta(self.config, each.pair)
            if each is not None and delta is not None and each.place.transposed:
                delta = delta.T
            merged[number], error = merge_weight(matrix, delta, self.dtype)
            largest = max(largest, error)
        return merged, largest

    def _dequantized(self, name: str) -> Tensor:
        if name in self.reader.source.foreign:
            return self.reader.stored(name)
        assert self.info.spec is not None
        row = self.rows[name]
        return self.reader.dequantized(name, row.shape, self.info.spec, transposed=row.transposed)


def _check_model(info: CheckpointInfo, base: Path | None) -> list[str]:
    if info.spec is not None:
        return []
    if info.seen_in_floats:
        if base is not None:
            raise ValueError(f"{info.path} is quantized by {info.format!r}, which records no other base to merge over")
        return [
            f"{info.path} is quantized by {info.format!r}: if the adapter was trained over weights that were packed "
            "from it, these are not quite its base"
        ]
    if info.format != "float":
        raise UnsupportedError(
            info.unread
            or f"{info.path}: is quantized by {info.format!r}; packed models of this library merge, and those of "
            f"bitsandbytes in 4 bits, {', '.join(READERS)}"
        )
    if base is not None:
        raise ValueError(f"{info.path} is in 16 or 32 bits itself: there is no other base to merge over")
    return [f"{info.path} is not packed: if the adapter was trained over packed weights, these are not quite its base"]


def _adapted_tensors(
    info: CheckpointInfo, source: Source, adapter: Path, pairs: Mapping[str, Pair]
) -> dict[str, list[_Adapted]]:
    """The adapters of each tensor that has some. Everything is checked here, before any work."""
    rows = {row.name: row for row in info.tensors}
    adapted: dict[str, list[_Adapted]] = {}
    missing: list[str] = []
    find_expert = expert_places(source) if any(".experts." in layer for layer in pairs) else lambda name: None
    for layer, (a, b) in pairs.items():
        name = stored_name(f"{layer}.weight", rows)
        place = find_expert(f"{layer}.weight") if name is None else ExpertPlace(name)
        name = None if place is None else place.name
        if _is_tied(layer, name, source.config):
            raise UnsupportedError(
                f"{adapter}: {layer} is tied to the embedding in {info.path}, which the adapter would change too. "
                f"Train without {layer.rpartition('.')[2]!r} in target_modules; or untie the two before quantizing: "
                "store the head's weight in the files and set tie_word_embeddings to false"
            )
        if name is None or place is None:
            missing.append(layer)
            continue
        row = rows[name]
        shape = (b.shape[0], a.shape[1])
        stored = row.float_shape if place.number is None else row.float_shape[1:]
        if (stored[::-1] if place.transposed else stored) != shape:
            raise FormatError(
                f"{adapter}: {layer}: the adapter is for a weight of {list(shape)}, {name} of {info.path} has "
                f"{list(row.float_shape)}; is this adapter for another model?"
            )
        if row.kind != "packed" and row.dtype not in FLOAT_DTYPES:
            raise UnsupportedError(f"{adapter}: {layer}: the model's weight is {row.dtype}, which takes no adapter")
        adapted.setdefault(name, []).append(_Adapted(layer, (a, b), place))
    if missing:
        raise FormatError(
            f"{adapter}: adapters of {len(missing)} layers that {info.path} lacks, e.g. {missing[0]}; "
            "is this adapter for another model?"
        )
    return adapted


def _is_tied(layer: str, stored: str | None, config: Mapping[str, Any]) -> bool:
    """Whether ``layer`` is an output head that reads the embedding: transformers then ignores a weight of its own."""
    if layer.rpartition(".")[2] not in ("lm_head", "embed_out"):
        return False
    text = config.get("text_config")
    asked = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
    return stored is None or asked is True
