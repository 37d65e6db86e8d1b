"""compressed-tensors folders whose integer weights are packed (``pack-quantized``): codes along the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_rs.checkpoint.foreign import VALUE_DTYPES, FolderReader, ForeignWeight, ReadStored, tensor_error
from qlora_rs.checkpoint.grouped import PERIOD, GroupedWeight, groups_in_words, unpack, words_of
from qlora_rs.checkpoint.source import StoredTensor

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
# NOTE: codes of 3, 5, 6 and 7 bits lie elsewhere in the files of some versions, which nothing in them tells apart.
BITS = (2, 4, 8)
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


@dataclass(frozen=True)
class CompressedWeight(GroupedWeight):
    """``weight_packed`` [out, ceil(in * bits / 32)], ``weight_scale`` [out, groups], ``weight_zero_point`` [ceil(out *
    bits / 32), groups] or none, ``weight_shape`` [2], ``weight_g_idx`` [in] or none.
    """

    def integers(self, stored: ReadStored, first: int, count: int) -> tuple[Tensor, Tensor | int, Tensor]:
        """See `GroupedWeight.integers`."""
        bits, last = self.bits, first + count
        codes = unpack(stored(self.parts["weight_packed"])[first:last], bits, self.shape[1])
        scales = stored(self.parts["weight_scale"])[first:last]
        packed = self.parts.get("weight_zero_point")
        if packed is None:
            return codes, 1 << (bits - 1), scales
        words = stored(packed)[first * bits // 32 : words_of(last, bits)]
        return codes, unpack(words.T, bits, count).T.contiguous(), scales

    def checked_indices(self, part: StoredTensor, indices: Tensor) -> Tensor | None:
        """See `GroupedWeight.checked_indices`; -1 says that columns are in order."""
        if bool((indices == -1).any()):
            return None
        found = super().checked_indices(part, indices)
        if found is not None and not bool((torch.bincount(found, minlength=self.groups) == self.group_size).all()):
            raise tensor_error(self.source, part, f"gives some group more or fewer than {self.group_size} columns")
        return found


@dataclass(frozen=True)
class _Scheme:
    """What a config group says of weights."""

    bits: int
    symmetric: bool
    group_size: int | None


def read_weights(reader: FolderReader) -> dict[str, ForeignWeight]:
    """The weights of a folder of packed integers by name, in the order of its files.

    Raises:
        FormatError: parts are missing, or do not fit together or to ``config.json``.
        UnsupportedError: another format of compressed-tensors, or a scheme that means more than these tensors tell.
    """
    config = reader.config
    if config.get("format") != FORMAT:
        raise reader.unsupported(
            f"compressed-tensors in the format {config.get('format')!r} is not read, only {FORMAT!r}"
        )
    for key, what in (("transform_config", "transforms of its weights"), ("sparsity_config", "sparse weights")):
        extra = config.get(key)
        if extra and not (isinstance(extra, dict) and extra.get("format") == "dense"):
            raise reader.unsupported(f"compressed-tensors with {what} ({key}) is not read")
    schemes = _schemes(reader)
    weights: dict[str, ForeignWeight] = {}
    for base, parts in reader.groups(PARTS, PARTS[:3]).items():
        weights[f"{base}.weight"] = _read_weight(reader, base, parts, schemes)
    return weights


def _schemes(reader: FolderReader) -> list[_Scheme]:
    groups = reader.config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise reader.invalid("there are no config_groups")
    schemes = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise reader.invalid(f"config_groups[{name!r}] says nothing of weights")
        own = group.get("format")
        kind, strategy, bits = weights.get("type", "int"), weights.get("strategy"), weights.get("num_bits", 8)
        if own not in (None, FORMAT) or kind != "int" or bits not in BITS:
            raise reader.unsupported(
                f"compressed-tensors weights of {bits} bits of type {kind!r} ({own or FORMAT}) are not read, only "
                f"integers of {', '.join(map(str, BITS))} bits"
            )
        schemes.append(_Scheme(bits, _flag(reader, weights, "symmetric"), _size(reader, weights, strategy)))
    return schemes


def _flag(reader: FolderReader, weights: Mapping[str, Any], key: str) -> bool:
    value = weights.get(key, True)
    if not isinstance(value, bool):
        raise reader.invalid(f"{key} is {value!r}, neither true nor false")
    return value


def _size(reader: FolderReader, weights: Mapping[str, Any], strategy: object) -> int | None:
    size = weights.get("group_size")
    if strategy == "channel" or (strategy is None and size == -1):
        return None
    if strategy not in ("group", None) or (strategy is None and size is None):
        raise reader.unsupported(f"scales by {strategy or 'tensor'!r} are not read, only by group and channel")
    if type(size) is not int or size < 1:
        raise reader.invalid(f"group_size is {size!r}, not a positive integer")
    return size


def _read_weight(
    reader: FolderReader, base: str, parts: dict[str, StoredTensor], schemes: list[_Scheme]
) -> CompressedWeight:
    packed, scale, shape = (parts[part] for part in PARTS[:3])
    reader.expect_matrix(packed, ("I32",))
    reader.expect_matrix(scale, tuple(VALUE_DTYPES))
    reader.expect(shape, ("I64", "I32"), (2,), "the shape of a matrix")
    rows, columns = (int(size) for size in reader.stored(shape))
    if rows != packed.shape[0] or columns < 1:
        raise reader.error(shape, f"says [{rows}, {columns}], but {packed.name!r} has {packed.shape[0]} rows")
    symmetric = "weight_zero_point" not in parts
    for scheme in schemes:
        size = columns if scheme.group_size is None else scheme.group_size
        fits = packed.shape[1] == words_of(columns, scheme.bits) and scale.shape == (rows, -(-columns // size))
        if fits and symmetric == scheme.symmetric and columns % size == 0:
            break
    else:
        zeros = "no zero points" if symmetric else "zero points"
        raise reader.error(
            packed,
            f"{list(packed.shape)} for {[rows, columns]} with scales {list(scale.shape)} and {zeros} is none of the "
            "schemes in config.json",
        )
    groups = columns // size
    what = f"{scheme.bits} bits of [{rows}, {columns}] in groups of {size}"
    if not symmetric:
        reader.expect(parts["weight_zero_point"], ("I32",), (words_of(rows, scheme.bits), groups), what)
    if "weight_g_idx" in parts:
        reader.expect(parts["weight_g_idx"], ("I32", "I64"), (columns,), what)
    order = ", act-order" if "weight_g_idx" in parts else ""
    kind = "symmetric" if symmetric else "asymmetric"
    return CompressedWeight(
        name=f"{base}.weight",
        shape=(rows, columns),
        dtype=scale.dtype,
        parts=parts,
        kind=f"int{scheme.bits}",
        scheme=f"{scheme.bits} bits, {groups_in_words(groups, size)}, {kind}{order}",
        row_step=PERIOD,
        source=reader.source,
        bits=scheme.bits,
        groups=groups,
        group_size=size,
    )
