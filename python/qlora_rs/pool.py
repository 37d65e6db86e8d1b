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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qlora_rs import _bridge, _core, torch_memory
from qlora_rs.devices import resolve_device
from qlora_rs.errors import PageError, UnsupportedError
from qlora_rs.report import format_bytes, parse_bytes

Mode = Literal["read", "write", "overwrite"]
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
        stall_seconds: how long computing has waited for copies (on a CUDA device: streams, of waits that have ended).
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


@dataclass(frozen=True)
class Span:
    """A piece of a timeline (`PagedPool.record_timeline`).

    Attributes:
        lane: ``"in"`` and ``"out"``: copies from and to the host; ``"compute"``: a stream from acquiring a buffer until
            releasing it; ``"wait"``: a stream stood still for a buffer that was on its way.
        stream: number of the stream of the last two.
        buffer: name of the buffer.
        begin: seconds since the timeline was started.
        end: the same, of its end.
    """

    lane: Literal["in", "out", "compute", "wait"]
    stream: int | None
    buffer: str
    begin: float
    end: float


class PagedPool:
    """A budget of device memory that buffers share, and host memory behind it.

    A buffer takes whole pages, so many small tensors belong into one buffer. A pool may be used from any thread; each
    call is short. A forked child must not use its parent's pool.

    On a CUDA device work is queued: acquiring a buffer makes torch's current stream wait for what has to come first,
    never the host, and releasing it ends with what is queued on that stream until then. The host memory is pinned; see
    `reserve`.

    Args:
        budget: bytes of device memory, e.g. ``"24GiB"`` (`qlora_rs.report.parse_bytes`); rounded down to pages. It is
            taken as it is needed, not at once.
        device: ``"cpu"``: frames are in ordinary memory, with the policy and bookkeeping that a device gets.
            ``"cuda"``, ``"cuda:1"``: on a CUDA device, without an index on the current one.
        page_size: bytes of a page: a multiple of 4096, on a CUDA device of 2 MiB.
        policy: ``"trace"`` learns the order of uses; ``"lru"`` lets the page leave that was used longest ago, and
            fetches nothing ahead.

    Raises:
        ValueError: a budget of no page, or a page size that cannot be.
        UnsupportedError: a device for which there is no pool.
        DeviceError: the system gives no memory, or there is no such device.
    """

    def __init__(
        self,
        budget: int | str,
        device: torch.device | str = "cpu",
        *,
        page_size: int | str = _PAGE_SIZE,
        policy: Policy = "trace",
    ) -> None:
        where = torch.device(device)
        if where.type not in ("cpu", "cuda"):
            raise UnsupportedError(f"there is no paged pool on {where}; there is on device='cpu' and device='cuda'")
        self.page_size = parse_bytes(page_size)
        frames = parse_bytes(budget) // self.page_size if self.page_size > 0 else 0
        self.budget = frames * self.page_size
        self.device = resolve_device(where)
        if self.device.type == "cuda":
            torch.cuda.init()
        self._core = _core.Pool(frames=frames, page_bytes=self.page_size, policy=policy, device=self.device.index)
        self._buffers: weakref.WeakSet[PagedBuffer] = weakref.WeakSet()

    def zeros(self, shape: Sequence[int] | int, dtype: torch.dtype = torch.float32, *, name: str = "") -> PagedBuffer:
        """A new buffer of zeros, which takes no device memory before it is used.

        Args:
            shape: of the tensor that it holds; at least one element.
            dtype: its type.
            name: what messages call it.

        Raises:
            PageError: it takes more pages than the budget has.
            ValueError: it has no elements, or a negative size.
            DeviceError: the host has no memory for it.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if any(size < 0 for size in shape):
            raise ValueError(f"buffer {name!r} cannot have the shape {list(shape)}: sizes are not negative")
        number = self._core.create(name, math.prod(shape) * dtype.itemsize)
        return PagedBuffer(self, number, shape, dtype, name)

    def reserve(self, bytes: int | str, *, progress: Callable[[int, int], object] | None = None) -> int:
        """Make host memory ready for buffers of so many bytes together, ahead of their creation.

        On a CUDA device this pins it, some GB a second; what is ready can be used while the rest is not, so a thread
        may do it beside other work. Without it memory is pinned as buffers are created.

        Args:
            bytes: how many, e.g. ``"35GB"``.
            progress: told (bytes ready, bytes in all); raising ends the call, and what is ready stays.

        Returns:
            The bytes that were made ready.

        Raises:
            DeviceError: the host has no more; the message says how much it had.
        """
        return self._core.reserve(parse_bytes(bytes), progress=progress)

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
        """Use the whole budget again.

        Where memory is shared with torch (`sharing_with_torch`), torch gives back first what it only caches.
        """
        if self.device.type == "cuda":
            torch_memory.release_cached(self.device.index)
        self._core.reclaim()

    def sharing_with_torch(self) -> contextlib.AbstractContextManager[None]:
        """For the length of a ``with`` block, torch's memory on the pool's device comes from where frames can give way.

        Where there is none for a tensor, the pools of that device give frames back (as `give_back` chooses them) and
        torch gets it, on every thread, in backward too. Frames can take again what torch frees; torch keeps what it
        only caches, so call `reclaim` between steps where ``stats().limit_bytes`` has fallen below the budget. Memory
        of tensors that were given to `torch.Tensor.record_stream` is used again only after that, or after the block.

        Enter it once, around the training loop and not inside of it: torch's cache is emptied first. On the CPU it does
        nothing.

        Raises:
            UnsupportedError: torch is older than 2.8.
        """
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch_memory.shared(self.device.index)

    @contextlib.contextmanager
    def record_timeline(self) -> Iterator[list[Span]]:
        """Record what happens when, for the length of a ``with`` block; the list is filled, by ``begin``, when it ends.

        The host waits at both ends. One timeline at a time: a second one takes the first one's place.

        >>> pool = PagedPool("64KiB", page_size=4096)
        >>> buffer = pool.zeros(100, name="moments")
        >>> with pool.record_timeline() as spans, buffer.acquired("write") as values:
        ...     _ = values.add_(1)
        >>> [(span.lane, span.buffer) for span in spans]
        [('in', 'moments'), ('compute', 'moments')]
        """
        spans: list[Span] = []
        self._core.start_timeline()
        try:
            yield spans
        finally:
            spans.extend(Span(*row) for row in self._core.stop_timeline())  # type: ignore[arg-type]

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

        On a CUDA device it belongs to torch's current stream: work on it that is queued there between `acquire` and
        `release` is in order with copies and with other streams' uses. Other streams must be made to wait for this one
        and this one for them, as for any tensor.

        In the capture of a CUDA graph only a buffer that is acquired already can be: its address must hold for every
        replay. Acquire it before, for writing if the graph writes, and release it after the last replay.

        Args:
            mode: ``"read"``; ``"write"`` where its values may change; ``"overwrite"`` where all of them will be set, so
                that they need not be fetched (until then they are anything).

        Raises:
            PageError: no room beside other acquired buffers; it is frozen, freed, or acquired by others.
        """
        return self._view(self._acquire(mode), host=False)

    def _acquire(self, mode: Mode) -> int:
        """`acquire`, for those who need no tensor: the address."""
        pool = self.pool
        return pool._core.acquire(self._number, stream=_bridge.stream_of(pool.device), mode=mode)

    def _view(self, address: int, *, host: bool) -> Tensor:
        core = self.pool._core
        return _bridge.pool_tensor(core, address, host=host, shape=self.shape, dtype=self.dtype, owner=self)

    def release(self) -> None:
        """End the last `acquire` on torch's current stream: its tensor must not be used in what is queued from now on.

        Raises:
            PageError: it is not acquired there.
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

        It must not be written to. The host waits until the values are there.

        Raises:
            PageError: it is acquired for writing, or was freed.
        """
        return self._view(self.pool._core.host(self._number), host=True)

    def to_tensor(self) -> Tensor:
        """The values as a new CPU tensor."""
        return self.host().clone()

    def flush(self) -> None:
        """Queue the copy of changed values to the host now, so that nobody has to wait for it later."""
        self.pool._core.flush(self._number)

    @contextlib.contextmanager
    def filling(self) -> Iterator[Tensor]:
        """A CPU tensor in the pool's own memory, to be given all new values in a ``with`` block.

        Nobody can acquire the buffer meanwhile. Where the block raises, the buffer is zeros.

        Raises:
            PageError: it is acquired, frozen or freed.
        """
        address = self.pool._core.begin_fill(self._number)
        whole = False
        try:
            yield self._view(address, host=True)
            whole = True
        finally:
            self.pool._core.end_fill(self._number, whole=whole)

    def copy_(self, tensor: Tensor) -> PagedBuffer:
        """Replace the values by those of a tensor of the same shape and type, of any device.

        Values on a CUDA device are copied there, on torch's current stream, and written back when they have to leave;
        the host does not wait. Others go to the host's memory.

        Raises:
            PageError: it is acquired, frozen or freed.
            ValueError: another shape or type.
        """
        if tensor.shape != self.shape or tensor.dtype != self.dtype:
            got = f"{list(tensor.shape)} of {tensor.dtype}"
            raise ValueError(f"buffer {self.name!r} holds {list(self.shape)} of {self.dtype}, got {got}")
        source = tensor.detach()
        # From another device by way of the host: frames are not mapped for other devices.
        here = source.device == self.pool.device and source.is_cuda
        if not here or not self._copy_on_device(source):
            with self.filling() as values:
                values.copy_(source)
        return self

    def _copy_on_device(self, source: Tensor) -> bool:
        """False where other acquired buffers leave no room."""
        try:
            values = self.acquire("overwrite")
        except PageError:
            if torch.cuda.is_current_stream_capturing():
                raise
            return False
        try:
            values.copy_(source)
        finally:
            self.release()
        return True

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


def _free_quietly(core: _core.Pool, number: int) -> None:
    # Acquired and forgotten: its pages stay as long as the pool.
    with contextlib.suppress(PageError):
        core.free(number)
