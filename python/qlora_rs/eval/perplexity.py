"""Perplexity of a causal language model on a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_rs.errors import NonFiniteError
from qlora_rs.eval.mode import device_of, evaluating, max_positions

# Rows of logits that are turned into float32 at a time.
CHUNK = 64


@dataclass(frozen=True)
class Perplexity:
    """How surprised a model was.

    Attributes:
        nll: mean negative log-likelihood in nats per scored token.
        tokens: number of scored tokens.
        windows: number of windows that they came in.
    """

    nll: float
    tokens: int
    windows: int

    @property
    def ppl(self) -> float:
        """``exp(nll)``."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


def perplexity(
    model: nn.Module,
    tokens: Tensor | Sequence[int],
    *,
    window: int = 512,
    progress: Callable[[int, int], object] | None = None,
) -> Perplexity:
    """Perplexity over consecutive windows that share nothing.

    A text of n tokens is cut into windows of ``window`` tokens, the last one shorter (left out if it is one token
    alone). In each, every token but the first is scored, given those before it in the same window. The mean is over
    all scored tokens: float32 log-softmax, float64 sum. A figure means something only with its window and its
    tokenizer: windows of 2048 give lower figures than windows of 512.

    Args:
        model: returns ``.logits`` (1, n, vocabulary) for ``input_ids`` (1, n); it runs in its own dtype, in evaluation
            mode, and is left in the mode it was in.
        tokens: 1-D token ids.
        window: tokens per window.
        progress: called with (tokens done, tokens in all).

    Raises:
        TypeError, ValueError: fewer than two tokens, not 1-D integers, ids outside the vocabulary, or a window that
            is larger than the model's context.
        NonFiniteError: the model gives NaN or infinite losses; the window is named.

    Source: the protocol without overlap of Hugging Face's "Perplexity of fixed-length models".

    >>> from types import SimpleNamespace
    >>> class Uniform(nn.Module):
    ...     def forward(self, input_ids, use_cache):
    ...         return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 8))
    >>> print(f"{perplexity(Uniform(), [1, 2, 3, 4, 5], window=4).ppl:.3f}")
    8.000
    """
    ids = _checked(model, torch.as_tensor(tokens), window)
    device = device_of(model)
    total, scored, windows = 0.0, 0, 0
    with evaluating(model):
        for start in range(0, len(ids) - 1, window):
            piece = ids[start : start + window].to(device)
            loss = _sum_of_losses(model, piece)
            if not math.isfinite(loss):
                end = start + len(piece) - 1
                raise NonFiniteError(f"the model's loss on tokens {start} to {end} is {loss}: its weights are damaged")
            total += loss
            scored += len(piece) - 1
            windows += 1
            if progress is not None:
                progress(min(start + window, len(ids)), len(ids))
    return Perplexity(total / scored, scored, windows)


def _checked(model: nn.Module, ids: Tensor, window: int) -> Tensor:
    if ids.ndim != 1:
        raise ValueError(f"tokens is a 1-D sequence of ids; got shape {list(ids.shape)}")
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if len(ids) and not whole:  # an empty list becomes a float tensor
        raise TypeError(f"tokens are integers; got {ids.dtype}")
    ids = ids.long()  # a narrow type could not be compared with the size of the vocabulary
    if len(ids) < 2:
        raise ValueError(f"at least 2 tokens are needed, as the first has nothing before it; got {len(ids)}")
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise ValueError(f"window is an integer of at least 2; got {window!r}")
    context = max_positions(model)
    if context is not None and window > context:
        raise ValueError(f"window is {window}, but the model takes {context} tokens at most")
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    outside = ids < 0 if vocabulary is None else (ids < 0) | (ids >= vocabulary)
    if outside.any():
        raise ValueError(
            f"token id {int(ids[outside][0])} is outside the model's vocabulary of {vocabulary or 'ids from 0'}; "
            "do model and tokenizer belong together?"
        )
    return ids


def _sum_of_losses(model: nn.Module, ids: Tensor) -> float:
    output: Any = model(input_ids=ids[None], use_cache=False)
    logits: Tensor = output.logits[0, :-1]
    targets = ids[1:]
    total = torch.zeros((), dtype=torch.float64)
    # In pieces: a float32 copy of all logits would be larger than the model where the vocabulary is large.
    for part, wanted in zip(logits.split(CHUNK), targets.split(CHUNK), strict=True):
        losses = nn.functional.cross_entropy(part.float(), wanted, reduction="none")
        total += losses.double().sum().cpu()
    return float(total)
