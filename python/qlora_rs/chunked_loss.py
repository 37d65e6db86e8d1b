"""Cross entropy over an output head in chunks of tokens, so that the logits are never there as a whole."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from qlora_rs.report import parse_bytes

IGNORED = -100
CHUNK_BYTES = 256 << 20

Reduction = Literal["mean", "sum"]
Head = Callable[[Tensor], Tensor]


def chunked_cross_entropy(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    reduction: Reduction = "mean",
    chunk_bytes: int | str = CHUNK_BYTES,
    vocabulary: int | None = None,
) -> Tensor:
    """Cross entropy of ``head(hidden)`` against targets, in nats; float32 scalar.

    The head is only run where a token counts, on one chunk of these at a time, and again in the backward pass, which
    keeps nothing of a chunk but its input. Everything has its gradient: hidden states, and the head's own parameters or
    adapters. With one chunk the bits are those of ``cross_entropy(head(hidden).float(), ...)``; with several, the
    chunks' sums are added in float32, and a product of fewer rows may round its logits in another way.

    Args:
        hidden: (..., width), what the head takes.
        head: gives (..., vocabulary) logits, of any float type; packed, adapted or plain.
        targets: (...) int64, ``-100`` where a token does not count.
        reduction: ``"mean"`` over the tokens that count (NaN where none does), or ``"sum"``.
        chunk_bytes: of a chunk's float32 logits; the backward pass takes about four times as much.
        vocabulary: how many logits a token has; by default the head is asked.

    Raises:
        ValueError: shapes that do not fit, or another reduction.

    >>> import torch
    >>> head = torch.nn.Linear(8, 1000)
    >>> hidden, targets = torch.randn(50, 8), torch.arange(50)
    >>> loss = chunked_cross_entropy(hidden, head, targets, chunk_bytes="32kB")  # 8 tokens at a time
    >>> torch.allclose(loss, torch.nn.functional.cross_entropy(head(hidden), targets))
    True
    """
    _check_reduction(reduction)
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(f"hidden states of shape {list(hidden.shape)} have no targets of shape {list(targets.shape)}")
    counts = targets != IGNORED
    return _over_rows(hidden[counts], head, targets[counts], reduction, chunk_bytes, vocabulary)


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is 'mean' or 'sum', got {reduction!r}")


def _over_rows(
    rows: Tensor, head: Head, targets: Tensor, reduction: Reduction, chunk_bytes: int | str, vocabulary: int | None
) -> Tensor:
    chunk = chunk_tokens(_vocabulary(head, rows) if vocabulary is None else vocabulary, chunk_bytes)
    if len(rows) <= chunk:
        return _chunk_loss(rows, head, targets, reduction)
    total = torch.zeros((), dtype=torch.float32, device=rows.device)
    # What is next needed first stays where it is: hooks that move saved tensors away would gain nothing.
    with torch.autograd.graph.saved_tensors_hooks(_same, _same):
        for part, their_targets in zip(rows.split(chunk), targets.split(chunk), strict=True):
            total = total + checkpoint(_chunk_loss, part, head, their_targets, "sum", use_reentrant=False)
    return total / len(rows) if reduction == "mean" else total


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _chunk_loss(rows: Tensor, head: Head, targets: Tensor, reduction: Reduction) -> Tensor:
    logits = head(rows[None])[0]  # heads may want (samples, length, width)
    return cross_entropy(logits.float(), targets, reduction=reduction)


def chunk_tokens(vocabulary: int, chunk_bytes: int | str = CHUNK_BYTES) -> int:
    """Tokens whose float32 logits take so many bytes; a multiple of 64 where there are as many, at least 1."""
    tokens = max(1, parse_bytes(chunk_bytes) // (4 * max(1, vocabulary)))
    return tokens if tokens < 64 else tokens // 64 * 64


def _vocabulary(head: Head, rows: Tensor) -> int:
    known = getattr(head, "out_features", None)
    if isinstance(known, int):
        return known
    with torch.no_grad():
        return head(rows[None, :1]).shape[-1]


# Models that do more to their logits than their head does (a soft cap, a scale).
_transforming: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def causal_lm_loss(
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    *,
    reduction: Reduction = "mean",
    chunk_bytes: int | str = CHUNK_BYTES,
    **inputs: Any,
) -> Tensor:
    """Loss of a causal language model of transformers without ever holding all logits; float32 scalar, in nats.

    As ``model(input_ids, labels=labels).loss``, but over `chunked_cross_entropy`: the model's own forward pass is run,
    its output head only where the next token counts. A model that goes on computing with its head's logits (a soft cap,
    a scale) is found out and gets all logits of the tokens that count at once, as one does whose head is not known.

    Args:
        model: with ``get_output_embeddings``; adapters, PEFT's too, may be on it.
        input_ids: (samples, length) int64.
        labels: the same shape, not shifted: the token where it counts, ``-100`` elsewhere.
        reduction, chunk_bytes: see `chunked_cross_entropy`.
        inputs: more of what the model takes, as ``attention_mask``; not what says which logits it makes.

    Raises:
        ValueError: labels of another shape than the tokens, another reduction, or an input that the loss decides.

    >>> loss = causal_lm_loss(model, input_ids, labels=input_ids)  # doctest: +SKIP
    """
    _check_reduction(reduction)
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels have shape {list(labels.shape)}, input_ids {list(input_ids.shape)}: give one a token")
    inputs = _without_decided(inputs)
    targets = labels[:, 1:]
    counts = targets != IGNORED
    rows = nn.functional.pad(counts, (0, 1))  # (samples, length): predicts a token that counts
    find_head = getattr(model, "get_output_embeddings", None)
    seen = _Seen(rows, None if find_head is None else find_head(), chunk_bytes, model in _transforming)

    def logits_of() -> Tensor:
        with seen.watching():
            logits: Tensor = model(input_ids=input_ids, use_cache=False, **inputs).logits
        return logits

    logits = logits_of()
    if seen.hidden is not None:
        if seen.gave(logits):
            return _over_rows(seen.hidden, seen.head, targets[counts], reduction, chunk_bytes, seen.vocabulary)
        _transforming.add(model)
        seen.whole = True
        logits = logits_of()
    if logits.shape[:2] == rows.shape:  # a model without a head that could be told; else (1, counted, vocabulary)
        logits = logits[rows]
    return cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets[counts], reduction=reduction)


# What a model takes that is decided here: the only value that changes nothing, and why there is no other.
_DECIDED: dict[str, tuple[Any, str]] = {
    "use_cache": (False, "nothing is generated from the tokens of a loss"),
    "logits_to_keep": (0, "logits are made where the next token counts: put -100 into labels elsewhere"),
    "num_logits_to_keep": (0, "logits are made where the next token counts: put -100 into labels elsewhere"),
    "return_dict": (True, "the logits are found by name"),
}


def _without_decided(inputs: dict[str, Any]) -> dict[str, Any]:
    """What is left for the model, without values that change nothing."""
    for name, (value, why) in _DECIDED.items():
        given = inputs.get(name)
        if given is not None and (isinstance(given, Tensor) or given != value):
            raise ValueError(f"{name} is always {value} in a loss, got {given!r}: {why}")
    return {name: given for name, given in inputs.items() if name not in _DECIDED}


class _Seen:
    """What a model's head is given, of which it sees the rows that count; only one of them where they are many."""

    def __init__(self, rows: Tensor, head: Any, chunk_bytes: int | str, whole: bool) -> None:
        self.rows, self.head, self.chunk_bytes, self.whole = rows, head, chunk_bytes, whole
        self.hidden: Tensor | None = None
        self.output: Tensor | None = None
        self.version = 0
        self.vocabulary = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context the head is watched."""
        self.hidden = self.output = None
        if self.head is None:
            yield
            return
        handles = [self.head.register_forward_pre_hook(self._select), self.head.register_forward_hook(self._look)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _select(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not inputs or not isinstance(inputs[0], Tensor) or inputs[0].shape[:2] != self.rows.shape:
            return None
        selected = inputs[0][self.rows]
        vocabulary = getattr(module, "out_features", None)
        if self.whole or not isinstance(vocabulary, int) or len(selected) <= chunk_tokens(vocabulary, self.chunk_bytes):
            return (selected[None], *inputs[1:])
        self.hidden, self.vocabulary = selected, vocabulary
        return (selected[None, :1].detach(), *inputs[1:])

    def _look(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.output = output
        self.version = _version(output)

    def gave(self, logits: Tensor) -> bool:
        """Are these logits what the head gave?"""
        output = self.output
        if not isinstance(output, Tensor) or _version(output) != self.version:  # scaled in place, say
            return False
        return logits is output or torch.equal(logits.float(), output.float())


def _version(output: Any) -> int:
    """How often a tensor was written to; inference tensors do not count that."""
    return output._version if isinstance(output, Tensor) and not output.is_inference() else 0
