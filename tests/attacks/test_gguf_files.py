"""Damaged GGUF files: a clear error within a moment, whatever they claim to hold."""

from __future__ import annotations

import os
import struct
import time
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest

from qlora_rs import FormatError, QloraError, UnsupportedError
from qlora_rs.checkpoint import convert, gguf_header, inspect, quantize
from qlora_rs.checkpoint.gguf_header import check_header

STRING, ARRAY, UINT32 = 8, 9, 4


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    convert(tiny_llama, path, "gguf")
    return path.read_bytes()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(tensors: int, fields: int, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + body


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return text("a") + struct.pack("<IIQ", ARRAY, kind, count) + content


HUGE = 1 << 60


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", FormatError, "no GGUF file"),
        (b"GGU", FormatError, "no GGUF file"),
        (b"PK\x03\x04" + bytes(100), FormatError, "no GGUF file"),
        (b"GGUF", FormatError, "the version: 4 bytes are claimed, 0 are left"),
        (header(0, 0, version=1), UnsupportedError, "version 1; versions 2 and 3"),
        (header(0, 0, version=9), UnsupportedError, "version 9"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), UnsupportedError, "big-endian"),
        (header(HUGE, 0), FormatError, f"0 fields and {HUGE} tensors"),
        (header(0, HUGE), FormatError, f"{HUGE} fields"),
        (header(0, 1, struct.pack("<Q", HUGE) + bytes(50)), FormatError, f"name of field 0: {HUGE} bytes"),
        (header(0, 1, array(UINT32, HUGE)), FormatError, "values of 'a'"),
        (header(0, 1, array(STRING, HUGE)), FormatError, "values of 'a'"),
        (header(0, 1, array(STRING, 2, text("x") + struct.pack("<Q", 1 << 40))), FormatError, "field 'a'"),
        (header(0, 1, array(ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 9)), FormatError, "arrays in arrays"),
        (header(0, 1, text("a") + struct.pack("<I", 77) + bytes(9)), FormatError, "type 77"),
        (header(1, 0, text("t") + struct.pack("<I", 1 << 30) + bytes(30)), FormatError, "1073741824 dimensions"),
        (header(0, 0), UnsupportedError, "architecture None"),
    ],
)
def test_headers_that_claim_what_is_not_there(tmp_path, content, error, message) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(error, match=message):
        inspect(path)
    assert time.monotonic() - started < 5


def test_a_pipe_that_is_called_as_a_file_is_refused_and_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    for read in (inspect, lambda path: quantize(path, tmp_path / "out")):
        with pytest.raises(FormatError, match=r"model\.gguf: not a regular file"):
            read(tmp_path / "model.gguf")


def test_files_that_are_cut_off_anywhere_are_refused(whole, tmp_path) -> None:
    path = tmp_path / "model.gguf"
    step = len(whole) // 97
    for length in range(0, len(whole) - 40, step):
        path.write_bytes(whole[:length])
        with pytest.raises(QloraError, match=r"model\.gguf"):
            quantize(path, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


def test_flipped_bits_of_the_header_end_in_our_errors_or_in_none(whole, tmp_path) -> None:
    path = tmp_path / "model.gguf"
    end = whole.index(b"blk.1.ffn_down.weight") + 80
    for at in range(0, end, 53):
        content = bytearray(whole)
        content[at] ^= 1 << at % 8
        path.write_bytes(content)
        with suppress(QloraError):
            inspect(path)


def test_a_file_that_is_cut_off_while_its_header_is_walked_is_refused(tmp_path, monkeypatch) -> None:
    path = tmp_path / "model.gguf"
    words = 100_000  # more than is read ahead
    path.write_bytes(header(0, 1, array(STRING, words, text("a longer word") * words)))
    value = gguf_header._Walk._value

    def cut(walk, *arguments):
        os.truncate(path, 2000)
        value(walk, *arguments)

    monkeypatch.setattr(gguf_header._Walk, "_value", cut)
    with pytest.raises(FormatError, match=r"model\.gguf: at byte \d+: .*'a'.*the file has become shorter"):
        check_header(path)


def test_the_header_of_a_good_file_passes(whole, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    check_header(path)


FIELDS = [
    *(f"llama.{name}" for name in ("attention.head_count", "attention.head_count_kv", "attention.key_length")),
    *(f"llama.{name}" for name in ("rope.dimension_count", "rope.freq_base", "rope.scaling.factor")),
    *("llama.attention.layer_norm_rms_epsilon", "llama.block_count", "llama.expert_count", "split.count"),
    *("general.alignment", "general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.bos_token_id"),
]


@pytest.mark.parametrize("value", ["abc", -5, 0, 33, 1 << 62, float("nan"), [1, 2, 3], ["a"], True])
def test_fields_of_other_kinds_end_in_our_errors_or_in_none(tmp_path, fields_and_tensors, value) -> None:
    for name in FIELDS:
        path = tmp_path / "model.gguf"
        write(path, {**fields_and_tensors[0], "llama.rope.scaling.type": "linear", name: value}, fields_and_tensors[1])
        with suppress(QloraError):
            inspect(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("llama.rope.freq_base", "abc", r"llama\.rope\.freq_base is 'abc', not a number"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "layer_norm_rms_epsilon is nan, not a number"),
        ("llama.rope.dimension_count", [1], r"rope\.dimension_count is \[1\], not a positive integer"),
        ("llama.attention.key_length", 33, "heads are 33 wide"),
        ("split.count", "abc", "is one of 'abc' parts"),
    ],
)
def test_a_field_of_another_kind_is_named(tmp_path, fields_and_tensors, name, value, message) -> None:
    write(tmp_path / "model.gguf", {**fields_and_tensors[0], name: value}, fields_and_tensors[1])
    with pytest.raises(QloraError, match=rf"model\.gguf: .*{message}"):
        inspect(tmp_path / "model.gguf")


@pytest.mark.parametrize("shape", [(0,), (4, 4), (7,)])
def test_rope_factors_of_another_shape_are_refused(tmp_path, fields_and_tensors, shape) -> None:
    fields, tensors = fields_and_tensors
    write(tmp_path / "model.gguf", fields, {**tensors, "rope_freqs.weight": np.ones(shape, np.float32)})
    with pytest.raises(QloraError, match=r"model\.gguf: .*rope_freqs\.weight"):
        inspect(tmp_path / "model.gguf")


@pytest.fixture(scope="module")
def fields_and_tensors(whole, tmp_path_factory):
    """What a good file holds."""
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    path.write_bytes(whole)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def write(path: Path, fields: dict[str, object], tensors: dict[str, np.ndarray]) -> None:
    """A GGUF file of these; the kind of a field is that of its value."""
    kinds = {bool: "BOOL", str: "STRING", int: "INT64", float: "FLOAT32"}
    writer = gguf.GGUFWriter(path, "llama")
    writer.kv_data[0].clear()
    for name, value in fields.items():
        inner = value[0] if isinstance(value, list) else value
        kind = gguf.GGUFValueType[kinds[type(inner)]]
        writer.add_key_value(name, value, gguf.GGUFValueType.ARRAY if isinstance(value, list) else kind, sub_type=kind)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
