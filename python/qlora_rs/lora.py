"""LoRA adapters over frozen Linear layers: the layer, its autograd function, and how it is attached to a model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_of_torch

from qlora_rs import ops, transformed_product
from qlora_rs.experts import PackedExperts
from qlora_rs.linear import Linear4bit
from qlora_rs.selection import matches, select_linear

ALL_LINEAR = "all-linear"


class LoraTerm(torch.autograd.Function):
    """``s x A^T B^T`` that keeps only x, A and B; ``x A^T`` is made again in the backward pass (r columns: cheap)."""

    @staticmethod
    def forward(x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """x (..., in), a (r, in), b (out, r) -> (..., out) in x's dtype."""
        inner = x @ a.to(x.dtype).T
        return (inner * scaling) @ b.to(x.dtype).T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the inputs."""
        x, a, b, ctx.scaling = inputs
        ctx.save_for_backward(x, a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x in its dtype, of A and B in theirs (float32)."""
        x, a, b = ctx.saved_tensors
        need_x, need_a, need_b, _ = ctx.needs_input_grad
        grad_x = grad_a = grad_b = None
        grad_inner = (grad @ b.to(grad.dtype)) * ctx.scaling  # (..., r)
        if need_x:
            grad_x = grad_inner @ a.to(grad.dtype)
        if need_a:
            grad_a = (_rows(grad_inner).T @ _rows(x)).to(a.dtype)
        if need_b:
            inner = (x @ a.to(x.dtype).T) * ctx.scaling
            grad_b = (_rows(grad).T @ _rows(inner)).to(b.dtype)
        return grad_x, grad_a, grad_b, None


class TransformedLoraTerm(LoraTerm):
    """The same for forward-mode gradients and `torch.func`; a compiler takes no function that can do more."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the inputs, for slopes too."""
        LoraTerm.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def jvp(
        ctx: Any, x_slope: Tensor | None, a_slope: Tensor | None, b_slope: Tensor | None, *_: object
    ) -> Tensor | None:
        """The slope of the term along those of x, A and B."""
        x, a, b = ctx.saved_tensors
        moved = ((x_slope, a, b), (x, a_slope, b), (x, a, b_slope))
        terms = [
            TransformedLoraTerm.apply(*each, ctx.scaling) for each in moved if all(part is not None for part in each)
        ]
        return sum(terms[1:], terms[0]) if terms else None


def _rows(x: Tensor) -> Tensor:
    """(..., n) -> (product, n); a vector is one row."""
    return x.flatten(0, -2) if x.ndim > 1 else x[None]


def _is_bare(layer: nn.Module) -> TypeGuard[Linear4bit]:
    """Is this a packed layer whose call does nothing but its own forward, so that a kernel may stand in for it?

    Hooks capture activations, gather shards or bring offloaded weights; they have to run.
    """
    return (
        type(layer) is Linear4bit
        and "forward" not in layer.__dict__  # accelerate puts its own there
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and not (module_of_torch._global_forward_hooks or module_of_torch._global_forward_pre_hooks)
    )


