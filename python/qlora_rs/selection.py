"""Which Linear layers of a model are packed, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

# Components of names that output heads carry: their error goes straight into the result.
HEADS = frozenset(["lm_head", "embed_out", "proj_out", "score", "classifier", "classification_head", "qa_outputs"])
# Routers of mixtures of experts: small, and a wrong choice of expert costs more than any rounding.
ROUTERS = frozenset(["router", "gate", "shared_expert_gate"])


@dataclass(frozen=True)
class Selection:
    """What happens to each Linear layer, in the model's order.

    Attributes:
        packed: names of the layers to pack.
        skipped: (name, reason) of the others.
    """

    packed: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` is the full name, its last component, or a glob over the full name.

    >>> [matches("layers.0.mlp.up_proj", pattern) for pattern in ("up_proj", "*.0.mlp.*", "mlp")]
    [True, True, False]
    """
    return pattern == name or pattern == name.rpartition(".")[2] or fnmatchcase(name, pattern)


def select_linear(
    model: nn.Module, *, skip_modules: Sequence[str] | None = None, include: Sequence[str] | None = None
) -> Selection:
    """Decide for every ``nn.Linear`` of ``model``: by default all but output heads and routers.

    Args:
        model: any module; parameters may be on the meta device.
        skip_modules: patterns (see `matches`) of layers that stay besides the defaults; they win over ``include``.
        include: patterns of layers that are packed although the defaults would leave them.

    Raises:
        ValueError: a pattern matches no Linear layer.
    """
    skip, wanted = tuple(skip_modules or ()), tuple(include or ())
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for option, patterns in (("skip_modules", skip), ("include", wanted)):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in linears):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "none"
                raise ValueError(f"{option}: {pattern!r} matches no Linear layer; the last components here are {known}")
    reason_of = _default_reasons(model)
    packed: list[str] = []
    skipped: list[tuple[str, str]] = []
    for name in linears:
        by = next((pattern for pattern in skip if matches(name, pattern)), None)
        reason = f"matches the skip pattern {by!r}" if by is not None else None
        if reason is None and not any(matches(name, pattern) for pattern in wanted):
            reason = reason_of(name)
        if reason is None:
            packed.append(name)
        else:
            skipped.append((name, reason))
    return Selection(tuple(packed), tuple(skipped))


def _default_reasons(model: nn.Module) -> Callable[[str], str | None]:
    """Why a layer stays by default, or None."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    strict = getattr(model, "_keep_in_fp32_modules", None) or ()
    kept = {*strict, *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}

    def reason(name: str) -> str | None:
        parts = name.split(".")
        if HEADS.intersection(parts) or (output is not None and model.get_submodule(name) is output):
            return "output head"
        if parts[-1] in ROUTERS:
            return "router of a mixture of experts"
        if kept.intersection(parts):
            return "its model asks for float32 here"
        return None

    return reason
