"""Device memory under a budget: what is in use is on the device, the rest waits on the host. See docs/paging.md."""

from __future__ import annotations

from qlora_rs.paging.activations import saved_activations
from qlora_rs.paging.fit import Fitted, fit
from qlora_rs.paging.plan import Part, Plan
from qlora_rs.paging.weights import PagedWeights, page_weights
from qlora_rs.pool import PagedBuffer, PagedPool, PoolStats, Span

__all__ = [
    "Fitted",
    "PagedBuffer",
    "PagedPool",
    "PagedWeights",
    "Part",
    "Plan",
    "PoolStats",
    "Span",
    "fit",
    "page_weights",
    "saved_activations",
]
