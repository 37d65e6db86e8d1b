"""bitsandbytes' 4-bit folders: read, converted both ways, compared byte by byte with what the library itself wrote.

tests/golden/make_bitsandbytes.py made the folders that are compared with.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qlora_rs
from qlora_rs import FormatError, Linear4bit, QuantSpec, UnsupportedError, checkpoint, reference
from qlora_rs.checkpoint import convert, flat, inspect

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "bitsandbytes"
UP = "model.layers.0.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"

SPECS = {
    "nf4": QuantSpec("nf4", 64, False),
    "nf4-double": QuantSpec("nf4"),
    "fp4": QuantSpec("fp4", 64, False),
    "fp4-double": QuantSpec("fp4"),
}
PACKED = [*SPECS, "nf4-as-bf16", "nf4-as-f16", "nf4-as-f32", "nf4-double-sharded", "nf4-skipping"]


def same_files(a: Path, b: Path) -> None:
    assert sorted(os.listdir(a)) == sorted(os.listdir(b))
    for name in os.listdir(a):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The golden source, quantized here; by the name of bitsandbytes' counterpart."""
    folder = tmp_path_factory.mktemp("quantized")
    for name, spec in SPECS.items():
        checkpoint.quantize(GOLDEN / "source", folder / name, spec)
    return folder


