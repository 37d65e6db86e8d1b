"""`analyze`: every figure against what plain torch computes from whole tensors."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora_rs
from qlora_rs import FormatError, QuantSpec, UnsupportedError, reference
from qlora_rs.checkpoint import analysis as module
from qlora_rs.checkpoint import analyze, convert, figures, quantize, slices

NAME = "model.layers.1.mlp.down_proj.weight"  # rows of 131: short blocks, an odd number of columns


def packed_model(make_model, tmp_path, spec=None, **changes):
    source = make_model(torch.bfloat16, **changes)
    quantize(source, tmp_path / "packed", spec)
    return source, tmp_path / "packed"


def expected_of(source, spec):
    """The weight, what it was packed to, its scales and codes, by the library's plain parts."""
    weight = load_file(source / "model.safetensors")[NAME]
    packed = qlora_rs.quantize(weight, spec)
    values = qlora_rs.dequantize(packed, torch.float32)
    absmax = packed.absmax
    if spec.double_quant:
        absmax = reference.nested_absmax(packed.absmax, packed.absmax_scale, packed.absmax_offset)
    codes = packed.codes if spec.bits == 8 else reference.unpack(packed.codes, weight.shape[1])
    return weight.float(), values, absmax, codes


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(),
        QuantSpec("int4", 32, double_quant=False),
        QuantSpec("fp4", 128),
        QuantSpec("int8", 64),
        QuantSpec(codebook=[-1, -0.2, 0.1, 0.7, 1.0], double_quant=False),
    ],
    ids=lambda spec: spec.quant_type,
)
def test_figures_of_a_weight_equal_plain_arithmetic(make_model, tmp_path, spec) -> None:
    source, packed = packed_model(make_model, tmp_path, spec)
    found = analyze(packed, source)
    (weight,) = [each for each in found.weights if each.name == NAME]
    original, values, absmax, codes = expected_of(source, spec)
    error = (values - original).double()
    assert weight.error is not None
    assert weight.error.mean_abs == pytest.approx(float(error.abs().mean()))
    assert weight.error.rms == pytest.approx(float(error.square().mean().sqrt()))
    assert weight.error.max_abs == pytest.approx(float(error.abs().max()))
    assert weight.error.relative == pytest.approx(float(error.norm() / original.double().norm()))
    levels = sorted(set(spec.values))
    step = absmax.double().repeat_interleave(spec.block_size, 1)[:, :131] * (levels[-1] - levels[0]) / (len(levels) - 1)
    steps = error / step
    assert weight.error.mean_steps == pytest.approx(float(steps.abs().mean()), rel=1e-5)
    assert weight.error.rms_steps == pytest.approx(float(steps.square().mean().sqrt()), rel=1e-5)
    assert weight.error.max_steps == pytest.approx(float(steps.abs().max()), rel=1e-5)
    counts = Counter(codes.flatten().tolist())
    assert weight.code_counts == tuple(counts.get(code, 0) for code in range(len(spec.values)))
    ratios = absmax.double() / values.double().square().mean().sqrt()
    assert weight.blocks == absmax.numel()
    assert weight.largest_ratio == pytest.approx(float(ratios.max()))
    assert weight.median_ratio == pytest.approx(float(ratios.median()))


def test_sums_over_the_model_are_those_of_its_weights(make_model, tmp_path) -> None:
    source, packed = packed_model(make_model, tmp_path)
    found = analyze(packed, source)
    info = qlora_rs.checkpoint.inspect(packed)
    assert len(found.weights) == len(info.packed) == 14
    assert sum(found.code_counts) == sum(found.step_counts) == sum(row.elements for row in info.packed)
    assert sum(part.bytes for part in found.parts) == info.total_bytes
    assert sum(part.parameters for part in found.parts) == info.parameters
    assert found.bits_per_parameter == pytest.approx(8 * info.total_bytes / info.parameters)
    report = qlora_rs.checkpoint.diff(source, packed)
    assert found.relative_error == pytest.approx(report.relative_error, rel=1e-6)
    shares = [count / sum(found.code_counts) for count in found.code_counts if count]
    assert found.entropy == pytest.approx(-sum(share * math.log2(share) for share in shares))


