"""Merging files to files: the same tensors as in memory, a folder that plain transformers loads, absent or whole."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qlora_rs
from qlora_rs import FormatError, QuantSpec, UnsupportedError
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


@pytest.mark.parametrize("over_source", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_files_equal_merging_in_memory(packed, adapter, tiny_llama, tmp_path, dtype, over_source):
    base = tiny_llama if over_source else None
    report = merge(packed, adapter, tmp_path / "merged", dtype=dtype, base=base)
    expected, expected_report = saved_in_memory(packed, adapter, tmp_path / "memory", dtype, base)
    got = load_folder(tmp_path / "merged")
    assert got.keys() == expected.keys()
    assert all(got[name].dtype == dtype and torch.equal(got[name], expected[name]) for name in expected)
    assert {row.name: row for row in report.layers} == {row.name: row for row in expected_report.layers}
    assert (report.base, report.dtype) == (expected_report.base, dtype)
    assert report.bytes_after == sum(tensor.nbytes for tensor in got.values())
    assert (report.max_base_error is None) is not over_source


def test_plain_transformers_loads_it_in_a_process_without_this_library(packed, adapter, tmp_path):
    merged = tmp_path / "merged"
    merge(packed, adapter, merged, dtype=torch.float32)
    model = qlora_rs.from_pretrained(packed, dtype=torch.float32)
    qlora_rs.load_adapter(model, adapter)
    tokens = torch.arange(40)[None] * 5 % 250
    with torch.no_grad():
        expected = model(tokens).logits
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    program = """
import sys
from safetensors.torch import load_file, save_file
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, tokens, out = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(info.values()), info
assert AutoTokenizer.from_pretrained(folder).chat_template
with torch.no_grad():
    save_file({"logits": model(load_file(tokens)["tokens"]).logits}, out)
