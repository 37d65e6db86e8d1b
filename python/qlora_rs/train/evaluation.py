"""The mean loss over samples that are not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_rs.errors import FormatError
from qlora_rs.eval.mode import evaluating
from qlora_rs.train.batches import batches
from qlora_rs.train.encoding import Encoder, Sample, load_tokenizer, pad_token
from qlora_rs.train.loss import loss_sum
from qlora_rs.train.records import read_records


def mean_loss(model: Any, samples: Sequence[Sample], *, batch_size: int, pad_id: int) -> tuple[float, int]:
    """Nats a counted token, and how many tokens count; the model keeps its mode."""
    total = 0.0
    with evaluating(model):
        for batch in batches(samples, batch_size, pad_id):
            total += loss_sum(model, batch).item()
    counted = sum(sample.counted_tokens for sample in samples)
    return total / counted, counted


def held_out_loss(
    model: Any,
    tokenizer_folder: Path,
    data: Path,
    *,
    max_samples: int | None = None,
    max_length: int = 1024,
    batch_size: int = 4,
) -> float:
    """Mean loss, in nats a token, over the first samples of a JSONL file: what training would count of them.

    Args:
        model: a causal language model of transformers, with or without adapters.
        tokenizer_folder: the model folder whose tokenizer and chat template apply.
        data: JSONL in a form that `train` takes.
        max_samples: how many samples; all of them where it is None.
        max_length: longer samples are cut to so many tokens.
        batch_size: samples that go through the model at once.

    Raises:
        OSError, FormatError, UnsupportedError: as `train`, also where no token counts.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    encoder = Encoder(tokenizer, max_length, model=tokenizer_folder, data=data)
    samples = [encoder.encode(record) for record in read_records(data).records[:max_samples]]
    samples = [sample for sample in samples if sample.counted_tokens]
    if not samples:
        raise FormatError(f"{data}: no sample has a token that counts for the loss within {max_length} tokens")
    return mean_loss(model, samples, batch_size=batch_size, pad_id=pad_token(tokenizer))[0]
