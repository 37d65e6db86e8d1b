"""SentencePiece's tokenizers in GGUF files, read and written, against SentencePiece's own token ids.

tests/golden/make_sentencepiece.py trained the tokenizer and made of it what other libraries make.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer

from qlora_rs import UnsupportedError
from qlora_rs.checkpoint import convert, quantize
from qlora_rs.checkpoint.gguf_source import open_gguf

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "sentencepiece"
FIELDS = json.loads((GOLDEN / "fields.json").read_text())
TEXTS = [(each["text"], each["ids"]) for each in json.loads((GOLDEN / "expected.json").read_text())]
CHAT = "{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"


@pytest.fixture
def source(make_tiny_llama, tmp_path) -> Path:
    """A Llama with the golden tokenizer."""
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 8, "num_key_value_heads": 2}
    folder = make_tiny_llama(tmp_path / "source", vocab_size=600, bos_token_id=1, eos_token_id=2, **sizes)
    for name in ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.copy(GOLDEN / "tokenizer.json", folder)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {"unk_token": "<unk>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def by_llama_cpp(path: Path, source: Path, **fields: bool) -> Path:
    """The model with the tokenizer's fields as gguf-py, in llama.cpp's converter, takes them from tokenizer.model."""
    convert(source, path.with_suffix(".first.gguf"), "gguf")
    reader = gguf.GGUFReader(path.with_suffix(".first.gguf"))
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "tokenizer.", "general.architecture")):
            continue
        writer.add_key_value(name, field.contents(), field.types[0])
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(FIELDS["tokens"])
    writer.add_token_scores(FIELDS["scores"])
    writer.add_token_types(FIELDS["types"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokenizer_of(path: Path):
    from transformers import AutoTokenizer

    opened = open_gguf(path)
    return AutoTokenizer.from_pretrained(opened.companions_folder())


def test_the_golden_tokenizer_json_gives_the_ids_of_sentencepiece() -> None:
    tokenizer = Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
    for text, ids in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text


def test_tokens_scores_and_kinds_are_written_as_gguf_py_takes_them_from_the_model(source, tmp_path) -> None:
    convert(source, tmp_path / "model.gguf", "gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.tokens"] == FIELDS["tokens"]
    assert fields["tokenizer.ggml.scores"] == FIELDS["scores"]
    assert fields["tokenizer.ggml.token_type"] == FIELDS["types"]
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.unknown_token_id"] == 0
    assert "tokenizer.ggml.merges" not in fields


@pytest.mark.parametrize("written", ["here", "by llama.cpp's code"])
def test_read_here_it_gives_the_ids_of_sentencepiece(source, tmp_path, written) -> None:
    path = tmp_path / "model.gguf"
    if written == "here":
        convert(source, path, "gguf")
    else:
        by_llama_cpp(path, source)
    tokenizer = tokenizer_of(path)
    for text, ids in TEXTS:
        assert tokenizer(text, add_special_tokens=False).input_ids == ids, text
        assert tokenizer(text).input_ids == [1, *ids], text
        assert tokenizer.decode(ids) == text.replace("\u2581", " "), text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer("<s>a</s>", add_special_tokens=False).input_ids[0] == 1


def test_transformers_own_reader_gives_them_where_texts_begin_with_a_letter(source, tmp_path) -> None:
    from transformers import AutoTokenizer

    convert(source, tmp_path / "model.gguf", "gguf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf", local_files_only=True)
    compared = [(text, ids) for text, ids in TEXTS if not text.startswith((" ", "\u2581"))]
    assert len(compared) > 8
    for text, ids in compared:
        assert tokenizer(text, add_special_tokens=False).input_ids == ids, text


def test_a_packed_folder_made_of_the_file_keeps_tokenizer_and_template(source, tmp_path) -> None:
    from transformers import AutoTokenizer

    convert(source, tmp_path / "model.gguf", "gguf")
    quantize(tmp_path / "model.gguf", tmp_path / "packed")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "packed")
    for text, ids in TEXTS:
        assert tokenizer(text, add_special_tokens=False).input_ids == ids, text
    chat = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "[INST] Hello [/INST]"


def test_no_space_and_no_token_is_put_before_where_the_file_says_so(source, tmp_path) -> None:
    by_llama_cpp(tmp_path / "model.gguf", source, add_space_prefix=False, add_bos_token=False, add_eos_token=True)
    tokenizer = tokenizer_of(tmp_path / "model.gguf")
    plain = Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
    from tokenizers import normalizers

    plain.normalizer = normalizers.Replace(" ", "\u2581")
    for text, _ in TEXTS:
        ids = plain.encode(text, add_special_tokens=False).ids
        assert tokenizer(text).input_ids == [*ids, 2], text
        assert tokenizer.decode(ids) == text.replace("\u2581", " "), text


@pytest.mark.parametrize("form", ["metaspace", "replace alone"])
def test_other_forms_of_the_same_are_written(source, tmp_path, form) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    if form == "metaspace":
        content["normalizer"] = None
        content["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False,
        }  # fmt: skip
    else:
        content["normalizer"] = content["normalizer"]["normalizers"][1]
    (source / "tokenizer.json").write_text(json.dumps(content))
    report = convert(source, tmp_path / "model.gguf", "gguf")
    assert any("no space before a text that begins with one" in note for note in report.notes) == (form == "metaspace")
    expected, found = Tokenizer.from_file(str(source / "tokenizer.json")), tokenizer_of(tmp_path / "model.gguf")
    for text, _ in TEXTS:
        if form == "replace alone" or not text.startswith((" ", "\u2581")):
            ids = expected.encode(text, add_special_tokens=False).ids
            assert found(text, add_special_tokens=False).input_ids == ids, text


def drop_merge(content) -> None:
    del content["model"]["merges"][40]


def swap_merges(content) -> None:
    merges = content["model"]["merges"]
    at = next(n for n in range(len(merges) - 2) if "".join(merges[n]) == "".join(merges[n + 1]))
    merges.insert(0, merges.pop(at))


def drop_byte(content) -> None:
    content["model"]["vocab"]["\u2603"] = content["model"]["vocab"].pop("<0x41>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_merge, r"does not merge"),
        (swap_merges, r"several ranks"),
        (drop_byte, r"tokens for 255 bytes"),
        (lambda content: content.update(normalizer={"type": "NFKC"}), r"normalizes or cuts text"),
        (lambda content: content.update(pre_tokenizer={"type": "Digits", "individual_digits": True}), r"normalizes or"),
    ],
)
def test_what_readers_would_cut_otherwise_is_refused_and_nothing_written(source, tmp_path, change, message) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    change(content)
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedError, match=message):
        convert(source, tmp_path / "model.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
