"""The optimizer of a run, and what a saved state of it looks like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qlora_rs._core import STATE_BLOCK_SIZE
from qlora_rs.optim import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
from qlora_rs.optim.base import StateOptimizer
from qlora_rs.optim.rules import ADAMW
from qlora_rs.pool import PagedPool

OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit")
_MOMENTS = tuple(kind.name for kind in ADAMW.states)


def make_optimizer(
    name: str, parameters: Sequence[nn.Parameter], lr: float, weight_decay: float, pool: PagedPool | None
) -> torch.optim.Optimizer:
    """The optimizer called ``name``.

    Args:
        name: one of `OPTIMIZERS`.
        parameters: what it trains.
        lr, weight_decay: its options.
        pool: where a paged one keeps its state; by default a pool of its own.
    """
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if name == "adamw":
        # One pass over all tensors: a loop in Python over hundreds of small ones would take as long as a layer.
        return torch.optim.AdamW(parameters, fused=True, **options)
    if name == "adamw8bit":
        return AdamW8bit(parameters, **options)
    if pool is None:
        pool = _pool_for(parameters, name)
    paged: type[PagedAdamW8bit | PagedAdamW32bit] = PagedAdamW8bit if name == "paged_adamw8bit" else PagedAdamW32bit
    return paged(parameters, pool=pool, **options)


def _pool_for(parameters: Sequence[nn.Parameter], name: str) -> PagedPool:
    """Two pages: without a budget there is nothing to share, and state is fetched while other state is used."""
    device = parameters[0].device if parameters else torch.device("cpu")
    page = 2 << 20 if name.endswith("8bit") else 8 << 20
    return PagedPool(2 * page, device, page_size=page)


def state_shapes(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Size]:
    """Names and shapes of the state that a step leaves for a parameter."""
    shapes = {"step": torch.Size(), **dict.fromkeys(_MOMENTS, parameter.shape)}
    if not isinstance(optimizer, StateOptimizer) or optimizer.bits != 8:
        return shapes
    if parameter.numel() >= optimizer.min_8bit_size:
        shapes |= {f"{name}_absmax": torch.Size([-(-parameter.numel() // STATE_BLOCK_SIZE)]) for name in _MOMENTS}
    return shapes
