"""GPTQ, AWQ and compressed-tensors folders: the values that those libraries' own code gives, bit for bit.

tests/golden/make_foreign.py made the folders, and recorded the hash of each weight as its library dequantizes it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora_rs
from qlora_rs import QuantSpec, UnsupportedError
from qlora_rs.checkpoint import convert, diff, foreign, inspect, open_weights, quantize, verify
from qlora_rs.checkpoint.dequantized import open_float_source
from qlora_rs.checkpoint.grouped import unpack
from qlora_rs.checkpoint.slices import SliceReader

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "foreign"
FOLDERS = sorted(folder.name for folder in GOLDEN.iterdir())
DOWN = "model.layers.0.mlp.down_proj.weight"


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def expected(name: str) -> dict[str, str]:
    return json.loads((GOLDEN / name / "expected.json").read_text())["sha256"]


def exact(name: str) -> str:
    """The target of `convert` that rounds nothing."""
    return "bf16" if json.loads((GOLDEN / name / "config.json").read_text())["dtype"] == "bfloat16" else "fp16"


def test_there_are_folders_of_each_library() -> None:
    assert len(FOLDERS) == 18
    assert {name.partition("-")[0] for name in FOLDERS} == {"gptq", "gptqmodel", "awq", "ct"}


@pytest.mark.parametrize("name", FOLDERS)
def test_values_are_those_of_the_library_itself(name) -> None:
    read = open_weights(GOLDEN / name)
    assert {weight: digest(read(weight)) for weight in expected(name)} == expected(name)


@pytest.mark.parametrize("name", FOLDERS)
def test_pieces_of_rows_are_the_same_values(name, monkeypatch) -> None:
    monkeypatch.setattr(foreign, "PIECE_ELEMENTS", 32 * 64)
    read = open_weights(GOLDEN / name)
    assert {weight: digest(read(weight)) for weight in expected(name)} == expected(name)


@pytest.mark.parametrize("name", FOLDERS)
def test_ranges_of_bytes_are_the_same_values(name) -> None:
    with SliceReader(open_float_source(GOLDEN / name)) as reader:
        total = reader.source.tensors[DOWN].nbytes
        cuts = [0, 1, 190, 192, 193, 4000, 4001, total]
        parts = [reader.read(DOWN, start, end - start) for start, end in pairwise(cuts)]
    assert digest(torch.cat(parts)) == expected(name)[DOWN]


@pytest.mark.parametrize("name", FOLDERS)
def test_inspect_says_what_the_folder_holds(name) -> None:
    info = inspect(GOLDEN / name)
    row = next(row for row in info.tensors if row.name == DOWN)
    assert info.format == {"awq": "awq", "ct": "compressed-tensors"}.get(name.partition("-")[0], "gptq")
    assert {row.name for row in info.packed} == set(expected(name))
    assert (row.kind, row.shape) == ("packed", (64, 96))
    assert info.total_bytes == sum(t.nbytes for t in load_file(GOLDEN / name / "model.safetensors").values())
    bits = next(bits for bits in (2, 3, 8, 4) if f"{bits}bit" in name or f"int{bits}" in name or bits == 4)
    assert row.dtype == f"int{bits}"
    assert all(scheme.startswith(f"{bits} bits, ") for scheme in info.schemes)
    assert ("one group a row" in info.schemes[0]) == ("channel" in name)
    assert ("act-order" in info.schemes[0]) == ("act-order" in name)


@pytest.mark.parametrize("name", FOLDERS)
def test_converted_to_its_own_type_nothing_is_rounded(name, tmp_path, load_folder) -> None:
    report = convert(GOLDEN / name, tmp_path / "out", exact(name))
    tensors = load_folder(tmp_path / "out")
    kept = {row.name for row in inspect(GOLDEN / name).tensors if row.kind == "kept"}
    assert report.weights == 7
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(tensors) == {*expected(name), *kept}
    if name != "ct-int4-channel-asym":  # whose own type is float32
        assert {weight: digest(tensors[weight]) for weight in expected(name)} == expected(name)
        assert not report.notes
    else:
        assert "F16 rounds them once more" in report.notes[0]


def test_rounding_to_another_type_is_told(tmp_path, load_folder) -> None:
    report = convert(GOLDEN / "awq-g32", tmp_path / "out", "bf16")
    assert "gives its weights in F16: BF16 rounds them once more" in report.notes[0]
    values = open_weights(GOLDEN / "awq-g32")(DOWN)
    assert torch.equal(load_folder(tmp_path / "out")[DOWN], values.bfloat16())


def test_transformers_loads_what_was_converted(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    convert(GOLDEN / "gptq-4bit-g32-sym", tmp_path / "out", "fp16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert digest(model.get_parameter(DOWN)) == expected("gptq-4bit-g32-sym")[DOWN]


def test_an_adapter_merges_over_the_values(tmp_path, load_folder) -> None:
    from qlora_rs.merge import merge

    folder = GOLDEN / "awq-g32"
    convert(folder, tmp_path / "plain", "fp16")
    model = qlora_rs.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    qlora_rs.attach_lora(model, r=4)
    for layer in qlora_rs.lora_modules(model).values():
        torch.nn.init.normal_(layer.lora_B.data)
    qlora_rs.save_adapter(model, tmp_path / "adapter")
    report = merge(folder, tmp_path / "adapter", tmp_path / "merged")
    merge(tmp_path / "plain", tmp_path / "adapter", tmp_path / "expected")
    assert "quantized by 'awq'" in report.notes[0]
    merged, alike = load_folder(tmp_path / "merged"), load_folder(tmp_path / "expected")
    assert all(torch.equal(merged[key], alike[key]) for key in alike)
    with pytest.raises(ValueError, match="records no other base"):
        merge(folder, tmp_path / "adapter", tmp_path / "other", base=tmp_path / "plain")


def test_a_model_packed_from_it_merges_over_its_values(tmp_path, load_folder) -> None:
    from qlora_rs.merge import merge

    folder = GOLDEN / "awq-g32"
    quantize(folder, tmp_path / "packed", QuantSpec("nf4", 32))
    model = qlora_rs.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    qlora_rs.attach_lora(model, r=4)  # whose B is zero: nothing is added
    qlora_rs.save_adapter(model, tmp_path / "adapter")
    merge(tmp_path / "packed", tmp_path / "adapter", tmp_path / "merged", dtype=torch.float16, base=folder)
    merged = load_folder(tmp_path / "merged")
    assert {weight: digest(merged[weight]) for weight in expected("awq-g32")} == expected("awq-g32")
    other = GOLDEN / "gptq-4bit-g32-sym"
    with pytest.raises(qlora_rs.FormatError, match="SHA-256"):
        merge(tmp_path / "packed", tmp_path / "adapter", tmp_path / "other", base=other)


def test_diff_compares_the_values(tmp_path) -> None:
    convert(GOLDEN / "awq-g32", tmp_path / "plain", "fp16")
    assert diff(GOLDEN / "awq-g32", tmp_path / "plain").same
    other = diff(GOLDEN / "awq-g32", GOLDEN / "gptq-4bit-g32-sym")
    assert 0 < other.relative_error < 0.2
    assert {t.name for t in other.tensors if t.status != "same"} == set(expected("awq-g32"))


def test_codes_of_other_meaning_are_not_passed_off_as_ours(tmp_path) -> None:
    with pytest.raises(UnsupportedError, match=r"awq's codes mean other values .* `--to native` packs the values anew"):
        convert(GOLDEN / "awq-g32", tmp_path / "out", "bitsandbytes")
    convert(GOLDEN / "awq-g32", tmp_path / "native", "native", spec=QuantSpec("nf4", 32))
    convert(tmp_path / "native", tmp_path / "out", "bitsandbytes")
    assert diff(tmp_path / "native", GOLDEN / "awq-g32").relative_error == pytest.approx(0.08, rel=0.2)


def test_a_shard_alone_shows_its_whole_weights(tmp_path) -> None:
    folder = tmp_path / "gptq"
    shutil.copytree(GOLDEN / "gptq-4bit-g32-sym", folder)
    tensors = load_file(folder / "model.safetensors")
    lacking = DOWN.replace("weight", "scales")
    del tensors[lacking]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    info = inspect(folder / "model.safetensors")
    assert len(info.packed) == 6
    with pytest.raises(qlora_rs.FormatError, match=r"lacks model\.layers.0\.mlp\.down_proj\.scales"):
        inspect(folder)


def test_weights_in_several_files_are_read(tmp_path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(GOLDEN / "gptq-4bit-g32-asym-act-order", folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(3):
        part = dict(list(tensors.items())[shard::3])  # parts of one weight lie in different files
        file = f"model-{shard + 1:05}-of-00003.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    hashes = expected("gptq-4bit-g32-asym-act-order")
    read = open_weights(folder)
    assert {weight: digest(read(weight)) for weight in hashes} == hashes
    convert(folder, tmp_path / "out", "fp16", max_shard_size=30_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    assert diff(folder, tmp_path / "out").same


@pytest.mark.parametrize(("bits", "count"), [(2, 1), (2, 33), (3, 32), (3, 95), (4, 7), (4, 64), (8, 3), (8, 12)])
def test_a_stream_of_bits_is_unpacked(bits, count) -> None:
    generator = torch.Generator().manual_seed(count)
    codes = torch.randint(0, 1 << bits, (3, count), generator=generator)
    words = []
    for row in codes.tolist():
        stream = sum(code << (bits * place) for place, code in enumerate(row))
        size = -(-count * bits // 32)
        size += -size % 3 if bits == 3 else 0
        values = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(size)]
        words.append([value - (1 << 32) if value >> 31 else value for value in values])
    assert torch.equal(unpack(torch.tensor(words, dtype=torch.int32), bits, count).long(), codes)


@pytest.mark.parametrize("name", ["gptq-3bit-g32-sym-act-order", "awq-g32", "ct-int4-g32-asym"])
def test_quantized_it_is_what_quantizing_its_16_bit_model_gives(name, tmp_path, load_folder) -> None:
    report = quantize(GOLDEN / name, tmp_path / "packed")
    convert(GOLDEN / name, tmp_path / "plain", exact(name))
    quantize(tmp_path / "plain", tmp_path / "expected")
    ours, theirs = load_folder(tmp_path / "packed"), load_folder(tmp_path / "expected")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (tmp_path / "packed" / "config.json").read_bytes() == (tmp_path / "expected" / "config.json").read_bytes()
    assert "their values are quantized anew, and the errors of both add up" in report.notes[-1]
    assert (len(report.packed), len(report.skipped)) == (7, 5)
    assert report.bytes_after == sum(tensor.nbytes for tensor in theirs.values())


def test_what_was_quantized_is_verified_against_the_folder(tmp_path) -> None:
    folder = tmp_path / "awq"
    shutil.copytree(GOLDEN / "awq-g32", folder)
    quantize(folder, tmp_path / "packed", QuantSpec("int8", 32, False))
    report = verify(tmp_path / "packed", folder)
    assert report.same
    assert [file.same for file in report.files] == [True]
    shutil.copytree(GOLDEN / "gptq-4bit-g32-sym", folder, dirs_exist_ok=True)
    assert not verify(tmp_path / "packed", folder).same


def test_a_dry_run_reports_the_same_and_writes_nothing(tmp_path) -> None:
    real = quantize(GOLDEN / "awq-g32", tmp_path / "packed", max_shard_size=9_000)
    dry = quantize(GOLDEN / "awq-g32", tmp_path / "other", dry_run=True)
    assert dry == real
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) == 4


def test_each_weight_is_dequantized_once(tmp_path, monkeypatch) -> None:
    from qlora_rs.checkpoint.awq import AwqWeight

    made: list[str] = []
    rows = AwqWeight.rows

    def counted(self, stored, first, count):
        made.append(self.name)
        return rows(self, stored, first, count)

    monkeypatch.setattr(AwqWeight, "rows", counted)
    quantize(GOLDEN / "awq-g32", tmp_path / "packed")
    assert sorted(made) == sorted(expected("awq-g32"))


def test_progress_ends_where_it_said(tmp_path) -> None:
    seen: list[tuple[int, int]] = []
    quantize(GOLDEN / "awq-g32", tmp_path / "packed", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("name", ["gptqmodel-4bit-g32-asym-gptq", "awq-channel", "ct-int4-g32-sym-act-order"])
def test_loaded_it_has_the_bytes_of_the_quantized_folder(name, tmp_path, load_folder) -> None:
    spec = QuantSpec("fp4", 32, double_quant=False)
    quantize(GOLDEN / name, tmp_path / "packed", spec)
    model = qlora_rs.from_pretrained(GOLDEN / name, spec, dtype=torch.float32)
    stored = load_folder(tmp_path / "packed")
    state = model.state_dict()
    assert state.keys() == stored.keys()
    for key, tensor in stored.items():
        assert torch.equal(state[key], tensor.to(state[key].dtype)), key
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8, torch.int32}


def test_a_loaded_model_is_saved_as_a_native_one(tmp_path) -> None:
    model = qlora_rs.from_pretrained(GOLDEN / "awq-g32", dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    tokens = torch.arange(9).reshape(1, 9)
    again = qlora_rs.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(model(input_ids=tokens).logits, again(input_ids=tokens).logits)


def test_values_that_are_not_finite_are_refused_by_name(tmp_path) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(GOLDEN / "awq-g32", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[DOWN.replace("weight", "scales")][1, 3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for attempt in (lambda: qlora_rs.from_pretrained(folder), lambda: quantize(folder, tmp_path / "packed")):
        with pytest.raises(qlora_rs.NonFiniteError, match=r"model\.safetensors: .*down_proj\.weight.*NaN"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["nan"]
