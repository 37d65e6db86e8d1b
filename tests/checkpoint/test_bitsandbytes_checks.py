"""verify and diff of bitsandbytes' 4-bit folders: what they made themselves, what was converted, what was damaged."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora_rs
from qlora_rs import QuantSpec, UnsupportedError, checkpoint, reference
from qlora_rs.checkpoint import flat, slices

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "bitsandbytes"
SOURCE = GOLDEN / "source"
UP = "model.layers.0.mlp.up_proj.weight"
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def differing(report):
    """{part: (differing, at a border)} added up over all tensors."""
    found: dict[str, tuple[int, int]] = {}
    for tensor in report.tensors:
        for part in tensor.parts:
            if part.differing:
                before = found.get(part.part, (0, 0))
                found[part.part] = (before[0] + part.differing, before[1] + part.at_border)
    return found


def write_flat(write_tensors, folder, weights, spec, codes=None):
    """A bitsandbytes folder of these weights; ``codes`` replace those of the first."""
    tensors = {}
    for name, weight in weights.items():
        packed = qlora_rs.quantize(weight.reshape(1, -1), spec)
        tensors[name] = packed.codes.reshape(-1, 1) if codes is None else codes.reshape(-1, 1)
        codes = None
        tensors[f"{name}.absmax"] = packed.absmax.flatten()
        tensors[f"{name}.quant_map"] = flat.code_values(spec).clone()
        offset = None
        if packed.absmax_scale is not None:
            tensors[f"{name}.nested_absmax"] = packed.absmax_scale.flatten()
            tensors[f"{name}.nested_quant_map"] = flat.scale_values().clone()
            offset = float(packed.absmax_offset)
        state = flat.render_state(spec, "bfloat16", tuple(weight.shape), offset)
        key = f"{name}.quant_state.bitsandbytes__{spec.quant_type}"
        tensors[key] = torch.tensor(list(state), dtype=torch.uint8)
    return write_tensors(folder, tensors, quantization_config=BNB)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nf4", {}),
        ("nf4-as-f16", {}),
        ("nf4-skipping", {}),
        ("nf4-double", {"absmax": (12, 12)}),
        ("nf4-as-bf16", {"absmax": (12, 12)}),
        ("nf4-double-sharded", {"absmax": (12, 12)}),
        ("fp4", {"codes": (528, 528)}),
    ],
)
def test_their_own_folders_verify_and_what_they_round_otherwise_is_counted(name, expected) -> None:
    report = checkpoint.verify(GOLDEN / name, SOURCE)
    assert report.same
    assert differing(report) == expected
    assert report.notes[0].endswith("records no hashes of its source: only the tensors were compared")
    assert ("rounds in its own way" in str(report)) == bool(expected)
    assert ("to the last bit" in str(report)) != bool(expected)
    document = json.loads(json.dumps(report.to_dict()))
    assert document["summary"]["rounding"] == sum(tensor.status == "rounding" for tensor in report.tensors)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_what_convert_writes_verifies_to_the_last_bit(tmp_path, quant_type, double_quant) -> None:
    checkpoint.quantize(SOURCE, tmp_path / "native", QuantSpec(quant_type, 64, double_quant))
    checkpoint.convert(tmp_path / "native", tmp_path / "flat", "bitsandbytes")
    assert {tensor.status for tensor in checkpoint.verify(tmp_path / "flat", SOURCE).tensors} == {"same"}
    report = checkpoint.diff(tmp_path / "native", tmp_path / "flat")
    assert report.same
    assert (report.format_a, report.format_b) == ("qlora_rs", "bitsandbytes")
    parts = {part.part for tensor in report.tensors for part in tensor.parts}
    assert parts == {"bytes", "codes", "absmax"} | ({"absmax_scale", "absmax_offset"} if double_quant else set())


@pytest.mark.parametrize("part", ["", ".absmax", ".nested_absmax"])
def test_a_flipped_bit_is_no_rounding(tmp_path, flip_bit, part) -> None:
    shutil.copytree(GOLDEN / "nf4-double", tmp_path / "flat")
    flip_bit(tmp_path / "flat" / "model.safetensors", UP + part, offset=1, bit=0x40)
    report = checkpoint.verify(tmp_path / "flat", SOURCE)
    assert [tensor.name for tensor in report.differing] == [UP]
    assert not report.same
    counts = differing(report)
    name = {"": "codes", ".absmax": "absmax", ".nested_absmax": "absmax_scale"}[part]
    assert counts[name][0] - counts[name][1] >= 1


@pytest.mark.parametrize(("quant_type", "step"), [("nf4", 1), ("nf4", -1), ("fp4", 1)])
def test_codes_of_an_approximate_reciprocal_are_at_borders_and_others_are_not(
    write_tensors, tmp_path, quant_type, step
) -> None:
    spec = QuantSpec(quant_type, 64, False)
    # Many values exactly at borders, so that a reciprocal of another last bit moves them.
    table = torch.tensor(spec.values).sort().values
    borders = (table[1:] + table[:-1]) / 2
    weight = borders[torch.randint(len(borders), (70, 64))] * 0.7
    weight[:, 0] = 0.7
    absmax = weight.abs().amax(dim=1, keepdim=True)
    inverse = 1 / absmax
    inverse = torch.nextafter(inverse, inverse * (1 + step))
    codes = reference.nearest_code(weight * inverse, reference.codebook_of(quant_type), quant_type)
    ours = reference.unpack(qlora_rs.quantize(weight, spec).codes, 64)
    moved = int((codes != ours).sum())
    assert moved > 0
    packed = reference.pack(codes, reference.zero_code(reference.codebook_of(quant_type)))
    source = write_tensors(tmp_path / "source", {"a.weight": weight})
    write_flat(write_tensors, tmp_path / "flat", {"a.weight": weight}, spec, packed)
    report = checkpoint.verify(tmp_path / "flat", source)
    assert differing(report) == {"codes": (moved, moved)}
    assert report.same
    codes[3, 5] = (codes[3, 5] + 5) % 16
    shutil.rmtree(tmp_path / "flat")
    packed = reference.pack(codes, reference.zero_code(reference.codebook_of(quant_type)))
    write_flat(write_tensors, tmp_path / "flat", {"a.weight": weight}, spec, packed)
    report = checkpoint.verify(tmp_path / "flat", source)
    assert not report.same
    total, at_border = differing(report)["codes"]
    assert total - at_border == 1


def their_scales(absmax: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and group scales as bitsandbytes' CPU code makes them, whole groups: it looks codes up by the nearest of
    65536 places in [-1, 1]."""
    table = flat.scale_values()
    codes_of_places = reference.nearest_even(torch.arange(65536, dtype=torch.float64) / 32767.5 - 1, table)
    groups = (absmax - offset).view(-1, 256)
    scale = groups.abs().amax(1)
    x = groups / torch.where(scale > 0, scale, 1)[:, None]
    return codes_of_places[((x + 1) * 32767.5 + 0.5).floor().long()].flatten(), scale


