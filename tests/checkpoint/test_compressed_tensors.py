"""compressed-tensors' packed INT4 as it is written: what the library's own code packs, and reads."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora_rs
from qlora_rs import FormatError, QuantSpec, UnsupportedError, checkpoint
from qlora_rs.checkpoint import convert, diff, inspect, open_weights
from qlora_rs.checkpoint.to_compressed_tensors import pack_words, quantize_groups

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def theirs():
    """The library's module; the tests that compare with it are skipped where it is not installed."""
    return pytest.importorskip("compressed_tensors")


@pytest.fixture(scope="module")
def source(tmp_path_factory, make_tiny_llama):
    """16 bits, with rows of whole groups of 128; read-only."""
    folder = tmp_path_factory.mktemp("models") / "source"
    return make_tiny_llama(folder, hidden_size=128, intermediate_size=256, attention_bias=True)


@pytest.fixture(scope="module", params=[32, 128])
def written(request, source, tmp_path_factory):
    """(group size, folder, report) of a conversion from 16 bits; read-only."""
    folder = tmp_path_factory.mktemp("written") / f"g{request.param}"
    return request.param, folder, convert(source, folder, "compressed-tensors", group_size=request.param)


def scheme_of(folder: Path):
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return QuantizationConfig.model_validate(config)