def test_parts_tell_codes_from_scales(make_model, tmp_path) -> None:
    _, packed = packed_model(make_model, tmp_path)
    parts = {part.name: part for part in analyze(packed).parts}
    query = parts["self_attn.q_proj"]
    blocks = 72 * 2  # rows of 72 are a block of 64 and one of 8
    assert (query.kind, query.tensors, query.parameters) == ("packed", 2, 2 * 72 * 72)
    assert (query.code_bytes, query.scale_bytes) == (2 * 72 * 36, 2 * (blocks + 4 + 4))
    assert (parts["norm"].kind, parts["norm"].bits_per_parameter) == ("kept", 16.0)


@pytest.mark.parametrize("slice_elements", [1, slices.SLICE_ELEMENTS], ids=["slices", "whole"])
def test_an_outlier_block_is_found_where_it_is(tmp_path, monkeypatch, slice_elements) -> None:
    monkeypatch.setattr(slices, "SLICE_ELEMENTS", slice_elements)  # 1: a slice is 256 rows
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "unknown"}')
    weight = torch.randn(515, 131, generator=torch.Generator().manual_seed(0))
    weight[513, 70] = 40.0
    save_file({"layers.0.up.weight": weight, "layers.1.up.weight": torch.zeros(3, 5)}, source / "model.safetensors")
    quantize(source, tmp_path / "packed", QuantSpec("int4", double_quant=False), include=["up"])
    found = analyze(tmp_path / "packed")
    (block,) = found.outliers
    assert (block.name, block.expert, block.row, block.block, block.absmax) == ("layers.0.up.weight", 0, 513, 1, 40.0)
    values = qlora_rs.dequantize(qlora_rs.quantize(weight, found.spec))
    assert block.ratio == pytest.approx(40 / float(values.double().square().mean().sqrt()))
    assert block.zeros == pytest.approx(float((values[513, 64:128] == 0).double().mean()))
    assert [weight.outlier_blocks for weight in found.weights] == [1, 0]


def test_slices_change_no_figure(tmp_path, monkeypatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "unknown"}')
    weight = torch.randn(2, 515, 131, generator=torch.Generator().manual_seed(0))
    save_file({"experts.up": weight}, source / "model.safetensors")
    quantize(source, tmp_path / "packed", include=["up"])
    whole = analyze(tmp_path / "packed", source)
    monkeypatch.setattr(slices, "SLICE_ELEMENTS", 1)
    sliced = analyze(tmp_path / "packed", source)
    assert sliced.step_counts == whole.step_counts
    assert sliced.outliers == whole.outliers
    for name, value in vars(whole.weights[0].error).items():
        assert getattr(sliced.weights[0].error, name) == pytest.approx(value, rel=1e-12)
    for name in ("code_counts", "blocks", "outlier_blocks"):
        assert getattr(sliced.weights[0], name) == getattr(whole.weights[0], name)


def test_stacks_of_experts_are_judged_matrix_by_matrix(tmp_path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "unknown"}')
    weight = torch.randn(3, 5, 131, generator=torch.Generator().manual_seed(0))
    weight[1] *= 100  # no outliers: all of this matrix is large
    weight[2, 4, 130] = 50.0
    save_file({"experts.up": weight}, source / "model.safetensors")
    quantize(source, tmp_path / "packed", QuantSpec(double_quant=False), include=["up"])
    found = analyze(tmp_path / "packed", source)
    (block,) = found.outliers
    assert (block.expert, block.row, block.block) == (2, 4, 2)
    assert found.weights[0].blocks == 3 * 5 * 3


def test_bitsandbytes_folders_give_the_figures_of_native_ones(make_model, tmp_path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=101, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "native")
    qlora_rs.checkpoint.convert(tmp_path / "native", tmp_path / "bnb", "bitsandbytes")
    native, flat = (analyze(tmp_path / name, tmp_path / "source") for name in ("native", "bnb"))
    by_name = {weight.name: weight for weight in native.weights}
    assert len(flat.weights) == 7
    for weight in flat.weights:
        assert weight.error == by_name[weight.name].error
        assert weight.code_counts == by_name[weight.name].code_counts
    assert flat.step_counts == native.step_counts


