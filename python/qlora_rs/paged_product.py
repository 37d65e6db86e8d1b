"""Products over packed weights that lie in a pool: on the device while they are used, on the host otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from qlora_rs import _bridge, direct, ops, recomputation
from qlora_rs._core import DeviceWeight
from qlora_rs.operator_product import OperatorProduct
from qlora_rs.pool import PagedBuffer, PagedPool
from qlora_rs.recomputation import KeptWeights
from qlora_rs.spec import QuantSpec

# As torch's allocator aligns at the least what kernels are used to.
_ALIGNMENT = 256  # bytes
# Addresses of one weight that are remembered. A block comes back to few places, as all blocks are of about one size.
_MOST_PLACES = 32


class Piece(NamedTuple):
    """Where in a block's buffer a tensor lies: bytes ``start:stop``."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: torch.Size


Pieces = tuple[Piece, Piece, Piece | None, Piece | None]


class PagedBlock:
    """The packed weights of a block of layers, in one buffer of a pool, which is only ever acquired for reading.

    Args:
        pool: where they go.
        name: what messages call the buffer.
        weights: codes and scales of each weight, of any device; they are copied.

    Attributes:
        buffer: all bytes, uint8.
        pieces: where each weight's codes and scales are.

    Raises:
        PageError: the block has more pages than the pool's budget.
        DeviceError: the host has no memory for it.
    """

    def __init__(self, pool: PagedPool, name: str, weights: Sequence[direct.Parts]) -> None:
        self.pieces: list[Pieces] = []
        end = 0
        for parts in weights:
            pieces: list[Piece | None] = []
            for part in parts:
                if part is None:
                    pieces.append(None)
                    continue
                pieces.append(Piece(end, end + part.nbytes, part.dtype, part.shape))
                end = -(-(end + part.nbytes) // _ALIGNMENT) * _ALIGNMENT
            codes, absmax, scale, offset = pieces
            assert codes is not None
            assert absmax is not None
            self.pieces.append((codes, absmax, scale, offset))
        # Not frozen, so that loading a state dict may replace what it holds.
        self.buffer: PagedBuffer = pool.zeros(max(1, end), torch.uint8, name=name)
        with self.buffer.filling() as content:
            for parts, places in zip(weights, self.pieces, strict=True):
                _write(content, parts, places)

    def host_parts(self, number: int) -> direct.Parts:
        """A weight's codes and scales in the pool's host memory, each as a tensor with a storage of its own.

        Files and checks for shared memory look at storages: in one for all, each layer would seem to hold the block.
        """
        memory = self.buffer.host().numpy()
        codes, absmax, scale, offset = (
            None if piece is None else torch.from_numpy(memory[piece.start : piece.stop]).view(piece.dtype)
            for piece in self.pieces[number]
        )
        return _shaped((codes, absmax, scale, offset), self.pieces[number])

    def write(self, number: int, parts: direct.Parts) -> None:
        """Replace a weight, on the host and on the device.

        Raises:
            PageError: the block is in use.
        """
        content = self.buffer.to_tensor()
        _write(content, parts, self.pieces[number])
        self.buffer.copy_(content)


def _write(content: Tensor, parts: direct.Parts, pieces: Pieces) -> None:
    for part, piece in zip(parts, pieces, strict=True):
        if part is not None and piece is not None:
            content[piece.start : piece.stop].copy_(part.detach().contiguous().view(-1).view(torch.uint8))


def _shaped(flat: tuple[Tensor | None, ...], pieces: Pieces) -> direct.Parts:
    codes, absmax, scale, offset = (
        None if part is None or piece is None else part.view(piece.shape)
        for part, piece in zip(flat, pieces, strict=True)
    )
    assert codes is not None
    assert absmax is not None
    return codes, absmax, scale, offset


class _Resident(NamedTuple):
    """A weight at some place of the device."""

    parts: direct.Parts
    weight: DeviceWeight | None  # on a CUDA device


class PagedProduct:
    """x W^T + b and its gradient over one weight of a block: each product acquires the block, and releases it.

    Nothing of the weight is kept for the backward pass, which acquires it anew where a recomputation has not left it
    dequantized.

    Args:
        block: what is acquired.
        number: of the weight in it.
        columns: in_features.
        spec: how it is quantized.
        operator: what multiplies with it where no kernel is called directly.

    Attributes:
        parts: codes and scales in host memory, what a layer shows as its parameters.
    """

    _outside_graphs: ClassVar[Any] = None

    __slots__ = ("_at", "_block", "_device", "_number", "_operator", "columns", "parts", "spec")

    def __init__(
        self, block: PagedBlock, number: int, columns: int, spec: QuantSpec, operator: OperatorProduct
    ) -> None:
        if PagedProduct._outside_graphs is None:  # loads the compiler, which importing this module should not
            PagedProduct._outside_graphs = staticmethod(torch.compiler.disable(PagedProduct._eager))
        self._block = block
        self._number = number
        self._operator = operator
        self._device = block.buffer.pool.device
        self._at: dict[int, _Resident] = {}
        self.columns = columns
        self.spec = spec
        codes, absmax, scale, offset = (
            None if part is None else torch.nn.Parameter(part, requires_grad=False) for part in block.host_parts(number)
        )
        assert codes is not None
        assert absmax is not None
        self.parts: direct.Parts = (codes, absmax, scale, offset)

    @property
    def device(self) -> torch.device:
        """Where products are made."""
        return self._device

    @property
    def buffer(self) -> PagedBuffer:
        """What is acquired."""
        return self._block.buffer

    def holds(self, parts: direct.Parts) -> bool:
        """Are these the tensors that the pool holds, or has somebody put others in their place?"""
        own = self.parts
        return parts[0] is own[0] and parts[1] is own[1] and parts[2] is own[2] and parts[3] is own[3]

    def write(self, parts: direct.Parts) -> None:
        """Replace the weight by one of the same shapes and types; see `PagedBlock.write`."""
        self._block.write(self._number, parts)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product, recorded for autograd where a gradient is wanted.

        Raises:
            ValueError: x is on another device than the pool.
            PageError: no room beside other acquired buffers, or a CUDA graph is being captured and nobody holds the
                block, whose address would change under it.
        """
        if torch.compiler.is_compiling():  # what is acquired while a graph is traced would not be when it runs
            product: Tensor = self._outside_graphs(self, x, bias)
            return product
        return self._eager(x, bias)

    def _eager(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.device != self._device:
            raise ValueError(
                f"x is on {x.device}, the packed weight is paged to {self._device} (buffer {self.buffer.name!r}): "
                "move x there"
            )
        x = ops.autocasted(x)
        if ops.wants_gradient(x, bias):
            y: Tensor = _Recorded.apply(x, bias, self)
            return y
        return self.product(x, bias)

    def product(self, x: Tensor, bias: Tensor | None, kept: KeptWeights | None = None) -> Tensor:
        """x W^T + b, of which nothing is recorded; the dequantized W may be left in ``kept``."""
        here = self._acquire()
        try:
            dequantize = None if kept is None else partial(kept.weight, self, partial(self._dequantized, here))
            if here.weight is not None and direct.applies(x):
                return ops.device_linear(x, here.weight, bias, dequantize)
            if dequantize is not None and direct.unwatched(x):
                return self._operator.product(x, here.parts, bias, dequantize)
            return self._operator(x, here.parts, bias)
        finally:
            self.buffer.release()

    def gradient(self, grad: Tensor, weight: Tensor | None = None) -> Tensor:
        """The gradient of x, of which nothing is recorded; by the dequantized W where it is there."""
        if weight is not None and direct.unwatched(grad):
            return ops.dense_linear_backward(grad, weight)
        here = self._acquire()
        try:
            if here.weight is not None and direct.applies(grad):
                return ops.device_linear_backward(grad, here.weight)
            return self._operator.gradient(grad, here.parts)
        finally:
            self.buffer.release()

    def with_adapter(self, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor | None:
        """The product and ``scaling x A^T B^T`` in one kernel; None where there is none. Nothing is recorded."""
        if x.device != self._device:
            return None
        here = self._acquire()
        try:
            if here.weight is None:
                return None
            return direct.product_with_adapter(here.weight, x, bias, a, b, scaling)
        finally:
            self.buffer.release()

    def _dequantized(self, here: _Resident, dtype: torch.dtype) -> Tensor:
        if here.weight is not None and dtype in direct.DTYPES:
            weight: Tensor = here.weight.dequantize(dtype)
            return weight
        return self._operator.dequantize(here.parts, dtype)

    def _acquire(self) -> _Resident:
        memory = self.buffer.acquire()
        try:
            address = _bridge.span(memory)[0]
            here = self._at.get(address)
            if here is None:
                here = self._look(memory, address)
            return here
        except BaseException:
            self.buffer.release()
            raise

    def _look(self, memory: Tensor, address: int) -> _Resident:
        """The weight at a place where it has not been before."""
        pieces = self._block.pieces[self._number]
        parts = _shaped(
            tuple(None if piece is None else memory[piece.start : piece.stop].view(piece.dtype) for piece in pieces),
            pieces,
        )
        weight = None
        if self._device.type == "cuda" and not self._operator.flat:
            weight = ops.device_weight(*parts, self.columns, self.spec, moves=True)
        if len(self._at) >= _MOST_PLACES:
            self._at.clear()
        here = self._at[address] = _Resident(parts, weight)
        return here


class _Recorded(torch.autograd.Function):
    """The product; only the way to the weight is kept, not the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, product: PagedProduct) -> Tensor:
        ctx.product = product
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.kept = recomputation.kept_weights()
        return product.product(x, bias, ctx.kept if ctx.needs_input_grad[0] else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        weight = None if ctx.kept is None else ctx.kept.take(ctx.product, grad.dtype)
        if ctx.needs_input_grad[0]:
            if grad.requires_grad:
                grad_x = _RecordedGradient.apply(grad, ctx.product)
            else:
                grad_x = ctx.product.gradient(grad, weight)
        if ctx.needs_input_grad[1]:
            grad_bias = ops.bias_gradient(grad, ctx.bias_dtype)
        return grad_x, grad_bias, None


class _RecordedGradient(torch.autograd.Function):
    """dY W, whose own gradient is the product with W^T again."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, product: PagedProduct) -> Tensor:
        ctx.product = product
        return product.gradient(grad)

    @staticmethod
    def backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.product(grad_grad, None), None
