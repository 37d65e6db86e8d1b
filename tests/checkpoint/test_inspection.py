"""`checkpoint.inspect`: what a folder or a file holds, from headers alone."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora_rs
from qlora_rs import QuantSpec, checkpoint


def test_a_packed_folder_shows_spec_logical_shapes_bits_and_source_hashes(make_model, tmp_path):
    source, target = make_model(shards=2), tmp_path / "packed"
    report = checkpoint.quantize(source, target, QuantSpec("nf4", 32), max_shard_size=30_000)
    info = checkpoint.inspect(target)
    assert (info.format, info.spec) == ("qlora_rs", QuantSpec("nf4", 32))
    assert len(info.files) > 1
    assert {(row.name, row.shape, row.bytes) for row in info.packed} == {
        (entry.name, entry.shape, entry.bytes_after) for entry in report.packed
    }
    assert info.total_bytes == report.bytes_after
    odd = next(row for row in info.packed if row.name.endswith("0.mlp.down_proj.weight"))
    assert odd.shape == (72, 131)
    assert odd.bits_per_weight == 8 * odd.bytes / (72 * 131)
    assert info.source_sha256 == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in source.glob("*.safetensors")
    }


def test_a_float_folder_shows_what_it_stores(make_model):
    info = checkpoint.inspect(make_model(torch.float16))
    assert (info.format, info.spec, info.packed, info.source_sha256) == ("float", None, (), {})
    assert {row.dtype for row in info.tensors} == {"F16"}
    assert {row.bits_per_weight for row in info.tensors} == {16.0}


def test_packed_and_float_folders_have_the_same_number_of_parameters(make_model, tmp_path):
    source = make_model()
    checkpoint.quantize(source, tmp_path / "packed", QuantSpec("int8", 64))
    assert checkpoint.inspect(tmp_path / "packed").parameters == checkpoint.inspect(source).parameters


def test_a_single_file_is_understood_by_the_config_beside_it(make_model, tmp_path):
    checkpoint.quantize(make_model(), tmp_path / "packed")
    info = checkpoint.inspect(tmp_path / "packed" / "model.safetensors")
    assert len(info.packed) == 14
    shutil.copy(tmp_path / "packed" / "model.safetensors", tmp_path / "alone.safetensors")
    alone = checkpoint.inspect(tmp_path / "alone.safetensors")
    assert (alone.format, alone.packed) == ("float", ())


def test_other_libraries_formats_are_named_and_listed_as_stored(make_model):
    source = make_model()
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (source / "config.json").write_text(json.dumps(config))
    info = checkpoint.inspect(source)
    assert (info.format, info.spec, info.packed) == ("gptq", None, ())


def test_the_document_for_programs_is_json_and_adds_up(make_model, tmp_path):
    checkpoint.quantize(make_model(), tmp_path / "packed")
    document = json.loads(json.dumps(checkpoint.inspect(tmp_path / "packed").to_dict()))
    assert document["total_bytes"] == sum(row["bytes"] for row in document["tensors"])
    packed = [row for row in document["tensors"] if row["kind"] == "packed"]
    assert document["packed_bytes"] == sum(row["bytes"] for row in packed)
    assert document["spec"] == {"quant_type": "nf4", "block_size": 64, "double_quant": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("w.weight_absmax_offset"), r"w\.weight_absmax_offset.*I32 \[1\].*got nothing"),
        (
            lambda t, m: t.update({"w.weight_absmax": t["w.weight_absmax"].int()}),
            r"expected U8 \[5, 2\].*got I32",
        ),
        (lambda t, m: t.update({"w.weight": t["w.weight"][:, :-1].contiguous()}), r"expected U8 \[5, 33\]"),
        (lambda t, m: m.update({"w.weight.shape": "[5, 1000]"}), r"expected U8 \[5, 500\]"),
        (lambda t, m: m.update({"w.weight.shape": "[-1]"}), "expected sizes"),
        (lambda t, m: m.update({"w.weight.shape": "{"}), "expected sizes"),
        (lambda t, m: m.update({"source_sha256": "[]"}), "source_sha256"),
    ],
)
def test_parts_that_do_not_fit_together_are_errors(write_tensors, tmp_path, change, message):
    source = write_tensors(tmp_path / "source", {"w.weight": torch.ones(5, 65)}, model_type="unknown")
    checkpoint.quantize(source, tmp_path / "packed", include=["w"])
    file = tmp_path / "packed" / "model.safetensors"
    tensors, metadata = load_file(file), {"format": "pt", "w.weight.shape": "[5, 65]"}
    change(tensors, metadata)
    save_file(tensors, file, metadata)
    with pytest.raises(qlora_rs.FormatError, match=message) as caught:
        checkpoint.inspect(tmp_path / "packed")
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("change", [{"format_version": 2}, {"block_size": 63}, {"quant_type": "nf5"}])
def test_a_config_from_elsewhere_or_later_is_an_error(make_model, tmp_path, change):
    checkpoint.quantize(make_model(), tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(qlora_rs.FormatError, match=next(iter(change))):
        checkpoint.inspect(tmp_path / "packed")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("block_size", 63, "block_size is one of 32"),
        ("quant_type", "nf5", "quant_type is one of nf4"),
        ("modules_to_not_convert", 7, "a list of names for modules_to_not_convert; got 7"),
        ("modules_to_not_convert", ["lm_head", 7], "a list of names for modules_to_not_convert"),
    ],
)
def test_a_wrong_field_of_quantization_config_is_named_with_its_file(make_model, tmp_path, field, value, match):
    checkpoint.quantize(make_model(), tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"][field] = value
    path.write_text(json.dumps(config))
    for read in (checkpoint.inspect, qlora_rs.from_pretrained):
        with pytest.raises(qlora_rs.FormatError, match=rf"packed/config\.json: quantization_config: .*{match}"):
            read(tmp_path / "packed")