assert "qlora_rs" not in sys.modules
"""
    arguments = [merged, tmp_path / "tokens.safetensors", tmp_path / "logits.safetensors"]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)
    got = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_config_loses_the_quantization_and_other_files_come_along(packed, adapter, tiny_llama, tmp_path):
    (packed / "notes").mkdir()
    (packed / "notes" / "LICENSE").write_bytes(b"\x00free")
    (packed / "pytorch_model.bin").write_bytes(b"123")
    report = merge(packed, adapter, tmp_path / "merged", dtype=torch.float16)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    source = json.loads((tiny_llama / "config.json").read_text())
    assert config == {**source, "dtype": "float16"}
    assert list(config) == list(source)
    assert (tmp_path / "merged" / "notes" / "LICENSE").read_bytes() == b"\x00free"
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (packed / name).read_bytes()
    assert [entry.name for entry in report.left_out] == ["pytorch_model.bin"]
    assert "pytorch_model.bin" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["files"] == ["model.safetensors"]


def test_large_outputs_are_sharded_with_an_index(packed, adapter, tmp_path):
    merge(packed, adapter, tmp_path / "whole")
    report = merge(packed, adapter, tmp_path / "sharded", max_shard_size=50_000)
    assert len(report.files) > 2
    whole, sharded = load_folder(tmp_path / "whole"), load_folder(tmp_path / "sharded")
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "sharded" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 - not a dict
            assert opened.metadata() == {"format": "pt"}
    assert len(qlora_rs.checkpoint.inspect(tmp_path / "sharded").tensors) == len(whole)


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


@pytest.mark.parametrize("spec", [QuantSpec("int8", 32), QuantSpec("fp4", double_quant=False), QuantSpec("int4", 4096)])
def test_every_kind_of_packing_is_merged(tiny_llama, adapter, tmp_path, spec):
    qlora_rs.checkpoint.quantize(tiny_llama, tmp_path / "other", spec)
    merge(tmp_path / "other", adapter, tmp_path / "merged")
    expected, _ = saved_in_memory(tmp_path / "other", adapter, tmp_path / "memory", torch.bfloat16)
    got = load_folder(tmp_path / "merged")
    assert all(torch.equal(got[name], expected[name]) for name in expected)


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


def test_fused_experts_and_tensors_of_other_types_come_through(packed, adapter, tmp_path):
    spec = QuantSpec()
    experts = torch.randn(3, 10, 129)
    value = qlora_rs.quantize(experts, spec)
    tensors = load_file(packed / "model.safetensors")
    with safe_open(packed / "model.safetensors", "pt") as file:
        metadata = {**file.metadata(), "experts.up.shape": json.dumps([3, 10, 129])}
    tensors |= {
        "experts.up": value.codes,
        "experts.up_absmax": value.absmax,
        "experts.up_absmax_scale": value.absmax_scale.view(torch.int32),
        "experts.up_absmax_offset": value.absmax_offset.view(torch.int32),
        "counts": torch.tensor(7),
        "nothing": torch.empty(0, 3),
        "eight_bit": torch.tensor([1.5, -2]).to(torch.float8_e4m3fn),
        "wide": torch.tensor([1 / 3], dtype=torch.float64),
    }
    save_file(tensors, packed / "model.safetensors", metadata)
    report = merge(packed, adapter, tmp_path / "merged")
    got = load_folder(tmp_path / "merged")
    assert torch.equal(got["experts.up"], qlora_rs.dequantize(value, torch.float32).to(torch.bfloat16))
    assert "experts.up" in {row.name for row in report.layers}
    for name in ("counts", "wide"):
        assert (got[name].dtype, got[name].tolist()) == (tensors[name].dtype, tensors[name].tolist())
    assert got["eight_bit"].view(torch.uint8).tolist() == tensors["eight_bit"].view(torch.uint8).tolist()
    assert (got["nothing"].dtype, got["nothing"].shape) == (torch.bfloat16, (0, 3))


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


def test_a_model_in_16_bits_is_merged_with_a_note(tiny_llama, adapter, tmp_path):
    report = merge(tiny_llama, adapter, tmp_path / "merged")
    assert any("is not packed" in note for note in report.notes)
    name = "model.layers.0.mlp.up_proj"
    config, pairs = qlora_rs.read_adapter(adapter)
    weight = load_file(tiny_llama / "model.safetensors")[f"{name}.weight"].float() + qlora_rs.adapters.adapter_delta(
        config, pairs[name]
    )
    assert torch.equal(load_folder(tmp_path / "merged")[f"{name}.weight"], weight.to(torch.bfloat16))
    with pytest.raises(ValueError, match="no other base"):
        merge(tiny_llama, adapter, tmp_path / "again", base=tiny_llama)


def test_another_source_is_refused_with_both_hashes(packed, adapter, make_tiny_llama, tmp_path):
    other = make_tiny_llama(tmp_path / "other", seed=1)
    found = hashlib.sha256((other / "model.safetensors").read_bytes()).hexdigest()
    recorded = qlora_rs.checkpoint.inspect(packed).source_sha256["model.safetensors"]
    with pytest.raises(FormatError, match=f"other/model.safetensors: SHA-256 is {found}.*{recorded}"):
        merge(packed, adapter, tmp_path / "merged", base=other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "other", "packed"]


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


@pytest.mark.parametrize("stored_head", [False, True])
def test_an_adapter_on_a_tied_head_is_refused(make_tiny_llama, tmp_path, stored_head):
    source = make_tiny_llama(tmp_path / "source", tie_word_embeddings=True)
    if stored_head:
        tensors = load_file(source / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    qlora_rs.checkpoint.quantize(source, tmp_path / "packed")
    model = qlora_rs.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    adapter = write_adapter(model, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    with pytest.raises(UnsupportedError, match=r"lm_head is tied to the embedding.*target_modules"):
        merge(tmp_path / "packed", adapter, tmp_path / "merged")


def test_adapters_of_other_models_are_refused_by_layer(packed, make_tiny_llama, tmp_path):
    deeper = qlora_rs.from_pretrained(make_tiny_llama(tmp_path / "deeper", num_hidden_layers=3))
    adapter = write_adapter(deeper, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(FormatError, match=r"adapters of 1 layers that .* lacks, e\.g\. model\.layers\.2"):
        merge(packed, adapter, tmp_path / "merged")
    wider = qlora_rs.from_pretrained(make_tiny_llama(tmp_path / "wider", intermediate_size=133))
    adapter = write_adapter(wider, tmp_path / "adapter2", target_modules=["up_proj"])
    with pytest.raises(FormatError, match=r"up_proj: the adapter is for a weight of \[133, 72\].*\[131, 72\]"):
        merge(packed, adapter, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


def test_models_of_other_libraries_and_other_types_are_refused(packed, adapter, tmp_path):
    with pytest.raises(ValueError, match="bfloat16, float16 or float32"):
        merge(packed, adapter, tmp_path / "merged", dtype=torch.int8)
    with pytest.raises(ValueError, match="max_shard_size"):
        merge(packed, adapter, tmp_path / "merged", max_shard_size=0)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="gptq"):
        merge(packed, adapter, tmp_path / "merged")


def test_values_that_do_not_fit_name_file_and_tensor(packed, adapter, tmp_path):
    tensors = load_file(packed / "model.safetensors")
    with safe_open(packed / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, packed / "model.safetensors", metadata)
    with pytest.raises(
        FormatError, match=r"model\.safetensors: model\.norm\.weight: values up to .* do not fit float16"
    ):
        merge(packed, adapter, tmp_path / "merged", dtype=torch.float16)
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize("place", ["packed", "packed/merged", "adapter/merged", "base/merged", "."])
def test_destinations_in_or_around_the_inputs_are_refused(packed, adapter, tiny_llama, tmp_path, place):
    import shutil

    base = shutil.copytree(tiny_llama, tmp_path / "base")
    with pytest.raises(UnsupportedError, match="choose another"):
        merge(packed, adapter, tmp_path / place, base=base, overwrite=True)


def test_an_existing_folder_is_replaced_only_when_asked_and_whole(packed, adapter, tmp_path, monkeypatch):
    merged = tmp_path / "merged"
    merge(packed, adapter, merged)
    before = (merged / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        merge(packed, adapter, merged)
    with monkeypatch.context() as patch:
        patch.setattr("qlora_rs.merge.copy_file", lambda source, destination: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge(packed, adapter, merged, dtype=torch.float32, overwrite=True)
    assert (merged / "model.safetensors").read_bytes() == before
    merge(packed, adapter, merged, dtype=torch.float32, overwrite=True)
    assert (merged / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged", "packed"]


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


@pytest.mark.parametrize("over_source", [False, True])
def test_progress_grows_to_the_end(packed, adapter, tiny_llama, tmp_path, over_source):
    calls: list[tuple[int, int]] = []
    base = tiny_llama if over_source else None
    merge(packed, adapter, tmp_path / "merged", base=base, progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert {total for _, total in calls} == {calls[-1][0]}


def test_a_disk_that_is_too_small_says_so_first(packed, adapter, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(OSError, match="10 B are free"):
        merge(packed, adapter, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))