@pytest.mark.parametrize("ulps", [0, 1, -2])
@pytest.mark.parametrize("weights", ["normal", "nearly constant", "constant"])
def test_scales_that_they_round_by_places_verify_and_others_do_not(write_tensors, tmp_path, weights, ulps) -> None:
    spec = QuantSpec()
    weight = torch.randn(2048, 2048)  # so many scales that some lie halfway between two places
    if weights != "normal":  # the offset's last places are large beside the groups' scales
        weight = 1 + torch.rand(512, 1024) * (1e-3 if weights == "nearly constant" else 0)
    source = write_tensors(tmp_path / "source", {"a.weight": weight})
    write_flat(write_tensors, tmp_path / "flat", {"a.weight": weight}, spec)
    tensors = load_file(tmp_path / "flat" / "model.safetensors")
    offset = qlora_rs.quantize(weight.reshape(1, -1), spec).absmax_offset
    for _ in range(abs(ulps)):
        offset = torch.nextafter(offset, offset * (2 if ulps > 0 else 0))
    absmax = qlora_rs.quantize(weight.reshape(1, -1), QuantSpec(double_quant=False)).absmax.flatten()
    tensors["a.weight.absmax"], tensors["a.weight.nested_absmax"] = their_scales(absmax, offset)
    state = flat.render_state(spec, "bfloat16", tuple(weight.shape), float(offset))
    tensors["a.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(state), dtype=torch.uint8)
    write_tensors(tmp_path / "theirs", tensors, quantization_config=BNB)
    report = checkpoint.verify(tmp_path / "theirs", source)
    assert report.same
    if weights != "constant" or ulps:
        assert differing(report)["absmax"][0] > 0
        # Two codes off is no rounding.
        tensors["a.weight.absmax"][77] ^= 2
        write_tensors(tmp_path / "damaged", tensors, quantization_config=BNB)
        counts = differing(checkpoint.verify(tmp_path / "damaged", source))["absmax"]
        assert counts[0] - counts[1] == 1


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(3, 100), (37, 45), (2, 5, 100), (1, 131)])
def test_rows_that_share_blocks_are_verified_and_compared_by_value(
    write_tensors, tmp_path, monkeypatch, shape, double_quant
) -> None:
    monkeypatch.setattr(slices, "SLICE_ELEMENTS", 300)
    spec = QuantSpec(block_size=32, double_quant=double_quant)
    weights = {"a.up.weight": torch.randn(shape).bfloat16(), "b.up.weight": torch.randn(shape).bfloat16()}
    source = write_tensors(tmp_path / "source", weights, model_type="unknown")
    packed = write_flat(write_tensors, tmp_path / "flat", weights, spec)
    assert {tensor.status for tensor in checkpoint.verify(packed, source).tensors} == {"same"}
    checkpoint.quantize(source, tmp_path / "native", spec, include=["up"])
    checkpoint.convert(packed, tmp_path / "bf16", "bf16")
    plain = load_file(tmp_path / "bf16" / "model.safetensors")
    expected = sum(float((plain[name].double() - weight.double()).square().sum()) for name, weight in weights.items())
    report = checkpoint.diff(source, packed)
    assert report.count("different") == 2
    assert sum(t.norm_difference**2 for t in report.tensors) == pytest.approx(expected, rel=0.02)
    report = checkpoint.diff(tmp_path / "native", packed)
    whole = math.prod(shape[:-1]) == 1
    assert [tensor.status for tensor in report.tensors] == ["same" if whole else "different"] * 2
    if not whole:
        assert {tensor.reasons for tensor in report.tensors} == {("blocks by rows / flat",)}
        assert 0 < report.relative_error < 0.2