def test_without_a_source_there_are_no_errors_and_it_says_so(make_model, tmp_path) -> None:
    _, packed = packed_model(make_model, tmp_path)
    found = analyze(packed)
    assert found.relative_error is None
    assert found.step_counts == ()
    assert all(weight.error is None for weight in found.weights)
    assert any("no source" in note for note in found.notes)


def test_another_model_as_source_is_refused(make_model, tmp_path) -> None:
    source, packed = packed_model(make_model, tmp_path)
    tensors = load_file(source / "model.safetensors")
    other = make_model(name="other")
    save_file({**tensors, NAME: torch.zeros(3, 7)}, other / "model.safetensors")
    with pytest.raises(FormatError, match=r"shape \[3, 7\].*another model"):
        analyze(packed, other)
    del tensors[NAME]
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(FormatError, match=r"holds no .*down_proj.*another model"):
        analyze(packed, other)
    with pytest.raises(UnsupportedError, match="16-bit model"):
        analyze(packed, packed)
    with pytest.raises(UnsupportedError, match="is not packed"):
        analyze(source)


def test_json_has_no_object_that_json_lacks(make_model, tmp_path) -> None:
    source, packed = packed_model(make_model, tmp_path)
    document = json.loads(json.dumps(analyze(packed, source).to_dict()))
    assert document["spec"]["quant_type"] == "nf4"
    assert len(document["step_edges"]) == len(document["step_counts"]) + 1 == len(module.STEP_EDGES)


def test_progress_reaches_the_bytes_of_the_packed_weights(make_model, tmp_path) -> None:
    _, packed = packed_model(make_model, tmp_path)
    seen: list[tuple[int, int]] = []
    analyze(packed, progress=lambda done, total: seen.append((done, total)))
    total = sum(row.bytes for row in qlora_rs.checkpoint.inspect(packed).packed)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("transformer.h.11.attn.c_proj.weight", ("attn.c_proj", 11)),
        ("lm_head.weight", ("lm_head", None)),
        ("model.layers.2.mlp.experts.gate_up_proj", ("mlp.experts.gate_up_proj", 2)),
        ("blocks.4", ("blocks", 4)),
    ],
)
def test_parts_are_names_without_numbers(name, part) -> None:
    assert figures.part_of(name) == part


@pytest.mark.parametrize(
    "name", ["gptq-4bit-g32-asym-act-order", "gptq-3bit-g32-sym-act-order", "awq-g32", "ct-int4-g32-asym"]
)
def test_a_source_of_another_library_is_measured_against_as_its_values(name, tmp_path) -> None:
    golden = Path(__file__).resolve().parent.parent / "golden" / "foreign" / name
    convert(golden, tmp_path / "plain", "fp16" if "float16" in (golden / "expected.json").read_text() else "bf16")
    quantize(tmp_path / "plain", tmp_path / "packed")
    found, expected = analyze(tmp_path / "packed", golden), analyze(tmp_path / "packed", tmp_path / "plain")
    assert 0.05 < found.relative_error < 0.2
    assert found.weights == expected.weights
    assert found.step_counts == expected.step_counts


def test_a_gguf_file_is_a_source(make_tiny_llama, tmp_path) -> None:
    source = make_tiny_llama(tmp_path / "source", hidden_size=96, intermediate_size=160, num_attention_heads=8)
    convert(source, tmp_path / "model.gguf", "gguf", output_type="bf16")
    quantize(source, tmp_path / "packed")
    found, expected = analyze(tmp_path / "packed", tmp_path / "model.gguf"), analyze(tmp_path / "packed", source)
    assert found.relative_error == pytest.approx(expected.relative_error, rel=1e-6)
    assert {w.name: w.error.max_abs for w in found.weights} == {w.name: w.error.max_abs for w in expected.weights}
