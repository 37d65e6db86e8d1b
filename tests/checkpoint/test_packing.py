"""`checkpoint.quantize`: the packed folder against `qlora_rs.quantize` of each tensor."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import qlora_rs
from qlora_rs import QuantSpec, checkpoint

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def is_linear(name: str) -> bool:
    return name.split(".")[-2] in LINEAR


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor


def assert_packed_as(tensors, name: str, weight: torch.Tensor, spec: QuantSpec) -> None:
    expected = qlora_rs.quantize(weight, spec)
    parts = {
        "": expected.codes,
        "_absmax": expected.absmax,
        "_absmax_scale": expected.absmax_scale,
        "_absmax_offset": expected.absmax_offset,
    }
    for suffix, part in parts.items():
        if part is None:
            assert name + suffix not in tensors
        else:
            found = tensors[name + suffix]
            assert found.dtype in (torch.uint8, torch.int32)
            assert found.shape == part.shape
            assert torch.equal(found, bits(part)), name + suffix


@pytest.mark.parametrize(
    ("dtype", "shards", "spec"),
    [
        (torch.bfloat16, 1, QuantSpec()),
        (torch.bfloat16, 3, QuantSpec("nf4", 32, double_quant=False)),
        (torch.float16, 2, QuantSpec("fp4", 128)),
        (torch.float32, 1, QuantSpec("int8", 64)),
        (torch.float32, 2, QuantSpec("int4", 4096, double_quant=False)),
        (torch.float16, 1, QuantSpec(codebook=[-1, -0.25, 0, 0.5, 1])),
        (torch.bfloat16, 2, QuantSpec("dynamic8", 256)),
        (torch.float32, 1, QuantSpec("udynamic8", 32, double_quant=False)),
        (torch.bfloat16, 1, QuantSpec(codebook=[k / 128 - 1 for k in range(256)])),
    ],
    ids=[
        "nf4-bf16",
        "nf4-single-quant-3-files",
        "fp4-fp16",
        "int8-fp32",
        "int4-one-block-rows",
        "codebook",
        "dynamic8-2-files",
        "udynamic8",
        "codebook-of-8-bits",
    ],
)
def test_linear_weights_are_packed_as_quantize_does_and_the_rest_is_byte_identical(
    make_model, load_folder, tmp_path, dtype, shards, spec
):
    source = make_model(dtype, shards)
    target = tmp_path / "packed"
    report = checkpoint.quantize(source, target, spec, slice_bytes=1000)
    before, after = load_folder(source), load_folder(target)
    parts = 4 if spec.double_quant else 2
    assert len(after) == 14 * parts + len(before) - 14
    for name, tensor in before.items():
        if is_linear(name):
            assert_packed_as(after, name, tensor, spec)
        else:
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], tensor)
    assert {entry.name for entry in report.packed} == {name for name in before if is_linear(name)}
    assert {entry.name for entry in report.skipped} == {name for name in before if not is_linear(name)}
    assert report.bytes_before == sum(tensor.nbytes for tensor in before.values())
    assert report.bytes_after == sum(tensor.nbytes for tensor in after.values())
    assert not (tmp_path / "packed.partial").exists()


def test_packed_bytes_equal_the_specification(make_model, load_folder, tmp_path):
    source = make_model(torch.float32)
    checkpoint.quantize(source, tmp_path / "packed")
    weight = load_folder(source)["model.layers.1.mlp.down_proj.weight"]
    codes, absmax = load_folder(tmp_path / "packed")["model.layers.1.mlp.down_proj.weight"], []
    for row in range(weight.shape[0]):
        blocks = weight[row].split(64)
        absmax.append([block.abs().max().item() for block in blocks])
        values = torch.cat([block * (1 / block.abs().max()) for block in blocks])
        table = torch.tensor(QuantSpec().values)
        nearest = torch.bucketize(values, (table[1:] + table[:-1]) / 2)
        nearest = torch.cat([nearest, torch.tensor([7])])  # the odd last nibble is the code of zero
        assert torch.equal(codes[row], (nearest[0::2] * 16 + nearest[1::2]).to(torch.uint8))


@pytest.mark.parametrize("slice_bytes", [1, 127, 4096])
def test_output_does_not_depend_on_slices_threads_or_source_shards(make_model, tmp_path, slice_bytes):
    sources = {1: make_model(), 3: make_model(shards=3, name="sharded")}
    digests = set()
    for shards, source in sources.items():
        whole, sliced = tmp_path / f"whole-{shards}", tmp_path / f"sliced-{shards}"
        checkpoint.quantize(source, whole)
        checkpoint.quantize(source, sliced, slice_bytes=slice_bytes, num_threads=1)
        first = (whole / "model.safetensors").read_bytes()
        assert first == (sliced / "model.safetensors").read_bytes()
        header = int.from_bytes(first[:8], "little")
        digests.add(hashlib.sha256(first[8 + header :]).hexdigest())
    assert len(digests) == 1


def test_config_keeps_its_keys_in_order_and_gains_the_quantization(make_model, tmp_path):
    source = make_model()
    checkpoint.quantize(source, tmp_path / "packed", QuantSpec("nf4", 128))
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert list(after)[:-1] == list(before)
    assert after.pop("quantization_config") == {
        "quant_method": "qlora_rs",
        "quant_type": "nf4",
        "block_size": 128,
        "double_quant": True,
        "modules_to_not_convert": ["lm_head"],
        "format_version": 1,
    }
    assert after == before
    assert checkpoint.read_quantization_config(source) is None
    found = checkpoint.read_quantization_config(tmp_path / "packed")
    assert found is not None
    assert QuantSpec.from_config(found) == QuantSpec("nf4", 128)


def test_hashes_versions_and_odd_shapes_are_recorded(make_model, tmp_path):
    source = make_model(shards=2)
    checkpoint.quantize(source, tmp_path / "packed")
    with safe_open(tmp_path / "packed" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["qlora_rs_version"] == qlora_rs.__version__
    assert json.loads(metadata["source_sha256"]) == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in source.glob("*.safetensors")
    }
    assert {key for key in metadata if key.endswith(".shape")} == {
        f"model.layers.{layer}.mlp.down_proj.weight.shape" for layer in range(2)
    }
    assert json.loads(metadata["model.layers.0.mlp.down_proj.weight.shape"]) == [72, 131]


def test_large_outputs_are_sharded_with_an_index(make_model, load_folder, tmp_path):
    target = tmp_path / "packed"
    checkpoint.quantize(make_model(), target, max_shard_size=30_000)
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    index = json.loads((target / "model.safetensors.index.json").read_text())
    tensors = load_folder(target)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert list(index["weight_map"]) == sorted(tensors)
    for name, file in index["weight_map"].items():
        with safe_open(target / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 - not a dict


def test_other_files_are_carried_and_other_weights_are_reported(make_model, tmp_path):
    source = make_model()
    (source / "tokenizer.json").write_bytes(b"\x00tok")
    (source / "templates").mkdir()
    (source / "templates" / "chat.jinja").write_text("{{ x }}")
    (source / "linked.txt").symlink_to(source / "tokenizer.json")
    (source / "pytorch_model.bin").write_bytes(b"123")
    (source / "original").mkdir()
    (source / "original" / "consolidated.safetensors").write_bytes(b"1")
    (source / ".git").mkdir()
    (source / "loop").symlink_to(source)
    report = checkpoint.quantize(source, tmp_path / "packed")
    target = tmp_path / "packed"
    assert (target / "tokenizer.json").read_bytes() == b"\x00tok"
    assert (target / "templates" / "chat.jinja").read_text() == "{{ x }}"
    assert not (target / "linked.txt").is_symlink()
    assert (target / "linked.txt").read_bytes() == b"\x00tok"
    left_out = {entry.name: entry.reason for entry in report.left_out}
    assert set(left_out) == {"pytorch_model.bin", "original/consolidated.safetensors", ".git/", "loop/"}
    assert all(left_out.values())
    assert "pytorch_model.bin" in str(report)
    names = {path.name for path in target.rglob("*") if path.is_file()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "chat.jinja", "linked.txt"}


def test_source_is_untouched_and_progress_reaches_the_end(make_model, tmp_path):
    source = make_model(shards=2)
    before = {path: path.read_bytes() for path in source.iterdir()}
    calls: list[tuple[int, int]] = []
    checkpoint.quantize(source, tmp_path / "packed", progress=lambda done, total: calls.append((done, total)))
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    assert calls[-1][0] == calls[-1][1] == sum(path.stat().st_size for path in source.glob("*.safetensors"))


def test_dry_run_reports_the_same_and_writes_nothing(make_model, tmp_path):
    source = make_model()
    planned = checkpoint.quantize(source, tmp_path / "packed", dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    assert planned == checkpoint.quantize(source, tmp_path / "packed")
    assert json.loads(json.dumps(planned.to_dict()))["bytes_after"] == planned.bytes_after


def test_nonfinite_weights_are_refused_with_file_tensor_count_and_index(
    load_folder, make_model, write_tensors, tmp_path
):
    tensors = load_folder(make_model(torch.float32))
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    tensors["model.layers.1.mlp.down_proj.weight"][70, 130] = float("-inf")
    source = write_tensors(tmp_path / "spoiled", tensors, dtype="float32")
    with pytest.raises(qlora_rs.NonFiniteError) as caught:
        checkpoint.quantize(source, tmp_path / "packed", slice_bytes=600)
    message = str(caught.value)
    for part in ("model.safetensors", "model.layers.1.mlp.down_proj.weight", "2 NaN", f"index {3 * 131 + 5}"):
        assert part in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "spoiled"]


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec("dynamic8", 32)], ids=QuantSpec.describe)
def test_fused_experts_are_packed_per_expert_when_included(write_tensors, load_folder, tmp_path, spec):
    experts = torch.randn(3, 10, 129, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    tensors = {"experts.gate_up_proj": experts, "experts.bias": torch.zeros(3)}
    source = write_tensors(tmp_path / "source", tensors, model_type="no_such_model", architectures=None)
    report = checkpoint.quantize(source, tmp_path / "packed", spec, include=["gate_up_proj"], slice_bytes=500)
    packed = load_folder(tmp_path / "packed")
    assert_packed_as(packed, "experts.gate_up_proj", experts, spec)
    assert packed["experts.gate_up_proj_absmax_offset"].shape == (3,)
    assert report.packed[0].shape == (3, 10, 129)


def test_source_that_is_quantized_already_is_refused(make_model, tmp_path):
    checkpoint.quantize(make_model(), tmp_path / "packed")
    with pytest.raises(qlora_rs.UnsupportedError, match=r"quantized already.*qlora_rs"):
        checkpoint.quantize(tmp_path / "packed", tmp_path / "again")


@pytest.mark.parametrize("argument", [{"max_shard_size": 0}, {"slice_bytes": 0}, {"num_threads": -1}])
def test_impossible_arguments_are_refused(make_model, tmp_path, argument):
    with pytest.raises(ValueError, match="at least"):
        checkpoint.quantize(make_model(), tmp_path / "packed", **argument)
    assert not Path(tmp_path / "packed").exists()
