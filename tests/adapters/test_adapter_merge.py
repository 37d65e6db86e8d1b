"""`merge_adapter`: in memory, one rounding, all or nothing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qlora_rs
from qlora_rs import FormatError, Linear4bit, LoraLinear, UnsupportedError, attach_lora, lora_modules, merge_adapter
from qlora_rs.adapter_merge import merge_weight, relative_error

Q_PROJ = "model.layers.0.self_attn.q_proj"


def weights_before(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Per packed layer its dequantized weight and its adapter's delta, in float64."""
    return {
        name: (layer.base_layer.dequantize(torch.float32).double(), layer.delta().double())
        for name, layer in lora_modules(model).items()
    }


def test_logits_are_those_of_base_and_adapter(adapted_model, logits) -> None:
    model = adapted_model()
    before = logits(model)
    report = merge_adapter(model, torch.float32)
    assert not any(isinstance(module, Linear4bit | LoraLinear) for module in model.modules())
    assert torch.allclose(logits(model), before, atol=1e-5)
    assert report.max_rounding_error == 0.0
    assert report.max_base_error is None


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_weights_are_rounded_once_and_the_error_is_reported(adapted_model, dtype, digits) -> None:
    model = adapted_model(use_rslora=True)
    expected = weights_before(model)
    report = merge_adapter(model, dtype)
    assert [layer.name for layer in report.layers] == list(expected)
    for layer in report.layers:
        base, delta = expected[layer.name]
        merged = model.get_submodule(layer.name).weight
        assert merged.dtype == dtype
        exact = base + delta
        assert float(((merged.double() - exact).abs() / exact.abs().clamp_min(2**-14)).max()) <= 2.0**-digits * 1.001
        error = float((merged.double() - exact).norm() / exact.norm())
        assert layer.rounding_error == pytest.approx(error, rel=1e-3)
        assert 0 < layer.rounding_error < 2.0**-digits
    assert report.max_rounding_error == max(layer.rounding_error for layer in report.layers)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert f"{len(expected)} layers merged over the dequantized base" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["name"] == report.layers[0].name


def test_layers_without_adapter_become_plain_too_and_biases_stay(make_tiny_llama, adapted_model, tmp_path) -> None:
    source = make_tiny_llama(tmp_path / "source", attention_bias=True)
    model = adapted_model(source, target_modules=["v_proj"])
    model.model.layers[0].self_attn.q_proj.bias.data.fill_(3.0)
    expected = model.model.layers[0].self_attn.q_proj.dequantize(torch.float32)
    report = merge_adapter(model)
    layer = model.model.layers[0].self_attn.q_proj
    assert len(report.layers) == 14
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, expected.bfloat16())
    assert torch.equal(layer.bias, torch.full((72,), 3.0, dtype=torch.bfloat16))
    assert not layer.weight.requires_grad


def test_the_given_base_replaces_the_dequantized_one(tiny_llama, adapted_model) -> None:
    model = adapted_model()
    before = weights_before(model)
    report = merge_adapter(model, torch.float32, base=tiny_llama)
    source = load_file(tiny_llama / "model.safetensors")
    for layer in report.layers:
        base = source[f"{layer.name}.weight"].double()
        dequantized, delta = before[layer.name]
        assert torch.allclose(model.get_submodule(layer.name).weight.double(), base + delta, atol=1e-7)
        assert layer.base_error == pytest.approx(float((dequantized - base).norm() / base.norm()), rel=1e-4)
    assert 0.05 < report.max_base_error < 0.15
    assert str(tiny_llama) in str(report)
    assert "away from these weights" in str(report)


@pytest.mark.parametrize(("change", "match"), [({"intermediate_size": 133}, "133"), ({"num_hidden_layers": 1}, "none")])
def test_another_model_as_base_is_an_error_and_changes_nothing(
    make_tiny_llama, adapted_model, logits, tmp_path, change, match
) -> None:
    other = make_tiny_llama(tmp_path / "other", **change)
    model = adapted_model()
    before = logits(model)
    with pytest.raises(FormatError, match=match):
        merge_adapter(model, base=other)
    assert torch.equal(logits(model), before)


