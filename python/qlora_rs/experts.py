"""Mixtures of experts: the fused 3-D weights of transformers' expert modules as packed Linear layers of each expert."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_rs.linear import Linear4bit
from qlora_rs.packed import PackedTensor
from qlora_rs.quantization import quantize
from qlora_rs.spec import QuantSpec

GATE_UP, DOWN = "gate_up_proj", "down_proj"
FUSED = (GATE_UP, DOWN)


def is_experts(module: nn.Module) -> bool:
    """Whether this is a module of fused experts as transformers 5 writes them."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


def why_not_packed(module: nn.Module) -> str | None:
    """Why fused experts cannot be computed from packed weights; None where they can."""
    kind = type(module).__name__
    if not is_experts(module):
        return f"{kind}: fused experts are no Linear layers; --include packs them"
    parameters = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    wanted: dict[str, Any] = {"has_gate": True, "has_bias": False, "is_transposed": False}
    differing = [f"{name} {not value}" for name, value in wanted.items() if getattr(module, name) is not value]
    if getattr(module, "has_post_expert_norm", False):
        differing.append("has_post_expert_norm True")
    if set(parameters) != set(FUSED) or any(len(shape) != 3 for shape in parameters.values()):
        differing.append(f"parameters {', '.join(parameters) or 'none'}")
    return f"{kind}: no code for such experts ({'; '.join(differing)})" if differing else None


def packable_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of fused experts that `PackedExperts` can stand for, by name."""
    return {name: module for name, module in model.named_modules() if is_experts(module) and not why_not_packed(module)}


class PackedExperts(nn.ModuleList):
    """``sum over the chosen experts e of p_e down_e(act(gate_e(x)) up_e(x))``, each matrix a packed Linear layer.

    Member e is a ``ModuleDict`` of expert e's layers, under the names that the files have for them: ``w1``, ``w3``,
    ``w2``, or ``gate_proj``, ``up_proj``, ``down_proj``, or the fused ``gate_up_proj``, ``down_proj``. Only the experts
    that a batch chooses are computed, one after another, and no more than one matrix is dequantized at a time. Being
    Linear layers they can be paged, adapted and merged like all others.

    Args:
        fused: transformers' module; its activation and gate are used, and it gives its weights up.
        experts: of each expert the layers by name: of gate and up, in the order of the rows in ``gate_up_proj``, then
            that of down.

    Source: the eager forward of transformers' experts (``transformers.integrations.moe``), to the order of its sums.
    """

    def __init__(self, fused: nn.Module, experts: Sequence[Mapping[str, nn.Linear]]) -> None:
        super().__init__()
        *inner, down = experts[0]
        self.inner, self.down = tuple(inner), down
        emptied = copy.copy(fused)
        emptied._parameters = {}
        # Not a member: it has no weights, and its name would be one of an expert.
        self.__dict__["_rule"] = emptied
        for layers in experts:
            self.append(nn.ModuleDict(layers))

    @classmethod
    def from_float(cls, fused: nn.Module, spec: QuantSpec | None = None) -> PackedExperts:
        """Quantize transformers' module, expert by expert; it gives its weights up.

        Raises:
            NonFiniteError: a weight holds NaN or Inf.
        """
        count = fused.get_parameter(DOWN).shape[0]
        experts = [
            {name: Linear4bit.from_packed(quantize(fused.get_parameter(name)[number], spec)) for name in FUSED}
            for number in range(count)
        ]
        return cls(fused, experts).train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x (tokens, hidden), for each token k experts and their weights (tokens, k) -> (tokens, hidden)."""
        result = torch.zeros_like(hidden_states)
        chosen = top_k_index.flatten()
        with torch.no_grad():
            order = chosen.argsort(stable=True)
            counts = torch.bincount(chosen, minlength=len(self)).tolist()  # NOTE: the one wait for the device
        weights, start = top_k_weights.flatten(), 0
        for expert, count in zip(self, counts, strict=False):
            if count:
                places = order[start : start + count]
                tokens = places // top_k_index.shape[-1]
                y = self._expert(expert, hidden_states[tokens]) * weights[places, None]
                result.index_add_(0, tokens, y.to(result.dtype))
            start += count
        return result

    def _expert(self, expert: Any, x: Tensor) -> Tensor:
        inner = [expert[name](x) for name in self.inner]
        rule: Any = self._rule
        y: Tensor = expert[self.down](rule._apply_gate(inner[0] if len(inner) == 1 else torch.cat(inner, -1)))
        return y

    def fused(self, weight: Callable[[Any], Tensor]) -> nn.Module:
        """transformers' module again, of the weights that ``weight`` gives for each layer."""
        restored: nn.Module = copy.copy(self.__dict__["_rule"])
        restored._parameters = {}
        for name, parts in ((GATE_UP, self.inner), (DOWN, (self.down,))):
            stack = torch.stack([torch.cat([weight(expert[part]) for part in parts]) for expert in self._members()])
            restored.register_parameter(name, nn.Parameter(stack, requires_grad=False))
        return restored.train(self.training)

    def _members(self) -> list[Any]:
        return list(self)


def split_experts(packed: PackedTensor) -> list[PackedTensor]:
    """The matrices of a packed weight (experts, out, in), each in memory of its own.

    Raises:
        ValueError: it is flat, so that experts share blocks or scales, or is no stack of matrices.
    """
    if packed.flat or len(packed.shape) != 3:
        raise ValueError("not a stack of matrices with blocks and scales of their own")
    scale, offset = packed.absmax_scale, packed.absmax_offset
    return [
        PackedTensor(
            packed.codes[number].clone(),
            packed.absmax[number].clone(),
            None if scale is None else scale[number].clone(),
            None if offset is None else offset[number : number + 1].clone(),
            packed.spec,
            packed.shape[1:],
            packed.dtype,
        )
        for number in range(packed.shape[0])
    ]
