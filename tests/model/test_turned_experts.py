"""Qwen3-VL-MoE: transformers takes its stacks of experts as (out, in) and as (in, out), and tells by the shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora_rs
from mixtures import EXPERTS, HIDDEN, INNER, SHARED, logits, plain
from qlora_rs import FormatError, checkpoint
from qlora_rs.merge import merge

KIND = "AutoModelForImageTextToText"
FUSED = [
    f"model.language_model.layers.{layer}.mlp.experts.{part}_proj" for layer in (0, 1) for part in ("gate_up", "down")
]


def write_source(folder: Path) -> None:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    torch.manual_seed(3)
    text = {
        **SHARED,
        "intermediate_size": 45,
        "moe_intermediate_size": INNER,
        "num_experts": EXPERTS,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": HIDDEN}
    config = Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    Qwen3VLMoeForConditionalGeneration(config).save_pretrained(folder)


@pytest.fixture
def source(tmp_path) -> Path:
    """As transformers saves it: (experts, out, in)."""
    write_source(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def turned(source, tmp_path) -> Path:
    """The same as it was published: (experts, in, out)."""
    folder = tmp_path / "turned"
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    assert weights[FUSED[0]].shape == (EXPERTS, 2 * INNER, HIDDEN)
    weights |= {name: weights[name].mT.contiguous() for name in FUSED}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_both_layouts_pack_to_one_model(source, turned, tmp_path) -> None:
    checkpoint.quantize(source, tmp_path / "packed")
    checkpoint.quantize(turned, tmp_path / "packed_turned")
    assert checkpoint.verify(tmp_path / "packed_turned", turned).same
    rows = {row.name: row for row in checkpoint.inspect(tmp_path / "packed_turned").packed}
    assert all(rows[name].transposed for name in FUSED)
    assert rows[FUSED[0]].shape == (EXPERTS, 2 * INNER, HIDDEN)
    expected = qlora_rs.from_pretrained(tmp_path / "packed", dtype="float32")
    for folder in (tmp_path / "packed_turned", turned, source):
        model = qlora_rs.from_pretrained(folder, dtype="float32")
        state = model.state_dict()
        for name, tensor in expected.state_dict().items():
            assert torch.equal(state[name], tensor), name
        model.save_pretrained(tmp_path / "saved")
        assert checkpoint.diff(tmp_path / "packed", tmp_path / "saved").same


def test_in_sixteen_bits_again_it_has_the_layout_of_its_source(source, turned, tmp_path) -> None:
    models = []
    for folder in (source, turned):
        checkpoint.quantize(folder, tmp_path / f"{folder.name}_packed")
        checkpoint.convert(tmp_path / f"{folder.name}_packed", tmp_path / f"{folder.name}_plain", "bf16")
        stored, original = (
            load_file(each / "model.safetensors") for each in (tmp_path / f"{folder.name}_plain", folder)
        )
        assert {name: tensor.shape for name, tensor in stored.items()} == {n: t.shape for n, t in original.items()}
        models.append(plain(tmp_path / f"{folder.name}_plain", KIND).state_dict())
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


def test_adapters_of_single_experts_merge_into_either_layout(source, turned, tmp_path) -> None:
    for folder in (source, turned):
        checkpoint.quantize(folder, tmp_path / f"{folder.name}_packed")
    model = qlora_rs.from_pretrained(tmp_path / "turned_packed", dtype="float32")
    targets = ["*.experts.2.gate_up_proj", "*.experts.3.down_proj"]
    qlora_rs.attach_lora(model, r=2, seed=0, target_modules=targets)
    for parameter in qlora_rs.lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    qlora_rs.save_adapter(model, tmp_path / "adapter")
    for name in ("source_packed", "turned_packed"):
        merge(tmp_path / name, tmp_path / "adapter", tmp_path / f"{name}_merged", dtype=torch.float32)
        torch.testing.assert_close(
            logits(plain(tmp_path / f"{name}_merged", KIND)), logits(model), rtol=1e-3, atol=1e-4
        )
    # Over the 16-bit weights, by files and in memory.
    merge(tmp_path / "turned_packed", tmp_path / "adapter", tmp_path / "over", dtype=torch.float32, base=turned)
    merge(turned, tmp_path / "adapter", tmp_path / "of_source", dtype=torch.float32)
    over, of_source = (load_file(tmp_path / name / "model.safetensors") for name in ("over", "of_source"))
    assert all(torch.equal(tensor, of_source[name]) for name, tensor in over.items())
    qlora_rs.merge_adapter(model, dtype=torch.float32, base=turned)
    state = model.state_dict()
    assert all(torch.allclose(state[name], over[name].mT, rtol=0, atol=1e-6) for name in FUSED)


def test_a_shape_that_is_neither_is_a_format_error(turned, tmp_path) -> None:
    weights = load_file(turned / "model.safetensors")
    weights[FUSED[1]] = weights[FUSED[1]][:, :-1].contiguous()
    save_file(weights, turned / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"down_proj.*config\.json asks for"):
        checkpoint.quantize(turned, tmp_path / "packed")
