"""Mixtures of experts: the fused 3-D weights of transformers' expert modules as packed Linear layers of each expert."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_rs.linear import Linear4bit
from qlora_rs.packed import PackedShapes, PackedTensor
from qlora_rs.quantization import quantize
from qlora_rs.spec import QuantSpec

GATE_UP, DOWN = "gate_up_proj", "down_proj"
FUSED = (GATE_UP, DOWN)
BIASES = {name: f"{name}_bias" for name in FUSED}

# Classes of transformers that compute every expert on an input of its own, and tell nothing of their layout: their
# weights are transposed, gated and without biases.
_WITH_OWN_INPUTS = frozenset(["Llama4TextExperts"])


def is_experts(module: nn.Module) -> bool:
    """Whether this is a module of fused experts as transformers 5 writes them."""
    told = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
    return told or has_own_inputs(module)


def has_own_inputs(module: nn.Module) -> bool:
    """Whether each expert gets inputs of its own, one after another, as in Llama 4."""
    return type(module).__name__ in _WITH_OWN_INPUTS and type(module).__module__.startswith("transformers.")


def is_transposed(fused: nn.Module) -> bool:
    """Whether transformers' module holds each expert's matrix as (in, out)."""
    return has_own_inputs(fused) or bool(getattr(fused, "is_transposed", False))


def has_biases(fused: nn.Module) -> bool:
    """Whether the layers of transformers' module have biases, (experts, out)."""
    return bool(getattr(fused, "has_bias", False))


def logical_shape(fused: nn.Module, parameter: str) -> tuple[int, int, int]:
    """(experts, out, in) of a fused weight, however it is laid out."""
    experts, rows, columns = fused.get_parameter(parameter).shape
    return (experts, columns, rows) if is_transposed(fused) else (experts, rows, columns)


def why_not_packed(module: nn.Module) -> str | None:
    """Why fused experts cannot be computed from packed weights; None where they can."""
    kind = type(module).__name__
    if not is_experts(module):
        return f"{kind}: fused experts are no Linear layers; --include packs them"
    parameters = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    wanted = {"has_gate": True, "has_post_expert_norm": False}
    differing = [f"{name} {not value}" for name, value in wanted.items() if getattr(module, name, value) is not value]
    expected = dict.fromkeys(FUSED, 3) | (dict.fromkeys(BIASES.values(), 2) if has_biases(module) else {})
    if {name: len(shape) for name, shape in parameters.items()} != expected:
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
            that of down; each (out, in), whether or not transformers holds its matrix so.

    Source: the eager forward of transformers' experts (``transformers.integrations.moe``), to the order of its sums.
    """

    def __init__(self, fused: nn.Module, experts: Sequence[Mapping[str, nn.Linear]]) -> None:
        super().__init__()
        *inner, down = experts[0]
        self.inner, self.down = tuple(inner), down
        self.transposed = is_transposed(fused)
        emptied = copy.copy(fused)
        emptied._parameters = {}
        # Not a member: it has no weights, and its name would be one of an expert.
        self.__dict__["_rule"] = emptied
        for layers in experts:
            self.append(nn.ModuleDict(layers))

    @staticmethod
    def of(fused: nn.Module, experts: Sequence[Mapping[str, nn.Linear]]) -> PackedExperts:
        """The class that computes as ``fused`` does; arguments as of the class."""
        return (OwnInputExperts if has_own_inputs(fused) else PackedExperts)(fused, experts).train(fused.training)

    @classmethod
    def from_float(cls, fused: nn.Module, spec: QuantSpec | None = None) -> PackedExperts:
        """Quantize transformers' module, expert by expert; it gives its weights up.

        Raises:
            NonFiniteError: a weight holds NaN or Inf.
        """
        count = fused.get_parameter(DOWN).shape[0]
        biases = BIASES if has_biases(fused) else {}

        def layer(name: str, number: int) -> Linear4bit:
            weight = fused.get_parameter(name)[number]
            bias = fused.get_parameter(biases[name])[number].detach().clone() if biases else None
            return Linear4bit.from_packed(quantize(weight.T if is_transposed(fused) else weight, spec), bias)

        return cls.of(fused, [{name: layer(name, number) for name in FUSED} for number in range(count)])

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
        y: Tensor = expert[self.down](self._gate(inner[0] if len(inner) == 1 else torch.cat(inner, -1)))
        return y

    def _gate(self, gate_up: Tensor) -> Tensor:
        rule: Any = self._rule
        gated: Tensor = rule._apply_gate(gate_up)
        return gated

    def fused(self, weight: Callable[[Any], Tensor]) -> nn.Module:
        """transformers' module again, of the weights that ``weight`` gives for each layer, and the layers' biases."""
        restored: nn.Module = copy.copy(self.__dict__["_rule"])
        restored._parameters = {}
        biased = has_biases(restored)
        for name, parts in ((GATE_UP, self.inner), (DOWN, (self.down,))):
            matrices = (torch.cat([weight(expert[part]) for part in parts]) for expert in self._members())
            stack = torch.stack([matrix.T if self.transposed else matrix for matrix in matrices])
            restored.register_parameter(name, nn.Parameter(stack, requires_grad=False))
            if biased:
                biases = [torch.cat([expert[part].bias for part in parts]) for expert in self._members()]
                restored.register_parameter(
                    BIASES[name], nn.Parameter(torch.stack(biases).detach(), requires_grad=False)
                )
        return restored.train(self.training)

    def _members(self) -> list[Any]:
        return list(self)


class OwnInputExperts(PackedExperts):
    """``down_e(up_e(x_e) act(gate_e(x_e)))`` of every expert e, on inputs x_e of its own, as Llama 4 has them.

    A token that did not choose an expert comes to it as zeros (its score, by which inputs are multiplied, is 0), and
    goes as zeros; so do the gradients. Only the other rows are computed.

    Source: ``Llama4TextExperts`` in transformers, to the order of its sums.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """x (experts * tokens, hidden), expert by expert -> the same shape."""
        with torch.no_grad():
            given = (hidden_states != 0).any(-1).view(len(self), -1)
            rows = given.flatten().nonzero()[:, 0]
            counts = given.sum(-1).tolist()
        result, start = torch.zeros_like(hidden_states), 0
        for expert, count in zip(self, counts, strict=True):
            if count:
                places = rows[start : start + count]
                result.index_add_(0, places, self._expert(expert, hidden_states[places]).to(result.dtype))
            start += count
        return result

    def _gate(self, gate_up: Tensor) -> Tensor:
        rule: Any = self._rule
        gate, up = gate_up.chunk(2, -1)
        gated: Tensor = up * rule.act_fn(gate)
        return gated


