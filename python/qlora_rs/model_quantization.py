"""Quantizing a model in memory, in place, layer by layer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import nn

from qlora_rs import ops
from qlora_rs.errors import NonFiniteError, UnsupportedError
from qlora_rs.experts import (
    BIASES,
    FUSED,
    PackedExperts,
    has_biases,
    is_experts,
    logical_shape,
    why_not_packed,
)
from qlora_rs.linear import Linear4bit
from qlora_rs.lora import replace_module
from qlora_rs.packed import FLOAT_DTYPES
from qlora_rs.report import PackedEntry, QuantizeReport, SkippedEntry
from qlora_rs.selection import matches, select_linear
from qlora_rs.spec import QuantSpec


def quantize_model(
    model: nn.Module,
    spec: QuantSpec | None = None,
    skip_modules: Sequence[str] | None = None,
    *,
    include: Sequence[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> QuantizeReport:
    """Replace the Linear layers of a model in memory by packed ones, in place, and transformers' fused experts by
    `qlora_rs.experts.PackedExperts`, which hold a packed layer for each.

    Args:
        model: any module; what is neither, is packed already, or shares its weight with another module stays.
        spec: NF4 in doubly quantized blocks of 64 by default.
        skip_modules: patterns (full name, last component or glob) of layers, and modules of experts, that stay besides
            output heads and routers.
        include: patterns of layers that are packed although the defaults would leave them.
        progress: called with (bytes done, bytes in all) of the float weights.

    Raises:
        ValueError: a pattern matches no layer, or nothing is left to pack.
        NonFiniteError: a weight holds NaN or Inf (named); the model is then as it was before.
        UnsupportedError: a layer's weight has a type or device that cannot be quantized.
    """
    spec = QuantSpec() if spec is None else spec
    fused, skipped_experts, skip_linear = _fused_experts(model, skip_modules or ())
    selection = select_linear(model, skip_modules=skip_linear, include=include)
    reasons = {**dict(selection.skipped), **skipped_experts}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    layers: dict[str, nn.Linear] = {}
    for name in selection.packed:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        others = [other for other in owners[id(layer.weight)] if other != f"{name}.weight"]
        if isinstance(layer, Linear4bit):
            reasons[name] = "packed already"
        elif others:
            reasons[name] = f"shares its weight with {others[0]}"
        else:
            layers[name] = layer
    if not layers and not fused:
        raise ValueError("nothing to pack: the model has no Linear layer that could be")
    weights = {f"{name}.weight": layer.weight for name, layer in layers.items()}
    weights |= {f"{name}.{part}": each.get_parameter(part) for name, each in fused.items() for part in FUSED}
    _check_weights(weights)
    chosen = (*layers, *fused)
    before = _bytes(model)
    entries, biases = [], []
    done, total = 0, sum(weight.nbytes for weight in weights.values())
    weights.clear()
    for name in tuple(layers):
        layer = layers.pop(name)  # so that its float weight is freed before the next is packed
        packed = Linear4bit.from_float(layer, spec).train(layer.training)
        replace_module(model, name, packed)
        size, dtype = layer.weight.nbytes, str(layer.weight.dtype).removeprefix("torch.")
        shape = tuple(layer.weight.shape)
        after = packed.packed().nbytes
        entries.append(PackedEntry(f"{name}.weight", shape, dtype, spec.describe(), size, after))
        done += size
        if progress is not None:
            progress(done, total)
    for name in tuple(fused):
        module = fused.pop(name)
        experts = PackedExperts.from_float(module, spec)
        replace_module(model, name, experts)
        for part in FUSED:
            weight = module.get_parameter(part)
            after = sum(cast(Linear4bit, cast(nn.ModuleDict, each)[part]).packed().nbytes for each in experts)
            dtype, shape = str(weight.dtype).removeprefix("torch."), logical_shape(module, part)
            entries.append(PackedEntry(f"{name}.{part}", shape, dtype, spec.describe(), weight.nbytes, after))
            if has_biases(module):
                bias = BIASES[part]
                biases.append(SkippedEntry(f"{name}.{bias}", "bias", module.get_parameter(bias).nbytes))
            done += weight.nbytes
        if progress is not None:
            progress(done, total)
    if "transformers" in sys.modules:
        from qlora_rs.integrations.transformers import adopt

        adopt(model, spec, [name for name in reasons if name not in skipped_experts])
    kept = (*_kept(model, chosen, reasons), *biases)
    return QuantizeReport(tuple(entries), kept, before, _bytes(model))


def _fused_experts(
    model: nn.Module, skip: Sequence[str]
) -> tuple[dict[str, nn.Module], dict[str, str], list[str] | None]:
    """The modules of experts to pack, why the others stay, and the patterns of ``skip`` that mean Linear layers."""
    fused: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    used: set[str] = set()
    for name, module in model.named_modules():
        if is_experts(module):
            by = next((pattern for pattern in skip if matches(name, pattern)), None)
            reason = why_not_packed(module) if by is None else f"matches the skip pattern {by!r}"
            used.update(pattern for pattern in skip if matches(name, pattern))
            if reason is None:
                fused[name] = module
            else:
                reasons[name] = reason
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    left = [pattern for pattern in skip if pattern not in used or any(matches(name, pattern) for name in linears)]
    return fused, reasons, left or None


def _check_weights(weights: Mapping[str, torch.Tensor]) -> None:
    """Everything that could fail, before the first layer is replaced."""
    for name, weight in weights.items():
        if weight.dtype not in FLOAT_DTYPES or weight.device.type not in ops.DEVICES:
            raise UnsupportedError(
                f"{name} is {weight.dtype} on {weight.device}; float32, bfloat16 and float16 on "
                f"{', '.join(ops.DEVICES)} can be quantized: move or cast the model, or skip the layer"
            )
        # The extremes are NaN where one value is, and take no memory as a mask would.
        if not weight.is_meta and weight.numel() and not torch.isfinite(torch.stack(torch.aminmax(weight))).all():
            bad = (~torch.isfinite(weight)).flatten()
            raise NonFiniteError(
                f"{name} holds {int(bad.sum())} NaN or infinite value(s), the first at flat index "
                f"{int(bad.int().argmax())}; mend the weight, or skip the layer"
            )


def _kept(model: nn.Module, packed: Sequence[str], reasons: dict[str, str]) -> tuple[SkippedEntry, ...]:
    entries = []
    experts = tuple(f"{name}." for name in packed if isinstance(model.get_submodule(name), PackedExperts))
    for name, parameter in model.named_parameters():
        module_name, _, leaf = name.rpartition(".")
        if (module_name in packed and leaf != "bias") or name.startswith(experts):
            continue
        kind = "bias" if leaf == "bias" else f"{type(model.get_submodule(module_name)).__name__}: not a Linear layer"
        reason = reasons.get(module_name) if leaf != "bias" else None
        entries.append(SkippedEntry(name, reason or kind, parameter.nbytes))
    return tuple(entries)


def _bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
