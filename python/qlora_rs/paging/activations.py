"""Tensors that autograd saves for the backward pass, in a pool meanwhile."""

from __future__ import annotations

import heapq
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from qlora_rs.pool import PagedBuffer, PagedPool
from qlora_rs.report import parse_bytes


@contextmanager
def saved_activations(pool: PagedPool, min_bytes: int | str = "1MiB") -> Iterator[None]:
    """Within the context, what autograd saves for the backward pass waits in a pool until it is needed.

    Made for gradient checkpointing (not the reentrant one), which saves the input of each layer: the forward pass
    writes them one after the other, the backward pass reads them in the reverse order, once, and what has been read is
    forgotten, never written back. Buffers are used again in the same order at each step, so that the pool learns it.
    Values are copied, so all bits stay the same. The backward pass may be inside or outside of the context.

    Left alone are parameters, small tensors, those that are not contiguous, and those of other devices than the pool's.

    Args:
        pool: where they go; weights and optimizer state may share it.
        min_bytes: smaller tensors are left alone, as each takes whole pages.

    Raises:
        PageError: a tensor has more pages than the pool's budget (from the operation that saves it).

    >>> import torch
    >>> from qlora_rs.paging import PagedPool
    >>> from torch.utils.checkpoint import checkpoint
    >>> pool = PagedPool("64KiB", page_size=4096)
    >>> layers = [torch.nn.Linear(64, 64) for _ in range(9)]
    >>> x = torch.ones(64, 64, requires_grad=True)  # 16 KiB: four of the nine inputs fit
    >>> with saved_activations(pool, min_bytes="4KiB"):
    ...     y = x
    ...     for layer in layers:
    ...         y = checkpoint(torch.nn.Sequential(layer, torch.nn.Tanh()), y, use_reentrant=False)
    >>> y.sum().backward()
    >>> pool.stats().buffers, pool.stats().resident_bytes
    (9, 0)
    """
    # Beside the pool's own fields, so that both go together, and the next step finds the buffers of this one.
    shelf: _Shelf = vars(pool).setdefault("_saved_activations", _Shelf(pool))
    least = max(1, parse_bytes(min_bytes))

    def pack(tensor: Tensor) -> Tensor | _Saved:
        return shelf.save(tensor) if tensor.nbytes >= least and shelf.takes(tensor) else tensor

    def unpack(saved: Tensor | _Saved) -> Tensor:
        return saved.load() if isinstance(saved, _Saved) else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Shelf:
    """Buffers of a pool that hold saved tensors, or wait for the next ones."""

    def __init__(self, pool: PagedPool) -> None:
        self._pool = weakref.ref(pool)
        self._device = pool.device
        self._lock = threading.Lock()
        self._buffers: list[PagedBuffer] = []
        # By size: numbers of buffers that hold nothing. The lowest comes first, so that a step like the last one meets
        # the same buffers whatever the order in which they became free.
        self._free: dict[int, list[int]] = {}
        # What was given up since. Only appended to: it happens wherever Python frees an object.
        self._given_up: deque[int] = deque()
        # One tensor may be saved for several operations (a layer's input for each of its projections).
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def takes(self, tensor: Tensor) -> bool:
        """Is this a tensor that may go?"""
        return (
            type(tensor) is Tensor
            and tensor.device == self._device
            and tensor.layout == torch.strided
            and tensor.is_contiguous()
            and not isinstance(tensor._base, nn.Parameter)
        )

    def save(self, tensor: Tensor) -> _Saved:
        """Copy a tensor into a buffer."""
        known, version = self._known.get(tensor, (lambda: None, None))
        saved: _Saved | None = known()
        if saved is None or version != tensor._version:
            saved = _Saved(self, self._take(tensor.nbytes), tensor)
            self._known[tensor] = weakref.ref(saved), tensor._version
        return saved

    def buffer(self, number: int) -> PagedBuffer:
        """The buffer of that number."""
        return self._buffers[number]

    def give_up(self, number: int) -> None:
        """Nobody needs what a buffer holds."""
        self._buffers[number].discard()
        self._given_up.append(number)

    def _take(self, nbytes: int) -> int:
        with self._lock:
            while self._given_up:
                number = self._given_up.popleft()
                heapq.heappush(self._free.setdefault(self._buffers[number].nbytes, []), number)
            free = self._free.get(nbytes)
            if free:
                return heapq.heappop(free)
            pool = self._pool()
            assert pool is not None  # it holds this shelf
            number = len(self._buffers)
            self._buffers.append(pool.zeros(nbytes, torch.uint8, name=f"saved activation {number}"))
            return number


class _Saved:
    """A tensor in a buffer, for as long as autograd refers to this."""

    def __init__(self, shelf: _Shelf, number: int, tensor: Tensor) -> None:
        self._shelf, self._number = shelf, number
        self._shape, self._dtype = tensor.shape, tensor.dtype
        with shelf.buffer(number).acquired("overwrite") as memory:
            memory.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())

    def load(self) -> Tensor:
        """A copy, which may be used as long as one likes."""
        with self._shelf.buffer(self._number).acquired() as memory:
            return memory.view(self._dtype).view(self._shape).clone()

    def __del__(self) -> None:
        """The buffer may hold the next tensor."""
        self._shelf.give_up(self._number)
