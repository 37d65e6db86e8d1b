"""Device memory under a budget: what is in use is on the device, the rest waits on the host. See docs/paging.md."""

from __future__ import annotations

from qlora_rs.paging.activations import saved_activations
from qlora_rs.paging.weights import PagedWeights, page_weights
from qlora_rs.pool import PagedBuffer, PagedPool, PoolStats

__all__ = ["PagedBuffer", "PagedPool", "PagedWeights", "PoolStats", "page_weights", "saved_activations"]
