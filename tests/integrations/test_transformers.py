"""The registered quantizer: both import orders, saving, other classes over the same folder, training."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import qlora_rs
from qlora_rs import Linear4bit, QuantSpec, checkpoint


@pytest.fixture(scope="module")
def packed(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "tiny"
    checkpoint.quantize(tiny_llama, folder)
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "import qlora_rs, transformers",
        "import transformers, qlora_rs",
        "import transformers.quantizers.auto, qlora_rs",
        "import qlora_rs; from transformers import AutoModelForCausalLM",
    ],
)
def test_both_import_orders_register_the_format(packed, imports):
    program = (
        f"{imports}\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(packed)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stdout == "Linear4bit\n", run.stderr


def test_importing_qlora_rs_alone_does_not_import_transformers():
    program = "import sys, qlora_rs; print('transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_save_pretrained_writes_what_the_packer_writes(tiny_llama, packed, tmp_path):
    for name, model in (("loaded", qlora_rs.from_pretrained(packed)), ("made", qlora_rs.from_pretrained(tiny_llama))):
        model.save_pretrained(tmp_path / name)
        info, expected = checkpoint.inspect(tmp_path / name), checkpoint.inspect(packed)
        assert {(row.name, row.kind, row.shape) for row in info.tensors} == {
            (row.name, row.kind, row.shape) for row in expected.tensors
        }
        config = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert config == json.loads((packed / "config.json").read_text())["quantization_config"]
        again = qlora_rs.from_pretrained(tmp_path / name)
        for (key, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
            assert torch.equal(a, b), key


def test_other_classes_over_the_same_folder_keep_their_own_heads_in_floats(packed):
    from transformers import AutoModel, AutoModelForSequenceClassification

    base = AutoModel.from_pretrained(packed)
    assert isinstance(base.layers[0].mlp.up_proj, Linear4bit)
    reference = qlora_rs.from_pretrained(packed).model
    assert torch.equal(base.layers[1].mlp.down_proj.weight, reference.layers[1].mlp.down_proj.weight)
    classifier = AutoModelForSequenceClassification.from_pretrained(packed, num_labels=3)
    assert isinstance(classifier.model.layers[0].mlp.up_proj, Linear4bit)
    assert not isinstance(classifier.score, Linear4bit)
    assert torch.isfinite(classifier(torch.arange(5)[None]).logits).all()


def test_on_the_fly_configuration_takes_patterns(tiny_llama):
    from transformers import AutoModelForCausalLM

    from qlora_rs.integrations.transformers import QloraRsConfig

    config = QloraRsConfig(block_size=32, modules_to_not_convert=["k_proj"])
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config, dtype=torch.float32)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.spec == QuantSpec("nf4", 32)
    assert not isinstance(attention.k_proj, Linear4bit)
    assert model.hf_quantizer.is_trainable


def test_a_newer_format_is_refused(packed):
    from qlora_rs.integrations.transformers import QloraRsConfig

    with pytest.raises(qlora_rs.FormatError, match="format_version is 2"):
        QloraRsConfig(format_version=2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_llama_learns_through_adapters_with_and_without_checkpointing(packed, checkpointing, descend):
    model = qlora_rs.from_pretrained(packed, dtype=torch.float32)
    qlora_rs.attach_lora(model, r=4, seed=0)
    if checkpointing:
        # Renamed in transformers 5.2x; the old name warns there.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()
    model.train()
    optimizer = torch.optim.AdamW(qlora_rs.lora_parameters(model), lr=1e-2)
    ids = torch.arange(48).view(2, 24)
    losses = descend(model, optimizer, ids, 8)
    assert losses[-1] < losses[0] - 0.1


def test_the_trainer_of_transformers_trains_the_adapters_and_refuses_a_model_without(packed, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = qlora_rs.from_pretrained(packed, dtype=torch.float32)
    with pytest.raises(ValueError, match="adapters"):
        Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    qlora_rs.attach_lora(model, r=4, seed=0)
    rows = [{"input_ids": torch.arange(20) + i, "labels": torch.arange(20) + i} for i in range(8)]
    settings = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="no"
    )
    before = [p.clone() for p in qlora_rs.lora_parameters(model)]
    with pytest.raises(qlora_rs.UnsupportedError, match="save_adapter"):
        model.save_pretrained(tmp_path / "whole")
    Trainer(model, settings, train_dataset=rows).train()
    assert any(not torch.equal(a, b) for a, b in zip(before, qlora_rs.lora_parameters(model), strict=True))
