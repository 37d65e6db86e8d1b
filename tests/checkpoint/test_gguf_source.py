"""GGUF files as input: files that gguf-py writes, against what transformers' own loader makes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import qlora_rs
from qlora_rs import FormatError, UnsupportedError
from qlora_rs.checkpoint import convert, diff, inspect, open_weights, quantize, verify
from qlora_rs.checkpoint.dequantized import open_float_source
from qlora_rs.checkpoint.gguf_rope import llama3_factors
from qlora_rs.checkpoint.slices import SliceReader
from qlora_rs.checkpoint.weights import TensorReader

Kind = gguf.GGMLQuantizationType
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# What gguf-py dequantizes but cannot make: blocks of 256.
ONLY_READ = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
FieldMaker = Callable[[gguf.GGUFWriter], None]


def tiny(family: str, **changes: int):
    """A random model of transformers, one layer deep."""
    import transformers

    sizes = {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 1,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 70,
        "max_position_embeddings": 128,
        "head_dim": 16,
        **changes,
    }
    config = getattr(transformers, f"{family.capitalize()}Config")(**sizes, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.capitalize()}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.1  # norms and biases too
    return model


def tiny_qwen(family: str):
    # transformers takes it for granted that heads of a Qwen3 in a GGUF file are 128 wide.
    return tiny(family, head_dim=128) if family == "qwen3" else tiny(family)


def write(path: Path, model, kind: str = "F16", extra: FieldMaker | None = None) -> Path:
    """The model as llama.cpp's converter lays it out, written by gguf-py's own code; a byte a token."""
    config = model.config
    family = config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family == "llama":
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_vocab_size(config.vocab_size)
    elif family == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*"!0123456789abcdefghijklmnopqrstuvwxyz", "ab", *(f"<{n}>" for n in range(32))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(40)
    writer.add_eos_token_id(41)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    if extra is not None:
        extra(writer)
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[family]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        stored = Kind[kind] if weight.ndim == 2 else Kind.F32
        if kind in ONLY_READ and weight.ndim == 2:
            block, size = gguf.GGML_QUANT_SIZES[stored]
            rng = np.random.default_rng(len(name))
            # Below 0x3c every byte, so that scales in float16 are finite.
            data = rng.integers(0, 0x3C, (weight.shape[0], weight.shape[1] // block * size), dtype=np.uint8)
        else:
            data = gguf.quantize(weight, stored)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def by_transformers(path: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.state_dict()


def ours(path: Path) -> dict[str, torch.Tensor]:
    source = open_float_source(path)
    reader = TensorReader(source)
    return {name: reader.stored(name) for name in source.tensors}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A Llama in Q8_0; read-only."""
    return write(tmp_path_factory.mktemp("gguf") / "llama.gguf", tiny("llama"), "Q8_0")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *QUANTIZED])
def test_values_and_order_are_those_of_transformers(tmp_path, kind) -> None:
    path = write(tmp_path / "model.gguf", tiny("llama"), kind)
    expected, found = by_transformers(path), ours(path)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name].float(), tensor), name


@pytest.mark.parametrize("kind", ONLY_READ)
def test_blocks_of_256_are_read_as_transformers_does(tmp_path, kind) -> None:
    model = tiny("llama", hidden_size=256, intermediate_size=256, num_attention_heads=4, head_dim=64)
    path = write(tmp_path / "model.gguf", model, kind)
    expected, found = by_transformers(path), ours(path)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert found["model.layers.0.mlp.up_proj.weight"].abs().max() > 0


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_families_whose_rows_keep_their_order_are_read_too(tmp_path, family) -> None:
    path = write(tmp_path / "model.gguf", tiny_qwen(family), "Q4_1")
    expected, found = by_transformers(path), ours(path)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_model_computes_what_transformers_computes(tmp_path, family) -> None:
    from transformers import AutoModelForCausalLM

    path = write(tmp_path / "model.gguf", tiny_qwen(family))
    convert(path, tmp_path / "plain", "fp16")
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)(tokens)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)(tokens)
    # float32 norms go through float16 in the folder; all else is float16 in both.
    assert torch.allclose(found.logits, expected.logits, atol=2e-3)


