"""Which samples a step sees, and how they lie in its batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_rs.chunked_loss import IGNORED
from qlora_rs.train.encoding import Sample


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right to the longest of them.

    Attributes:
        input_ids: (samples, length) int64.
        attention_mask: (samples, length) int64, 0 on padding.
        labels: (samples, length) int64: the token where it counts, -100 elsewhere.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def derived_seed(seed: int, *purpose: object) -> int:
    """A seed of its own for every purpose, so that none depends on how much another has drawn.

    >>> derived_seed(0, "order", 1) == derived_seed(0, "order", 1) != derived_seed(0, "order", 2)
    True
    """
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def permutation(count: int, seed: int, *purpose: object) -> list[int]:
    """0 ... count - 1 in an order that the seed decides."""
    generator = torch.Generator().manual_seed(derived_seed(seed, *purpose))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


class SampleStream:
    """The samples in the order of training, epoch after epoch; any step's can be had without those before it.

    The first epoch has the order of ``samples``, which is shuffled already; every later one a fresh permutation.
    """

    def __init__(self, samples: Sequence[Sample], seed: int, per_step: int, epochs: int | None) -> None:
        self._samples = samples
        self._seed = seed
        self._per_step = per_step
        self._end = None if epochs is None else epochs * len(samples)
        self._order: tuple[int, list[int]] = (0, list(range(len(samples))))

    def step(self, number: int) -> list[Sample]:
        """The samples of a step (from 1); fewer in the last one if the epochs end there."""
        first = (number - 1) * self._per_step
        last = first + self._per_step
        if self._end is not None:
            last = min(last, self._end)
        return [self._at(place) for place in range(first, last)]

    def _at(self, place: int) -> Sample:
        epoch, offset = divmod(place, len(self._samples))
        if self._order[0] != epoch:
            count = len(self._samples)
            shuffled = permutation(count, self._seed, "order", epoch) if epoch else list(range(count))
            self._order = (epoch, shuffled)
        return self._samples[self._order[1][offset]]


def batches(samples: Sequence[Sample], batch_size: int, pad_id: int) -> Iterator[Batch]:
    """The samples in batches, like lengths together: so there is less padding, and the sum is the same."""
    ordered = sorted(samples, key=lambda sample: sample.length, reverse=True)
    for first in range(0, len(ordered), batch_size):
        yield collate(ordered[first : first + batch_size], pad_id)


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Lay samples into one batch."""
    shape = (len(samples), max(sample.length for sample in samples))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, sample in enumerate(samples):
        ids = sample.ids.long()
        input_ids[row, : sample.length] = ids
        attention_mask[row, : sample.length] = 1
        labels[row, : sample.length] = ids.where(sample.counted, torch.tensor(IGNORED))
    return Batch(input_ids, attention_mask, labels)