class LoraLinear(nn.Module):
    """``y = x W^T + b + (alpha / r) dropout(x) A^T B^T``, W frozen, A (r, in) and B (out, r) trained in float32.

    A starts Kaiming-uniform and B zero, so that the adapter begins as the identity; with ``use_rslora`` the factor
    is ``alpha / sqrt(r)``. A and B are cast to the base's output dtype for the product.

    Source: Hu et al., LoRA, 2021; Kalajdzievski, rsLoRA, 2023.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_hyperparameters(r, lora_alpha, lora_dropout)
        self.base_layer = base_layer
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        self.enabled = True
        device = getattr(base_layer, "compute_device", base_layer.weight.device)
        self.lora_A = nn.Parameter(torch.empty(r, base_layer.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, r, dtype=torch.float32, device=device))
        if generator is None or device.type == "meta":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            drawn = torch.empty(self.lora_A.shape, device=generator.device)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            self.lora_A.data.copy_(drawn)

    @property
    def scaling(self) -> float:
        """The factor before ``B A``."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def in_features(self) -> int:
        """Columns of W and of A."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Rows of W and of B."""
        return self.base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """The base's weight: code that looks at a Linear's weight (its device, say) finds it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base_layer.bias

    def delta(self) -> Tensor:
        """``(alpha / r) B A`` in float32, shape (out, in): what merging adds to W."""
        return (self.lora_B.detach() @ self.lora_A.detach()) * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        dropped = self.lora_dropout > 0 and self.training
        if self.enabled and not dropped and _is_bare(self.base_layer):
            fused = self.base_layer.fused_with_adapter(x, self.lora_A, self.lora_B, self.scaling)
            if fused is not None:
                return fused
        if not self.enabled:
            y: Tensor = self.base_layer(x)
            return y
        term_input = ops.autocasted(x)
        if dropped:
            term_input = nn.functional.dropout(term_input, self.lora_dropout)
        # Before the base, which saves nothing on a device: a recomputation ends with the last tensor that is saved, and
        # so need not make a block's last product again.
        rule = TransformedLoraTerm if transformed_product.is_wanted(slopes=True) else LoraTerm
        term: Tensor = rule.apply(term_input, self.lora_A, self.lora_B, self.scaling)
        y = self.base_layer(x)
        return y + term.to(y.dtype)

    def extra_repr(self) -> str:
        """``r=16, lora_alpha=32, lora_dropout=0.0, use_rslora=False``."""
        return (
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, use_rslora={self.use_rslora}"
        )


@dataclass(frozen=True)
class AttachReport:
    """What `attach_lora` did.

    Attributes:
        attached: names of the layers that got an adapter.
        skipped: (name, reason) of Linear layers that got none.
        trainable_parameters: elements of all A and B.
        total_parameters: elements of the model, packed weights counted at their logical size.
    """

    attached: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    trainable_parameters: int
    total_parameters: int

    @classmethod
    def of(cls, model: nn.Module, skipped: Sequence[tuple[str, str]] = ()) -> AttachReport:
        """Count what is on ``model`` now."""
        trainable = sum(p.numel() for p in lora_parameters(model))
        return cls(tuple(lora_modules(model)), tuple(skipped), trainable, _logical_parameters(model))

    def __str__(self) -> str:
        """``LoRA on 210 layers: 4,884,480 of 139,399,488 parameters train (3.50 %); 1 Linear layer left: ...``."""
        share = 100 * self.trainable_parameters / max(1, self.total_parameters)
        text = (
            f"LoRA on {len(self.attached)} layers: {self.trainable_parameters:,} of {self.total_parameters:,} "
            f"parameters train ({share:.2f} %)"
        )
        if self.skipped:
            shown = ", ".join(f"{name} ({reason})" for name, reason in self.skipped[:3])
            more = f" and {len(self.skipped) - 3} more" if len(self.skipped) > 3 else ""
            layers = "Linear layer" if len(self.skipped) == 1 else "Linear layers"
            text += f"; {len(self.skipped)} {layers} left: {shown}{more}"
        return text


def attach_lora(
    model: nn.Module,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    use_rslora: bool = False,
    *,
    seed: int | None = None,
) -> AttachReport:
    """Put a LoRA adapter on Linear layers of ``model``, in place, and freeze everything else.

    Args:
        model: any module; packed (`Linear4bit`) and float Linear layers both take adapters.
        r: rank.
        lora_alpha: the adapter is scaled by ``lora_alpha / r`` (``/ sqrt(r)`` with ``use_rslora``).
        lora_dropout: dropout of the adapter's input while training.
        target_modules: ``"all-linear"`` (every Linear layer but output heads, routers and experts, of which there are
            thousands); another string is a regular expression that must match a layer's full name; a list holds full
            names, last components or globs.
        use_rslora: rank-stabilized scaling.
        seed: draws every A from this seed alone; by default from torch's global generator.

    Raises:
        ValueError: arguments out of range, a target that matches no Linear layer, or a model that already has adapters.

    Source: names and meanings are those of PEFT's ``LoraConfig``.
    """
    _check_hyperparameters(r, lora_alpha, lora_dropout)
    if lora_modules(model):
        raise ValueError("the model already has adapters; merge them or load a fresh model")
    chosen, skipped = _targets(model, target_modules)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return attach_to(model, chosen, r, lora_alpha, lora_dropout, use_rslora, skipped=skipped, generator=generator)


def attach_to(
    model: nn.Module,
    names: Sequence[str],
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    use_rslora: bool,
    *,
    skipped: Sequence[tuple[str, str]] = (),
    generator: torch.Generator | None = None,
) -> AttachReport:
    """Put an adapter on exactly the Linear layers ``names`` and freeze everything else."""
    model.requires_grad_(False)
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        layer = LoraLinear(base, r, lora_alpha, lora_dropout, use_rslora, generator=generator)
        replace_module(model, name, layer.train(base.training))
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if hasattr(quantizer, "has_adapters"):
        quantizer.has_adapters = True  # transformers' Trainer refuses a packed model that has none
    return AttachReport.of(model, skipped)


def lora_modules(model: nn.Module) -> dict[str, LoraLinear]:
    """Every adapter layer by its name in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapter, in the model's order: what the optimizer trains."""
    return [p for layer in lora_modules(model).values() for p in (layer.lora_A, layer.lora_B)]


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes as if it had no adapters."""
    layers = [layer for layer in lora_modules(model).values() if layer.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _targets(model: nn.Module, target_modules: str | Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if isinstance(target_modules, str) and target_modules == ALL_LINEAR:
        reasons = dict(select_linear(model).skipped)
        experts = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PackedExperts))
        of_experts = {name for name in linears if name.startswith(experts)}
        reasons |= dict.fromkeys(of_experts, "an expert's; target_modules may name it")
        packed = {name for name in linears if isinstance(model.get_submodule(name), Linear4bit)} - of_experts
        chosen = [name for name in linears if name in packed or name not in reasons]
        if not chosen:
            raise ValueError("the model has no Linear layer that could take an adapter")
        return chosen, [(name, reasons[name]) for name in linears if name not in chosen]
    if isinstance(target_modules, str):
        pattern = re.compile(target_modules)
        chosen = [name for name in linears if pattern.fullmatch(name)]
        unmatched = [] if chosen else [target_modules]
    else:
        chosen = [name for name in linears if any(matches(name, target) for target in target_modules)]
        unmatched = [t for t in target_modules if not any(matches(name, t) for name in linears)]
        if not target_modules:
            raise ValueError("target_modules is empty; name layers, or use 'all-linear'")
    if unmatched:
        known = sorted({name.rpartition(".")[2] for name in linears})
        raise ValueError(
            f"target_modules: {', '.join(map(repr, unmatched))} matches no Linear layer; "
            f"the last components here are {', '.join(known) or 'none'}"
        )
    return chosen, [(name, "not in target_modules") for name in linears if name not in chosen]


def _check_hyperparameters(r: int, lora_alpha: float, lora_dropout: float) -> None:
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r is a positive integer; got {r!r}")
    if not lora_alpha > 0 or math.isinf(lora_alpha):
        raise ValueError(f"lora_alpha is positive and finite; got {lora_alpha!r}")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout lies in [0, 1); got {lora_dropout!r}")


def _logical_parameters(model: nn.Module) -> int:
    packed = [module for module in model.modules() if isinstance(module, Linear4bit)]
    held = {id(p) for module in packed for p in module.parameters(recurse=False) if not p.is_floating_point()}
    plain = sum(p.numel() for p in model.parameters() if id(p) not in held)
    return plain + sum(module.in_features * module.out_features for module in packed)