def quantize_transposed(stack: Tensor, spec: QuantSpec | None = None) -> PackedTensor:
    """Quantize float matrices (..., in, out) as (..., out, in), one at a time: no transposed copy of them all is made.

    Raises:
        NonFiniteError: as `quantize`, with the flat index in the transposed matrix.
    """
    *lead, columns, rows = stack.shape
    matrices = stack.reshape(-1, columns, rows) if stack.numel() else stack[:0]
    packed = [quantize(matrix.T, spec) for matrix in matrices]
    if not packed:
        return quantize(stack.mT, spec)
    shape, spec = (*lead, rows, columns), packed[0].spec
    shapes = PackedShapes.of(shape, spec)
    return PackedTensor(
        codes=torch.stack([each.codes for each in packed]).view(shapes.codes),
        absmax=torch.stack([each.absmax for each in packed]).view(shapes.absmax),
        absmax_scale=_stacked([each.absmax_scale for each in packed], shapes.absmax_scale),
        absmax_offset=_stacked([each.absmax_offset for each in packed], shapes.absmax_offset),
        spec=spec,
        shape=shape,
        dtype=stack.dtype,
    )


def _stacked(parts: Sequence[Tensor | None], shape: tuple[int, ...]) -> Tensor | None:
    held = [part for part in parts if part is not None]
    return torch.stack(held).view(shape) if held else None


def split_experts(packed: PackedTensor) -> list[PackedTensor]:
    """The matrices of a packed weight (experts, out, in), each in memory of its own.

    Raises:
        ValueError: it is flat, so that experts share blocks or scales, or is no stack of matrices.
    """
    if packed.flat or len(packed.shape) != 3:
        raise ValueError("not a stack of matrices with blocks and scales of their own")
    return [_clone(expert_of(packed, number)) for number in range(packed.shape[0])]


def expert_of(packed: PackedTensor, number: int) -> PackedTensor:
    """One matrix of a packed weight (experts, out, in) that is packed by rows; views of its memory."""
    scale, offset = packed.absmax_scale, packed.absmax_offset
    return PackedTensor(
        packed.codes[number],
        packed.absmax[number],
        None if scale is None else scale[number],
        None if offset is None else offset[number : number + 1],
        packed.spec,
        packed.shape[1:],
        packed.dtype,
    )


def _clone(packed: PackedTensor) -> PackedTensor:
    scale, offset = packed.absmax_scale, packed.absmax_offset
    return replace(
        packed,
        codes=packed.codes.clone(),
        absmax=packed.absmax.clone(),
        absmax_scale=None if scale is None else scale.clone(),
        absmax_offset=None if offset is None else offset.clone(),
    )
