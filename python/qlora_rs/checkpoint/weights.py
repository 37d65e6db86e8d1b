"""Tensors of a model folder by name: stored ones as they are, packed ones as values, float ones of 16-bit folders."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from qlora_rs.checkpoint.choice import FLOAT_DTYPES, ExpertPlace, expert_places
from qlora_rs.checkpoint.dequantized import open_float_source
from qlora_rs.checkpoint.flat import FlatWeight, expect_maps, flat_packed, read_flat_weights, shaped_packed, shapeless
from qlora_rs.checkpoint.source import Source
from qlora_rs.checkpoint.stored import StoredReader
from qlora_rs.errors import FormatError
from qlora_rs.experts import expert_of
from qlora_rs.packed import PackedTensor, is_flat_layout
from qlora_rs.quantization import dequantize
from qlora_rs.spec import QuantSpec


class TensorReader:
    """Reads tensors of an opened folder, one at a time; it keeps the last packed one, whose parts come in turn."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._stored = StoredReader(source)
        self._last: tuple[str, PackedTensor] | None = None

    def stored(self, name: str) -> Tensor:
        """The tensor as its file holds it; one that another library quantized, dequantized.

        Raises:
            FormatError: the file changed since its header was read, or holds what its format does not allow.
            UnsupportedError: torch has no such type.
        """
        foreign = self.source.foreign.get(name)
        if foreign is not None:
            return foreign.values(self._stored.read)
        return self._stored.read(self.source.tensors[name])

    def matrix(self, name: str, number: int) -> Tensor:
        """One matrix of a stack of them that its file holds in floats."""
        return self._stored.read_matrix(self.source.tensors[name], number)

    def packed(
        self, name: str, shape: tuple[int, ...], spec: QuantSpec, dtype: torch.dtype = torch.float32
    ) -> PackedTensor:
        """The packed weight ``name`` of logical ``shape``; `inspect` has checked that its parts fit together.

        Raises:
            UnsupportedError: the file is bitsandbytes', and does not tell the weight's shape, or its codes mean other
                values than here.
        """
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next is read
            if f"{name}_absmax" in self.source.tensors:
                found = assemble_packed(self.stored, name, shape, spec, dtype)
            else:
                found = shaped_packed(self.source, self.flat[name], self.stored, dtype)
            self._last = name, found
        return replace(self._last[1], dtype=dtype)

    def require_packed(self, name: str) -> None:
        """Raise what `packed` would, of a weight whose parts `inspect` has checked; little is read."""
        if f"{name}_absmax" not in self.source.tensors:
            if self.flat[name].shape is None:
                raise shapeless(self.source, self.flat[name])
            expect_maps(self.source, self.flat[name], self.stored)

    def dequantized(
        self,
        name: str,
        shape: tuple[int, ...],
        spec: QuantSpec,
        dtype: torch.dtype = torch.float32,
        *,
        transposed: bool = False,
    ) -> Tensor:
        """The packed weight ``name`` of logical ``shape`` in ``dtype``, whether or not its blocks end with its rows.

        With ``transposed`` its matrices are (in, out), as the model in floats has them; one is turned at a time.

        Raises:
            FormatError: codes that the codebook does not have.
            UnsupportedError: the file does not tell the weight's shape.
        """
        if f"{name}_absmax" in self.source.tensors:
            packed = self.packed(name, shape, spec)
        else:
            weight = self.flat[name]
            if weight.shape is None:
                raise shapeless(self.source, weight)
            packed = flat_packed(self.source, weight, self.stored)
        try:
            if transposed:
                return _dequantize_transposed(packed, dtype)
            result = dequantize(packed, dtype)
        except ValueError as error:
            raise FormatError(str(error)) from None
        assert result.numel() == math.prod(shape)
        return result.reshape(shape)

    @cached_property
    def flat(self) -> dict[str, FlatWeight]:
        """The 4-bit weights of a bitsandbytes folder."""
        return read_flat_weights(self.source, self.stored)


def _dequantize_transposed(packed: PackedTensor, dtype: torch.dtype) -> Tensor:
    """The values of a weight (..., out, in) that is packed by rows as (..., in, out)."""
    *lead, rows, columns = packed.shape
    if len(lead) != 1:
        return dequantize(packed, dtype).mT.contiguous()
    result = torch.empty((*lead, columns, rows), dtype=dtype, device=packed.codes.device)
    for number, matrix in enumerate(result):
        matrix.copy_(dequantize(expert_of(packed, number), dtype).T)
    return result


def assemble_packed(
    stored: Callable[[str], Tensor], name: str, shape: tuple[int, ...], spec: QuantSpec, dtype: torch.dtype
) -> PackedTensor:
    """The packed weight ``name`` of the tensors that ``stored`` gives by their names in the files."""

    def scales(part: str) -> Tensor:
        tensor = stored(name + part)
        return tensor.view(torch.float32) if tensor.dtype == torch.int32 else tensor

    codes = stored(name)
    return PackedTensor(
        codes=codes,
        absmax=scales("_absmax"),
        absmax_scale=scales("_absmax_scale") if spec.double_quant else None,
        absmax_offset=scales("_absmax_offset") if spec.double_quant else None,
        spec=spec,
        shape=shape,
        dtype=dtype,
        flat=is_flat_layout(tuple(codes.shape), shape, spec),
    )


def open_weights(path: str | os.PathLike[str]) -> Callable[[str], Tensor]:
    """A function that reads one float tensor of a 16- or 32-bit model folder (or one seen as such) by its name.

    A name may carry the prefix of the base model (``model.``) that the files lack, or lack the one that they carry.

    Raises:
        FileNotFoundError, NotADirectoryError, FormatError: ``path`` is no whole model folder.
        UnsupportedError: its weights are quantized.

    The function raises FormatError where no file holds the tensor, or not as a float one.

    >>> weight = open_weights("SmolLM2-135M-Instruct")  # doctest: +SKIP
    >>> weight("model.norm.weight").shape  # doctest: +SKIP
    torch.Size([576])
    """
    source = open_float_source(Path(path))
    reader = TensorReader(source)
    places = cache(partial(expert_places, source))

    def weight(name: str) -> Tensor:
        stored = stored_name(name, source.tensors)
        place = None if stored is None else ExpertPlace(stored)
        if place is None and ".experts." in name:
            place = places()(name)
        if place is None:
            raise FormatError(f"{source.path}: none of its files holds the tensor {name!r}")
        stored = place.name
        tensor = source.tensors[stored]
        if tensor.dtype not in FLOAT_DTYPES:
            raise FormatError(
                f"{source.path / tensor.file}: tensor {stored!r}: expected F32, BF16 or F16, got {tensor.dtype}"
            )
        if place.number is None:
            return reader.stored(stored)
        matrix = reader.matrix(stored, place.number)
        return matrix.T if place.transposed else matrix

    return weight


def stored_name(name: str, stored: Collection[str]) -> str | None:
    """The one of the ``stored`` names that means the model's tensor ``name``, or None.

    Files of a base model alone lack its prefix, and a base model's own names lack the one of files with a head.

    >>> stored_name("model.layers.0.up.weight", ["layers.0.up.weight", "norm.weight"])
    'layers.0.up.weight'
    >>> stored_name("layers.0.up.weight", ["model.layers.0.up.weight"])
    'model.layers.0.up.weight'
    """
    if name in stored:
        return name
    without = name.partition(".")[2]
    if without.count(".") > 1 and without in stored:
        return without
    longer = [each for each in stored if each.endswith(f".{name}")]
    return longer[0] if len(longer) == 1 else None
