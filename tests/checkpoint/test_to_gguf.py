"""GGUF files that `convert` writes: read back by transformers' and gguf-py's own code, never only by ours."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora_rs
from qlora_rs import FormatError, QuantSpec, UnsupportedError
from qlora_rs.checkpoint import convert, gguf_rope, to_gguf

TEXT = "Two  roads diverged in 1916, don't they?\n\n\té<|start|>user 漢字 🙂"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def even_llama(make_tiny_llama, tmp_path_factory) -> Path:
    """Rows are multiples of 32, heads are not of 8; read-only."""
    folder = tmp_path_factory.mktemp("models") / "even"
    return make_tiny_llama(folder, hidden_size=96, intermediate_size=160, num_attention_heads=8, num_key_value_heads=2)


def by_transformers(path: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def stored(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_the_same_model_back(make_tiny_llama, tmp_path, tied) -> None:
    source = make_tiny_llama(tmp_path / "source", tie_word_embeddings=tied)
    convert(source, tmp_path / "model.gguf", "gguf", output_type="bf16")
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    found = by_transformers(tmp_path / "model.gguf")
    assert found.config.tie_word_embeddings is tied
    assert set(found.state_dict()) == set(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)


def test_transformers_reads_the_same_tokenizer_back(make_tiny_llama, tmp_path) -> None:
    from transformers import AutoTokenizer

    source = make_tiny_llama(tmp_path / "source", vocab_size=270)
    content = json.loads((source / "tokenizer.json").read_text())
    for left, right in (("T", "w"), ("Tw", "o"), ("\u0120", "r"), ("\u0120r", "o")):
        content["model"]["merges"].append([left, right])
        content["model"]["vocab"][left + right] = len(content["model"]["vocab"])
    (source / "tokenizer.json").write_text(json.dumps(content))
    convert(source, tmp_path / "model.gguf", "gguf")
    expected = AutoTokenizer.from_pretrained(source)
    assert {"Two", "\u0120ro"} <= set(expected.convert_ids_to_tokens(expected(TEXT).input_ids))
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[262:] == ["\u0120ro", *(f"[PAD{n}]" for n in range(263, 270))]
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert found(TEXT).input_ids == expected(TEXT).input_ids
    assert found.chat_template == expected.chat_template
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert found.apply_chat_template(chat, tokenize=False) == expected.apply_chat_template(chat, tokenize=False)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(found, token) == getattr(expected, token)


@pytest.mark.parametrize("output_type", ["f16", "bf16", "q8_0"])
def test_the_file_is_byte_for_byte_the_one_that_gguf_py_writes(even_llama, tmp_path, output_type) -> None:
    convert(even_llama, tmp_path / "ours.gguf", "gguf", output_type=output_type)
    reader = gguf.GGUFReader(tmp_path / "ours.gguf")
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind, value = field.types[0], field.contents()
        if kind == gguf.GGUFValueType.ARRAY:
            writer.add_array(field.name, value)
        else:
            writer.add_key_value(field.name, value, kind)
    source = load_file(even_llama / "model.safetensors")
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    names = {f"{theirs.get_name(name.removesuffix('.weight'))}.weight": name for name in source}
    assert set(names) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        weight = source[names[tensor.name]].float().numpy()
        for part, heads in (("attn_q", 8), ("attn_k", 2)):
            if part in tensor.name:  # as llama.cpp's converter orders them
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        kind = gguf.GGMLQuantizationType[output_type.upper() if weight.ndim == 2 else "F32"]
        writer.add_tensor(tensor.name, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_slices_of_rows_change_no_byte(even_llama, tmp_path, monkeypatch) -> None:
    qlora_rs.checkpoint.quantize(even_llama, tmp_path / "packed", QuantSpec("nf4", 32))
    sources = {"float": even_llama, "packed": tmp_path / "packed"}
    for name, source in sources.items():
        convert(source, tmp_path / f"{name}.gguf", "gguf", output_type="q8_0")
    from qlora_rs.checkpoint import slices

    monkeypatch.setattr(slices, "SLICE_ELEMENTS", 7)
    monkeypatch.setattr(to_gguf, "SLICE_ELEMENTS", 7)
    for name, source in sources.items():
        convert(source, tmp_path / "again.gguf", "gguf", output_type="q8_0", overwrite=True)
        assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / f"{name}.gguf").read_bytes()


@pytest.mark.parametrize("to", ["native", "bitsandbytes"])
def test_packed_models_are_written_with_their_dequantized_values(make_tiny_llama, tmp_path, to) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    source = make_tiny_llama(tmp_path / "source", **sizes)
    qlora_rs.checkpoint.quantize(source, tmp_path / "native")
    if to == "bitsandbytes":
        convert(tmp_path / "native", tmp_path / to, to)
    report = convert(tmp_path / to, tmp_path / "model.gguf", "gguf", output_type="bf16")
    convert(tmp_path / "native", tmp_path / "plain", "bf16")
    expected = load_file(tmp_path / "plain" / "model.safetensors")
    found = by_transformers(tmp_path / "model.gguf").state_dict()
    assert report.weights == 14
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.float()), name


def test_rows_that_q8_0_cannot_hold_are_f16_and_named(tiny_llama, tmp_path) -> None:
    report = convert(tiny_llama, tmp_path / "model.gguf", "gguf", output_type="q8_0")
    kinds = {tensor.tensor_type.name for tensor in stored(tmp_path / "model.gguf").values()}
    assert kinds == {"F32", "F16"}
    assert any("no multiples of 32" in note for note in report.notes)


def test_llama3_frequencies_are_those_of_transformers(make_tiny_llama, tmp_path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    source = make_tiny_llama(tmp_path / "source", rope_parameters=rope, head_dim=64)
    convert(source, tmp_path / "model.gguf", "gguf")
    factors = stored(tmp_path / "model.gguf")["rope_freqs.weight"].data
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig.from_pretrained(source)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** (-torch.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain / torch.from_numpy(np.array(factors)), stretched, rtol=1e-6)
    assert factors.max() == 8
    assert factors.min() == 1
    assert 1 < sorted(factors)[np.searchsorted(sorted(factors), 1, "right")] < 8


def test_linear_scaling_and_odd_head_widths_are_told(make_tiny_llama, tmp_path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    source = make_tiny_llama(tmp_path / "source", rope_parameters=rope, head_dim=22)
    convert(source, tmp_path / "model.gguf", "gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["llama.rope.scaling.type"].contents() == "linear"
    assert fields["llama.rope.scaling.factor"].contents() == 4.0
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        assert fields[f"llama.{key}"].contents() == 22


def test_what_goes_along_and_what_does_not_is_reported(tiny_llama, tmp_path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("card")
    report = convert(tmp_path / "source", tmp_path / "model.gguf", "gguf")
    assert (report.source, report.target, report.files) == ("float", "gguf f16", ("model.gguf",))
    left = {entry.name for entry in report.left_out}
    assert "README.md" in left
    assert not left & {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"}
    assert report.bytes_after == sum(int(tensor.n_bytes) for tensor in stored(tmp_path / "model.gguf").values())


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"model_type": "qwen2"}, r"model_type 'qwen2'; only llama and mistral"),
        ("config.json", {"attention_bias": True}, r"attention_bias True"),
        ("config.json", {"hidden_act": "gelu"}, r"hidden_act 'gelu'"),
        ("config.json", {"sliding_window": 100}, r"sliding_window 100"),
        ("config.json", {"num_hidden_layers": 3}, r"9 tensors of a llama model are in none of its files"),
        ("config.json", {"num_hidden_layers": 1 << 40}, r"num_hidden_layers is 1099511627776, but its files hold 21"),
        ("config.json", {"num_hidden_layers": 1}, r"are no part of a llama model"),
        ("config.json", {"num_key_value_heads": 4}, r"has shape \[36, 72\], but config.json asks for \[72, 72\]"),
        ("config.json", {"hidden_size": "72"}, r"hidden_size is '72', not a positive integer"),
        ("config.json", {"vocab_size": 100}, r"embed_tokens.*has shape"),
        ("config.json", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, r"rope_type 'yarn'"),
        ("tokenizer.json", {"normalizer": {"type": "NFC"}}, r"normalizes text \(NFC\)"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, r"cuts text in a way that has no name here"),
        (
            "tokenizer.json",
            {"model": {"type": "WordPiece", "vocab": {}}},
            r"WordPiece.*byte-level and SentencePiece's BPE are written",
        ),
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": []}}, r"'Unigram' tokenizer"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 999}, "merges": []}}, r"'a' has the id 999"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_nothing_written(
    tiny_llama, tmp_path, file, changes, message
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "source")
    edit_json(tmp_path / "source" / file, **changes)
    with pytest.raises((UnsupportedError, FormatError), match=message):
        convert(tmp_path / "source", tmp_path / "model.gguf", "gguf")
    assert os.listdir(tmp_path) == ["source"]


def test_values_that_do_not_fit_are_refused_and_nothing_is_left(tiny_llama, tmp_path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    tensors[Q_PROJ][5, 7] = 1e5
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(FormatError, match=r"q_proj.*9.984e\+04 do not fit float16; choose bfloat16"):
        convert(tmp_path / "source", tmp_path / "model.gguf", "gguf")
    assert os.listdir(tmp_path) == ["source"]
    convert(tmp_path / "source", tmp_path / "model.gguf", "gguf", output_type="bf16")


def test_destinations_are_files_that_may_be_replaced(tiny_llama, tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    for destination, message in (
        (tmp_path / "folder", "is a folder; GGUF is one file"),
        (tmp_path / "notes.txt", "is no GGUF file"),
        (tiny_llama / "model.gguf", "lies in the source"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            convert(tiny_llama, destination, "gguf", overwrite=True)
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(tiny_llama, tmp_path / "notes.txt", "gguf")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    convert(tiny_llama, tmp_path / "model.gguf", "gguf")
    before = (tmp_path / "model.gguf").read_bytes()
    convert(tiny_llama, tmp_path / "model.gguf", "gguf", output_type="bf16", overwrite=True)
    assert (tmp_path / "model.gguf").read_bytes() != before
    assert sorted(os.listdir(tmp_path)) == ["folder", "model.gguf", "notes.txt"]


def test_types_of_other_targets_are_refused(tiny_llama, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"f16, q8_0, bf16.*'q4_0'"):
        convert(tiny_llama, tmp_path / "out", "gguf", output_type="q4_0")
    with pytest.raises(ValueError, match="for gguf alone"):
        convert(tiny_llama, tmp_path / "out", "bf16", output_type="f16")


@pytest.mark.parametrize(("heads", "rows"), [(1, 2), (3, 6), (9, 576), (8, 8 * 22)])
def test_ordering_rows_and_back_is_the_identity(heads, rows) -> None:
    from qlora_rs.checkpoint.gguf_names import from_interleaved, to_interleaved

    weight = torch.arange(rows * 5).reshape(rows, 5)
    there = to_interleaved(weight, heads)
    assert torch.equal(from_interleaved(there, heads), weight)
    width = rows // heads
    if width > 2:
        assert torch.equal(there[1], weight[width // 2])


def test_rope_parameters_of_older_configs_are_read() -> None:
    old = {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert gguf_rope.rope_parameters(old) == {
        "type": "linear",
        "factor": 2.0,
        "rope_type": "linear",
        "rope_theta": 5000.0,
    }
    assert gguf_rope.rope_parameters({})["rope_theta"] == 10000.0
