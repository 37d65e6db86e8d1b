"""Torch's memory on a CUDA device, taken from where the paged pools of that device can give frames back for it."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

import torch
from torch.cuda.memory import CUDAPluggableAllocator, MemPool, use_mem_pool

from qlora_rs import _core
from qlora_rs.errors import UnsupportedError


class _Sharing:
    """Of one device: a pool of torch's, whose memory our two C functions take from the device and free."""

    def __init__(self, device: int) -> None:
        self.device = device
        # NOTE: torch refers to it from every segment, and does not keep it alive.
        self.allocator = CUDAPluggableAllocator(_core.__file__, "qlora_rs_alloc", "qlora_rs_free")
        self.lock = threading.Lock()
        self.entered = 0
        self.pool: MemPool | None = None

    def enter(self) -> None:
        with self.lock:
            if self.entered == 0:
                # What torch caches elsewhere would stay there.
                torch.cuda.empty_cache()
                self.pool = self._begin()
            self.entered += 1

    def leave(self) -> None:
        with self.lock:
            self.entered -= 1
            if self.entered == 0 and self.pool is not None:
                self._end(self.pool)
                self.pool = None  # which frees what no tensor uses

    def release_cached(self) -> None:
        """Torch frees the segments of its pool only with the pool, so another takes its place.

        What other threads allocate in between comes from torch's usual memory, which harms nobody.
        """
        with self.lock:
            if self.pool is not None and not torch.cuda.is_current_stream_capturing():
                self._end(self.pool)
                self.pool = None
                torch.cuda.empty_cache()
                self.pool = self._begin()

    def new_pool(self) -> MemPool:
        with torch.cuda.device(self.device):
            return MemPool(self.allocator.allocator())

    # On all threads, that of backward included; `use_mem_pool` covers the calling one only.

    def _begin(self) -> MemPool:
        pool = self.new_pool()
        torch._C._cuda_beginAllocateToPool(self.device, pool.id)
        return pool

    def _end(self, pool: MemPool) -> None:
        torch._C._cuda_endAllocateToPool(self.device, pool.id)
        torch._C._cuda_releasePool(self.device, pool.id)


_sharing: dict[int, _Sharing] = {}
_making = threading.Lock()


@contextlib.contextmanager
def shared(device: int) -> Iterator[None]:
    """Torch's memory on this device comes from where pools can give way, for the length of a ``with`` block.

    Raises:
        UnsupportedError: torch is older than 2.8.
    """
    sharing = _sharing_of(device)
    if not hasattr(torch._C, "_cuda_beginAllocateToPool"):
        with use_mem_pool(sharing.new_pool(), device):
            yield
        return
    sharing.enter()
    try:
        yield
    finally:
        sharing.leave()


def release_cached(device: int) -> None:
    """Where memory is shared, torch gives back what it only caches."""
    sharing = _sharing.get(device)
    if sharing is not None:
        sharing.release_cached()


def _sharing_of(device: int) -> _Sharing:
    if hasattr(torch._C, "_MemPoolContext"):
        # There a thread's own context, not the memory's pool, says who frees it.
        raise UnsupportedError(f"sharing memory with torch needs torch 2.8 or newer, this is {torch.__version__}")
    with _making:
        if device not in _sharing:
            _warn_of_graphs(device)
            _sharing[device] = _Sharing(device)
        return _sharing[device]


def _warn_of_graphs(device: int) -> None:
    """A graph must get memory of its own: of two pools that are begun, the one begun last has to serve."""
    if not hasattr(torch._C, "_cuda_beginAllocateToPool"):
        return
    with torch.cuda.device(device):
        outer, inner = MemPool(), MemPool()
        for pool in (outer, inner):
            torch._C._cuda_beginAllocateToPool(device, pool.id)
        torch.empty(1, device=torch.device("cuda", device))
        served = bool(torch.cuda.memory_snapshot(inner.id))
        for pool in (inner, outer):
            torch._C._cuda_endAllocateToPool(device, pool.id)
            torch._C._cuda_releasePool(device, pool.id)
    if not served:
        warnings.warn(
            f"with torch {torch.__version__} a CUDA graph that is captured while memory is shared would not keep its "
            "memory for itself: capture graphs outside of sharing_with_torch()",
            stacklevel=5,
        )
