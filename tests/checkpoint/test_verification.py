"""verify finds every bit that is not what the source gives, and names it."""

from __future__ import annotations

import json
import struct

import pytest
import torch

from qlora_rs import FormatError, QuantSpec, UnsupportedError, checkpoint
from qlora_rs.checkpoint import slices

DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"
SPECS = [
    QuantSpec(),
    QuantSpec("int8", 32, False),
    QuantSpec("dynamic8", 256),
    QuantSpec("fp4", 128, False),
    QuantSpec(codebook=[-1, 0, 0.5]),
    QuantSpec(codebook=[k / 99 - 1 for k in range(199)]),
]


def edit_header(path, change):
    """Rewrite the header of a file with ``change(header)``."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    text = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def found(report):
    """{name: (status, {part: differing})} of what is not the same."""
    return {
        tensor.name: (tensor.status, {part.part: part.differing for part in tensor.parts if part.differing})
        for tensor in report.differing
    }


@pytest.fixture
def pair(make_model, tmp_path):
    """A source in bfloat16, and its packed folder."""
    source = make_model()
    checkpoint.quantize(source, tmp_path / "packed")
    return tmp_path / "packed", source


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
@pytest.mark.parametrize(("dtype", "shards"), [(torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 2)])
def test_an_untouched_pair_verifies(make_model, tmp_path, spec, dtype, shards) -> None:
    source = make_model(dtype, shards)
    checkpoint.quantize(source, tmp_path / "packed", spec, max_shard_size=20_000)
    report = checkpoint.verify(tmp_path / "packed", source)
    assert (report.same, report.same_files, report.notes, report.spec) == (True, True, (), spec)
    assert [tensor.status for tensor in report.tensors] == ["same"] * 21
    assert "verified: " in str(report)
    parts = {part.part: part.total for t in report.tensors if t.name == DOWN for part in t.parts}
    # A row of 131 columns takes 66 bytes of two codes each, and a block more than 131 // block_size.
    assert parts["codes"] == 72 * (131 if spec.bits == 8 else 132)
    assert parts["absmax"] == 72 * (131 // spec.block_size + 1)
    assert set(parts) == {"codes", "absmax"} | ({"absmax_scale", "absmax_offset"} if spec.double_quant else set())


@pytest.mark.parametrize("small_slices", [False, True])
@pytest.mark.parametrize("part", ["", "_absmax", "_absmax_scale", "_absmax_offset"])
def test_one_flipped_bit_of_a_packed_weight_is_found(pair, monkeypatch, part, small_slices, flip_bit) -> None:
    packed, _ = pair
    if small_slices:
        monkeypatch.setattr(slices, "SLICE_BYTES", 64)
    flip_bit(packed / "model.safetensors", DOWN + part)
    report = checkpoint.verify(*pair)
    assert found(report) == {DOWN: ("different", {part.removeprefix("_") or "codes": 1})}
    assert not report.same
    assert f"different {DOWN}: {part.removeprefix('_') or 'codes'} 1 of " in str(report)
    assert "the source is the recorded one, so " in str(report)


def test_every_code_of_a_byte_counts(pair, flip_bit) -> None:
    flip_bit(pair[0] / "model.safetensors", DOWN, offset=5, bit=0x11)
    assert found(checkpoint.verify(*pair)) == {DOWN: ("different", {"codes": 2})}


def test_one_flipped_bit_of_a_kept_tensor_is_found(pair, flip_bit) -> None:
    flip_bit(pair[0] / "model.safetensors", NORM, offset=143, bit=0x80)
    report = checkpoint.verify(*pair)
    assert found(report) == {NORM: ("different", {"bytes": 1})}
    assert f"different {NORM}: bytes 1 of 144" in str(report)


def test_one_flipped_bit_of_the_source_is_found_by_its_hash_and_in_its_tensor(pair, flip_bit) -> None:
    packed, source = pair
    flip_bit(source / "model.safetensors", DOWN, offset=1, bit=0x80)
    report = checkpoint.verify(packed, source)
    assert (report.same, report.same_files) == (False, False)
    assert found(report) == {DOWN: ("different", {"codes": 1})}
    assert "source model.safetensors: SHA-256 " in str(report)
    assert f"{source} is not what {packed} was made from, or was changed since" in str(report)


def test_a_renamed_tensor_is_missing_under_one_name_and_extra_under_the_other(pair) -> None:
    def rename(header):
        return {name.replace("model.norm", "model.nora"): value for name, value in header.items()}

    edit_header(pair[0] / "model.safetensors", rename)
    report = checkpoint.verify(*pair)
    assert found(report) == {NORM: ("missing", {}), "model.nora.weight": ("extra", {})}
    assert f"missing {NORM}: the packed folder has no such tensor" in str(report)


def test_other_shapes_and_types_are_named(pair, write_tensors, load_folder, tmp_path) -> None:
    tensors = load_folder(pair[1])
    tensors[DOWN] = tensors[DOWN][:-1].contiguous()
    tensors[NORM] = tensors[NORM].half()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].view(torch.int16)
    other = write_tensors(tmp_path / "other", tensors)
    report = checkpoint.verify(pair[0], other, check="tensors")
    assert {tensor.name: tensor.reason for tensor in report.differing} == {
        DOWN: "shape [72, 131], but [71, 131] in the source",
        NORM: "BF16, but F16 in the source",
        "lm_head.weight": "BF16, but I16 in the source",
    }


def test_another_block_size_than_the_config_says_is_a_damaged_file(pair) -> None:
    config = json.loads((pair[0] / "config.json").read_text())
    config["quantization_config"]["block_size"] = 32
    (pair[0] / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"model\.safetensors: tensor '.*_absmax': expected U8 .* block_size=32"):
        checkpoint.verify(*pair)


def test_another_type_than_the_config_says_is_found_in_the_codes(pair) -> None:
    config = json.loads((pair[0] / "config.json").read_text())
    config["quantization_config"]["quant_type"] = "fp4"
    (pair[0] / "config.json").write_text(json.dumps(config))
    report = checkpoint.verify(*pair)
    assert len(report.differing) == 14
    assert all([part for part, _ in parts.items()] == ["codes"] for _, parts in found(report).values())


def test_without_recorded_hashes_the_tensors_are_compared(pair, flip_bit) -> None:
    def forget(header):
        del header["__metadata__"]["source_sha256"]
        return header

    edit_header(pair[0] / "model.safetensors", forget)
    report = checkpoint.verify(*pair)
    assert (report.same, report.same_files, report.files) == (True, None, ())
    assert report.notes == (f"{pair[0]} records no hashes of its source: only the tensors were compared",)
    with pytest.raises(UnsupportedError, match="records no hashes of its source; compare the tensors"):
        checkpoint.verify(*pair, check="hashes")
    flip_bit(pair[0] / "model.safetensors", NORM)
    assert not checkpoint.verify(*pair).same


def test_settings_that_are_not_the_sources_are_told_although_the_tensors_are_the_same(pair) -> None:
    path = pair[0] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 7.0, "added": 1}))
    report = checkpoint.verify(*pair)
    assert report.same
    assert report.notes == (
        f"{path} has other settings than the source's: added, rope_theta; only tensors are compared",
    )
    assert "the tensors of" in str(report)


def test_a_source_cut_into_other_files_is_the_same_model(pair, write_tensors, load_folder, tmp_path) -> None:
    resharded = write_tensors(tmp_path / "resharded", load_folder(pair[1]), shards=4)
    report = checkpoint.verify(pair[0], resharded)
    assert (report.same, report.same_files, report.differing) == (True, False, ())
    assert {file.file: (file.recorded is None, file.found) for file in report.files}["model.safetensors"] == (
        False,
        None,
    )
    assert "to the last bit, although the source's files are not the recorded ones" in str(report)
    assert not checkpoint.verify(pair[0], resharded, check="hashes").same


def test_hashes_alone_say_nothing_about_the_packed_tensors_and_the_report_says_so(pair, flip_bit) -> None:
    flip_bit(pair[0] / "model.safetensors", NORM)
    report = checkpoint.verify(*pair, check="hashes")
    assert (report.same, report.tensors) == (True, ())
    assert "the packed tensors were not compared" in str(report)
    flip_bit(pair[1] / "model.safetensors", NORM)
    report = checkpoint.verify(*pair, check="hashes")
    assert not report.same
    assert "another model or version of it" in str(report)


def test_tensors_alone_are_compared_without_hashing(pair) -> None:
    calls: list[tuple[int, int]] = []
    report = checkpoint.verify(*pair, check="tensors", progress=lambda done, total: calls.append((done, total)))
    assert (report.same, report.files) == (True, ())
    assert calls[-1] == (checkpoint.inspect(pair[0]).total_bytes,) * 2


def test_progress_ends_where_it_said(pair) -> None:
    calls: list[tuple[int, int]] = []
    checkpoint.verify(*pair, progress=lambda done, total: calls.append((done, total)))
    expected = checkpoint.inspect(pair[0]).total_bytes + (pair[1] / "model.safetensors").stat().st_size
    assert calls[-1] == (expected, expected)
    assert calls == sorted(calls)


def test_another_model_differs_in_everything_and_is_said_to_be_another(
    pair, make_model, write_tensors, tmp_path
) -> None:
    other = write_tensors(tmp_path / "other", {"a.b.weight": torch.ones(2, 3)})
    report = checkpoint.verify(pair[0], other)
    assert len(report.differing) == len(report.tensors) == 22
    assert "is another model than" in str(report)


def test_nan_in_a_kept_tensor_is_bytes_like_any_other(write_tensors, load_folder, make_model, tmp_path) -> None:
    tensors = load_folder(make_model(torch.float32))
    tensors[NORM][3] = torch.nan
    source = write_tensors(tmp_path / "with-nan", tensors)
    checkpoint.quantize(source, tmp_path / "packed")
    assert checkpoint.verify(tmp_path / "packed", source).same


def test_nan_in_the_source_of_a_packed_weight_is_a_difference_with_its_reason(
    pair, write_tensors, load_folder, tmp_path
) -> None:
    tensors = load_folder(pair[1])
    tensors[DOWN][3, 130] = torch.nan
    other = write_tensors(tmp_path / "with-nan", tensors)
    (verdict,) = checkpoint.verify(pair[0], other).differing
    assert verdict.name == DOWN
    assert verdict.reason == "the source weight holds NaN or infinite values, which quantize refuses"


def test_experts_are_compared_one_by_one(write_tensors, tmp_path, flip_bit) -> None:
    name = "layers.0.experts.up.weight"
    source = write_tensors(tmp_path / "experts", {name: torch.randn(3, 70, 129)}, model_type="unknown")
    checkpoint.quantize(source, tmp_path / "packed", QuantSpec(block_size=32), include=["up"])
    assert checkpoint.verify(tmp_path / "packed", source).same
    for part, last in (
        ("", 3 * 70 * 65),
        ("_absmax", 3 * 70 * 5),
        ("_absmax_scale", 3 * 2 * 4),
        ("_absmax_offset", 12),
    ):
        flip_bit(tmp_path / "packed" / "model.safetensors", name + part, offset=last - 1)
    expected = dict.fromkeys(("codes", "absmax", "absmax_scale", "absmax_offset"), 1)
    assert found(checkpoint.verify(tmp_path / "packed", source)) == {name: ("different", expected)}


def test_experts_without_elements_take_no_time_however_many_are_claimed(make_model, tmp_path) -> None:
    source = make_model()
    checkpoint.quantize(source, tmp_path / "packed", QuantSpec(double_quant=False))
    empty = {"shape": [1 << 40, 0, 2], "data_offsets": [0, 0]}
    codes = {"dtype": "U8", **empty, "shape": [1 << 40, 0, 1]}
    scales = {"dtype": "I32", **empty, "shape": [1 << 40, 0, 1]}
    edit_header(source / "model.safetensors", lambda header: header | {"a": {"dtype": "BF16", **empty}})
    edit_header(tmp_path / "packed" / "model.safetensors", lambda header: header | {"a": codes, "a_absmax": scales})
    assert checkpoint.verify(tmp_path / "packed", source, check="tensors").same
    assert checkpoint.diff(tmp_path / "packed", source).count("different") == 15


def test_what_cannot_be_verified_is_refused(pair, tmp_path) -> None:
    packed, source = pair
    with pytest.raises(UnsupportedError, match="is not quantized; verify checks a folder that qlora-rs packed"):
        checkpoint.verify(source, packed)
    with pytest.raises(UnsupportedError, match=r"is quantized .* give the 16-bit model"):
        checkpoint.verify(packed, packed)
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        checkpoint.verify(packed, tmp_path / "absent")
    with pytest.raises(ValueError, match="check is one of all, hashes, tensors"):
        checkpoint.verify(packed, source, check="everything")


@pytest.mark.parametrize("side", [0, 1])
def test_truncated_files_are_named(pair, side) -> None:
    path = pair[side] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(FormatError, match=rf"{path.parent.name}/model\.safetensors"):
        checkpoint.verify(*pair)


def test_hashes_of_files_outside_the_source_are_not_taken(pair) -> None:
    def point_outside(header):
        header["__metadata__"]["source_sha256"] = json.dumps({"../packed/config.json": "0" * 64})
        return header

    edit_header(pair[0] / "model.safetensors", point_outside)
    report = checkpoint.verify(*pair)
    outside = next(file for file in report.files if file.file.startswith(".."))
    assert (outside.found, outside.same, report.same) == (None, False, True)


def test_the_report_as_json_holds_every_tensor(pair, flip_bit) -> None:
    flip_bit(pair[0] / "model.safetensors", NORM)
    document = json.loads(json.dumps(checkpoint.verify(*pair).to_dict()))
    assert document["summary"] == {"same": 20, "rounding": 0, "different": 1, "missing": 0, "extra": 0}
    assert (document["same"], document["same_files"]) == (False, True)
    assert len(document["tensors"]) == 21
    (changed,) = [tensor for tensor in document["tensors"] if tensor["name"] == NORM]
    assert changed == {
        "name": NORM,
        "kind": "kept",
        "status": "different",
        "parts": [{"part": "bytes", "differing": 1, "total": 144, "at_border": 0}],
        "reason": "",
    }
    assert document["spec"] == QuantSpec().to_config()
