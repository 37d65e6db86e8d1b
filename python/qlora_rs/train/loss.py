"""The loss of a batch: the sum over its counted tokens, so that sums of batches add up to a mean over all tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_rs.eval.mode import device_of
from qlora_rs.train.batches import IGNORED, Batch


def loss_sum(model: Any, batch: Batch) -> Tensor:
    """Negative log-likelihood in nats, summed over the counted tokens; float32 scalar.

    Logits are made only where the next token counts: with a large vocabulary they are a good part of the work.
    """
    batch = batch.to(device_of(model))
    targets = batch.labels[:, 1:]
    rows = nn.functional.pad(targets != IGNORED, (0, 1))  # (samples, length): predicts a token that counts
    with _head_sees(model, rows):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    if logits.shape[:2] == rows.shape:  # a model without a head that could be told; else (1, counted, vocabulary)
        logits = logits[rows]
    return nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), targets[targets != IGNORED], reduction="sum"
    )


@contextmanager
def _head_sees(model: Any, rows: Tensor) -> Iterator[None]:
    """Within the context the output head gets (1, counted, hidden) in place of (samples, length, hidden)."""
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    if head is None:
        yield
        return

    def select(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not inputs or not isinstance(inputs[0], torch.Tensor) or inputs[0].shape[:2] != rows.shape:
            return None
        return (inputs[0][rows][None], *inputs[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