def test_slices_of_bytes_are_those_of_the_whole(llama) -> None:
    source = open_float_source(llama)
    with SliceReader(source) as reader:
        for name, tensor in ours(llama).items():
            content = tensor.reshape(-1).view(torch.uint8)
            for start, count in ((0, 4), (4, len(content) - 8), (len(content) // 2 // 4 * 4, 40), (0, len(content))):
                assert torch.equal(reader.read(name, start, count), content[start : start + count]), name


def test_inspect_lists_weights_under_transformers_names(llama) -> None:
    info = inspect(llama)
    rows = {row.name: row for row in info.tensors}
    assert (info.format, info.spec, info.schemes) == ("gguf", None, ("Q8_0: blocks of 32, 8.5 bits a weight",))
    query, norm = rows["model.layers.0.self_attn.q_proj.weight"], rows["model.norm.weight"]
    assert (query.kind, query.dtype, query.shape, query.bits_per_weight) == ("packed", "q8_0", (96, 96), 8.5)
    assert (norm.kind, norm.dtype, norm.shape, norm.bytes) == ("kept", "F32", (96,), 384)
    assert info.total_bytes == sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(llama).tensors)


def test_quantized_files_are_what_quantizing_their_values_gives(llama, tmp_path) -> None:
    report = quantize(llama, tmp_path / "packed")
    assert len(report.packed) == 7
    assert any("quantized by gguf" in note for note in report.notes)
    assert any("rounded to bfloat16: 2" in note for note in report.notes)  # embedding and head
    values = ours(llama)
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    for entry in report.packed:
        packed = qlora_rs.quantize(values[entry.name])
        assert torch.equal(stored[entry.name], packed.codes), entry.name
        assert torch.equal(stored[f"{entry.name}_absmax"], packed.absmax), entry.name
    embedding = "model.embed_tokens.weight"
    assert torch.equal(stored[embedding], values[embedding].bfloat16())
    assert verify(tmp_path / "packed", llama).same


def test_loading_gives_what_quantizing_to_files_gives(llama, tmp_path) -> None:
    quantize(llama, tmp_path / "packed")
    loaded = qlora_rs.from_pretrained(llama, dtype=torch.float32)
    expected = qlora_rs.from_pretrained(tmp_path / "packed", dtype=torch.float32).state_dict()
    assert set(loaded.state_dict()) == set(expected)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert loaded.config.eos_token_id == 41


def test_output_folders_have_tokenizer_template_and_config(llama, tmp_path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    convert(llama, tmp_path / "plain", "bf16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    # Digits one by one, as the file's own name for the way to cut says, which transformers does not know.
    assert tokenizer.tokenize("ab1916c") == ["ab", "1", "9", "1", "6", "c"]
    assert len(tokenizer) <= 70  # transformers adds a token of GPT-2's that the embedding has no row for
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"
    config = AutoConfig.from_pretrained(tmp_path / "plain")
    assert (config.model_type, config.head_dim, config.vocab_size, config.bos_token_id) == ("llama", 16, 70, 40)
    assert GenerationConfig.from_pretrained(tmp_path / "plain").eos_token_id == 41
    assert not [name for name in (tmp_path / "plain").iterdir() if name.suffix == ".gguf"]


def test_files_are_compared_with_folders_and_other_files(llama, tmp_path) -> None:
    convert(llama, tmp_path / "plain", "bf16")
    report = diff(tmp_path / "plain", llama)
    assert report.count("different") == len(report.tensors)  # F32 here, BF16 there
    assert 0 < report.relative_error < 0.004  # a rounding to bfloat16
    convert(tmp_path / "plain", tmp_path / "again.gguf", "gguf", output_type="bf16")
    plain = open_weights(tmp_path / "plain")
    for name, tensor in ours(tmp_path / "again.gguf").items():
        assert torch.equal(tensor.bfloat16(), plain(name)), name


def test_a_file_becomes_a_file_of_another_type(llama, tmp_path) -> None:
    convert(llama, tmp_path / "again.gguf", "gguf", output_type="q8_0")
    expected, found = ours(llama), ours(tmp_path / "again.gguf")
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name  # quantizing values of blocks gives the blocks
    fields = [gguf.GGUFReader(path).fields for path in (llama, tmp_path / "again.gguf")]
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.pre", "tokenizer.chat_template"):
        assert fields[0][key].contents() == fields[1][key].contents(), key


@pytest.mark.parametrize("to", ["native", "bitsandbytes", "compressed-tensors"])
def test_a_file_becomes_packed_by_quantizing_alone(llama, tmp_path, to) -> None:
    with pytest.raises(UnsupportedError, match="`qlora-rs quantize` makes a packed"):
        convert(llama, tmp_path / "out", to)


def test_adapters_merge_over_a_file(llama, tmp_path) -> None:
    model = qlora_rs.from_pretrained(llama, dtype=torch.float32)
    qlora_rs.attach_lora(model, r=2, seed=0)
    for layer in qlora_rs.lora_modules(model).values():
        layer.lora_B.data.normal_()
    qlora_rs.save_adapter(model, tmp_path / "adapter")
    from qlora_rs.merge import merge

    report = merge(llama, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    assert any("quantized by 'gguf'" in note for note in report.notes)
    name = "model.layers.0.self_attn.q_proj"
    layer = qlora_rs.lora_modules(model)[name]
    expected = ours(llama)[f"{name}.weight"] + layer.scaling * (layer.lora_B @ layer.lora_A)
    assert torch.allclose(load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"], expected, atol=1e-6)


def test_llama3_frequencies_become_their_parameters(make_tiny_llama, tmp_path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    source = make_tiny_llama(tmp_path / "source", rope_parameters=rope, head_dim=64)
    convert(source, tmp_path / "model.gguf", "gguf")
    assert open_float_source(tmp_path / "model.gguf").config["rope_parameters"] == rope
    changed = json.loads((source / "config.json").read_text())
    changed["rope_parameters"]["original_max_position_embeddings"] = 64
    (source / "config.json").write_text(json.dumps(changed))
    convert(source, tmp_path / "other.gguf", "gguf")
    with pytest.raises(UnsupportedError, match="not those of a Llama 3 model"):
        inspect(tmp_path / "other.gguf")
    assert llama3_factors({**rope, "factor": 1.0}, 64).eq(1).all()


def field(name: str, value: int | str) -> FieldMaker:
    kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32

    def add(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(name, None)
        writer.add_key_value(name, value, kind)

    return add


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        (field("general.architecture", "gemma2"), UnsupportedError, "architecture 'gemma2'; llama, qwen2, qwen3"),
        (field("llama.expert_count", 8), UnsupportedError, "mixture of experts"),
        (field("llama.rope.scaling.type", "yarn"), UnsupportedError, "'yarn'; linear and Llama 3's"),
        (field("llama.rope.dimension_count", 8), FormatError, "attn_q.*has shape"),
        (field("split.count", 3), UnsupportedError, "one of 3 parts"),
        (field("llama.block_count", 2), FormatError, "9 tensors of a llama model are missing, e.g. 'blk.1"),
        (
            field("llama.feed_forward_length", 128),
            FormatError,
            r"shape \[160, 96\], but its fields ask for \[128, 96\]",
        ),
        (field("llama.block_count", 1 << 30), FormatError, "has 1073741824 layers, but holds 12 tensors"),
        (field("llama.embedding_length", "many"), FormatError, "embedding_length is 'many', not a positive integer"),
        (field("llama.attention.head_count", 0), FormatError, "head_count is 0"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(96, np.float32)), UnsupportedError, "1 tensors that no"),
        (lambda w: w.add_tensor("blk.0.oddity", np.zeros(7, np.int32)), UnsupportedError, "'blk.0.oddity'"),
    ],
)
def test_files_that_are_not_understood_are_refused(tmp_path, extra, error, message) -> None:
    path = write(tmp_path / "model.gguf", tiny("llama"), "F16", extra)
    with pytest.raises(error, match=message):
        inspect(path)


def test_linear_scaling_is_read(tmp_path) -> None:
    def linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    path = write(tmp_path / "model.gguf", tiny("llama"), "F16", linear)
    rope = open_float_source(path).config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)


def test_a_missing_file_and_a_folder_with_that_name_are_told_apart(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path / "absent.gguf")
    with pytest.raises(FileNotFoundError):
        quantize(tmp_path / "absent.gguf", tmp_path / "out")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(FormatError, match=r"config\.json"):
        inspect(tmp_path / "folder.gguf")


def test_what_is_made_for_a_while_is_removed(llama, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = open_float_source(llama)
    assert list(tmp_path.iterdir()) == []
    folder = source.companions_folder()
    assert folder.parent == tmp_path
    assert (folder / "tokenizer.json").is_file()
    del source
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch) -> None:
    from qlora_rs.checkpoint import gguf_source

    path = write(tmp_path / "model.gguf", tiny("llama"))
    read = []
    monkeypatch.setattr(gguf_source, "check_header", lambda file: read.append(file))
    first = open_float_source(path)
    inspect(path)
    assert open_float_source(path).foreign is first.foreign
    assert read == [path]
    write(tmp_path / "new.gguf", tiny("llama", num_hidden_layers=2))
    (tmp_path / "new.gguf").replace(path)
    assert open_float_source(path).config["num_hidden_layers"] == 2
    assert len(read) == 2
