"""Which tensors are packed: by the model that transformers builds, and by patterns."""

from __future__ import annotations

import sys

import pytest
import torch

import qlora_rs
from qlora_rs import checkpoint


def packed_names(source, tmp_path, **options):
    report = checkpoint.quantize(source, tmp_path / "packed", dry_run=True, **options)
    return {entry.name for entry in report.packed}, report


def test_heads_embeddings_and_norms_stay_with_a_reason(make_model, tmp_path):
    names, report = packed_names(make_model(), tmp_path)
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert len(names) == 14
    assert set(reasons) >= {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    assert reasons["model.embed_tokens.weight"] == "embedding"
    assert all(reasons.values())


def test_names_without_the_base_models_prefix_are_found(make_model, load_folder, write_tensors, tmp_path):
    tensors = {
        name.removeprefix("model."): tensor
        for name, tensor in load_folder(make_model()).items()
        if name != "lm_head.weight"
    }
    source = write_tensors(tmp_path / "base", tensors)
    names, _ = packed_names(source, tmp_path)
    assert "layers.1.mlp.down_proj.weight" in names
    assert len(names) == 14


@pytest.mark.parametrize(
    "pattern", ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj.weight", "*.0.mlp.down*"]
)
def test_skip_patterns_are_full_names_or_globs(make_model, tmp_path, pattern):
    names, report = packed_names(make_model(), tmp_path, skip_modules=[pattern])
    assert "model.layers.0.mlp.down_proj.weight" not in names
    assert len(names) == 13
    assert any(entry.name == "model.layers.0.mlp.down_proj.weight" and entry.reason for entry in report.skipped)


def test_skip_by_last_component_and_modules_to_not_convert(make_model, tmp_path):
    checkpoint.quantize(make_model(), tmp_path / "packed", skip_modules=["v_proj"])
    config = checkpoint.read_quantization_config(tmp_path / "packed")
    expected = {"lm_head", "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"}
    assert set(config["modules_to_not_convert"]) == expected


def test_include_overrides_the_defaults(make_model, tmp_path):
    names, _ = packed_names(make_model(), tmp_path, include=["lm_head"])
    assert len(names) == 15
    names, report = packed_names(make_model(), tmp_path, include=["embed_tokens"])
    assert "model.embed_tokens.weight" in names
    assert any("not the weight of a Linear layer" in note for note in report.notes)


@pytest.mark.parametrize("option", ["skip_modules", "include"])
def test_a_pattern_that_matches_nothing_names_what_is_close(make_model, tmp_path, option):
    with pytest.raises(ValueError, match=r"donw_proj.*down_proj"):
        packed_names(make_model(), tmp_path, **{option: ["donw_proj"]})


def test_including_what_cannot_be_packed_is_an_error(make_model, tmp_path):
    with pytest.raises(ValueError, match=r"input_layernorm.*cannot be packed"):
        packed_names(make_model(), tmp_path, include=["input_layernorm"])


def test_skipping_everything_is_an_error(make_model, tmp_path):
    with pytest.raises(qlora_rs.UnsupportedError, match="nothing to pack"):
        packed_names(make_model(), tmp_path, skip_modules=["*"])


def test_a_tied_head_is_not_in_the_files_and_that_is_no_fault(make_model, tmp_path):
    source = make_model(tie_word_embeddings=True)
    names, _ = packed_names(source, tmp_path)
    assert len(names) == 14
    names, report = packed_names(source, tmp_path, include=["lm_head", "q_proj"])
    assert len(names) == 14
    assert any("lm_head.weight is tied" in note for note in report.notes)


def test_unknown_architecture_needs_include(make_model, tmp_path):
    source = make_model(model_type="never_heard_of_it", architectures=["NoSuchForCausalLM"])
    with pytest.raises(qlora_rs.UnsupportedError, match=r"never_heard_of_it.*--include PATTERN"):
        packed_names(source, tmp_path)
    names, report = packed_names(source, tmp_path, include=["*_proj"], skip_modules=["k_proj"])
    assert len(names) == 12
    assert any("only what --include names" in note for note in report.notes)


def test_without_transformers_include_names_the_weights(make_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    source = make_model()
    with pytest.raises(qlora_rs.UnsupportedError, match=r"qlora-rs\[transformers\].*--include"):
        packed_names(source, tmp_path)
    names, _ = packed_names(source, tmp_path, include=["*.mlp.*", "q_proj"])
    assert len(names) == 8
    checkpoint.quantize(source, tmp_path / "packed", include=["*_proj"])
    stays = checkpoint.read_quantization_config(tmp_path / "packed")["modules_to_not_convert"]
    assert set(stays) == {"lm_head", "model.embed_tokens"}


def test_a_linear_weight_that_no_file_holds_is_an_error(make_model, load_folder, write_tensors, tmp_path):
    tensors = load_folder(make_model())
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    source = write_tensors(tmp_path / "gap", tensors)
    with pytest.raises(qlora_rs.FormatError, match=r"1 Linear weights.*layers\.1\.self_attn\.q_proj\.weight"):
        packed_names(source, tmp_path)


def test_a_shape_that_config_does_not_ask_for_is_an_error(make_model, tmp_path):
    with pytest.raises(qlora_rs.FormatError, match=r"shape \[131, 72\].*\[133, 72\]"):
        packed_names(make_model(intermediate_size=133), tmp_path)


def test_linear_weights_in_eight_bits_are_refused(make_model, load_folder, write_tensors, tmp_path):
    tensors = load_folder(make_model())
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    source = write_tensors(tmp_path / "fp8", tensors)
    with pytest.raises(qlora_rs.UnsupportedError, match=r"F8_E4M3.*--skip"):
        packed_names(source, tmp_path)
    names, _ = packed_names(source, tmp_path, skip_modules=["model.layers.0.self_attn.q_proj"])
    assert len(names) == 13


def test_experts_that_transformers_fuses_are_packed_one_by_one(write_tensors, tmp_path):
    expert = "model.layers.0.block_sparse_moe.experts.{}.{}.weight"
    shapes = {"w1": (40, 32), "w2": (32, 40), "w3": (40, 32)}
    tensors = {expert.format(e, w): torch.zeros(shape) for e in range(2) for w, shape in shapes.items()}
    tensors |= {f"model.layers.0.self_attn.{p}_proj.weight": torch.zeros(32, 32) for p in "qkvo"}
    tensors |= {
        "model.layers.0.block_sparse_moe.gate.weight": torch.zeros(2, 32),
        "model.embed_tokens.weight": torch.zeros(11, 32),
        "lm_head.weight": torch.zeros(11, 32),
    }
    source = write_tensors(
        tmp_path / "moe",
        tensors,
        model_type="mixtral",
        architectures=["MixtralForCausalLM"],
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_key_value_heads=4,
        num_local_experts=2,
        vocab_size=11,
    )
    names, report = packed_names(source, tmp_path)
    attention = {f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkvo"}
    assert names == attention | {expert.format(e, w) for e in range(2) for w in shapes}
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert "not a Linear layer" in reasons["model.layers.0.block_sparse_moe.gate.weight"]
    names, _ = packed_names(source, tmp_path, skip_modules=["*.experts.*"])
    assert names == attention
