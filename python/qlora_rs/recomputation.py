"""Dequantized weights that a recomputation leaves to the backward pass behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from qlora_rs import _bridge

Dequantize = Callable[[torch.dtype], Tensor]
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def keep_dequantized() -> Contexts:
    """A ``context_fn`` for gradient checkpointing that has each weight dequantized twice a step, not three times.

    Without it a product of many tokens dequantizes its weight in the forward pass, when the forward pass is computed
    again, and in the backward pass. With it the backward pass takes what the recomputation has made, and drops it. That
    costs memory for the dequantized weights of one checkpointed call (a decoder layer of Llama-8B: 436 MB in bfloat16);
    all bits stay the same.

    A recomputation keeps weights for its own backward pass only: those that this one does not use go with the next
    recomputation of the call, at the latest with its graph. Products that need no dequantized weight (of few tokens)
    keep none. The reentrant kind of checkpointing takes no ``context_fn``. In what ``torch.compile`` traces nothing is
    kept; a checkpointed call inside of another one may keep its own weights, too.

    Returns:
        What ``torch.utils.checkpoint.checkpoint`` asks for: a context for the forward pass, one for recomputing it.

    >>> from torch.utils.checkpoint import checkpoint
    >>> from qlora_rs import Linear4bit, keep_dequantized
    >>> layer = Linear4bit.from_float(torch.nn.Linear(64, 64))
    >>> x = torch.randn(100, 64, requires_grad=True)
    >>> y = checkpoint(layer, x, use_reentrant=False, context_fn=keep_dequantized)
    >>> y.sum().backward()

    Of a model of transformers:

    >>> kwargs = {"use_reentrant": False, "context_fn": keep_dequantized}
    >>> model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)  # doctest: +SKIP
    """
    # A tracer takes contexts of this kind alone, and has to see the operators anyway.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        contexts: Contexts = create_selective_checkpoint_contexts(_recompute)
        return contexts
    kept = KeptWeights()
    return _Within(kept, recomputing=False), _Within(kept, recomputing=True)


def _recompute(*_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


class _Here(threading.local):
    """The checkpointed calls that this thread is computing, one inside of another.

    A recomputation runs on the thread of its backward pass, beside others.
    """

    def __init__(self) -> None:
        self.calls: list[KeptWeights] = []


_here = _Here()


def kept_weights() -> KeptWeights | None:
    """Where products of the checkpointed call that is being computed find and leave weights; None outside of one."""
    if torch.compiler.is_compiling() or not _here.calls:
        return None
    return _here.calls[-1]


class _Within:
    """The forward pass of a checkpointed call, or its recomputations: entered once for each."""

    def __init__(self, kept: KeptWeights, *, recomputing: bool) -> None:
        self._kept, self._recomputing = kept, recomputing
        self._entered: list[list[KeptWeights]] = []

    def __enter__(self) -> None:
        if self._recomputing:
            self._kept.start()
        self._entered.append(_here.calls)
        _here.calls.append(self._kept)

    def __exit__(self, *_: object) -> None:
        # NOTE: where a forward pass fails, some versions of torch come here when its traceback is dropped: on whatever
        # thread, and after others have been entered.
        self._entered.pop().remove(self._kept)
        self._kept.recomputing = False


class _Kept:
    """A weight, how many products are still to use it, and the stream that it is written on."""

    __slots__ = ("stream", "uses", "weight")

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.uses = weight, 0
        self.stream = _bridge.stream_of(weight.device)


class KeptWeights:
    """The dequantized weights of one checkpointed call, which lives as long as the graph of that call.

    A product is known by the object that makes it, so that all calls of a layer share one weight.

    Attributes:
        recomputing: whether products leave their weights here now.
    """

    __slots__ = ("_weights", "recomputing")

    def __init__(self) -> None:
        self.recomputing = False
        self._weights: dict[tuple[object, torch.dtype], _Kept] = {}

    def start(self) -> None:
        """Drop what an earlier recomputation has left, and keep what follows."""
        self._weights.clear()
        self.recomputing = True

    def weight(self, product: object, dequantize: Dequantize, dtype: torch.dtype) -> Tensor:
        """The dequantized weight of a product in ``dtype``; `take` will be called once for each call of this."""
        if not self.recomputing:
            return dequantize(dtype)
        kept = self._find(product, dtype)
        if kept is None:
            kept = self._weights[product, dtype] = _Kept(dequantize(dtype))
        kept.uses += 1
        return kept.weight

    def take(self, product: object, dtype: torch.dtype) -> Tensor | None:
        """What `weight` has left, if anything; the last one who may take it keeps it alive."""
        kept = self._find(product, dtype)
        if kept is None:
            return None
        kept.uses -= 1
        if kept.uses == 0:
            del self._weights[product, dtype]
        return kept.weight

    def _find(self, product: object, dtype: torch.dtype) -> _Kept | None:
        """Where another stream has come it may not be written yet."""
        kept = self._weights.get((product, dtype))
        return kept if kept is not None and kept.stream == _bridge.stream_of(kept.weight.device) else None
