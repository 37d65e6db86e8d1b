"""Writing safetensors tensor by tensor: what the format's own code reads back, in shards of the size asked for."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_rs.checkpoint.shards import PlannedTensor, plan_shards, write_shards
from qlora_rs.checkpoint.source import open_source

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int64: "I64"}
NAMES |= {torch.bool: "BOOL"}


def tensors() -> dict[str, torch.Tensor]:
    """Of every width, with lengths that leave the next tensor unaligned if nothing is done about it."""
    return {
        "odd": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(3, 5).half(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "long": torch.arange(3),
        "transposed": torch.randn(5, 3).T,
        "flags": torch.tensor([True, False, True]),
        "bf": torch.randn(2, 3, 5).bfloat16(),
    }


def planned(found: dict[str, torch.Tensor]) -> list[PlannedTensor]:
    return [PlannedTensor(name, NAMES[t.dtype], tuple(t.shape), t.nbytes) for name, t in found.items()]


def test_safetensors_reads_back_every_type_shape_and_the_metadata(tmp_path) -> None:
    expected = tensors()
    (shard,) = plan_shards(planned(expected), 1 << 30)
    write_shards(tmp_path, [shard], expected.__getitem__, {"format": "pt", "note": "é"})
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "é"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_every_tensor_starts_at_a_multiple_of_its_element(tmp_path) -> None:
    expected = tensors()
    write_shards(tmp_path, plan_shards(planned(expected), 1 << 30), expected.__getitem__, {})
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    for name, value in expected.items():
        assert header[name]["data_offsets"][0] % value.itemsize == 0, name


def test_shards_hold_at_most_what_is_asked_for_and_one_tensor_at_least(tmp_path) -> None:
    expected = {f"layer.{i}": torch.full((i + 1, 3), float(i)) for i in range(9)}
    shards = plan_shards(planned(expected), 100)
    assert all(shard.nbytes <= 100 or len(shard.tensors) == 1 for shard in shards)
    assert max(shard.nbytes for shard in shards) == 9 * 3 * 4
    assert [tensor.name for shard in shards for tensor in shard.tensors] == list(expected)
    write_shards(tmp_path, shards, expected.__getitem__, {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    source = open_source(tmp_path)  # checks the index against the files
    assert set(source.tensors) == set(expected)
    count = len(shards)
    assert source.files == tuple(f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())


def test_tensors_are_asked_for_one_at_a_time_in_the_order_given(tmp_path) -> None:
    expected = tensors()
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return expected[name]

    write_shards(tmp_path, plan_shards(planned(expected), 40), read, {})
    assert asked == list(expected)


def test_a_model_without_tensors_is_one_empty_file(tmp_path) -> None:
    write_shards(tmp_path, plan_shards([], 10), {}.__getitem__, {"format": "pt"})
    assert load_file(tmp_path / "model.safetensors") == {}


def test_a_full_disk_names_the_file(tmp_path, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    expected = tensors()
    with pytest.raises(OSError, match="No space left") as caught:
        write_shards(tmp_path, plan_shards(planned(expected), 1 << 30), expected.__getitem__, {})
    assert caught.value.filename == str(tmp_path / "model.safetensors")


def test_an_existing_file_is_not_written_over(tmp_path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(FileExistsError):
        write_shards(tmp_path, plan_shards([], 10), {}.__getitem__, {})
    assert (tmp_path / "model.safetensors").read_text() == "mine"
