"""`qlora_rs.train.batches`: which samples a step sees, and how they lie in its batches."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from qlora_rs.train.batches import SampleStream, batches, collate, permutation
from qlora_rs.train.encoding import Sample


def sample(length: int, line: int = 1) -> Sample:
    counted = torch.arange(length) % 2 == 1
    return Sample(line, torch.arange(1, length + 1, dtype=torch.int32), counted, 0)


def lines(stream: SampleStream, steps: int) -> list[list[int]]:
    return [[each.line for each in stream.step(number)] for number in range(1, steps + 1)]


@pytest.fixture
def seven() -> list[Sample]:
    return [sample(3, line) for line in range(7)]


def test_every_epoch_sees_every_sample_once_and_each_in_another_order(seven):
    seen = list(chain(*lines(SampleStream(seven, 0, 3, epochs=3), 7)))
    epochs = [seen[7 * epoch : 7 * epoch + 7] for epoch in range(3)]
    assert epochs[0] == list(range(7))  # shuffled already
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_last_step_ends_with_the_last_epoch(seven):
    stream = SampleStream(seven, 0, 4, epochs=2)
    assert [len(stream.step(number)) for number in (1, 2, 3, 4)] == [4, 4, 4, 2]


def test_without_epochs_the_stream_never_ends(seven):
    assert [len(each) for each in lines(SampleStream(seven, 0, 5, epochs=None), 20)] == [5] * 20


def test_a_step_can_be_had_without_those_before_it(seven):
    in_order = lines(SampleStream(seven, 1, 3, epochs=None), 12)
    assert [each.line for each in SampleStream(seven, 1, 3, epochs=None).step(9)] == in_order[8]


def test_another_seed_gives_another_order():
    assert permutation(50, 0, "order") == permutation(50, 0, "order")
    assert permutation(50, 0, "order") != permutation(50, 1, "order")
    assert permutation(50, 0, "order") != permutation(50, 0, "held-out")
    assert sorted(permutation(50, 0)) == list(range(50))


def test_padding_is_masked_and_never_counts():
    batch = collate([sample(2), sample(5)], pad_id=99)
    assert batch.input_ids.tolist() == [[1, 2, 99, 99, 99], [1, 2, 3, 4, 5]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [[-100, 2, -100, -100, -100], [-100, 2, -100, 4, -100]]


def test_batches_hold_every_sample_once_with_like_lengths_together():
    parts = list(batches([sample(length) for length in (1, 9, 2, 8, 3)], 2, pad_id=0))
    assert [part.attention_mask.sum(1).tolist() for part in parts] == [[9, 8], [3, 2], [1]]
