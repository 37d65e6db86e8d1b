"""What each data type costs a model: perplexity against bits per parameter."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_rs.checkpoint import CheckpointInfo, inspect
from qlora_rs.checkpoint.source import require_folder
from qlora_rs.checkpoint.weights import stored_name
from qlora_rs.devices import resolve_device
from qlora_rs.errors import UnsupportedError
from qlora_rs.eval.perplexity import Perplexity, perplexity
from qlora_rs.linear import Linear4bit
from qlora_rs.model import from_pretrained, load_float
from qlora_rs.spec import QuantSpec

DEFAULT_TYPES = ("int8", "nf4", "nf4+dq", "fp4", "int4")
DOUBLE_QUANT = "+dq"
STORED_NAMES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


@dataclass(frozen=True)
class TypeResult:
    """What was measured of one data type.

    Attributes:
        name: ``"nf4+dq"`` is NF4 with doubly quantized scales; of the model as it is ``"bf16"`` or the like.
        spec: how weights were packed; None for the model as it is.
        weights: how many weights were packed.
        bits_per_weight: storage bits of a packed element, scales included (of all elements for the model as it is).
        bits_per_parameter: the same over the whole model, with what stays in floats as the files hold it.
        bytes: of the whole model.
        perplexity: ``exp`` of the next figure.
        nats_per_token: mean negative log-likelihood.
        nats_over_stored: how many of these the model as it is does without.
        seconds: that the evaluation took, without loading.
    """

    name: str
    spec: QuantSpec | None
    weights: int
    bits_per_weight: float
    bits_per_parameter: float
    bytes: int
    perplexity: float
    nats_per_token: float
    nats_over_stored: float
    seconds: float


@dataclass(frozen=True)
class TypeComparison:
    """What `compare_types` measured.

    Attributes:
        model: the folder.
        parameters: of the whole model.
        tokens: scored tokens.
        window: tokens per window.
        dtype: of the arithmetic, e.g. ``"float32"``.
        device: where it was done, e.g. ``"cpu"``.
        results: the model as it is, then the types in the order asked for.
    """

    model: str
    parameters: int
    tokens: int
    window: int
    dtype: str
    device: str
    results: tuple[TypeResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        rows = [{**asdict(row), "spec": None if row.spec is None else row.spec.to_config()} for row in self.results]
        return {**asdict(self), "results": rows}


def parse_type(name: str, block_size: int = 64) -> QuantSpec:
    """The spec that a short name stands for: a data type, with ``+dq`` if its scales are quantized too.

    Raises:
        ValueError: there is no such type or block size.

    >>> parse_type("nf4+dq")
    QuantSpec(quant_type='nf4', block_size=64, double_quant=True, codebook=None)
    >>> parse_type("int8", 128).double_quant
    False
    """
    quant_type = name.removesuffix(DOUBLE_QUANT)
    return QuantSpec(quant_type, block_size, double_quant=quant_type != name)


def compare_types(
    path: str | os.PathLike[str],
    tokens: Tensor | Sequence[int],
    types: Sequence[str] = DEFAULT_TYPES,
    *,
    block_size: int = 64,
    window: int = 512,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> TypeComparison:
    """Measure a 16- or 32-bit model as it is, then with its Linear layers packed in each of some data types.

    One model is in memory at a time; each is quantized from the files. Perplexity is that of
    `qlora_rs.eval.perplexity`: figures of other windows, tokenizers or texts do not compare with these.

    Args:
        path: a model folder in 16 or 32 bits.
        tokens: 1-D token ids of a text.
        types: names of data types, ``+dq`` behind those whose scales are quantized too.
        block_size: elements that share a scale.
        window: tokens per window.
        dtype: of the arithmetic; ``"auto"`` is what the device computes fast.
        device: where to compute, as `qlora_rs.from_pretrained`.
        progress: called with (tokens done, tokens in all) over all types together.

    Raises:
        UnsupportedError: the folder is quantized.
        ValueError: a type, block size or window that there is not, or fewer than two tokens.
        Others as `qlora_rs.from_pretrained` and `perplexity`.

    >>> compare_types("SmolLM2-135M", tokens).results[2].perplexity  # doctest: +SKIP
    37.13
    """
    folder = Path(path)
    require_folder(folder)
    info = inspect(folder)
    if info.config is not None:
        raise UnsupportedError(
            f"{folder}: is quantized (quant_method {info.format!r}); what types cost is measured from a 16-bit model"
        )
    place = resolve_device(device)
    named = [(name, parse_type(name, block_size)) for name in dict.fromkeys(types)]
    ids = torch.as_tensor(tokens)
    total = (1 + len(named)) * len(ids)
    results: list[TypeResult] = []
    arithmetic = ""

    def count(done: int, _: int) -> None:
        if progress is not None:
            progress(len(results) * len(ids) + done, total)

    for name, spec in [(_stored_type(info), None), *named]:
        model = load_float(folder, dtype, place) if spec is None else from_pretrained(folder, spec, dtype, place)
        arithmetic = str(model.dtype).removeprefix("torch.")
        started = time.monotonic()
        found = perplexity(model, ids, window=window, progress=count)
        seconds = time.monotonic() - started
        results.append(_result(name, spec, info, model, found, seconds, results[0] if results else None))
        scored = found.tokens
        del model  # before the next one is loaded
    return TypeComparison(str(folder), info.parameters, scored, window, arithmetic, str(place), tuple(results))


def _stored_type(info: CheckpointInfo) -> str:
    stored = {row.dtype for row in info.tensors if row.dtype in STORED_NAMES}
    return STORED_NAMES[stored.pop()] if len(stored) == 1 else "as it is"


def _result(
    name: str,
    spec: QuantSpec | None,
    info: CheckpointInfo,
    model: nn.Module,
    found: Perplexity,
    seconds: float,
    base: TypeResult | None,
) -> TypeResult:
    rows = {row.name: row for row in info.tensors}
    size, packed_bytes, packed_elements, weights = info.total_bytes, 0, 0, 0
    for layer_name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            packed = layer.packed()
            elements = math.prod(packed.shape)
            stored = stored_name(f"{layer_name}.weight", rows)
            # A weight that transformers put together while loading has no tensor of its own in the files.
            before = rows[stored].bytes if stored is not None else elements * info.total_bytes // info.parameters
            size += packed.nbytes - before
            packed_bytes += packed.nbytes
            packed_elements += elements
            weights += 1
    per_parameter = 8 * size / info.parameters
    return TypeResult(
        name=name,
        spec=spec,
        weights=weights,
        bits_per_weight=8 * packed_bytes / packed_elements if packed_elements else per_parameter,
        bits_per_parameter=per_parameter,
        bytes=size,
        perplexity=found.ppl,
        nats_per_token=found.nll,
        nats_over_stored=found.nll - (found.nll if base is None else base.nats_per_token),
        seconds=seconds,
    )
