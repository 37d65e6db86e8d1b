"""Adapter files: the same computation in PEFT and here, and errors that change nothing."""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from torch import nn

import qlora_rs
from qlora_rs import adapters, lora_modules
from qlora_rs.adapters import CONFIG_FILE, WEIGHTS_FILE, adapter_delta, read_adapter

# PEFT asks transformers in its old words.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"r": 7, "lora_alpha": 2.5, "use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1},
        {"target_modules": ["model.layers.1.*"]},
        {"target_modules": ["lm_head"]},
    ],
    ids=str,
)
def test_peft_computes_the_same_from_our_files(plain_model, adapted_model, logits, tmp_path, settings) -> None:
    from peft import PeftModel

    model = adapted_model(**settings)
    qlora_rs.save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(plain_model(), tmp_path / "adapter")
    assert torch.allclose(logits(theirs), logits(model), atol=1e-5)
    with theirs.disable_adapter():
        assert not torch.allclose(logits(theirs), logits(model), atol=1e-3)
    layers = {name for name, _ in theirs.named_modules() if name.endswith(".lora_A")}
    assert layers == {f"base_model.model.{name}.lora_A" for name in lora_modules(model)}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["up_proj", "v_proj"], "use_rslora": True, "lora_dropout": 0.2},
        {"target_modules": r".*\.1\..*(q|down)_proj"},
        {"target_modules": ["k_proj"], "layers_to_transform": [1], "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_we_compute_the_same_from_files_of_peft(packed, plain_model, logits, tmp_path, settings) -> None:
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(plain_model(), LoraConfig(r=4, lora_alpha=9, task_type="CAUSAL_LM", **settings))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = qlora_rs.from_pretrained(packed, dtype=torch.float32)
    before = logits(ours)
    report = qlora_rs.load_adapter(ours, tmp_path / "adapter")
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    assert not torch.allclose(logits(ours), before, atol=1e-3)
    assert report.trainable_parameters == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    layer = lora_modules(ours)[report.attached[0]]
    assert layer.lora_dropout == settings.get("lora_dropout", 0.0)


def test_a_round_trip_keeps_values_settings_and_the_random_state(packed, adapted_model, logits, tmp_path) -> None:
    model = adapted_model(r=5, lora_alpha=2.5, lora_dropout=0.25, use_rslora=True, target_modules=["q_proj", "lm_head"])
    qlora_rs.save_adapter(model, tmp_path / "deep" / "adapter")
    again = qlora_rs.from_pretrained(packed, dtype=torch.float32)
    drawn = torch.get_rng_state()
    report = qlora_rs.load_adapter(again, tmp_path / "deep" / "adapter")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert set(report.attached) == set(lora_modules(model))
    for name, layer in lora_modules(model).items():
        other = lora_modules(again)[name]
        assert torch.equal(layer.lora_A, other.lora_A)
        assert torch.equal(layer.lora_B, other.lora_B)
        assert (other.r, other.lora_alpha, other.lora_dropout, other.use_rslora) == (5, 2.5, 0.25, True)
        assert other.lora_A.requires_grad
        assert not other.training
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_read_adapter_gives_what_a_layer_computes(adapted_model, tmp_path, use_rslora) -> None:
    model = adapted_model(use_rslora=use_rslora)
    qlora_rs.save_adapter(model, tmp_path)
    config, pairs = read_adapter(tmp_path)
    assert pairs.keys() == lora_modules(model).keys()
    for name, layer in lora_modules(model).items():
        assert torch.equal(adapter_delta(config, pairs[name]), layer.delta())


def test_files_are_pefts_and_readable_by_whom_the_umask_allows(adapted_model, tmp_path) -> None:
    old = os.umask(0o027)
    try:
        qlora_rs.save_adapter(adapted_model(), tmp_path / "adapter", base_model_name_or_path="some/base")
    finally:
        os.umask(old)
    assert sorted(os.listdir(tmp_path / "adapter")) == [CONFIG_FILE, WEIGHTS_FILE]
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert stat.S_IMODE((tmp_path / "adapter" / file).stat().st_mode) == 0o640
    config = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["task_type"] == "CAUSAL_LM"
    assert set(config["target_modules"]) == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    with safe_open(tmp_path / "adapter" / WEIGHTS_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert len(file.keys()) == 28


def test_names_are_written_in_full_where_last_parts_would_select_others_too(adapted_model, tmp_path) -> None:
    model = adapted_model(target_modules=["model.layers.1.mlp.*"])
    qlora_rs.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["target_modules"] == [f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")]


def test_a_model_without_adapters_or_with_unequal_ones_cannot_be_saved(packed, adapted_model, tmp_path) -> None:
    with pytest.raises(ValueError, match="no adapters"):
        qlora_rs.save_adapter(qlora_rs.from_pretrained(packed), tmp_path / "adapter")
    model = adapted_model()
    lora_modules(model)[Q_PROJ].lora_alpha = 6
    with pytest.raises(ValueError, match=r"differ in .*\(3, 5, .*\(3, 6"):
        qlora_rs.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("failing", ["save", "fsync"])
def test_an_interrupted_save_keeps_the_old_files_and_leaves_no_others(
    adapted_model, tmp_path, monkeypatch, failing
) -> None:
    qlora_rs.save_adapter(adapted_model(), tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    model = adapted_model(seed=2, lora_alpha=77)

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((adapters, "save") if failing == "save" else (os, "fsync")), interrupt)
        with pytest.raises(KeyboardInterrupt):
            qlora_rs.save_adapter(model, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    qlora_rs.save_adapter(model, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} != before


def test_a_full_disk_names_the_file(adapted_model, tmp_path) -> None:
    (tmp_path / f"{WEIGHTS_FILE}.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left.*{WEIGHTS_FILE}"):
        qlora_rs.save_adapter(adapted_model(), tmp_path)
    assert os.listdir(tmp_path) == []


def test_values_are_taken_over_by_a_model_that_has_the_same_adapters(adapted_model, adapter, logits) -> None:
    model = adapted_model(seed=9, lora_dropout=0.5)
    expected = logits(adapted_model())
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    qlora_rs.load_adapter(model, adapter)
    assert torch.equal(logits(model), expected)
    assert {layer.lora_dropout for layer in lora_modules(model).values()} == {0.5}


def test_training_goes_on_from_a_loaded_adapter(packed, adapter) -> None:
    model = qlora_rs.from_pretrained(packed, dtype=torch.float32)
    qlora_rs.load_adapter(model, adapter)
    ids = torch.arange(3, 26)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {f"{name}.lora_{half}" for name in lora_modules(model) for half in "AB"}
