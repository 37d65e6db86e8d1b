"""Buffers that share a memory budget: those in use are on the device, the others wait on the host.

Training repeats itself, so a pool that has seen one step knows the next: it fetches along the order of uses that it has
learned, and lets the page leave whose next use is farthest away. See docs/paging.md.

>>> import torch
>>> from qlora_rs.paging import PagedPool
>>> pool = PagedPool("64KiB", page_size=4096)
>>> moments = [pool.zeros((100, 100), name=f"layer {i}") for i in range(5)]  # 200,000 bytes under a budget of 65,536
>>> for moment in moments:
...     with moment.acquired("write") as values:
...         _ = values.add_(1)
>>> moments[0].to_tensor().sum().item()
10000.0
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qlora_rs import _bridge, _core
from qlora_rs.errors import PageError, UnsupportedError
from qlora_rs.report import format_bytes, parse_bytes

Mode = Literal["read", "write"]
Policy = Literal["trace", "lru"]

_PAGE_SIZE = 16 << 20


@dataclass(frozen=True)
class PoolStats:
    """What a pool has done since it was made, and how it stands; ``str`` gives one line for people.

    Attributes:
        limit_bytes: bytes of frames that may be used now: the budget, less what was given back.
        committed_bytes: bytes of frames that hold memory now.
        resident_bytes: bytes of pages on the device now.
        paged_bytes: bytes of pages on the host only now.
        host_bytes: bytes of host memory behind the pool.
        buffers: buffers that exist now.
        hits: times that an acquired buffer was there, or on its way.
        misses: times that it had to be fetched first.
        prefetches: times that a buffer was fetched ahead.
        evicted_pages: pages that lost their place to others.
        bytes_in: bytes copied from the host.
        bytes_out: bytes copied to the host.
        trace_breaks: how often the learned order of uses turned out to be another.
        trace_period: uses after which the order repeats, several of one buffer in a row being one; None while it is
            unknown.
        stall_seconds: how long computing has waited for copies.
    """

    limit_bytes: int
    committed_bytes: int
    resident_bytes: int
    paged_bytes: int
    host_bytes: int
    buffers: int
    hits: int
    misses: int
    prefetches: int
    evicted_pages: int
    bytes_in: int
    bytes_out: int
    trace_breaks: int
    trace_period: int | None
    stall_seconds: float

    @property
    def hit_rate(self) -> float:
        """Share of uses that found their buffer; 1.0 before the first."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else 1.0

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"{format_bytes(self.resident_bytes)} of {format_bytes(self.limit_bytes)} resident, "
            f"{format_bytes(self.paged_bytes)} paged out; hit rate {self.hit_rate:.1%}, "
            f"{format_bytes(self.bytes_in)} in, {format_bytes(self.bytes_out)} out, stalled {self.stall_seconds:.3f} s"
        )