def decompressed(folder: Path, layer: str) -> torch.Tensor:
    from compressed_tensors.compressors import PackedQuantizationCompressor

    parts = {
        name.removeprefix(f"{layer}."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith(f"{layer}.weight")
    }
    scheme = scheme_of(folder).config_groups["group_0"]
    return PackedQuantizationCompressor.decompress(parts, scheme)["weight"]


def test_their_code_packs_the_same_bytes(theirs, source, written) -> None:
    from compressed_tensors.compressors import pack_to_int32
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    group_size, folder, _ = written
    args = scheme_of(folder).config_groups["group_0"].weights
    tensors, read = load_file(folder / "model.safetensors"), open_weights(source)
    layers = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    assert len(layers) == 14
    for layer in layers:
        weight = read(f"{layer}.weight").float()
        groups = weight.unflatten(1, (-1, group_size))
        scale, zero_point = calculate_qparams(groups.amin(2), groups.amax(2), args)
        assert torch.equal(tensors[f"{layer}.weight_scale"], scale.bfloat16())
        codes = quantize(weight, scale.bfloat16().float(), zero_point, args, dtype=torch.int8)
        assert torch.equal(tensors[f"{layer}.weight_packed"], pack_to_int32(codes, 4))
        assert tensors[f"{layer}.weight_shape"].tolist() == list(weight.shape)


def test_their_code_reads_the_values_that_we_read(theirs, written) -> None:
    _, folder, _ = written
    read = open_weights(folder)
    for row in inspect(folder).packed:
        assert torch.equal(decompressed(folder, row.name.removesuffix(".weight")), read(row.name))


def test_transformers_loads_it_and_computes_with_the_values(theirs, written, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    _, folder, _ = written
    convert(folder, tmp_path / "plain", "bf16")
    packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    assert hasattr(packed.get_submodule(Q), "weight_packed")
    tokens = torch.arange(13).reshape(1, 13)
    with torch.no_grad():
        assert torch.equal(packed(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    assert torch.equal(packed.get_submodule(Q).weight, plain.get_submodule(Q).weight)


def test_config_is_one_that_their_class_reads_without_loss(theirs, written) -> None:
    group_size, folder, _ = written
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    parsed = scheme_of(folder)
    weights = parsed.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (4, group_size, True)
    assert parsed.ignore == ["lm_head"]
    dumped = json.loads(parsed.model_dump_json())
    assert {key: dumped[key] for key in config} == config


def test_config_is_that_of_their_own_folders_but_for_what_they_say_of_themselves(written) -> None:
    group_size, folder, _ = written
    golden = json.loads((GOLDEN / "foreign" / "ct-int4-g32-sym" / "config.json").read_text())["quantization_config"]
    golden["config_groups"]["group_0"]["weights"]["group_size"] = group_size
    ours = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert ours == {key: golden[key] for key in ours}
    assert set(golden) - set(ours) == {"version", "sparsity_config", "transform_config", "moe_sparsity_config"}


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("ct-int4-g32-sym", 7),
        ("ct-int4-channel", 7),  # whose scales are repeated
        ("gptq-4bit-g32-sym", 7),
        ("ct-int4-g32-sym-act-order", 0),
        ("ct-int4-g32-asym", 0),
        ("gptqmodel-4bit-g32-asym-gptq", 0),
        ("ct-int8-g32-asym", 0),
        ("ct-int2-g32-sym", 0),
    ],
)
def test_codes_that_mean_the_same_are_kept(name, same, tmp_path) -> None:
    folder = GOLDEN / "foreign" / name
    report = convert(folder, tmp_path / "out", "compressed-tensors")
    assert (f"{same} of 7 weights keep their codes and scales" in report.notes[-1]) == (same > 0)
    # Only weights whose grid is another one change.
    assert diff(folder, tmp_path / "out").same == (same == 7)
    if name == "ct-int4-g32-sym":
        ours, golden = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")
        assert ours.keys() == golden.keys()
        assert all(torch.equal(ours[key], golden[key]) for key in golden)


def test_what_rounding_changed_is_told(source, written) -> None:
    _, folder, report = written
    told = float(report.notes[-1].split(" by ")[1].split()[0])
    measured = diff(source, folder)
    packed = [tensor for tensor in measured.tensors if tensor.name in {row.name for row in inspect(folder).packed}]
    # The values that are told of are not rounded to bfloat16, which adds a little.
    exact = math.sqrt(sum(t.norm_difference**2 for t in packed) / sum(t.norm_a**2 for t in packed))
    assert told == pytest.approx(exact, rel=0.002)
    assert report.notes[-1] == f"rounding to packed INT4 changed the weights by {told:.4f} of their norm"


@pytest.mark.parametrize(("group_size", "direct", "twice"), [(32, 0.0949, 0.1297), (128, 0.1111, 0.1431)])
def test_errors_of_normal_weights_are_the_known_ones(write_tensors, tmp_path, group_size, direct, twice) -> None:
    tensors = {f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(512, 1024).bfloat16() for layer in range(2)}
    source = write_tensors(tmp_path / "source", tensors, model_type="unknown")
    checkpoint.quantize(source, tmp_path / "nf4", QuantSpec("nf4", 64, False), include=["up_proj"])
    convert(tmp_path / "nf4", tmp_path / "int4", "compressed-tensors", group_size=group_size)
    assert diff(source, tmp_path / "int4").relative_error == pytest.approx(twice, rel=0.01)
    weight = tensors["model.layers.0.mlp.up_proj.weight"].float()
    codes, scales = quantize_groups(weight, group_size, torch.bfloat16)
    values = codes * scales.float().repeat_interleave(group_size, 1)
    assert float((values - weight).norm() / weight.norm()) == pytest.approx(direct, rel=0.01)


@pytest.mark.parametrize("kind", ["native", "bitsandbytes", "awq"])
def test_other_sources_are_packed_from_their_values(kind, source, tmp_path) -> None:
    if kind == "awq":
        folder = GOLDEN / "foreign" / "awq-g32"
    else:
        folder = tmp_path / "nf4"
        checkpoint.quantize(source, folder, QuantSpec("nf4", 64))
        if kind == "bitsandbytes":
            convert(folder, tmp_path / "bnb", "bitsandbytes")
            folder = tmp_path / "bnb"
    report = convert(folder, tmp_path / "out", "compressed-tensors", max_shard_size=12_000)
    info = inspect(tmp_path / "out")
    assert len(info.packed) == report.weights == (7 if kind == "awq" else 14)
    assert len(report.files) > 1
    if kind == "awq":
        values = open_weights(folder)(f"{Q}.weight").float()
    else:
        packed = qlora_rs.from_pretrained(folder, dtype=torch.float32).get_submodule(Q)
        values = packed.dequantize(torch.float32)
    dtype = torch.float16 if kind == "awq" else torch.bfloat16
    codes, scales = quantize_groups(values, 32, dtype)
    tensors = {name: t for file in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(file).items()}
    assert torch.equal(tensors[f"{Q}.weight_packed"], pack_words(codes))
    assert torch.equal(tensors[f"{Q}.weight_scale"], scales)
    assert "had changed before; from the 16-bit model the sum would be less" in report.notes[-1]


def test_rows_that_are_no_whole_groups_stay_and_are_ignored(theirs, make_tiny_llama, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    source = make_tiny_llama(tmp_path / "source", hidden_size=64, intermediate_size=72)
    report = convert(source, tmp_path / "out", "compressed-tensors")
    down = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == [*down, "lm_head"]
    assert "2 weights stay in BF16, as their rows are no whole groups of 32: e.g. model.layers.0" in report.notes[0]
    assert report.weights == 12
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(model.get_submodule(down[0]).weight, open_weights(source)(f"{down[0]}.weight"))
    with pytest.raises(UnsupportedError, match="no weight that is packed has rows of whole groups of 128"):
        convert(source, tmp_path / "other", "compressed-tensors", group_size=128)


def test_groups_of_zeros_and_the_extremes_of_codes() -> None:
    weight = torch.zeros(2, 64)
    weight[0, :32] = torch.linspace(-1.0, 1.0, 32)
    codes, scales = quantize_groups(weight, 32, torch.float16)
    assert (int(codes.min()), int(codes.max())) == (-8, 7)
    assert torch.equal(codes[1], torch.zeros(64, dtype=torch.int8))
    assert bool((scales > 0).all())
    assert torch.equal(pack_words(codes)[1], torch.full((8,), -2004318072, dtype=torch.int32))  # 0x88888888


def test_weights_that_no_code_stands_for_are_refused(source, tmp_path) -> None:
    tensors = load_file(source / "model.safetensors")
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    broken = {**tensors, f"{Q}.weight": tensors[f"{Q}.weight"].index_fill(0, torch.tensor([5]), torch.nan)}
    save_file(broken, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(qlora_rs.NonFiniteError, match=r"model\.safetensors: tensor .*q_proj\.weight.*NaN"):
        convert(folder, tmp_path / "out", "compressed-tensors")
    large = {**tensors, f"{Q}.weight": torch.full((128, 128), 1e30, dtype=torch.bfloat16)}
    save_file(large, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text().replace("bfloat16", "float16"))
    with pytest.raises(FormatError, match=r"q_proj\.weight': scales: values up to 1.334e\+29 do not fit float16"):
        convert(folder, tmp_path / "out", "compressed-tensors")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("compressed-tensors", {"group_size": 64}, "32 or 128, goes with compressed-tensors alone; got 64"),
        ("bf16", {"group_size": 32}, "goes with compressed-tensors alone; got 32 for bf16"),
        ("compressed-tensors", {"spec": QuantSpec("int4")}, "a data type goes with what GPTQ, AWQ or"),
    ],
)
def test_options_that_mean_nothing_are_refused(source, tmp_path, to, options, message) -> None:
    checkpoint.quantize(source, tmp_path / "nf4")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "nf4", tmp_path / "out", to, **options)


def test_weights_of_other_libraries_become_native_as_asked(tmp_path, load_folder) -> None:
    spec = QuantSpec("int4", 32, double_quant=False)
    report = convert(GOLDEN / "foreign" / "awq-g32", tmp_path / "out", "native", spec=spec)
    checkpoint.quantize(GOLDEN / "foreign" / "awq-g32", tmp_path / "expected", spec)
    ours, expected = load_folder(tmp_path / "out"), load_folder(tmp_path / "expected")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    assert "quantized anew" in report.notes[0]
    assert checkpoint.verify(tmp_path / "out", GOLDEN / "foreign" / "awq-g32").same


def test_resumed_it_is_the_same_folder_and_tells_the_same(source, written, tmp_path) -> None:
    group_size, folder, report = written
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", "compressed-tensors", group_size=group_size, progress=stop)
    again = convert(source, tmp_path / "out", "compressed-tensors", group_size=group_size)
    assert again.notes[-1] == report.notes[-1]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_dry_run_tells_sizes_and_writes_nothing(source, written, tmp_path) -> None:
    group_size, _, report = written
    dry = convert(source, tmp_path / "out", "compressed-tensors", group_size=group_size, dry_run=True)
    assert (dry.bytes_after, dry.files, dry.weights, dry.kept) == (
        report.bytes_after,
        report.files,
        report.weights,
        report.kept,
    )
    assert not (tmp_path / "out").exists()


def test_progress_ends_where_it_said(source, tmp_path) -> None:
    for folder, to in ((source, "compressed-tensors"), (GOLDEN / "foreign" / "awq-g32", "native")):
        seen: list[tuple[int, int]] = []
        convert(folder, tmp_path / to, to, progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert seen[-1][0] == seen[-1][1]
