"""Fold adapters into 16-bit Linear layers of a model in memory, and say what the rounding cost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from qlora_rs.checkpoint.plain import cast
from qlora_rs.checkpoint.weights import open_weights
from qlora_rs.errors import FormatError, UnsupportedError
from qlora_rs.experts import FUSED, PackedExperts
from qlora_rs.linear import Linear4bit
from qlora_rs.lora import LoraLinear, replace_module
from qlora_rs.packed import FLOAT_DTYPES


@dataclass(frozen=True)
class MergedLayer:
    """One merged weight.

    Attributes:
        name: the layer.
        rounding_error: ``|merged - exact| / |exact|`` (Frobenius), exact being base + adapter in float32.
        base_error: ``|base - dequantized| / |base|`` where the weights of the 16-bit source were the base: what the
            adapter was trained on lay that far from them. Else None.
    """

    name: str
    rounding_error: float
    base_error: float | None


@dataclass(frozen=True)
class MergeReport:
    """What merging did, layer by layer, in the model's order."""

    layers: tuple[MergedLayer, ...]
    dtype: torch.dtype
    base: str

    @property
    def max_rounding_error(self) -> float:
        """Largest relative rounding error of a layer."""
        return max((layer.rounding_error for layer in self.layers), default=0.0)

    @property
    def max_base_error(self) -> float | None:
        """Largest relative distance of a layer's packed weight from the given base; None without one."""
        return max((layer.base_error for layer in self.layers if layer.base_error is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            "base": self.base,
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_rounding_error": self.max_rounding_error,
            "max_base_error": self.max_base_error,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        """``210 layers merged over the dequantized base into bfloat16; relative rounding error at most 1.7e-03``."""
        text = (
            f"{len(self.layers)} layers merged over {self.base} into {str(self.dtype).removeprefix('torch.')}; "
            f"relative rounding error at most {self.max_rounding_error:.1e}"
        )
        if self.max_base_error is not None:
            text += f"; the adapter's own base was up to {self.max_base_error:.1e} away from these weights"
        return text


def merge_weight(base: Tensor, delta: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, float]:
    """``dtype(base + delta)`` with the sum in float32 and one rounding, and its relative rounding error.

    Raises:
        FormatError: the sum holds NaN or infinite values, or does not fit ``dtype`` (float16 ends at 65504).
    """
    exact = base.float() if delta is None else base.float() + delta
    if not torch.isfinite(exact).all():
        raise FormatError("the merged weight would hold NaN or infinite values")
    merged = cast(exact, dtype)
    return merged, relative_error(merged, exact)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``|got - expected| / |expected|`` (Frobenius norms, float64 sums); 0 where both are zero."""
    norm = float(torch.linalg.vector_norm(expected.float(), dtype=torch.float64))
    distance = float(torch.linalg.vector_norm(got.float() - expected.float(), dtype=torch.float64))
    return distance / norm if norm else (0.0 if distance == 0 else float("inf"))


def merge_adapter(
    model: nn.Module, dtype: torch.dtype = torch.bfloat16, base: str | os.PathLike[str] | None = None
) -> MergeReport:
    """Turn every packed or adapted Linear layer into a plain 16-bit ``nn.Linear``, in place.

    The new weight is ``base + (alpha / r) B A``, summed in float32 and rounded once. Merging back into 4 bits would
    lose part of the adapter, so it is not offered. All other float parameters are cast to ``dtype`` too, since the
    merged layers take and give it; buffers stay as they are.

    Args:
        model: a model with packed layers, adapters or both.
        dtype: of the merged model: bfloat16, float16 or float32.
        base: None merges over the dequantized weights, which is what the adapter was trained on; the path of the
            16-bit model folder merges over its weights instead.

    Raises:
        ValueError: nothing to merge, or ``dtype`` is not a float type.
        FormatError: ``base`` lacks a weight or has another shape, or a value does not fit ``dtype``.
        UnsupportedError: an adapter sits on a weight that another module shares (a tied head).

    On an error the model is as it was before.
    """
    check_dtype(dtype)
    targets = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear | Linear4bit) and not name.endswith(".base_layer")
    }
    if not targets:
        raise ValueError("the model has neither packed layers nor adapters to merge")
    _refuse_shared(model, targets)
    source = None if base is None else open_weights(base)
    merged = [(name, *_merge_layer(name, module, dtype, source)) for name, module in targets.items()]
    replaced = {id(p) for module in targets.values() for p in module.parameters()}
    rest = []
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and id(parameter) not in replaced:
            with _naming(name):
                rest.append((parameter, cast(parameter.detach(), dtype)))

    for name, linear, _ in merged:
        replace_module(model, name, linear)
    stacks = []
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedExperts):
            replace_module(model, name, module.fused(attrgetter("weight")))
            stacks += [f"{name}.{part}" for part in FUSED]
    for parameter, value in rest:
        parameter.data = value
    _forget_quantization(model, stacks)
    described = "the dequantized base" if base is None else f"the weights of {os.fspath(base)}"
    return MergeReport(tuple(row for _, _, row in merged), dtype, described)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError unless a model can be merged into ``dtype``."""
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"merge into bfloat16, float16 or float32; got {dtype}")


def _refuse_shared(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    bearers: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        bearers.setdefault(id(parameter), []).append(name.replace(".base_layer.", "."))
    for name, module in targets.items():
        weight = module.base_layer.weight if isinstance(module, LoraLinear) else module.weight
        others = [other for other in bearers[id(weight)] if other != f"{name}.weight"]
        if others:
            raise UnsupportedError(
                f"{name} shares its weight with {others[0]}, which the adapter would change too; "
                f"train without {name.rpartition('.')[2]!r} in target_modules, or untie the two before training"
            )


def _forget_quantization(model: nn.Module, stacks: Sequence[str]) -> None:
    """Let transformers save and load it as the plain model that it is now, with ``stacks`` of experts in floats."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if hasattr(quantizer, "give_back"):
        quantizer.give_back(model, stacks)
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if attribute in vars(model):
            delattr(model, attribute)


def _merge_layer(
    name: str, module: LoraLinear | Linear4bit, dtype: torch.dtype, source: Callable[[str], Tensor] | None
) -> tuple[nn.Linear, MergedLayer]:
    layer = module.base_layer if isinstance(module, LoraLinear) else module
    dequantized = layer.dequantize(torch.float32) if isinstance(layer, Linear4bit) else layer.weight.detach()
    start, base_error = dequantized, None
    if source is not None:
        start = source(f"{name}.weight").to(dequantized.device)
        if start.shape != dequantized.shape:
            raise FormatError(f"{name}.weight: the base has {list(start.shape)}, the model {list(dequantized.shape)}")
        base_error = relative_error(dequantized, start)
    delta = module.delta() if isinstance(module, LoraLinear) else None
    with _naming(name):
        weight, error = merge_weight(start, delta, dtype)
        bias = None if layer.bias is None else cast(layer.bias.detach(), dtype)
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear.train(module.training), MergedLayer(name, error, base_error)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the name of a layer before what is wrong with it."""
    try:
        yield
    except FormatError as failure:
        raise FormatError(f"{name}: {failure}") from None