def test_a_packed_base_is_refused(packed, adapted_model) -> None:
    with pytest.raises(UnsupportedError, match="is quantized"):
        merge_adapter(adapted_model(), base=packed)


@pytest.mark.parametrize("where", [f"{Q_PROJ}.lora_B", "model.norm.weight"])
def test_values_that_float16_cannot_hold_are_an_error_and_change_nothing(adapted_model, logits, where) -> None:
    model = adapted_model()
    model.get_parameter(where).data.fill_(1e6)
    before = logits(model)
    with pytest.raises(FormatError, match=rf"{where.removesuffix('.lora_B')}.*do not fit float16; choose bfloat16"):
        merge_adapter(model, torch.float16)
    assert torch.equal(logits(model), before)
    assert model.model.embed_tokens.weight.dtype == torch.float32
    merge_adapter(model, torch.bfloat16)


def test_an_adapter_that_holds_nan_is_an_error_and_names_the_layer(adapted_model) -> None:
    model = adapted_model()
    lora_modules(model)[Q_PROJ].lora_A.data[0, 0] = float("nan")
    with pytest.raises(FormatError, match=rf"{Q_PROJ}: .*NaN"):
        merge_adapter(model)
    assert Q_PROJ in lora_modules(model)


def test_an_adapter_on_a_tied_head_is_refused(make_tiny_llama, adapted_model, tmp_path) -> None:
    source = make_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    model = adapted_model(source, target_modules=["lm_head"])
    with pytest.raises(UnsupportedError, match=r"lm_head shares its weight with model\.embed_tokens\.weight"):
        merge_adapter(model)
    assert "lm_head" in lora_modules(model)


def test_a_tie_survives_the_cast(make_tiny_llama, adapted_model, tmp_path) -> None:
    model = adapted_model(make_tiny_llama(tmp_path / "tied", tie_word_embeddings=True))
    merge_adapter(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_wrong_arguments_are_refused(adapted_model, tiny_llama) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match=r"bfloat16, float16 or float32; got torch\.int8"):
        merge_adapter(adapted_model(), torch.int8)
    with pytest.raises(ValueError, match="neither packed layers nor adapters"):
        merge_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama))


def test_adapters_over_float_layers_merge_too() -> None:
    model = nn.Sequential(nn.Linear(33, 65), nn.ReLU(), nn.Linear(65, 7, bias=False))
    attach_lora(model, r=3, seed=0)
    nn.init.normal_(model[0].lora_B)
    x = torch.randn(5, 33)
    before = model(x)
    buffer = torch.ones(2)
    model.register_buffer("positions", buffer)
    report = merge_adapter(model, torch.float32)
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert torch.allclose(model(x), before, atol=1e-5)
    assert model.positions is buffer


def test_the_merged_model_is_saved_and_loaded_as_a_plain_one(adapted_model, logits, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = adapted_model()
    merge_adapter(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(again), logits(model))
    assert not any("lora" in name or "absmax" in name for name in load_file(tmp_path / "model.safetensors"))


def test_a_merged_model_takes_new_adapters_and_trains(adapted_model) -> None:
    model = adapted_model()
    merge_adapter(model, torch.float32)
    attach_lora(model, r=2)
    ids = torch.arange(3, 26)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in qlora_rs.lora_parameters(model))


def test_relative_error_of_zeros_and_sums_that_float32_cannot_hold() -> None:
    zero = torch.zeros(3)
    assert relative_error(zero, zero) == 0.0
    assert relative_error(torch.ones(3), zero) == float("inf")
    assert relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])) == pytest.approx(0.5**0.5)
    with pytest.raises(FormatError, match="NaN or inf"):
        merge_weight(torch.full((2, 2), 3e38), torch.full((2, 2), 3e38), torch.float32)
    with pytest.raises(FormatError, match="do not fit bfloat16; choose float32"):
        merge_weight(torch.full((2, 2), 3.4e38), None, torch.bfloat16)
