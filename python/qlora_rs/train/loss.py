"""The loss of a batch: the sum over its counted tokens, so that sums of batches add up to a mean over all tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qlora_rs.chunked_loss import causal_lm_loss
from qlora_rs.eval.mode import device_of
from qlora_rs.train.batches import Batch


def loss_sum(model: Any, batch: Batch) -> Tensor:
    """Negative log-likelihood in nats, summed over the counted tokens; float32 scalar.

    Logits are made only where the next token counts, and of many tokens in chunks: with a large vocabulary they are a
    good part of the work, and the largest tensor by far.
    """
    batch = batch.to(device_of(model))
    return causal_lm_loss(model, batch.input_ids, batch.labels, reduction="sum", attention_mask=batch.attention_mask)
