"""Merging files to files: the same tensors as in memory, a folder that plain transformers loads, absent or whole."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qlora_rs
from qlora_rs import FormatError, UnsupportedError
from qlora_rs.merge import merge


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def write_adapter(model, folder, **settings):
    """Attach an adapter with values to ``model`` and save it."""
    qlora_rs.attach_lora(model, **{"r": 4, "lora_alpha": 8, **settings})
    generator = torch.Generator().manual_seed(1)
    for layer in qlora_rs.lora_modules(model).values():
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.1)
    qlora_rs.save_adapter(model, folder)
    return folder


@pytest.fixture
def packed(tiny_llama, tmp_path):
    qlora_rs.checkpoint.quantize(tiny_llama, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def adapter(packed, tmp_path):
    return write_adapter(qlora_rs.from_pretrained(packed, dtype=torch.float32), tmp_path / "adapter")


def saved_in_memory(packed, adapter, folder, dtype, base=None):
    """What loading, merging in memory and saving gives."""
    model = qlora_rs.from_pretrained(packed, dtype=torch.float32)
    qlora_rs.load_adapter(model, adapter)
    report = qlora_rs.merge_adapter(model, dtype, base=base)
    model.save_pretrained(folder)
    return load_folder(folder), report


def test_never_more_than_one_tensor_is_held(packed, adapter, tmp_path, monkeypatch):
    import weakref

    from qlora_rs.checkpoint import shards

    held: list[weakref.ref[torch.Tensor]] = []
    content = shards._content

    def watched(planned, tensor):
        assert not [reference for reference in held if reference() is not None]
        held.append(weakref.ref(tensor))
        return content(planned, tensor)

    monkeypatch.setattr(shards, "_content", watched)
    merge(packed, adapter, tmp_path / "merged")
    assert len(held) == 21


def test_biases_heads_and_kept_layers_are_merged_too(make_tiny_llama, tmp_path):
    source = make_tiny_llama(tmp_path / "source", attention_bias=True)
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.endswith("bias"):
            tensors[name] = torch.randn(tensors[name].shape).to(torch.bfloat16)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    qlora_rs.checkpoint.quantize(source, tmp_path / "packed", skip_modules=["v_proj"])
    model = qlora_rs.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    adapter = write_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "lm_head"])
    report = merge(tmp_path / "packed", adapter, tmp_path / "merged")
    assert len(report.layers) == 15
    assert "lm_head" in {row.name for row in report.layers}
    expected, _ = saved_in_memory(tmp_path / "packed", adapter, tmp_path / "memory", torch.bfloat16)
    got = load_folder(tmp_path / "merged")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert torch.equal(got["model.layers.0.self_attn.q_proj.bias"], tensors["model.layers.0.self_attn.q_proj.bias"])


def test_files_without_the_base_models_prefix_are_matched(packed, adapter, tmp_path):
    merge(packed, adapter, tmp_path / "expected")
    tensors = load_file(packed / "model.safetensors")
    with safe_open(packed / "model.safetensors", "pt") as file:
        metadata = {key.removeprefix("model."): value for key, value in file.metadata().items()}
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, packed / "model.safetensors", metadata)
    merge(packed, adapter, tmp_path / "merged")
    expected = load_folder(tmp_path / "expected")
    got = load_folder(tmp_path / "merged")
    assert all(torch.equal(got[name.removeprefix("model.")], expected[name]) for name in expected)


def test_a_source_in_other_files_is_refused(packed, adapter, tiny_llama, tmp_path):
    merge(tiny_llama, adapter, tmp_path / "sharded", max_shard_size=50_000)
    with pytest.raises(FormatError, match=r"its weight files are model-00001.*made from model\.safetensors"):
        merge(packed, adapter, tmp_path / "merged", base=tmp_path / "sharded")


def test_a_model_without_recorded_hashes_has_no_base_but_its_own(packed, adapter, tiny_llama, tmp_path):
    tensors = load_file(packed / "model.safetensors")
    with safe_open(packed / "model.safetensors", "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "source_sha256"}
    save_file(tensors, packed / "model.safetensors", metadata)
    with pytest.raises(UnsupportedError, match="records no hashes"):
        merge(packed, adapter, tmp_path / "merged", base=tiny_llama)
    merge(packed, adapter, tmp_path / "merged")


def test_ctrl_c_leaves_no_half_model(packed, adapter, tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"merged\.partial"):
        merge(packed, adapter, tmp_path / "merged", progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged.partial", "packed"]
    report = merge(packed, adapter, tmp_path / "merged")
    assert any("interrupted run" in note for note in report.notes)
    assert not (tmp_path / "merged.partial").exists()
