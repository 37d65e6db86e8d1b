"""`quantize_model`: in place, reported, all or nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qlora_rs
from qlora_rs import Linear4bit, NonFiniteError, QuantSpec, quantize_model


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 33)
        self.up_proj = nn.Linear(33, 65)
        self.down_proj = nn.Linear(65, 33, bias=False)
        self.norm = nn.LayerNorm(33)
        self.lm_head = nn.Linear(33, 11, bias=False)


def test_layers_are_replaced_by_what_from_float_makes_and_the_report_adds_up() -> None:
    model = Model()
    up, bias = model.up_proj, model.up_proj.bias
    before = sum(p.nbytes for p in model.parameters())
    seen: list[tuple[int, int]] = []
    report = quantize_model(model, QuantSpec("nf4", 32), progress=lambda done, total: seen.append((done, total)))
    assert isinstance(model.up_proj, Linear4bit)
    assert torch.equal(model.up_proj.weight, Linear4bit.from_float(up, QuantSpec("nf4", 32)).weight)
    assert model.up_proj.bias is bias
    assert [entry.name for entry in report.packed] == ["up_proj.weight", "down_proj.weight"]
    assert {entry.name: entry.reason for entry in report.skipped} == {
        "embed.weight": "Embedding: not a Linear layer",
        "up_proj.bias": "bias",
        "norm.weight": "LayerNorm: not a Linear layer",
        "norm.bias": "bias",
        "lm_head.weight": "output head",
    }
    assert report.bytes_before == before
    assert report.bytes_after == sum(p.nbytes for p in model.parameters())
    kept = sum(entry.bytes for entry in report.skipped)
    assert report.bytes_after == kept + sum(entry.bytes_after for entry in report.packed)
    assert seen == [(4 * 33 * 65, 8 * 33 * 65), (8 * 33 * 65, 8 * 33 * 65)]


def test_patterns_decide_and_one_that_matches_nothing_is_an_error() -> None:
    report = quantize_model(Model(), skip_modules=["up_proj"], include=["lm_head"])
    assert [entry.name for entry in report.packed] == ["down_proj.weight", "lm_head.weight"]
    with pytest.raises(ValueError, match="'q_proj' matches no Linear layer"):
        quantize_model(Model(), skip_modules=["q_proj"])


def test_a_weight_that_is_shared_stays_and_says_so() -> None:
    model = Model()
    model.tied = nn.Linear(33, 65)
    model.tied.weight = model.up_proj.weight
    report = quantize_model(model)
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert reasons["up_proj.weight"] == "shares its weight with tied.weight"
    assert model.tied.weight is model.up_proj.weight


def test_what_is_packed_already_stays() -> None:
    model = Model()
    quantize_model(model, skip_modules=["up_proj"])
    down = model.down_proj
    quantize_model(model)
    assert model.down_proj is down
    with pytest.raises(ValueError, match="nothing to pack"):
        quantize_model(model)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = Model()
    with torch.no_grad():
        model.down_proj.weight[3, 4] = float("inf")
    with pytest.raises(NonFiniteError, match=rf"down_proj\.weight holds 1 .* index {3 * 65 + 4}"):
        quantize_model(model)
    assert type(model.up_proj) is nn.Linear
    with pytest.raises(qlora_rs.UnsupportedError, match="float64"):
        quantize_model(Model().double())


def test_training_mode_is_kept() -> None:
    model = Model().eval()
    quantize_model(model)
    assert not model.up_proj.training


def test_a_transformers_model_quantized_in_memory_can_be_saved_and_loaded(tiny_llama, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    quantize_model(model, QuantSpec("fp4", 32))
    model.save_pretrained(tmp_path / "saved")
    again = qlora_rs.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert qlora_rs.checkpoint.inspect(tmp_path / "saved").spec == QuantSpec("fp4", 32)
    ids = torch.arange(19)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
