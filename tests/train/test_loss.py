"""`qlora_rs.train.loss`: the sum over the tokens that count, whatever the padding."""

from __future__ import annotations

import torch

import qlora_rs
from qlora_rs.train.batches import collate
from qlora_rs.train.encoding import Sample
from qlora_rs.train.loss import loss_sum


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in (5, 17, 9):
        ids = torch.randint(3, 250, (length,), generator=generator, dtype=torch.int32)
        made.append(Sample(1, ids, (torch.arange(length) % 3) == 1, 0))
    return made


def test_it_is_the_negative_log_likelihood_of_the_counted_tokens_alone(packed):
    model = qlora_rs.from_pretrained(packed, dtype=torch.float32)
    expected = 0.0
    for sample in samples():
        scores = model(input_ids=sample.ids.long()[None]).logits[0].double().log_softmax(-1)
        for place in sample.counted.nonzero().flatten().tolist():
            expected -= scores[place - 1, sample.ids[place]].item()
    with torch.no_grad():
        found = loss_sum(model, collate(samples(), pad_id=0)).item()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_the_head_works_only_where_the_next_token_counts_and_is_left_as_it_was(packed):
    model = qlora_rs.from_pretrained(packed, dtype=torch.float32)
    rows = []
    with model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: rows.append(output.shape)):
        loss_sum(model, collate(samples(), pad_id=0))
    counted = sum(sample.counted_tokens for sample in samples())
    assert [tuple(shape[:2]) for shape in rows] == [(1, counted)]
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_model_whose_head_is_not_known_gives_the_same(packed, monkeypatch):
    model = qlora_rs.from_pretrained(packed, dtype=torch.float32)
    batch = collate(samples(), pad_id=0)
    with torch.no_grad():
        found = loss_sum(model, batch)
        monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
        torch.testing.assert_close(loss_sum(model, batch), found)
