"""`convert` to compressed-tensors' packed INT4: symmetric codes -8..7, a scale for each group of 32 or 128 columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_rs.checkpoint.compressed_tensors import FORMAT, METHOD
from qlora_rs.checkpoint.foreign import PIECE_ELEMENTS, keeping
from qlora_rs.checkpoint.grouped import GroupedWeight
from qlora_rs.checkpoint.inspection import TensorRow
from qlora_rs.checkpoint.job import NONFINITE, Job
from qlora_rs.checkpoint.plain import STORED_DTYPES, cast, stored_dtype
from qlora_rs.checkpoint.shards import PlannedTensor, plan_grouped_shards
from qlora_rs.checkpoint.source import unquantized_config
from qlora_rs.checkpoint.stored import StoredReader
from qlora_rs.checkpoint.to_native import not_packed
from qlora_rs.checkpoint.writing import ModelPlan
from qlora_rs.errors import FormatError, NonFiniteError, UnsupportedError

GROUP_SIZES = (32, 128)
BITS = 4
LOWEST, HIGHEST = -8, 7


# Of a weight: the square of its norm, and of what rounding changed; None where codes and scales were kept.
_Change = tuple[float, float] | None


@dataclass
class CompressedPlan:
    """A folder that is to be written.

    Attributes:
        plan: its tensors and ``config.json``.
        packed: names of the weights that are packed.
        kept_whole: names of those that stay in floats, because their rows are no whole groups.
        changes: of the weights that are written.
    """

    plan: ModelPlan
    packed: tuple[str, ...]
    kept_whole: tuple[str, ...]
    changes: Mapping[str, _Change]

    @property
    def unchanged(self) -> int:
        """How many weights have the codes and scales of the source; known once it is written."""
        return sum(change is None for change in self.changes.values())

    @property
    def relative_error(self) -> float:
        """Root of the squares that rounding changed, relative to those of the weights; known once it is written."""
        known = [change for change in self.changes.values() if change is not None]
        norm = sum(weight for weight, _ in known)
        return math.sqrt(sum(changed for _, changed in known) / norm) if norm else 0.0


def plan_compressed(job: Job, group_size: int, notes: list[str]) -> CompressedPlan:
    """The packed weights of ``job``, whatever they are now, as packed INT4.

    Args:
        job: the source.
        group_size: columns that share a scale, 32 or 128.
        notes: gets what the user should know.

    Raises:
        UnsupportedError: a packed weight is no matrix, or all rows are too short.
        ValueError: another group size.
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(
            f"compressed-tensors is written in groups of {' or '.join(map(str, GROUP_SIZES))}; got {group_size}"
        )
    name = stored_dtype(job.source.config)
    dtype: torch.dtype = getattr(torch, name or "bfloat16")
    if name is None:
        notes.append("config.json tells no float type: scales are written in bfloat16")
    for row in job.info.packed:
        if len(row.shape) != 2 or not row.name.endswith(".weight"):
            raise UnsupportedError(
                f"{job.where(row)}: {list(row.shape)} is no Linear layer's weight, as compressed-tensors packs them"
            )
    fitting = [row for row in job.info.packed if row.shape[1] % group_size == 0 and row.elements]
    names = {row.name for row in fitting}
    left = tuple(row.name for row in job.info.packed if row.name not in names)
    if not names:
        raise UnsupportedError(f"{job.info.path}: no weight that is packed has rows of whole groups of {group_size}")
    if left:
        notes.append(
            f"{len(left)} weights stay in {STORED_DTYPES[dtype]}, as their rows are no whole groups of {group_size}: "
            f"e.g. {left[0]}"
        )
    packer = _Packer(job, group_size, dtype)
    parts: dict[str, Callable[[], Tensor]] = {}
    together: list[list[PlannedTensor]] = []
    for row in job.info.tensors:
        if row.name in names:
            together.append(_plan_parts(row, group_size, dtype, packer, parts))
        elif row.kind == "packed":
            size = row.elements * dtype.itemsize
            together.append([PlannedTensor(row.name, STORED_DTYPES[dtype], row.shape, size)])
            parts[row.name] = partial(job.values, row, dtype)
        else:
            together.append([PlannedTensor(row.name, row.dtype, row.shape, row.bytes)])
            parts[row.name] = job.stored(row.name)
    job.require_distinct(tensor for group in together for tensor in group)
    config = {
        **unquantized_config(job.source.config),
        "quantization_config": _quantization(group_size, not_packed(job, notes, names)),
    }
    shards = plan_grouped_shards(together, job.max_shard_size)
    words = {_words_name(row.name): row for row in fitting}
    read_bytes = {words_name: row.bytes for words_name, row in words.items()}
    read_bytes |= {row.name: row.bytes for row in job.info.tensors if row.name not in names}

    def restore(name: str, result: Any) -> None:
        if name in words:
            packer.changes[name] = None if result is None else (float(result[0]), float(result[1]))

    plan = ModelPlan(
        shards,
        lambda name: parts[name](),
        read_bytes,
        config,
        result=lambda name: packer.changes.get(name),
        restore=restore,
    )
    return CompressedPlan(plan, tuple(row.name for row in fitting), left, packer.changes)


