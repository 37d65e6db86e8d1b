"""A source is the recorded one, or it is refused before anything is merged over it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch

from qlora_rs import FormatError, UnsupportedError, checkpoint
from qlora_rs.checkpoint.provenance import open_recorded_source, recorded_source_bytes


@pytest.mark.parametrize("shards", [1, 3])
def test_the_recorded_source_is_hashed_once_and_opened(make_model, load_folder, tmp_path, shards) -> None:
    source = make_model(torch.float32, shards)
    checkpoint.quantize(source, tmp_path / "packed", max_shard_size=20_000)
    packed = checkpoint.inspect(tmp_path / "packed")
    files = sorted(source.glob("*.safetensors"))
    assert packed.source_sha256 == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    pieces: list[int] = []
    read = open_recorded_source(packed, source, pieces.append)
    assert sum(pieces) == sum(file.stat().st_size for file in files) == recorded_source_bytes(packed, source)
    for name, expected in load_folder(source).items():
        assert torch.equal(read(name), expected)


def test_one_changed_byte_is_refused_with_both_hashes(make_model, tmp_path) -> None:
    source = make_model(shards=2)
    checkpoint.quantize(source, tmp_path / "packed")
    packed = checkpoint.inspect(tmp_path / "packed")
    file = source / "model-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found, recorded = hashlib.sha256(content).hexdigest(), packed.source_sha256[file.name]
    with pytest.raises(FormatError, match=rf"{file.name}: SHA-256 is {found}, but .* made from {recorded}"):
        open_recorded_source(packed, source, lambda count: None)


def test_other_files_are_refused_without_hashing(make_model, tmp_path) -> None:
    checkpoint.quantize(make_model(shards=2), tmp_path / "packed")
    packed = checkpoint.inspect(tmp_path / "packed")
    whole = make_model(name="whole")
    pieces: list[int] = []
    with pytest.raises(FormatError, match=r"weight files are model\.safetensors, but .* model-00001-of-00002"):
        open_recorded_source(packed, whole, pieces.append)
    assert pieces == []
    assert recorded_source_bytes(packed, whole) == 0


def test_without_recorded_hashes_or_over_a_packed_source_nothing_is_opened(make_model, tmp_path) -> None:
    source = make_model()
    checkpoint.quantize(source, tmp_path / "packed")
    packed = checkpoint.inspect(tmp_path / "packed")
    with pytest.raises(UnsupportedError, match="records no hashes"):
        open_recorded_source(replace(packed, source_sha256={}), source, lambda count: None)
    with pytest.raises(UnsupportedError, match="is quantized"):
        open_recorded_source(packed, tmp_path / "packed", lambda count: None)