@pytest.fixture
def altered(tmp_path):
    """A copy of a golden folder with changed tensors: ``altered(change, name)``."""

    def alter(change, name="nf4-double"):
        folder = tmp_path / "altered"
        shutil.copytree(GOLDEN / name, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return alter


def state(**changes):
    """A change of the golden ``quant_state``; a value of ... removes the field."""

    def change(tensors):
        fields = {**json.loads(bytes(tensors[STATE].tolist())), **changes}
        text = json.dumps({key: value for key, value in fields.items() if value is not ...})
        tensors[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


# What the library itself writes.


def test_plain_nf4_is_their_folder_byte_for_byte(quantized, tmp_path) -> None:
    convert(quantized / "nf4", tmp_path / "out", "bitsandbytes")
    same_files(tmp_path / "out", GOLDEN / "nf4")


def test_double_quantization_differs_only_where_their_scale_code_is_not_the_nearest(quantized, tmp_path) -> None:
    convert(quantized / "nf4-double", tmp_path / "out", "bitsandbytes")
    assert (tmp_path / "out" / "config.json").read_bytes() == (GOLDEN / "nf4-double" / "config.json").read_bytes()
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(GOLDEN / "nf4-double")
    plain = tensors_of(GOLDEN / "nf4")
    table = reference.dynamic_map()
    assert ours.keys() == theirs.keys()
    differing = 0
    for name, tensor in ours.items():
        other = theirs[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        if not name.endswith(".absmax"):
            assert torch.equal(as_bytes(tensor), as_bytes(other)), name
            continue
        where = (tensor != other).nonzero().flatten()
        differing += len(where)
        base = name.removesuffix(".absmax")
        offset = json.loads(bytes(ours[f"{base}.quant_state.bitsandbytes__nf4"].tolist()))["nested_offset"]
        exact = (plain[name][where].double() - offset) / ours[f"{base}.nested_absmax"][where // 256]
        to_ours, to_theirs = ((table[codes[where].long()] - exact).abs() for codes in (tensor, other))
        assert (to_ours < to_theirs).all()
        assert ((to_theirs - to_ours) < 2e-5).all()
    assert differing == 12  # of 1344 scales


def test_fp4_differs_only_between_typed_borders_and_midpoints(quantized, tmp_path) -> None:
    convert(quantized / "fp4", tmp_path / "out", "bitsandbytes")
    assert (tmp_path / "out" / "config.json").read_bytes() == (GOLDEN / "fp4" / "config.json").read_bytes()
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(GOLDEN / "fp4")
    source = tensors_of(GOLDEN / "source")
    magnitudes = reference.FP4[reference.FP4_BY_RANK]
    midpoints = (magnitudes[:-1] + magnitudes[1:]) / 2
    differing = 0
    for name, tensor in ours.items():
        if f"{name}.absmax" not in ours:
            assert torch.equal(as_bytes(tensor), as_bytes(theirs[name])), name
            continue
        a, b = (reference.unpack(codes.reshape(1, -1), 2 * codes.numel())[0] for codes in (tensor, theirs[name]))
        where = (a != b).nonzero().flatten()
        absmax = ours[f"{name}.absmax"][where // 64]
        x = source[name].float().flatten()[where] * (1 / absmax)
        ranks = [torch.bucketize(x.abs(), borders) for borders in (reference.FP4_THRESHOLDS, midpoints)]
        rank_of = reference.FP4_BY_RANK.argsort()
        assert torch.equal(rank_of[a[where].long() % 8], ranks[0])
        zero = (a[where] % 8 == 0) & (b[where] % 8 == 0)  # the sign of zero is free
        assert (zero | ((rank_of[b[where].long() % 8] - ranks[0]).abs() <= 1)).all()
        differing += len(where)
    assert 0 < differing < 0.01 * sum(t.numel() for n, t in source.items() if n.endswith("proj.weight"))


@pytest.mark.parametrize("name", SPECS)
def test_keys_types_and_order_are_theirs(quantized, tmp_path, name) -> None:
    convert(quantized / name, tmp_path / "out", "bitsandbytes")
    with (
        open(tmp_path / "out" / "model.safetensors", "rb") as ours,
        open(GOLDEN / name / "model.safetensors", "rb") as theirs,
    ):
        length = ours.read(8)
        assert length == theirs.read(8)
        assert ours.read(int.from_bytes(length, "little")) == theirs.read(int.from_bytes(length, "little"))


# Reading and writing back.


@pytest.mark.parametrize("name", PACKED)
def test_written_back_it_is_the_same_folder(tmp_path, name) -> None:
    size = 20_000 if name.endswith("sharded") else 5_000_000_000
    convert(GOLDEN / name, tmp_path / "same", "bitsandbytes", max_shard_size=size)
    same_files(tmp_path / "same", GOLDEN / name)


@pytest.mark.parametrize("name", PACKED)
def test_through_the_native_format_no_byte_changes(tmp_path, name) -> None:
    convert(GOLDEN / name, tmp_path / "native", "native")
    size = 20_000 if name.endswith("sharded") else 5_000_000_000
    convert(tmp_path / "native", tmp_path / "back", "bitsandbytes", max_shard_size=size)
    same_files(tmp_path / "back", GOLDEN / name)


@pytest.mark.parametrize(
    "kept", [["bnb_4bit_quant_storage"], {"bnb_4bit_quant_storage": "int8"}, {"bnb_4bit_quant_type": "fp4"}]
)
def test_kept_settings_that_none_has_are_refused_with_the_file(tmp_path, kept) -> None:
    convert(GOLDEN / "nf4-as-f16", tmp_path / "native", "native")
    path = tmp_path / "native" / "config.json"
    config = json.loads(path.read_text())
    assert config["quantization_config"]["bitsandbytes"]["bnb_4bit_quant_storage"] == "float16"
    config["quantization_config"]["bitsandbytes"] = kept
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"config\.json.*bitsandbytes"):
        convert(tmp_path / "native", tmp_path / "back", "bitsandbytes")
    assert not (tmp_path / "back").exists()


def test_codes_that_are_no_whole_elements_of_the_kept_storage_are_refused(tmp_path, write_tensors) -> None:
    tensors = {"layers.0.up.weight": torch.randn(1, 66)}
    source = write_tensors(tmp_path / "source", tensors, 1, model_type="unknown")
    checkpoint.quantize(source, tmp_path / "native", include=["up"])
    path = tmp_path / "native" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["bitsandbytes"] = {"bnb_4bit_quant_storage": "bfloat16"}
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"33 bytes of codes, which are no whole elements of torch\.bfloat16"):
        convert(tmp_path / "native", tmp_path / "back", "bitsandbytes")


@pytest.mark.parametrize("name", ["nf4", "fp4-double"])
def test_the_native_folder_is_the_one_that_quantize_writes(quantized, tmp_path, name) -> None:
    convert(quantized / name, tmp_path / "flat", "bitsandbytes")
    convert(tmp_path / "flat", tmp_path / "native", "native")
    ours, expected = (tensors_of(folder) for folder in (tmp_path / "native", quantized / name))
    assert list(ours) == list(expected)
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    assert (tmp_path / "native" / "config.json").read_bytes() == (quantized / name / "config.json").read_bytes()
    assert inspect(tmp_path / "native").tensors == inspect(quantized / name).tensors


@pytest.mark.parametrize("name", PACKED)
def test_a_model_loads_with_the_very_same_bytes(name) -> None:
    model = qlora_rs.from_pretrained(GOLDEN / name, dtype=torch.float32)
    stored = tensors_of(GOLDEN / name)
    layers = {key: module for key, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) == (6 if name == "nf4-skipping" else 7)
    for key, layer in layers.items():
        assert torch.equal(as_bytes(layer.weight), as_bytes(stored[f"{key}.weight"]))
        assert torch.equal(as_bytes(layer.weight_absmax), as_bytes(stored[f"{key}.weight.absmax"]))
        if layer.spec.double_quant:
            scales = stored[f"{key}.weight.nested_absmax"]
            assert torch.equal(as_bytes(layer.weight_absmax_scale), as_bytes(scales))
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def test_a_loaded_model_answers_as_the_converted_folder_and_saves_natively(tmp_path) -> None:
    model = qlora_rs.from_pretrained(GOLDEN / "nf4-double", dtype=torch.bfloat16)
    convert(GOLDEN / "nf4-double", tmp_path / "native", "native")
    model.save_pretrained(tmp_path / "saved")
    tokens = torch.arange(9)[None]
    for folder in ("native", "saved"):
        again = qlora_rs.from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert model.config.name_or_path == str(GOLDEN / "nf4-double")
    qlora_rs.attach_lora(model, r=2)
    assert len(qlora_rs.lora_modules(model)) == 7


def test_another_spec_than_the_files_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is packed as nf4.*cannot be loaded as fp4"):
        qlora_rs.from_pretrained(GOLDEN / "nf4", QuantSpec("fp4"))


def test_inspect_lists_weights_by_their_logical_shape() -> None:
    info = inspect(GOLDEN / "nf4-double")
    assert (info.format, info.spec) == ("bitsandbytes", QuantSpec())
    assert len(info.packed) == 7
    assert len(info.tensors) == 16
    row = next(row for row in info.tensors if row.name == UP)
    assert (row.dtype, row.shape) == ("nf4", (384, 64))
    assert row.bytes == 12288 + 384 + 64 + 8 + 1024 + len(tensors_of(GOLDEN / "nf4-double")[STATE])
    assert info.total_bytes == sum(tensor.nbytes for tensor in tensors_of(GOLDEN / "nf4-double").values())
    assert inspect(GOLDEN / "nf4-double-sharded").packed != ()


def test_a_single_file_of_several_is_inspected_as_far_as_it_goes() -> None:
    files = sorted((GOLDEN / "nf4-double-sharded").glob("*.safetensors"))
    infos = [inspect(file) for file in files]
    assert all(info.format == "bitsandbytes" for info in infos)
    assert 0 < sum(len(info.packed) for info in infos) <= 7


# Sixteen bits.


@pytest.mark.parametrize(("to", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("name", ["nf4-double", "fp4", "nf4-as-bf16"])
def test_dequantized_it_holds_what_the_layers_compute_with(tmp_path, to, dtype, name) -> None:
    report = convert(GOLDEN / name, tmp_path / "out", to)
    stored = tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    model = qlora_rs.from_pretrained(GOLDEN / name, dtype=dtype)
    for key, module in model.named_modules():
        if isinstance(module, Linear4bit):
            assert torch.equal(stored[f"{key}.weight"], module.dequantize(dtype)), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert report.bytes_after == sum(tensor.nbytes for tensor in stored.values())
    qlora_rs.model.load_float(tmp_path / "out")


def test_native_folders_with_odd_rows_are_dequantized_too(tiny_llama, tmp_path) -> None:
    checkpoint.quantize(tiny_llama, tmp_path / "packed", QuantSpec("int4", 32))
    convert(tmp_path / "packed", tmp_path / "out", "bf16")
    stored = tensors_of(tmp_path / "out")
    model = qlora_rs.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    for key, module in model.named_modules():
        if isinstance(module, Linear4bit):
            assert torch.equal(stored[f"{key}.weight"], module.dequantize(torch.bfloat16)), key


def test_rows_that_share_blocks_are_dequantized_by_their_flat_blocks(tmp_path) -> None:
    convert(GOLDEN / "nf4-crossing", tmp_path / "out", "bf16")
    stored, packed = tensors_of(tmp_path / "out"), tensors_of(GOLDEN / "nf4-crossing")
    name = "model.layers.0.mlp.down_proj.weight"
    assert stored[name].shape == (72, 130)
    codes = reference.unpack(packed[name].reshape(1, -1), 72 * 130)
    expected = reference.NF4[codes.long()].flatten() * packed[f"{name}.absmax"].repeat_interleave(64)[: 72 * 130]
    assert torch.equal(stored[name].flatten(), expected.bfloat16())


def test_values_that_do_not_fit_float16_are_an_error(altered, tmp_path) -> None:
    def change(tensors):
        tensors[f"{UP}.absmax"][3] = 1e6

    with pytest.raises(FormatError, match=r"up_proj.*do not fit float16"):
        convert(altered(change, "nf4"), tmp_path / "out", "fp16")
    assert not (tmp_path / "out").exists()


# What the other format cannot hold.


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (QuantSpec("int4"), "int4.*no name"),
        (QuantSpec("int8"), "int8.*no name"),
        (QuantSpec("dynamic8"), "dynamic8.*no name"),
        (QuantSpec(codebook=[-1, 0.25, 0.5, 1]), "codebook.*no name"),
        (QuantSpec("nf4", 128), r"gate_proj\.weight.*rows of 64 elements are no whole blocks of 128"),
    ],
    ids=lambda value: value.describe() if isinstance(value, QuantSpec) else "",
)
def test_what_bitsandbytes_cannot_hold_is_refused_with_the_reason(tmp_path, spec, message) -> None:
    checkpoint.quantize(GOLDEN / "source", tmp_path / "packed", spec)
    with pytest.raises(UnsupportedError, match=message):
        convert(tmp_path / "packed", tmp_path / "out", "bitsandbytes")
    assert os.listdir(tmp_path) == ["packed"]


def test_a_skipped_layer_is_listed_for_transformers(tmp_path) -> None:
    checkpoint.quantize(GOLDEN / "source", tmp_path / "packed", skip_modules=["up_proj"])
    convert(tmp_path / "packed", tmp_path / "out", "bitsandbytes")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["model.layers.0.mlp.up_proj", "lm_head"]
    assert len(inspect(tmp_path / "out").packed) == 6


@pytest.mark.parametrize("double_quant", [False, True])
def test_experts_keep_their_bytes_where_scales_allow_it(write_tensors, tmp_path, double_quant) -> None:
    torch.manual_seed(1)
    experts = torch.randn(3, 256, 64)
    experts[:] = experts[:1]  # so that all have one offset
    source = write_tensors(tmp_path / "source", {"model.experts.up.weight": experts}, model_type="unknown")
    checkpoint.quantize(source, tmp_path / "packed", QuantSpec("nf4", 64, double_quant), include=["*"])
    convert(tmp_path / "packed", tmp_path / "flat", "bitsandbytes")
    stored = tensors_of(tmp_path / "flat")
    assert stored["model.experts.up.weight"].shape == (3 * 256 * 32, 1)
    assert stored["model.experts.up.weight.absmax"].shape == (768,)
    convert(tmp_path / "flat", tmp_path / "native", "native")
    ours, expected = tensors_of(tmp_path / "native"), tensors_of(tmp_path / "packed")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("rows", "message"), [(256, "scales of their own"), (255, "255 blocks of one expert are no multiple of 256")]
)
def test_experts_with_scales_of_their_own_are_refused(write_tensors, tmp_path, rows, message) -> None:
    source = write_tensors(tmp_path / "source", {"experts.up.weight": torch.randn(2, rows, 64)}, model_type="unknown")
    checkpoint.quantize(source, tmp_path / "packed", include=["*"])
    with pytest.raises(UnsupportedError, match=rf"experts\.up\.weight.*{message}"):
        convert(tmp_path / "packed", tmp_path / "flat", "bitsandbytes")


@pytest.mark.parametrize("columns", [1, 63, 65, 127])
def test_a_single_row_of_any_length_is_the_same_in_both(write_tensors, tmp_path, columns) -> None:
    source = write_tensors(tmp_path / "source", {"row.weight": torch.randn(1, columns)}, model_type="unknown")
    checkpoint.quantize(source, tmp_path / "packed", include=["*"])
    convert(tmp_path / "packed", tmp_path / "flat", "bitsandbytes")
    convert(tmp_path / "flat", tmp_path / "native", "native")
    assert inspect(tmp_path / "native").packed[0].shape == (1, columns)
    ours, expected = tensors_of(tmp_path / "native"), tensors_of(tmp_path / "packed")
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_other_formats_are_refused(tiny_llama, quantized, tmp_path) -> None:
    with pytest.raises(UnsupportedError, match="quantize"):
        convert(tiny_llama, tmp_path / "out", "bitsandbytes")
    with pytest.raises(UnsupportedError, match="native format already"):
        convert(quantized / "nf4", tmp_path / "out", "native")
    with pytest.raises(ValueError, match=r"native, bitsandbytes, bf16, fp16, compressed-tensors, gguf.*'exl2'"):
        convert(quantized / "nf4", tmp_path / "out", "exl2")
    shutil.copytree(GOLDEN / "nf4", tmp_path / "eight")
    config = tmp_path / "eight" / "config.json"
    config.write_text(config.read_text().replace('load_in_8bit": false', 'load_in_8bit": true'))
    assert inspect(tmp_path / "eight").spec is None
    with pytest.raises(UnsupportedError, match="holds no 4-bit weight"):
        convert(tmp_path / "eight", tmp_path / "out", "bf16")
    with pytest.raises(UnsupportedError, match="is quantized by 'bitsandbytes'"):
        qlora_rs.from_pretrained(tmp_path / "eight")


# Hostile files.


def delete(suffix):
    return lambda tensors: tensors.pop(UP + suffix)


def put(suffix, tensor):
    return lambda tensors: tensors.update({UP + suffix: tensor})


def text(content: bytes):
    return lambda tensors: tensors.update({STATE: torch.tensor(list(content), dtype=torch.uint8)})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (delete(".quant_state.bitsandbytes__nf4"), FormatError, "needs exactly one of .*; got none"),
        (put(".quant_state.bitsandbytes__fp4", torch.zeros(3, dtype=torch.uint8)), FormatError, "needs exactly one of"),
        (put(".quant_state.other", torch.zeros(3, dtype=torch.uint8)), FormatError, "needs exactly one of"),
        (delete(""), FormatError, "which no file holds"),
        (delete(".absmax"), FormatError, r"absmax.*got nothing"),
        (delete(".quant_map"), FormatError, r"quant_map.*got nothing"),
        (delete(".nested_absmax"), FormatError, r"nested_absmax.*got nothing"),
        (delete(".nested_quant_map"), FormatError, r"nested_quant_map.*got nothing"),
        (
            put(".absmax", torch.zeros(383, dtype=torch.uint8)),
            FormatError,
            r"absmax.*expected U8 \[384\].*got U8 \[383\]",
        ),
        (put(".absmax", torch.zeros(384)), FormatError, r"absmax.*expected U8 \[384\].*got F32"),
        (put(".nested_absmax", torch.zeros(3)), FormatError, r"nested_absmax.*expected F32 \[2\]"),
        (put(".quant_map", torch.zeros(15)), FormatError, r"quant_map.*expected F32 \[16\]"),
        (put("", torch.zeros(12287, 1, dtype=torch.uint8)), FormatError, "has 12287 bytes"),
        (put("", torch.zeros(3072, 1, dtype=torch.int32)), FormatError, "holds packed codes"),
        (text(b"{"), FormatError, "not valid JSON"),
        (text(b"\xff\xfe"), FormatError, "not valid JSON"),
        (text(b"[" * 5000), FormatError, "not valid JSON"),
        (text(b'{"quant_type": "nf4", "quant_type": "nf4"}'), FormatError, "'quant_type' occurs twice"),
        (text(b"[1]"), FormatError, "JSON list, not an object"),
        (text(b" " * 70000), FormatError, "of at most 65536"),
        (put(".quant_state.bitsandbytes__nf4", torch.zeros(3)), FormatError, "expected U8"),
        (state(surprise=1, blocks=2), FormatError, "does not know: surprise, blocks"),
        (state(blocksize=...), FormatError, "lacks blocksize"),
        (state(nested_dtype=...), FormatError, "lacks nested_dtype"),
        (state(quant_type="fp4"), FormatError, "quant_type 'fp4'"),
        (state(dtype="int8"), FormatError, "dtype 'int8'"),
        (state(shape=[384, -64]), FormatError, "shape"),
        (state(shape=[True, 64]), FormatError, "shape"),
        (state(shape=[1 << 40, 1 << 40]), FormatError, "shape"),
        (state(shape="384"), FormatError, "shape"),
        (state(shape=[384, 65]), FormatError, "takes 12480"),
        (state(nested_offset="0"), FormatError, "nested_offset"),
        (state(nested_offset=0.1), FormatError, "nested_offset"),
        (state(nested_offset=1e300), FormatError, "nested_offset"),
        (state(blocksize=48), UnsupportedError, "block_size is one of"),
        (state(blocksize="64"), UnsupportedError, "block_size is an integer"),
        (state(nested_blocksize=128), UnsupportedError, "groups of 128"),
        (state(nested_dtype="float16"), UnsupportedError, "'float16'"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_an_error_that_names_the_tensor(altered, change, error, message) -> None:
    folder = altered(change)
    with pytest.raises(error, match=rf"(?s)model\.safetensors: tensor '{UP}.*{message}"):
        inspect(folder)
    with pytest.raises(error, match=message):
        qlora_rs.from_pretrained(folder)


@pytest.mark.parametrize("part", [".quant_map", ".nested_quant_map"])
def test_codes_that_mean_other_values_are_refused(altered, tmp_path, part) -> None:
    def change(tensors):
        tensors[UP + part][3] += 0.001

    folder = altered(change)
    assert inspect(folder).spec == QuantSpec()
    for to in ("native", "bf16"):
        with pytest.raises(UnsupportedError, match=rf"up_proj\.weight\{part}' gives codes other values"):
            convert(folder, tmp_path / "out", to)
    with pytest.raises(UnsupportedError, match="gives codes other values"):
        qlora_rs.from_pretrained(folder)


def test_a_shape_that_is_not_told_is_refused_where_it_is_needed(altered, tmp_path) -> None:
    folder = altered(state(shape=None))
    assert next(row for row in inspect(folder).tensors if row.name == UP).shape == (24576,)
    convert(folder, tmp_path / "same", "bitsandbytes")
    same_files(tmp_path / "same", folder)
    for to in ("native", "bf16"):
        with pytest.raises(UnsupportedError, match=r"up_proj.*does not tell its shape"):
            convert(folder, tmp_path / "out", to)
    with pytest.raises(UnsupportedError, match=r"up_proj.*does not tell its shape"):
        qlora_rs.from_pretrained(folder)


def test_nested_parts_of_a_plain_weight_are_an_error(altered) -> None:
    folder = altered(put(".nested_absmax", torch.zeros(2)), "nf4")
    with pytest.raises(FormatError, match=r"nested_absmax' does not belong"):
        inspect(folder)


def test_weights_packed_in_two_ways_are_refused(altered, tmp_path) -> None:
    def change(tensors):
        fields = json.loads(bytes(tensors[STATE].tolist())) | {"blocksize": 128}
        tensors[STATE] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)
        tensors[f"{UP}.absmax"] = tensors[f"{UP}.absmax"][::2].contiguous()

    folder = altered(change, "nf4")
    assert inspect(folder).spec is None
    assert len(inspect(folder).packed) == 7
    with pytest.raises(UnsupportedError, match="in several ways"):
        convert(folder, tmp_path / "out", "native")


@pytest.mark.parametrize("keep", [4, 100, 9000, 40_000])
def test_a_truncated_file_is_an_error(tmp_path, keep) -> None:
    shutil.copytree(GOLDEN / "nf4-double", tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", keep)
    with pytest.raises(FormatError):
        inspect(tmp_path / "cut")
    with pytest.raises(FormatError):
        convert(tmp_path / "cut", tmp_path / "out", "native")


# Folders.


def test_an_interruption_leaves_no_destination_and_a_rerun_works(tmp_path) -> None:
    def interrupt(done, total):
        if done > total / 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"out\.partial"):
        convert(GOLDEN / "nf4-double", tmp_path / "out", "native", progress=interrupt)
    assert os.listdir(tmp_path) == ["out.partial"]
    report = convert(GOLDEN / "nf4-double", tmp_path / "out", "native")
    assert "was resumed" in report.notes[0]
    convert(GOLDEN / "nf4-double", tmp_path / "again", "native")
    same_files(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize("to", ["native", "bitsandbytes", "bf16"])
@pytest.mark.parametrize("native", [False, True])
def test_progress_ends_at_the_total(quantized, tmp_path, to, native) -> None:
    if native and to == "native":
        return
    source = (quantized if native else GOLDEN) / "nf4-double"
    calls: list[tuple[int, int]] = []
    convert(source, tmp_path / "out", to, progress=lambda *call: calls.append(call))
    assert calls[-1] == (inspect(source).total_bytes,) * 2
    assert calls == sorted(calls)


def test_other_files_go_along_and_native_shards_keep_a_weight_together(tmp_path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "nf4-double-sharded", source)
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"x")
    report = convert(source, tmp_path / "out", "native", max_shard_size=20_000)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert [entry.name for entry in report.left_out] == ["pytorch_model.bin"]
    assert len(report.files) > 2
    for file in report.files:
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            names = set(opened.keys())
        assert all(f"{name}_absmax_offset" in names for name in names if f"{name}_absmax" in names)


def test_merging_an_adapter_takes_a_bitsandbytes_base(tmp_path) -> None:
    from qlora_rs.merge import merge

    model = qlora_rs.from_pretrained(GOLDEN / "nf4", dtype=torch.float32)
    qlora_rs.attach_lora(model, r=2)
    qlora_rs.save_adapter(model, tmp_path / "adapter")
    merge(GOLDEN / "nf4", tmp_path / "adapter", tmp_path / "merged")
    convert(GOLDEN / "nf4", tmp_path / "plain", "bf16")
    same_files(tmp_path / "merged", tmp_path / "plain")


def test_the_table_of_codes_is_theirs() -> None:
    for name, spec in SPECS.items():
        stored = tensors_of(GOLDEN / name)[f"{UP}.quant_map"]
        assert torch.equal(as_bytes(flat.code_values(spec)), as_bytes(stored))


# With the library itself, where it is installed.


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("name", ["nf4", "nf4-double", "fp4-double", "skipping", "sharded"])
def test_transformers_and_bitsandbytes_load_what_is_written(quantized, tmp_path, name) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    if name == "skipping":
        checkpoint.quantize(GOLDEN / "source", tmp_path / "packed", skip_modules=["up_proj"])
    else:
        shutil.copytree(quantized / name.replace("sharded", "nf4-double"), tmp_path / "packed")
    size = 20_000 if name == "sharded" else 5_000_000_000
    convert(tmp_path / "packed", tmp_path / "out", "bitsandbytes", max_shard_size=size)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    ours = qlora_rs.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    layers = {key: module for key, module in ours.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) == (6 if name == "skipping" else 7)
    for key, layer in layers.items():
        weight = theirs.get_submodule(key).weight
        assert torch.equal(dequantize_4bit(weight.data, weight.quant_state), layer.dequantize(torch.bfloat16)), key
    tokens = torch.arange(9)[None]
    assert torch.allclose(theirs(tokens).logits.float(), ours(tokens).logits.float(), atol=0.02)