def quantize_groups(weight: Tensor, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Symmetric INT4 by groups: ``scale = max|w| / 7.5``, as compressed-tensors has it, codes to the nearest.

    Args:
        weight: float [out, in], all finite.
        group_size: a divisor of ``in``.
        dtype: of the scales; codes are chosen for the scales as they are rounded to it.

    Returns:
        int8 codes -8..7 [out, in], and scales [out, in / group_size].

    Raises:
        FormatError: a scale does not fit ``dtype``.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    scales = cast(groups.abs().amax(2) / ((HIGHEST - LOWEST) / 2), dtype)
    scales = torch.where(scales == 0, torch.finfo(dtype).eps, scales)
    codes = (groups / scales.float().unsqueeze(2)).round_().clamp_(LOWEST, HIGHEST)
    return codes.to(torch.int8).flatten(1), scales


def pack_words(codes: Tensor) -> Tensor:
    """int8 codes -8..7 [out, in], ``in`` a multiple of 8, as int32 words [out, in / 8], lowest bits first."""
    return _words((codes - LOWEST).to(torch.uint8))


def _words(nibbles: Tensor) -> Tensor:
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).contiguous().view(torch.int32)


@dataclass
class _Packer:
    """Packs weights, and keeps the last one: a file asks for its parts one after another."""

    job: Job
    group_size: int
    dtype: torch.dtype
    changes: dict[str, _Change] = field(default_factory=dict)
    _last: tuple[str, Tensor, Tensor] | None = None

    def parts(self, row: TensorRow) -> tuple[Tensor, Tensor]:
        """Words and scales."""
        if self._last is None or self._last[0] != row.name:
            self._last = None  # before the next is made
            self._last = (row.name, *self._pack(row))
        return self._last[1:]

    def _pack(self, row: TensorRow) -> tuple[Tensor, Tensor]:
        taken_over = self._take_over(row)
        if taken_over is not None:
            self.changes[_words_name(row.name)] = None
            return taken_over
        rows, columns = row.shape
        weight = self.job.exact_values(row)
        words = torch.empty((rows, columns // 8), dtype=torch.int32)
        scales = torch.empty((rows, columns // self.group_size), dtype=self.dtype)
        norm = changed = 0.0
        step = max(1, PIECE_ELEMENTS // columns)
        for first in range(0, rows, step):
            piece = weight[first : first + step].float()
            if not torch.isfinite(torch.stack(torch.aminmax(piece))).all():
                raise NonFiniteError(f"{self.job.where(row)}: {NONFINITE}")
            try:
                codes, scale = quantize_groups(piece, self.group_size, self.dtype)
            except FormatError as error:
                raise FormatError(f"{self.job.where(row)}: scales: {error}") from None
            words[first : first + step] = pack_words(codes)
            scales[first : first + step] = scale
            rounded = codes * scale.float().repeat_interleave(self.group_size, 1)
            norm += float(torch.linalg.vector_norm(piece)) ** 2
            changed += float(torch.linalg.vector_norm(piece - rounded)) ** 2
        self.changes[_words_name(row.name)] = norm, changed
        return words, scales

    def _take_over(self, row: TensorRow) -> tuple[Tensor, Tensor] | None:
        """Words and scales of a weight whose codes mean the same already, as those of symmetric GPTQ do."""
        weight = self.job.source.foreign.get(row.name)
        if (
            not isinstance(weight, GroupedWeight)
            or weight.bits != BITS
            or weight.group_size % self.group_size
            or weight.value_dtype != self.dtype
        ):
            return None
        stored = keeping(StoredReader(self.job.source).read, {})
        if weight.group_indices(stored) is not None:
            return None
        words, scales = [], []
        step = max(1, PIECE_ELEMENTS // row.shape[1] // weight.row_step) * weight.row_step
        for first in range(0, row.shape[0], step):
            codes, zeros, scale = weight.integers(stored, first, min(step, row.shape[0] - first))
            if not bool((torch.as_tensor(zeros) == -LOWEST).all()):
                return None
            words.append(_words(codes))
            scales.append(scale.repeat_interleave(weight.group_size // self.group_size, 1))
        taken_over = torch.cat(words), torch.cat(scales)
        if not bool(torch.isfinite(taken_over[1]).all()):
            raise NonFiniteError(f"{self.job.where(row)}: {NONFINITE}")
        return taken_over


def _plan_parts(
    row: TensorRow, group_size: int, dtype: torch.dtype, packer: _Packer, parts: dict[str, Callable[[], Tensor]]
) -> list[PlannedTensor]:
    base = row.name.removesuffix(".weight")
    rows, columns = row.shape

    parts[f"{base}.weight_packed"] = lambda: packer.parts(row)[0]
    parts[f"{base}.weight_scale"] = lambda: packer.parts(row)[1]
    parts[f"{base}.weight_shape"] = lambda: torch.tensor([rows, columns])
    scales = (rows, columns // group_size)
    return [
        PlannedTensor(f"{base}.weight_packed", "I32", (rows, columns // 8), rows * columns // 2),
        PlannedTensor(f"{base}.weight_scale", STORED_DTYPES[dtype], scales, math.prod(scales) * dtype.itemsize),
        PlannedTensor(f"{base}.weight_shape", "I64", (2,), 16),
    ]


def _words_name(weight: str) -> str:
    return f"{weight}_packed"


def _quantization(group_size: int, ignore: Collection[str]) -> dict[str, Any]:
    """``quantization_config`` as compressed-tensors' own `QuantizationConfig` reads it."""
    weights = {
        "dynamic": False,
        "group_size": group_size,
        "num_bits": BITS,
        "strategy": "group",
        "symmetric": True,
        "type": "int",
    }
    group = {
        "format": FORMAT,
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": FORMAT,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
    }
