"""diff tells same bytes from different ones, and how far apart the values are that they stand for."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora_rs
from qlora_rs import FormatError, QuantSpec, UnsupportedError, checkpoint
from qlora_rs.checkpoint import comparison, slices
from qlora_rs.checkpoint.source import open_source

DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(params=[False, True], ids=["whole", "slices"])
def _small_slices(request, monkeypatch) -> None:
    if request.param:
        monkeypatch.setattr(slices, "SLICE_BYTES", 64)
        monkeypatch.setattr(slices, "SLICE_ELEMENTS", 50)
        monkeypatch.setattr(comparison, "CACHED_ELEMENTS", 7)


@pytest.fixture
def source(make_model):
    return make_model()


@pytest.fixture
def packed(source, tmp_path):
    checkpoint.quantize(source, tmp_path / "packed")
    return tmp_path / "packed"


def by_name(report):
    return {tensor.name: tensor for tensor in report.tensors}


def relative(a, b):
    a, b = a.double(), b.double()
    return float((b - a).norm() / a.norm())


def test_a_folder_is_the_same_as_itself_and_as_a_copy_in_other_files(
    source, packed, write_tensors, load_folder, tmp_path
) -> None:
    resharded = write_tensors(tmp_path / "resharded", load_folder(source), shards=3)
    for a, b in ((source, source), (packed, packed), (source, resharded), (resharded, source)):
        report = checkpoint.diff(a, b)
        assert report.same
        assert [tensor.status for tensor in report.tensors] == ["same"] * 21
        assert (report.relative_error, report.max_abs_difference) == (None, None)


@pytest.mark.usefixtures("_small_slices")
@pytest.mark.parametrize(
    "spec",
    [QuantSpec(), QuantSpec("int8", 32), QuantSpec("dynamic8", 256), QuantSpec("fp4", 128, False)],
    ids=QuantSpec.describe,
)
def test_a_packed_folder_and_its_source_differ_by_the_error_of_quantization(
    source, load_folder, tmp_path, spec
) -> None:
    checkpoint.quantize(source, tmp_path / "p", spec)
    report = checkpoint.diff(source, tmp_path / "p")
    tensors = load_folder(source)
    assert [report.count(status) for status in ("same", "different")] == [7, 14]
    for name, found in by_name(report).items():
        if found.status == "different":
            values = qlora_rs.dequantize(qlora_rs.quantize(tensors[name], spec), torch.float32)
            assert found.relative_error == pytest.approx(relative(tensors[name], values), rel=1e-12)
            assert found.max_abs_difference == float((values - tensors[name].float()).abs().max())
            assert found.differing_values == int((values != tensors[name]).sum())
            assert (found.reasons, found.parts) == ((f"BF16 / {spec.quant_type}",), ())
    backwards = by_name(checkpoint.diff(tmp_path / "p", source))
    assert backwards[DOWN].max_abs_difference == by_name(report)[DOWN].max_abs_difference


@pytest.mark.usefixtures("_small_slices")
def test_many_rows_of_odd_columns_and_experts_are_dequantized_in_slices(write_tensors, tmp_path) -> None:
    name, spec = "layers.0.experts.up.weight", QuantSpec(block_size=32)
    weight = torch.randn(2, 777, 67)
    source = write_tensors(tmp_path / "experts", {name: weight}, model_type="unknown")
    checkpoint.quantize(source, tmp_path / "p", spec, include=["up"])
    (found,) = checkpoint.diff(source, tmp_path / "p").tensors
    values = qlora_rs.dequantize(qlora_rs.quantize(weight, spec), torch.float32)
    assert found.relative_error == pytest.approx(relative(weight, values), rel=1e-12)
    assert found.differing_values == int((values != weight).sum())


def test_double_quantization_changes_scales_and_no_code(source, packed, tmp_path) -> None:
    checkpoint.quantize(source, tmp_path / "plain", QuantSpec(double_quant=False))
    found = by_name(checkpoint.diff(tmp_path / "plain", packed))[DOWN]
    assert [(part.part, part.differing, part.total) for part in found.parts] == [("codes", 0, 72 * 132)]
    assert found.reasons == ("double_quant False / True",)
    assert 0 < found.relative_error < 0.02


def test_another_block_size_is_named(source, packed, tmp_path) -> None:
    checkpoint.quantize(source, tmp_path / "other", QuantSpec(block_size=32))
    found = by_name(checkpoint.diff(packed, tmp_path / "other"))[DOWN]
    assert found.reasons == ("block_size 64 / 32",)
    assert [part.part for part in found.parts] == ["codes"]
    assert found.parts[0].differing > 0


def test_another_codebook_is_compared_by_its_values(source, tmp_path) -> None:
    for name, codebook in (("a", [-1, 0, 1]), ("b", [-1, 0.25, 1])):
        checkpoint.quantize(source, tmp_path / name, QuantSpec(codebook=codebook))
    found = by_name(checkpoint.diff(tmp_path / "a", tmp_path / "b"))[DOWN]
    assert (found.reasons, found.parts) == (("other codebooks",), ())
    assert found.differing_values > 0


@pytest.mark.parametrize("part", ["", "_absmax", "_absmax_scale", "_absmax_offset"])
def test_one_flipped_bit_is_counted_in_its_part(packed, source, tmp_path, flip_bit, part) -> None:
    checkpoint.quantize(source, tmp_path / "again")
    flip_bit(tmp_path / "again" / "model.safetensors", DOWN + part, bit=0x10 if not part else 1)
    report = checkpoint.diff(packed, tmp_path / "again")
    (found,) = [tensor for tensor in report.tensors if tensor.status != "same"]
    counts = {each.part: each.differing for each in found.parts}
    assert counts == dict.fromkeys(counts, 0) | {part.removeprefix("_") or "codes": 1}
    assert len(counts) == 4
    assert found.differing_values > 0 or part in ("_absmax_scale", "_absmax_offset")


@pytest.mark.usefixtures("_small_slices")
def test_kept_tensors_are_compared_by_bytes_and_values(source, write_tensors, load_folder, tmp_path) -> None:
    tensors = load_folder(source)
    tensors[NORM][[3, 70]] += 1
    found = by_name(checkpoint.diff(source, write_tensors(tmp_path / "other", tensors)))[NORM]
    before = load_folder(source)[NORM]
    assert found.parts[0].differing == int((before.view(torch.uint8) != tensors[NORM].view(torch.uint8)).sum())
    assert found.differing_values == 2
    assert found.relative_error == pytest.approx(relative(before, tensors[NORM]))


def test_names_shapes_and_types_that_differ_are_told_apart(write_tensors, tmp_path) -> None:
    values = torch.randn(3, 5)
    shared = {"same": values, "integers": torch.arange(4), "cast": values.bfloat16().float(), "shape": values}
    shared = {name: each.clone() for name, each in shared.items()}
    a = write_tensors(tmp_path / "a", {**shared, "gone": values})
    changed = {"integers": torch.tensor([0, 1, 2, 4]), "cast": values.bfloat16(), "shape": values.T.contiguous()}
    b = write_tensors(tmp_path / "b", {**shared, **changed, "new": values, "scalar": torch.tensor(2.0)})
    found = by_name(checkpoint.diff(a, b))
    assert {name: each.status for name, each in found.items()} == {
        "cast": "different",
        "gone": "only_in_a",
        "integers": "different",
        "new": "only_in_b",
        "same": "same",
        "scalar": "only_in_b",
        "shape": "different",
    }
    assert (found["cast"].reasons, found["cast"].differing_values, found["cast"].relative_error) == (
        ("F32 / BF16",),
        0,
        0.0,
    )
    assert (found["shape"].reasons, found["shape"].relative_error) == (("shape [3, 5] / [5, 3]",), None)
    assert [(part.part, part.differing, part.total) for part in found["integers"].parts] == [("bytes", 1, 32)]
    assert found["integers"].differing_values is None
    assert (found["gone"].b, found["new"].a) == (None, None)


def test_nan_equals_nan_whatever_its_bits_and_is_else_counted_apart(write_tensors, tmp_path) -> None:
    nan, infinite = torch.nan, torch.inf
    a = torch.tensor([nan, 1.0, nan, infinite, infinite, 2.0, infinite, 0.0])
    b = torch.tensor([nan, nan, 1.0, infinite, -infinite, 5.0, 1.0, -0.0])
    b[:1].view(torch.int32)[0] ^= 1
    folders = [write_tensors(tmp_path / name, {"a.weight": each}) for name, each in (("a", a), ("b", b))]
    (found,) = checkpoint.diff(*folders).tensors
    assert (found.status, found.nonfinite, found.differing_values) == ("different", 4, 5)
    assert (found.max_abs_difference, found.norm_difference) == (3.0, 3.0)
    assert found.norm_a == pytest.approx(5**0.5)
    assert checkpoint.diff(folders[0], folders[0]).same


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3)])
def test_scalars_and_empty_tensors_are_compared(write_tensors, tmp_path, shape) -> None:
    a = write_tensors(tmp_path / "a", {"a.weight": torch.ones(shape)})
    b = write_tensors(tmp_path / "b", {"a.weight": torch.ones(shape, dtype=torch.float16)})
    assert checkpoint.diff(a, a).same
    (found,) = checkpoint.diff(a, b).tensors
    assert (found.status, found.differing_values, found.relative_error) == ("different", 0, 0.0)


def test_a_difference_from_zero_is_infinitely_large(write_tensors, tmp_path) -> None:
    a = write_tensors(tmp_path / "a", {"a.weight": torch.zeros(3)})
    b = write_tensors(tmp_path / "b", {"a.weight": torch.ones(3)})
    assert checkpoint.diff(a, b).relative_error == float("inf")


def test_large_float64_values_do_not_overflow_unseen(write_tensors, tmp_path) -> None:
    a = write_tensors(tmp_path / "a", {"a.weight": torch.full((3,), 1e200, dtype=torch.float64)})
    b = write_tensors(tmp_path / "b", {"a.weight": torch.full((3,), -1e200, dtype=torch.float64)})
    (found,) = checkpoint.diff(a, b).tensors
    assert (found.nonfinite, found.differing_values, found.max_abs_difference) == (0, 3, 2e200)


def test_a_folder_of_another_library_is_compared_with_its_like_only(source, write_tensors, tmp_path) -> None:
    config = {"quantization_config": {"quant_method": "other"}}
    foreign = write_tensors(tmp_path / "foreign", {"a.weight": torch.zeros(4, dtype=torch.uint8)}, **config)
    assert checkpoint.diff(foreign, foreign).same
    for pair in ((foreign, source), (source, foreign)):
        with pytest.raises(UnsupportedError, match="foreign: is quantized by 'other'"):
            checkpoint.diff(*pair)


def test_a_code_outside_the_codebook_names_file_and_tensor(source, tmp_path) -> None:
    for name in ("a", "b"):
        checkpoint.quantize(source, tmp_path / name, QuantSpec(codebook=[-1, 0, 1]))
    path = tmp_path / "b" / "model.safetensors"
    tensors = load_file(path)
    tensors[DOWN][0, 0] = 0xFF
    metadata = {f"{DOWN}.shape": "[72, 131]", "model.layers.0.mlp.down_proj.weight.shape": "[72, 131]"}
    save_file(tensors, path, metadata)
    with pytest.raises(FormatError, match=rf"b/model\.safetensors: {DOWN}: "):
        checkpoint.diff(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("change", [lambda content: content[:-9], lambda content: content + b"x"])
def test_a_file_that_changes_while_it_is_compared_is_an_error(packed, change) -> None:
    reader = slices.SliceReader(open_source(packed))
    path = packed / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with reader, pytest.raises(FormatError, match=r"model\.safetensors: the file changed since its header was read"):
        reader.read(DOWN, 0, 1)


def test_truncated_files_and_absent_folders_are_named(source, packed, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        checkpoint.diff(source, tmp_path / "absent")
    with pytest.raises(NotADirectoryError, match="not a model folder"):
        checkpoint.diff(source, packed / "model.safetensors")
    path = packed / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(FormatError, match=r"packed/model\.safetensors"):
        checkpoint.diff(source, packed)


def test_progress_counts_the_bytes_of_both_once(source, packed) -> None:
    calls: list[tuple[int, int]] = []
    checkpoint.diff(source, packed, progress=lambda done, total: calls.append((done, total)))
    total = sum(checkpoint.inspect(path).total_bytes for path in (source, packed))
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_the_report_as_json_holds_every_tensor(source, packed) -> None:
    document = json.loads(json.dumps(checkpoint.diff(source, packed).to_dict()))
    assert set(document) == {"same", "a", "b", "summary", "tensors"}
    assert document["a"] == {"path": str(source), "format": "float", "spec": None}
    assert document["b"]["spec"] == QuantSpec().to_config()
    assert document["summary"]["different"] == 14
    down = next(tensor for tensor in document["tensors"] if tensor["name"] == DOWN)
    assert down["a"]["dtype"], down["b"]["dtype"] == ("BF16", "nf4")
    assert down["relative_error"] == pytest.approx(down["norm_difference"] / down["norm_a"])