def test_folders_of_two_kinds_are_compared_weight_by_weight() -> None:
    report = checkpoint.diff(GOLDEN / "nf4", GOLDEN / "fp4-double")
    weights = [tensor for tensor in report.tensors if tensor.a.kind == "packed"]
    assert len(weights) == 7
    assert {tensor.reasons for tensor in weights} == {("quant_type nf4 / fp4", "double_quant False / True")}
    assert all(tensor.relative_error is not None and tensor.relative_error < 0.3 for tensor in weights)
    assert checkpoint.diff(GOLDEN / "nf4", GOLDEN / "nf4").same
    stored = checkpoint.diff(GOLDEN / "nf4", GOLDEN / "nf4-as-f16")
    reasons = {tensor.reasons for tensor in stored.tensors if tensor.a.kind == "packed"}
    assert reasons == {("codes stored as U8 / F16",)}
    assert stored.max_abs_difference == 0


def test_the_error_against_the_source_is_that_of_the_dequantized_folder(tmp_path) -> None:
    checkpoint.convert(GOLDEN / "nf4-double", tmp_path / "bf16", "bf16")
    direct, through = checkpoint.diff(SOURCE, GOLDEN / "nf4-double"), checkpoint.diff(SOURCE, tmp_path / "bf16")
    assert direct.relative_error == pytest.approx(through.relative_error, rel=0.01)
    assert 0.05 < direct.relative_error < 0.15


def test_progress_ends_where_it_said(tmp_path) -> None:
    calls: list[tuple[int, int]] = []
    checkpoint.diff(GOLDEN / "nf4-double", GOLDEN / "fp4-double", progress=lambda *seen: calls.append(seen))
    assert calls[-1][0] == calls[-1][1]
    calls.clear()
    checkpoint.verify(GOLDEN / "nf4-double", SOURCE, progress=lambda *seen: calls.append(seen))
    assert calls[-1][0] == calls[-1][1]


def test_a_shape_that_is_not_told_is_taken_from_the_source(write_tensors, tmp_path) -> None:
    weight = torch.randn(5, 77)
    source = write_tensors(tmp_path / "source", {"a.weight": weight})
    folder = write_flat(write_tensors, tmp_path / "flat", {"a.weight": weight}, QuantSpec(double_quant=False))
    tensors = load_file(folder / "model.safetensors")
    (key,) = [name for name in tensors if "quant_state" in name]
    state = {**json.loads(bytes(tensors[key].tolist())), "shape": None}
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    assert checkpoint.verify(folder, source).same
    other = write_tensors(tmp_path / "other", {"a.weight": torch.randn(5, 79)})
    (verdict,) = checkpoint.verify(folder, other).tensors
    assert verdict.reason == "386 codes, but 395 elements in the source"


def test_nan_in_the_source_is_told(write_tensors, tmp_path) -> None:
    weight = torch.randn(4, 64)
    folder = write_flat(write_tensors, tmp_path / "flat", {"a.weight": weight}, QuantSpec())
    weight[2, 3] = torch.nan
    (verdict,) = checkpoint.verify(folder, write_tensors(tmp_path / "source", {"a.weight": weight})).tensors
    assert (verdict.status, "NaN" in verdict.reason) == ("different", True)


def test_codes_of_other_values_and_eight_bits_are_refused(write_tensors, tmp_path) -> None:
    folder = write_flat(write_tensors, tmp_path / "flat", {"a.weight": torch.randn(4, 64)}, QuantSpec())
    source = write_tensors(tmp_path / "source", {"a.weight": torch.randn(4, 64)})
    tensors = load_file(folder / "model.safetensors")
    tensors["a.weight.quant_map"][3] += 0.25
    save_file(tensors, folder / "model.safetensors")
    for check in (checkpoint.verify, checkpoint.diff):
        with pytest.raises(UnsupportedError, match=r"a\.weight\.quant_map"):
            check(folder, source)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="verify checks a folder that qlora-rs packed, or bitsandbytes in 4"):
        checkpoint.verify(folder, source)
    with pytest.raises(UnsupportedError, match="compared with its like only"):
        checkpoint.diff(folder, source)
