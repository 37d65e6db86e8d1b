"""`from_pretrained`: packed folders and float ones, and everything that can be wrong with them."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora_rs
from qlora_rs import Linear4bit, QuantSpec, checkpoint

SPECS = [
    QuantSpec(),
    QuantSpec("fp4", 32, False),
    QuantSpec("int8", 128),
    QuantSpec("dynamic8", 32, False),
    QuantSpec(codebook=[-1, -0.2, 0, 0.4, 1]),
    QuantSpec(codebook=[k / 128 - 1 for k in range(256)]),
]


@pytest.fixture
def packed(tiny_llama, tmp_path):
    checkpoint.quantize(tiny_llama, tmp_path / "packed")
    return tmp_path / "packed"


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    from safetensors import safe_open

    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
def test_a_packed_folder_and_quantizing_on_the_way_in_give_the_same_bytes(tiny_llama, tmp_path, spec):
    checkpoint.quantize(tiny_llama, tmp_path / "packed", spec)
    files, memory = qlora_rs.from_pretrained(tmp_path / "packed"), qlora_rs.from_pretrained(tiny_llama, spec)
    for (name, a), (other, b) in zip(files.named_parameters(), memory.named_parameters(), strict=True):
        assert name == other
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name
    packed = [module for module in files.modules() if isinstance(module, Linear4bit)]
    assert len(packed) == 14
    assert all(module.spec == spec for module in packed)
    assert not files.training
    assert not memory.training


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_stored_values_are_quantized_whatever_type_is_computed_in(make_tiny_llama, tmp_path, stored, dtype):
    source = make_tiny_llama(tmp_path / "source", dtype=stored)
    model = qlora_rs.from_pretrained(source, dtype=dtype)
    expected = qlora_rs.quantize(load_file(source / "model.safetensors")["model.layers.1.mlp.down_proj.weight"])
    layer = model.model.layers[1].mlp.down_proj
    assert torch.equal(layer.weight, expected.codes)
    assert torch.equal(layer.packed().absmax_offset, expected.absmax_offset)
    assert model.model.embed_tokens.weight.dtype == dtype
    ids = torch.arange(7)[None]
    assert model(ids).logits.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_the_model_computes_for_itself_has_the_type_that_it_has_in_a_float_model(tiny_llama, dtype):
    from transformers import AutoModelForCausalLM

    ours = qlora_rs.from_pretrained(tiny_llama, dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype)
    expected = dict(theirs.named_buffers())
    assert "model.rotary_emb.inv_freq" in expected
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, expected[name], rtol=0, atol=0)


def test_a_folder_of_mixed_types_is_quantized_from_its_own_values(tiny_llama, make_tiny_llama, tmp_path):
    source = make_tiny_llama(tmp_path / "source", dtype=torch.float32)
    edit_tensors(source, lambda t: t.update({k: v.half() for k, v in t.items() if "norm" in k}))
    edit_config(source, lambda config: config.update(dtype="bfloat16"))
    checkpoint.quantize(source, tmp_path / "packed")
    files, memory = qlora_rs.from_pretrained(tmp_path / "packed"), qlora_rs.from_pretrained(source)
    for (name, a), (_, b) in zip(files.named_parameters(), memory.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_computes_what_the_dequantized_model_computes(packed):
    from transformers import AutoModelForCausalLM

    ours = qlora_rs.from_pretrained(packed, dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).dequantize()
    assert not any(isinstance(module, Linear4bit) for module in theirs.modules())
    few, many = torch.arange(31)[None], torch.arange(47)[None]
    with torch.no_grad():
        # Few tokens are multiplied with the packed weight itself, whose sums have an order of their own.
        torch.testing.assert_close(ours(few).logits, theirs(few).logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours(many).logits, theirs(many).logits)


def test_a_tied_head_stays_tied(make_tiny_llama, tmp_path):
    source = make_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    checkpoint.quantize(source, tmp_path / "packed")
    for folder in (source, tmp_path / "packed"):
        model = qlora_rs.from_pretrained(folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_biases_are_loaded(make_tiny_llama, tmp_path):
    source = make_tiny_llama(tmp_path / "source", attention_bias=True)
    edit_tensors(source, lambda t: t["model.layers.0.self_attn.q_proj.bias"].fill_(3.0))
    model = qlora_rs.from_pretrained(source)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, torch.full((72,), 3.0, dtype=model.dtype))


def test_a_head_that_was_packed_by_include_is_loaded_packed(tiny_llama, tmp_path):
    checkpoint.quantize(tiny_llama, tmp_path / "packed", include=["lm_head"], skip_modules=["v_proj"])
    model = qlora_rs.from_pretrained(tmp_path / "packed")
    assert isinstance(model.lm_head, Linear4bit)
    assert not isinstance(model.model.layers[0].self_attn.v_proj, Linear4bit)


def test_shards_are_loaded(tiny_llama, tmp_path):
    checkpoint.quantize(tiny_llama, tmp_path / "packed", max_shard_size=20_000)
    checkpoint.quantize(tiny_llama, tmp_path / "whole")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 2
    a, b = (qlora_rs.from_pretrained(tmp_path / name).state_dict() for name in ("packed", "whole"))
    assert all(torch.equal(a[key], b[key]) for key in b)


def test_the_spec_of_a_packed_folder_may_be_repeated_but_not_changed(packed):
    qlora_rs.from_pretrained(packed, QuantSpec())
    with pytest.raises(ValueError, match=r"packed as nf4, block_size=64.*loaded as nf4, block_size=32"):
        qlora_rs.from_pretrained(packed, QuantSpec("nf4", 32))


def test_what_is_not_there_or_no_model_is_an_error(tiny_llama, tmp_path):
    with pytest.raises(FileNotFoundError):
        qlora_rs.from_pretrained(tmp_path / "absent")
    with pytest.raises(NotADirectoryError):
        qlora_rs.from_pretrained(tiny_llama / "model.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(qlora_rs.FormatError, match=r"no config\.json"):
        qlora_rs.from_pretrained(tmp_path / "empty")


@pytest.mark.parametrize(("argument", "match"), [({"dtype": "int8"}, "dtype"), ({"dtype": torch.float64}, "dtype")])
def test_a_type_that_is_no_float_type_is_refused(tiny_llama, argument, match):
    with pytest.raises(ValueError, match=match):
        qlora_rs.from_pretrained(tiny_llama, **argument)


def test_a_device_without_kernels_or_that_is_not_there_is_refused(packed):
    for device in ("meta", "xpu:0"):
        with pytest.raises(qlora_rs.UnsupportedError, match=f"no kernels for {device}"):
            qlora_rs.from_pretrained(packed, device=device)
    with pytest.raises(qlora_rs.DeviceError, match="there is no CUDA device"):
        qlora_rs.from_pretrained(packed, device="cuda:63")


def test_another_librarys_format_is_refused_by_name(packed):
    edit_config(packed, lambda config: config["quantization_config"].update(quant_method="hqq"))
    with pytest.raises(qlora_rs.UnsupportedError, match="quantized by 'hqq'"):
        qlora_rs.from_pretrained(packed)


def test_without_transformers_the_extra_is_named(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(qlora_rs.UnsupportedError, match=r"qlora-rs\[transformers\]"):
        qlora_rs.from_pretrained(packed)


def test_a_missing_weight_is_an_error_and_not_drawn_at_random(packed):
    edit_tensors(packed, lambda t: t.pop("model.layers.1.input_layernorm.weight"))
    with pytest.raises(qlora_rs.FormatError, match=r"1 weights .* in none of its files.*layers\.1\.input_layernorm"):
        qlora_rs.from_pretrained(packed)


def test_a_missing_packed_weight_is_an_error(packed):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(packed, lambda t: [t.pop(name + part) for part in ("", "_absmax", "_absmax_scale", "_absmax_offset")])
    with pytest.raises(qlora_rs.FormatError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        qlora_rs.from_pretrained(packed)


def test_a_shape_that_config_does_not_ask_for_is_an_error(tiny_llama, packed, tmp_path, make_tiny_llama):
    source = make_tiny_llama(tmp_path / "source")
    for folder in (packed, source):
        edit_config(folder, lambda config: config.update(intermediate_size=133))
        with pytest.raises(qlora_rs.FormatError, match=r"mlp\.(down|gate|up)_proj.*131.*133"):
            qlora_rs.from_pretrained(folder)


def test_a_nan_weight_is_named(make_tiny_llama, tmp_path):
    source = make_tiny_llama(tmp_path / "source")
    edit_tensors(source, lambda t: t["model.layers.1.mlp.up_proj.weight"].view(-1)[19:21].fill_(float("nan")))
    with pytest.raises(qlora_rs.NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight: .*2 .*19"):
        qlora_rs.from_pretrained(source)


def test_a_truncated_file_is_an_error(packed):
    path = packed / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(qlora_rs.FormatError, match="cut off"):
        qlora_rs.from_pretrained(packed)


def test_packed_weights_of_layers_that_cannot_compute_are_refused(tiny_llama, tmp_path):
    checkpoint.quantize(tiny_llama, tmp_path / "packed", include=["embed_tokens"])
    with pytest.raises(qlora_rs.UnsupportedError, match=r"embed_tokens\.weight is packed, but belongs to a Embedding"):
        qlora_rs.from_pretrained(tmp_path / "packed")


def test_packed_weights_that_the_model_lacks_are_an_error(packed):
    edit_config(packed, lambda config: config.update(num_hidden_layers=1))
    with pytest.raises(qlora_rs.FormatError, match=r"no parameter for the packed weight 'model\.layers\.1"):
        qlora_rs.from_pretrained(packed)


def test_tensors_that_the_model_lacks_are_mentioned(packed):
    edit_tensors(packed, lambda t: t.update({"model.strange.weight": torch.ones(3)}))
    with pytest.warns(UserWarning, match=r"1 tensors are no parameters.*strange"):
        qlora_rs.from_pretrained(packed)


def test_nothing_is_printed(packed, tiny_llama, capfd):
    qlora_rs.from_pretrained(packed)
    qlora_rs.from_pretrained(tiny_llama)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
