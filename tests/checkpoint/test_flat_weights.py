"""bitsandbytes' weights whose blocks run over the ends of rows: every command, with the very same bytes.

tests/golden/make_bitsandbytes.py made the folders, and the hashes of what bitsandbytes itself dequantizes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qlora_rs
from qlora_rs import FormatError, Linear4bit, QuantSpec, UnsupportedError, checkpoint
from qlora_rs.checkpoint import convert, diff, inspect, verify
from qlora_rs.checkpoint.analysis import analyze
from qlora_rs.merge import merge

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "bitsandbytes"
FOLDERS = ["nf4-crossing", "nf4-crossing-double"]
ODD = GOLDEN / "nf4-crossing-double"
DOWN = "model.layers.0.mlp.down_proj"  # [35, 129]: 4515 elements, the last block has 35


def digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def same_tensors(a: Path, b: Path) -> None:
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture
def native(tmp_path):
    convert(ODD, tmp_path / "native", "native")
    return tmp_path / "native"


@pytest.fixture
def floats(tmp_path):
    """A 16-bit folder that both packed ones might have been made from: their own values, in float32 exactly."""
    tensors = load_file(ODD / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and "quant" not in name}
    kept = {name: tensor for name, tensor in kept.items() if not name.endswith("absmax")}
    model = qlora_rs.from_pretrained(ODD, dtype="float32")
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            kept[f"{name}.weight"] = module.dequantize(torch.float32)
    folder = tmp_path / "floats"
    folder.mkdir()
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((ODD / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_values_are_those_of_bitsandbytes_itself_for_odd_numbers_of_elements() -> None:
    model = qlora_rs.from_pretrained(ODD)
    expected = json.loads(ODD.with_suffix(".json").read_text())
    assert len(expected) == 7
    for name, sha256 in expected.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, Linear4bit)
        assert layer.flat
        assert digest(layer.dequantize(torch.bfloat16)) == sha256, name


@pytest.mark.parametrize("name", FOLDERS)
def test_a_loaded_layer_holds_the_bytes_of_the_file(name) -> None:
    stored = load_file(GOLDEN / name / "model.safetensors")
    layer = qlora_rs.from_pretrained(GOLDEN / name).get_submodule(DOWN)
    assert layer.weight.shape[0] == 1
    assert torch.equal(layer.weight.flatten(), stored[f"{DOWN}.weight"].flatten())
    packed = layer.packed()
    assert torch.equal(packed.absmax.flatten(), stored[f"{DOWN}.weight.absmax"])
    if packed.absmax_scale is not None:
        assert torch.equal(packed.absmax_scale, stored[f"{DOWN}.weight.nested_absmax"])


@pytest.mark.parametrize("name", FOLDERS)
def test_to_native_and_back_no_byte_changes(tmp_path, name) -> None:
    convert(GOLDEN / name, tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "back", "bitsandbytes")
    same_tensors(tmp_path / "back", GOLDEN / name)
    assert (tmp_path / "back" / "config.json").read_bytes() == (GOLDEN / name / "config.json").read_bytes()


def test_what_save_pretrained_writes_converts_back_byte_for_byte(tmp_path) -> None:
    qlora_rs.from_pretrained(ODD, dtype="bfloat16").save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "back", "bitsandbytes")
    same_tensors(tmp_path / "back", ODD)


def test_a_native_folder_loads_as_the_one_that_it_came_from(native) -> None:
    a, b = qlora_rs.from_pretrained(native), qlora_rs.from_pretrained(ODD)
    assert [name for name, _ in a.named_parameters()] == [name for name, _ in b.named_parameters()]
    for (name, mine), (_, theirs) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    tokens = torch.arange(11)[None]
    assert torch.equal(a(tokens).logits, b(tokens).logits)


def test_inspect_tells_the_shape_and_the_layout(native) -> None:
    for folder in (ODD, native):
        rows = {row.name: row for row in inspect(folder).packed}
        assert len(rows) == 7
        assert rows[f"{DOWN}.weight"].shape == (35, 129)
        assert all(row.flat for row in rows.values())
    assert not any(row.flat for row in inspect(GOLDEN / "nf4").packed)


def test_diff_compares_bytes_with_its_like_and_values_with_floats(native, floats) -> None:
    assert diff(native, ODD).same
    report = diff(floats, native)
    assert not report.same
    packed = [each for each in report.tensors if each.name == f"{DOWN}.weight"]
    assert packed[0].max_abs_difference == 0
    assert packed[0].differing_values == 0


def test_diff_tells_the_layout_from_that_by_rows(native, floats, tmp_path) -> None:
    checkpoint.quantize(floats, tmp_path / "rows")
    for other in (native, ODD):
        difference = next(t for t in diff(tmp_path / "rows", other).tensors if t.name == f"{DOWN}.weight")
        assert "blocks by rows / flat" in difference.reasons
        assert difference.max_abs_difference > 0


def test_verify_requantizes_flat_and_finds_a_changed_code(floats, tmp_path) -> None:
    plain = tmp_path / "plain"
    convert(GOLDEN / "nf4-crossing", plain, "native")
    convert(GOLDEN / "nf4-crossing", tmp_path / "source", "bf16")
    # The largest value of a block is exact in no 16-bit type: quantize what is compared with as it was written.
    model = qlora_rs.from_pretrained(GOLDEN / "nf4-crossing", dtype="float32")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            tensors[f"{name}.weight"] = module.dequantize(torch.float32)
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    for folder in (plain, GOLDEN / "nf4-crossing"):
        assert verify(folder, tmp_path / "source").same
    stored = load_file(plain / "model.safetensors")
    stored[f"{DOWN}.weight"][0, 1234] ^= 0x40
    with safe_open(plain / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(stored, plain / "model.safetensors", metadata)
    report = verify(plain, tmp_path / "source")
    assert [verdict.name for verdict in report.tensors if verdict.status == "different"] == [f"{DOWN}.weight"]


def test_analyze_measures_it_against_a_source(native, floats) -> None:
    for folder in (ODD, native):
        found = analyze(folder, floats)
        assert found.relative_error == 0
        by_name = {weight.name: weight for weight in found.weights}
        down = by_name[f"{DOWN}.weight"]
        assert sum(down.code_counts) == 4515
        assert down.blocks == 71


def test_analyze_names_an_outlier_by_the_row_in_which_its_block_begins(tmp_path) -> None:
    tensors = load_file(GOLDEN / "nf4-crossing" / "model.safetensors")
    tensors[f"{DOWN}.weight.absmax"][100] = 50.0  # elements 6400 to 6463 of rows of 130
    shutil.copytree(GOLDEN / "nf4-crossing", tmp_path / "model")
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    first = analyze(tmp_path / "model").outliers[0]
    assert (first.name, first.row, first.block, first.absmax) == (f"{DOWN}.weight", 49, 100, 50.0)


def test_quantizing_to_other_formats_takes_its_values(native, tmp_path) -> None:
    for number, folder in enumerate((ODD, native)):
        convert(folder, tmp_path / f"plain{number}", "fp16")
    same_tensors(tmp_path / "plain0", tmp_path / "plain1")
    model = qlora_rs.from_pretrained(ODD)
    values = load_file(tmp_path / "plain0" / "model.safetensors")
    assert torch.equal(values[f"{DOWN}.weight"], model.get_submodule(DOWN).dequantize(torch.float16))


def test_an_adapter_trains_saves_and_merges(native, tmp_path, descend) -> None:
    torch.manual_seed(0)
    model = qlora_rs.from_pretrained(ODD, dtype="float32")
    qlora_rs.attach_lora(model, r=3, seed=0)
    tokens = torch.arange(17)[None]
    optimizer = torch.optim.SGD(qlora_rs.lora_parameters(model), lr=0.5)
    losses = descend(model, optimizer, tokens, 5)
    assert losses[-1] < losses[0]
    qlora_rs.save_adapter(model, tmp_path / "adapter")
    trained = model(tokens).logits
    for folder in (ODD, native):
        merged = tmp_path / f"merged-{folder.name}"
        merge(folder, tmp_path / "adapter", merged, dtype=torch.float32)
        plain = qlora_rs.model.load_float(merged, dtype="float32")
        torch.testing.assert_close(plain(tokens).logits, trained, rtol=1e-4, atol=1e-5)
    qlora_rs.merge_adapter(model, dtype=torch.float32)
    torch.testing.assert_close(model(tokens).logits, trained, rtol=1e-4, atol=1e-5)


def test_experts_that_share_scales_are_taken_over_flat(write_tensors, tmp_path) -> None:
    """Three experts of 3 blocks: a group of 256 scales is theirs all."""
    torch.manual_seed(2)
    weight = torch.randn(3, 3, 64)
    packed = qlora_rs.quantize(weight.view(1, -1), QuantSpec())
    state = checkpoint.flat.render_state(QuantSpec(), "bfloat16", (3, 3, 64), float(packed.absmax_offset))
    tensors = {
        "experts.down_proj": packed.codes.view(-1, 1),
        "experts.down_proj.absmax": packed.absmax.flatten(),
        "experts.down_proj.quant_map": checkpoint.flat.code_values(QuantSpec()),
        "experts.down_proj.nested_absmax": packed.absmax_scale,
        "experts.down_proj.nested_quant_map": checkpoint.flat.scale_values(),
        "experts.down_proj.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
    }
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = write_tensors(tmp_path / "flat", tensors, model_type="unknown", quantization_config=quantization)
    convert(folder, tmp_path / "native", "native")
    row = inspect(tmp_path / "native").packed[0]
    assert (row.shape, row.flat) == ((3, 3, 64), True)
    assert diff(folder, tmp_path / "native").same
    convert(tmp_path / "native", tmp_path / "back", "bitsandbytes")
    same_tensors(tmp_path / "back", folder)


def test_a_flat_shape_that_its_codes_do_not_hold_is_a_format_error(native) -> None:
    path = native / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata[f"{DOWN}.weight.shape"] = "[35, 131]"
    save_file(load_file(path), path, metadata)
    with pytest.raises(FormatError, match=r"down_proj\.weight"):
        inspect(native)


def test_a_weight_of_unknown_shape_is_refused_by_name(tmp_path) -> None:
    shutil.copytree(ODD, tmp_path / "model")
    tensors = load_file(ODD / "model.safetensors")
    key = f"{DOWN}.weight.quant_state.bitsandbytes__nf4"
    state = {**json.loads(bytes(tensors[key].tolist())), "shape": None}
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"down_proj\.weight.*does not tell its shape"):
        qlora_rs.from_pretrained(tmp_path / "model")