class PagedPool:
    """A budget of device memory that buffers share, and host memory behind it.

    A buffer takes whole pages, so many small tensors belong into one buffer. A pool may be used from any thread; each
    call is short. A forked child must not use its parent's pool.

    Args:
        budget: bytes of device memory, e.g. ``"24GiB"`` (`qlora_rs.report.parse_bytes`); rounded down to pages.
        device: ``"cpu"``: frames are in ordinary memory, with the policy and bookkeeping that a device gets.
        page_size: bytes of a page, a multiple of 4096.
        policy: ``"trace"`` learns the order of uses; ``"lru"`` lets the page leave that was used longest ago, and
            fetches nothing ahead.

    Raises:
        ValueError: a budget of no page, or a page size that cannot be.
        UnsupportedError: a device for which there is no pool.
        DeviceError: the system gives no memory.
    """

    def __init__(
        self,
        budget: int | str,
        device: torch.device | str = "cpu",
        *,
        page_size: int | str = _PAGE_SIZE,
        policy: Policy = "trace",
    ) -> None:
        self.device = torch.device(device)
        if self.device.type != "cpu":
            raise UnsupportedError(f"there is no paged pool on {self.device} yet; what there is: device='cpu'")
        self.page_size = parse_bytes(page_size)
        frames = parse_bytes(budget) // self.page_size if self.page_size > 0 else 0
        self.budget = frames * self.page_size
        self._core = _core.HostPool(frames=frames, page_bytes=self.page_size, policy=policy)
        self._buffers: weakref.WeakSet[PagedBuffer] = weakref.WeakSet()

    def zeros(self, shape: Sequence[int] | int, dtype: torch.dtype = torch.float32, *, name: str = "") -> PagedBuffer:
        """A new buffer of zeros, which takes no device memory before it is used.

        Args:
            shape: of the tensor that it holds; at least one element.
            dtype: its type.
            name: what messages call it.

        Raises:
            PageError: it takes more pages than the budget has.
            ValueError: it has no elements.
            DeviceError: the host has no memory for it.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        number = self._core.create(name, math.prod(shape) * dtype.itemsize)
        return PagedBuffer(self, number, shape, dtype, name)

    def store(self, tensor: Tensor, *, name: str = "", frozen: bool = True) -> PagedBuffer:
        """A new buffer that holds a copy of a tensor (of any device); as `zeros` otherwise.

        Args:
            tensor: the values.
            name: what messages call it.
            frozen: the buffer will only be read, and is never copied back.
        """
        buffer = self.zeros(tuple(tensor.shape), tensor.dtype, name=name)
        buffer.copy_(tensor)
        if frozen:
            buffer.freeze()
        return buffer

    def prefetch(self, buffers: Iterable[PagedBuffer]) -> None:
        """Fetch buffers that will be used soon, in this order, as far as there is room.

        Where the order of uses is known, nothing is pushed out that is used before them.
        """
        self._core.prefetch([buffer._number_in(self) for buffer in buffers])

    def give_back(self, bytes: int | str) -> int:
        """Give device memory back to the system: unused frames first, then clean pages, then dirty ones.

        Returns the bytes given back, which are fewer where acquired buffers hold the rest. The pool keeps to what is
        left until `reclaim`.
        """
        return self._core.give_back(parse_bytes(bytes))

    def reclaim(self) -> None:
        """Use the whole budget again."""
        self._core.reclaim()

    def stats(self) -> PoolStats:
        """Counts since the pool was made, and how it stands."""
        return PoolStats(**self._core.stats())

    def frame_map(self) -> list[tuple[str, int] | None]:
        """For each frame, name and page number of the buffer whose page it holds."""
        names = {buffer._number: buffer.name for buffer in self._buffers}
        return [owner and (names.get(owner[0], ""), owner[1]) for owner in self._core.frame_map()]

    def __repr__(self) -> str:
        """Budget, device and page size."""
        return f"PagedPool(budget={self.budget}, device={str(self.device)!r}, page_size={self.page_size})"


class PagedBuffer:
    """A tensor in a `PagedPool`, made by `PagedPool.zeros` or `PagedPool.store`.

    It gives its pages up when nobody refers to it any more. Tensors that it hands out refer to it.

    Attributes:
        pool: where it lives.
        shape: of the tensor.
        dtype: its type.
        name: what messages call it.
        nbytes: bytes of the tensor.
    """

    def __init__(self, pool: PagedPool, number: int, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
        self.pool = pool
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.name = name
        self.nbytes = math.prod(shape) * dtype.itemsize
        self._number = number
        pool._buffers.add(self)
        self._finalizer = weakref.finalize(self, _free_quietly, pool._core, number)
        self._finalizer.atexit = False

    def acquire(self, mode: Mode = "read") -> Tensor:
        """The tensor on the pool's device, good until `release`; next time its memory may be elsewhere.

        Args:
            mode: ``"read"``, or ``"write"`` where its values may change.

        Raises:
            PageError: no room beside other acquired buffers; it is frozen, freed, or acquired by others.
        """
        if mode not in ("read", "write"):
            raise ValueError(f"mode is 'read' or 'write', got {mode!r}")
        address = self.pool._core.acquire(
            self._number, stream=_bridge.stream_of(self.pool.device), write=mode == "write"
        )
        return _bridge.host_view(address, self.shape, self.dtype, self)

    def release(self) -> None:
        """End the last `acquire`: its tensor must not be used any more.

        Raises:
            PageError: it is not acquired.
        """
        self.pool._core.release(self._number, stream=_bridge.stream_of(self.pool.device))

    @contextlib.contextmanager
    def acquired(self, mode: Mode = "read") -> Iterator[Tensor]:
        """`acquire` for the length of a ``with`` block."""
        values = self.acquire(mode)
        try:
            yield values
        finally:
            self.release()

    def host(self) -> Tensor:
        """The values as a CPU tensor in the pool's own memory, good until the buffer is next acquired for writing.

        It must not be written to.

        Raises:
            PageError: it is acquired for writing, or was freed.
        """
        return _bridge.host_view(self.pool._core.host(self._number), self.shape, self.dtype, self)

    def to_tensor(self) -> Tensor:
        """The values as a new CPU tensor."""
        return self.host().clone()

    def copy_(self, tensor: Tensor) -> PagedBuffer:
        """Replace the values by those of a tensor of the same shape and type.

        Raises:
            PageError: it is acquired, frozen or freed.
            ValueError: another shape or type.
        """
        if tensor.shape != self.shape or tensor.dtype != self.dtype:
            got = f"{list(tensor.shape)} of {tensor.dtype}"
            raise ValueError(f"buffer {self.name!r} holds {list(self.shape)} of {self.dtype}, got {got}")
        _bridge.fill_buffer(self.pool._core, self._number, tensor)
        return self

    def freeze(self) -> PagedBuffer:
        """From now on the buffer is only read, and never copied back."""
        self.pool._core.freeze(self._number)
        return self

    def discard(self) -> None:
        """Forget the values, without copying them back: the buffer is zeros again."""
        self.pool._core.discard(self._number)

    def free(self) -> None:
        """Give its memory up now.

        Raises:
            PageError: it is acquired, or was freed already.
        """
        self.pool._core.free(self._number)
        self._finalizer.detach()

    def _number_in(self, pool: PagedPool) -> int:
        if self.pool is not pool:
            raise ValueError(f"buffer {self.name!r} belongs to another pool")
        return self._number

    def __repr__(self) -> str:
        """Name, shape and type."""
        return f"PagedBuffer({self.name!r}, shape={list(self.shape)}, dtype={self.dtype})"


def _free_quietly(core: _core.HostPool, number: int) -> None:
    # Acquired and forgotten: its pages stay as long as the pool.
    with contextlib.suppress(PageError):
        core.free(number)
