"""The optimizers by the names that people know; ``Paged...`` ones keep their state in a `qlora_rs.paging.PagedPool`."""

from __future__ import annotations

from typing import Any

from qlora_rs.optim import rules
from qlora_rs.optim.base import StateOptimizer
from qlora_rs.optim.paged import PagedOptimizer


def _check(lr: Any, weight_decay: float, betas: tuple[float, ...] = (), eps: float = 0.0, count: int = 2) -> None:
    if not float(lr) >= 0:
        raise ValueError(f"lr must not be negative, got {lr}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if betas and len(betas) != count:
        raise ValueError(f"betas are {count} numbers, got {betas}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be at least 0 and below 1, got {betas}")


class AdamW(StateOptimizer):
    """AdamW with float32 state, as ``torch.optim.AdamW`` (Loshchilov and Hutter, 2019).

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate.
        betas: decay of the first and the second moment.
        eps: added to the denominator.
        weight_decay: decoupled, applied before the update.
        maximize: go up instead of down.
        max_grad_norm: clip gradients to this global norm, over all groups, without changing ``.grad``; afterwards
            ``grad_norm`` is the norm that was found. None: no clipping.
        more: ``capturable=True`` counts steps on the parameters' CUDA device and makes factors there, so that a step
            can be captured into a graph; ``lr`` may then be a tensor of that device, whose value each replay takes.

    Raises:
        ValueError: an option outside its range.
    """

    rule = rules.ADAMW

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        **more: Any,
    ) -> None:
        _check(lr, weight_decay, betas, eps)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, max_grad_norm=max_grad_norm, **more)


class AdamW8bit(AdamW):
    """AdamW with 8-bit state: 65/64 bytes an element and moment (Dettmers et al., 2022).

    Args:
        params: as the rest, see `AdamW`.
        min_8bit_size: tensors with fewer elements keep float32 state; 4096 unless given.
    """

    bits = 8


class PagedAdamW32bit(PagedOptimizer, AdamW):
    """`AdamW` whose state is paged; takes ``pool`` or ``budget`` beside its options."""


class PagedAdamW8bit(PagedOptimizer, AdamW8bit):
    """`AdamW8bit` whose state is paged; takes ``pool`` or ``budget`` beside its options."""


class Lion(StateOptimizer):
    """Lion with float32 state: moves by the sign of an interpolated moment (Chen et al., 2023).

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate, about a tenth of AdamW's.
        betas: of the interpolation and of the moment.
        weight_decay: decoupled, applied before the update; about ten times AdamW's.
        maximize: go up instead of down.
        max_grad_norm: as `AdamW`'s; ``capturable`` too.

    Raises:
        ValueError: an option outside its range.
    """

    rule = rules.LION

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        **more: Any,
    ) -> None:
        _check(lr, weight_decay, betas)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, max_grad_norm=max_grad_norm, **more)


class Lion8bit(Lion):
    """`Lion` with 8-bit state; takes ``min_8bit_size`` as `AdamW8bit` does."""

    bits = 8


class PagedLion32bit(PagedOptimizer, Lion):
    """`Lion` whose state is paged; takes ``pool`` or ``budget`` beside its options."""


class PagedLion8bit(PagedOptimizer, Lion8bit):
    """`Lion8bit` whose state is paged; takes ``pool`` or ``budget`` beside its options."""


class AdEMAMix(StateOptimizer):
    """AdEMAMix with float32 state: AdamW with a second, slower first moment (Pagliardini et al., 2024).

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate.
        betas: decay of the fast first moment, the second moment, and the slow first moment.
        alpha: weight of the slow moment.
        t_alpha: steps over which alpha grows from 0; None: at once.
        t_beta3: steps over which the third beta grows from the first; None: at once.
        eps: added to the denominator.
        weight_decay: decoupled, applied before the update.
        maximize: go up instead of down.
        max_grad_norm: as `AdamW`'s; ``capturable`` too.

    Raises:
        ValueError: an option outside its range.
    """

    rule = rules.ADEMAMIX

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        **more: Any,
    ) -> None:
        _check(lr, weight_decay, betas, eps, 3)
        defaults = {"lr": lr, "betas": betas, "alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3}
        defaults |= {"eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, max_grad_norm=max_grad_norm, **more)


class AdEMAMix8bit(AdEMAMix):
    """`AdEMAMix` with 8-bit state; takes ``min_8bit_size`` as `AdamW8bit` does."""

    bits = 8


class PagedAdEMAMix32bit(PagedOptimizer, AdEMAMix):
    """`AdEMAMix` whose state is paged; takes ``pool`` or ``budget`` beside its options."""


class PagedAdEMAMix8bit(PagedOptimizer, AdEMAMix8bit):
    """`AdEMAMix8bit` whose state is paged; takes ``pool`` or ``budget`` beside its options."""


class SGD(StateOptimizer):
    """Gradient descent with momentum, as ``torch.optim.SGD``; float32 state.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate.
        momentum: 0 keeps no state.
        dampening: of the gradient as it enters the momentum.
        weight_decay: added to the gradient, as torch does here.
        nesterov: look ahead along the momentum.
        maximize: go up instead of down.
        max_grad_norm: as `AdamW`'s; ``capturable`` too.

    Raises:
        ValueError: an option outside its range.
    """

    rule = rules.SGD

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        **more: Any,
    ) -> None:
        _check(lr, weight_decay)
        if not momentum >= 0:
            raise ValueError(f"momentum must not be negative, got {momentum}")
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError("nesterov needs momentum, and no dampening")
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        defaults |= {"nesterov": nesterov, "maximize": maximize}
        super().__init__(params, defaults, max_grad_norm=max_grad_norm, **more)


class SGD8bit(SGD):
    """`SGD` with 8-bit momentum; takes ``min_8bit_size`` as `AdamW8bit` does."""

    bits = 8
