"""`merge`: files to files, equal to merging in memory, absent or whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora_rs
from qlora_rs import FormatError, checkpoint, merge_adapter
from qlora_rs.checkpoint import shards, writing
from qlora_rs.merge import merge

Q_PROJ = "model.layers.0.self_attn.q_proj"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_base", [False, True])
def test_the_files_hold_what_merging_in_memory_gives(
    packed, adapter, adapted_model, tiny_llama, tmp_path, dtype, with_base
) -> None:
    base = tiny_llama if with_base else None
    report = merge(packed, adapter, tmp_path / "merged", dtype=dtype, base=base)
    model = adapted_model()
    in_memory = merge_adapter(model, dtype, base)
    merged, expected = tensors_of(tmp_path / "merged"), model.state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
    assert {value.dtype for value in merged.values()} == {dtype}
    rows = {layer.name: layer for layer in report.layers}
    assert {layer.name: layer for layer in in_memory.layers} == rows
    assert report.bytes_after == sum(value.nbytes for value in merged.values())
    assert json.loads(json.dumps(report.to_dict()))["files"] == ["model.safetensors"]


def test_plain_transformers_loads_it_without_this_library(packed, adapter, adapted_model, logits, tmp_path) -> None:
    merge(packed, adapter, tmp_path / "merged", dtype=torch.float32)
    program = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert AutoTokenizer.from_pretrained(sys.argv[1]).chat_template
assert not any(name.startswith("qlora_rs") for name in sys.modules)
assert model.dtype == torch.float32
torch.save(model(torch.arange(3, 26)[None]).logits.detach(), sys.argv[2])
"""
    command = [sys.executable, "-c", program, str(tmp_path / "merged"), str(tmp_path / "logits")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert torch.allclose(torch.load(tmp_path / "logits"), logits(adapted_model()), atol=1e-5)


def test_config_and_companions_are_those_of_the_source(packed, adapter, tiny_llama, tmp_path) -> None:
    model = tmp_path / "model"
    shutil.copytree(packed, model)
    (model / "LICENSE").write_text("free")
    (model / "pytorch_model.bin").write_bytes(b"weights once more")
    report = merge(model, adapter, tmp_path / "merged", dtype=torch.float16)
    expected = json.loads((tiny_llama / "config.json").read_text())
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged == {**expected, "dtype": "float16"}
    assert list(merged) == list(expected)
    names = {*os.listdir(model)} - {"pytorch_model.bin"}
    assert {*os.listdir(tmp_path / "merged")} == names
    assert [entry.name for entry in report.left_out] == ["pytorch_model.bin"]
    assert "left out pytorch_model.bin" in str(report)
    for name in names - {"config.json", "model.safetensors"}:
        assert (tmp_path / "merged" / name).read_bytes() == (model / name).read_bytes()


def test_shards_in_and_out_hold_the_same_tensors(packed, adapter, tiny_llama, tmp_path, logits) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint.quantize(tiny_llama, tmp_path / "sharded", max_shard_size=20_000)
    report = merge(tmp_path / "sharded", adapter, tmp_path / "many", max_shard_size=30_000)
    merge(packed, adapter, tmp_path / "one")
    assert len(report.files) > 2
    many, one = tensors_of(tmp_path / "many"), tensors_of(tmp_path / "one")
    assert many.keys() == one.keys()
    assert all(torch.equal(many[name], one[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.bytes_after
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("many", "one")]
    assert torch.equal(logits(models[0]), logits(models[1]))


def test_progress_counts_every_byte_that_is_read(packed, adapter, tiny_llama, tmp_path) -> None:
    seen: list[tuple[int, int]] = []
    merge(packed, adapter, tmp_path / "a", base=tiny_llama, progress=lambda *now: seen.append(now))
    stored = sum(row.bytes for row in checkpoint.inspect(packed).tensors)
    total = stored + (tiny_llama / "model.safetensors").stat().st_size
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


@pytest.mark.parametrize("spec", [("int8", 32, False), ("fp4", 128, True)])
def test_odd_columns_and_every_type_merge(tiny_llama, save_for, adapted_model, tmp_path, spec) -> None:
    checkpoint.quantize(tiny_llama, tmp_path / "packed", qlora_rs.QuantSpec(*spec))
    adapter = save_for(tmp_path / "packed", target_modules=["down_proj"])  # 131 columns
    merge(tmp_path / "packed", adapter, tmp_path / "merged")
    model = adapted_model(tmp_path / "packed", target_modules=["down_proj"])
    merge_adapter(model)
    merged, expected = tensors_of(tmp_path / "merged"), model.state_dict()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_packed_experts_are_dequantized(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"block.experts": torch.randn(3, 7, 67, generator=generator), "block.gate.weight": torch.ones(3, 67)}
    weights |= {"block.up.weight": torch.randn(5, 67, generator=generator), "block.steps": torch.arange(3)}
    source, packed, adapter = (tmp_path / name for name in ("source", "packed", "adapter"))
    for folder in (source, adapter):
        folder.mkdir()
    save_file(weights, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"model_type": "of-tomorrow", "part": {"torch_dtype": "float32"}}))
    checkpoint.quantize(source, packed, include=["block.experts", "block.up"])
    a, b = torch.randn(2, 67, generator=generator), torch.randn(5, 2, generator=generator)
    halves = {f"base_model.model.block.up.lora_{x}.weight": half for x, half in (("A", a), ("B", b))}
    save_file(halves, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3}))

    report = merge(packed, adapter, tmp_path / "merged", dtype=torch.float32)
    merged = tensors_of(tmp_path / "merged")
    experts = qlora_rs.dequantize(qlora_rs.quantize(weights["block.experts"]), torch.float32)
    up = qlora_rs.dequantize(qlora_rs.quantize(weights["block.up.weight"]), torch.float32)
    assert torch.equal(merged["block.experts"], experts)
    assert torch.allclose(merged["block.up.weight"], up + 1.5 * (b @ a))
    assert torch.equal(merged["block.steps"], weights["block.steps"])
    assert {layer.name for layer in report.layers} == {"block.experts", "block.up"}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == {"model_type": "of-tomorrow", "part": {"torch_dtype": "float32"}, "dtype": "float32"}

    halves = {f"base_model.model.block.experts.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(halves, adapter / "adapter_model.safetensors")
    with pytest.raises(FormatError, match=r"block\.experts"):
        merge(packed, adapter, tmp_path / "again")


def test_an_adapter_on_an_untied_head_merges_whether_the_head_is_packed_or_not(
    packed, tiny_llama, save_for, adapted_model, logits, tmp_path
) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint.quantize(tiny_llama, tmp_path / "all", include=["lm_head"])
    for number, folder in enumerate((packed, tmp_path / "all")):
        adapter = save_for(folder, target_modules=["lm_head", "q_proj"])
        report = merge(folder, adapter, tmp_path / str(number), dtype=torch.float32)
        assert "lm_head" in {layer.name for layer in report.layers}
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        expected = logits(adapted_model(folder, target_modules=["lm_head", "q_proj"]))
        assert torch.allclose(logits(merged), expected, atol=1e-5)


def test_a_model_in_16_bits_is_merged_over_its_own_weights(tiny_llama, adapter, tmp_path) -> None:
    report = merge(tiny_llama, adapter, tmp_path / "merged", dtype=torch.float32)
    config, pairs = qlora_rs.read_adapter(adapter)
    source, merged = load_file(tiny_llama / "model.safetensors"), tensors_of(tmp_path / "merged")
    b_a = pairs[Q_PROJ][1] @ pairs[Q_PROJ][0]
    expected = source[f"{Q_PROJ}.weight"].float() + config["lora_alpha"] / config["r"] * b_a
    assert torch.allclose(merged[f"{Q_PROJ}.weight"], expected)
    assert "its 16-bit weights" in report.base
    assert "not packed" in str(report)
    with pytest.raises(ValueError, match="no other base"):
        merge(tiny_llama, adapter, tmp_path / "again", base=tiny_llama)


@pytest.mark.parametrize(
    ("failure", "left"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ["merged.partial"]),
        (FormatError("damaged"), []),
        (KeyboardInterrupt(), ["merged.partial"]),
    ],
    ids=["full", "damaged", "interrupted"],
)
def test_a_failure_leaves_nothing_under_the_name(packed, adapter, tmp_path, monkeypatch, failure, left) -> None:
    content = shards._content

    def fail(planned, tensor):
        if planned.name == f"{Q_PROJ}.weight":
            raise failure
        return content(planned, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_content", fail)
        with pytest.raises(type(failure)) as caught:
            merge(packed, adapter, tmp_path / "merged")
    assert os.listdir(tmp_path) == left
    if isinstance(failure, OSError):
        assert str(caught.value.filename).endswith("model.safetensors")
    report = merge(packed, adapter, tmp_path / "merged")
    assert os.listdir(tmp_path) == ["merged"]
    assert ("interrupted run was resumed" in str(report)) == bool(left)
    expected = merge(packed, adapter, tmp_path / "expected")
    assert report.layers == expected.layers  # those that the failed run had merged too
    for name in os.listdir(tmp_path / "expected"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_too_little_space_is_said_before_work(packed, adapter, tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(writing, "write_shards", None)
    with pytest.raises(OSError, match="are free") as caught:
        merge(packed, adapter, tmp_path / "merged")
    assert caught.value.errno == errno.ENOSPC


def test_an_existing_destination_is_replaced_only_when_asked_and_whole(packed, adapter, tmp_path, monkeypatch) -> None:
    merge(packed, adapter, tmp_path / "merged")
    before = (tmp_path / "merged" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        merge(packed, adapter, tmp_path / "merged")
    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_json", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge(packed, adapter, tmp_path / "merged", dtype=torch.float32, overwrite=True)
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == before
    merge(packed, adapter, tmp_path / "merged", dtype=torch.float32, overwrite=True)
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size > 1.9 * len(before)
    assert os.listdir(tmp_path) == ["merged"]
