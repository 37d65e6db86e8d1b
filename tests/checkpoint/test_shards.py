"""Writing safetensors tensor by tensor: what the format's own code reads back, in shards of the size asked for."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_rs.checkpoint.journal import Journal
from qlora_rs.checkpoint.partial import Partial
from qlora_rs.checkpoint.shards import PlannedTensor, plan_shards, write_shards
from qlora_rs.checkpoint.source import open_source

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int64: "I64"}
NAMES |= {torch.bool: "BOOL"}


@pytest.fixture
def partial(tmp_path) -> Partial:
    """An empty folder ``tmp_path / "out"`` and its journal, which lies beside it."""
    (tmp_path / "out").mkdir()
    journal = Journal(tmp_path / "journal", {})
    journal.write()
    return Partial(tmp_path / "out", journal)


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


def test_safetensors_reads_back_every_type_shape_and_the_metadata(partial) -> None:
    expected = tensors()
    (shard,) = plan_shards(planned(expected), 1 << 30)
    write_shards(partial, [shard], expected.__getitem__, {"format": "pt", "note": "é"})
    read = load_file(partial.path / "model.safetensors")
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)
    with safe_open(partial.path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "é"}
    assert sorted(path.name for path in partial.path.iterdir()) == ["model.safetensors"]


def test_every_tensor_starts_at_a_multiple_of_its_element(partial) -> None:
    expected = tensors()
    write_shards(partial, plan_shards(planned(expected), 1 << 30), expected.__getitem__, {})
    content = (partial.path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    for name, value in expected.items():
        assert header[name]["data_offsets"][0] % value.itemsize == 0, name


def test_shards_hold_at_most_what_is_asked_for_and_one_tensor_at_least(partial) -> None:
    expected = {f"layer.{i}": torch.full((i + 1, 3), float(i)) for i in range(9)}
    shards = plan_shards(planned(expected), 100)
    assert all(shard.nbytes <= 100 or len(shard.tensors) == 1 for shard in shards)
    assert max(shard.nbytes for shard in shards) == 9 * 3 * 4
    assert [tensor.name for shard in shards for tensor in shard.tensors] == list(expected)
    write_shards(partial, shards, expected.__getitem__, {"format": "pt"})
    (partial.path / "config.json").write_text("{}")
    source = open_source(partial.path)  # checks the index against the files
    assert set(source.tensors) == set(expected)
    count = len(shards)
    assert source.files == tuple(f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1))
    index = json.loads((partial.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())


def test_tensors_are_asked_for_one_at_a_time_in_the_order_given(partial) -> None:
    expected = tensors()
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return expected[name]

    write_shards(partial, plan_shards(planned(expected), 40), read, {})
    assert asked == list(expected)


def test_a_model_without_tensors_is_one_empty_file(partial) -> None:
    write_shards(partial, plan_shards([], 10), {}.__getitem__, {"format": "pt"})
    assert load_file(partial.path / "model.safetensors") == {}


def test_a_full_disk_names_the_file(partial, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    expected = tensors()
    with pytest.raises(OSError, match="No space left") as caught:
        write_shards(partial, plan_shards(planned(expected), 1 << 30), expected.__getitem__, {})
    assert caught.value.filename == str(partial.path / "model.safetensors")


@pytest.fixture
def again(partial):
    """Write ``expected`` once more after the journal was read again; returns the names that were asked for."""

    def write(expected: dict[str, torch.Tensor], limit: int) -> list[str]:
        asked: list[str] = []
        journal = Journal.read(partial.journal.path)
        assert journal is not None

        def read(name: str) -> torch.Tensor:
            asked.append(name)
            return expected[name]

        write_shards(Partial(partial.path, journal), plan_shards(planned(expected), limit), read, {"format": "pt"})
        return asked

    return write


@pytest.mark.parametrize("limit", [40, 1 << 30])
@pytest.mark.parametrize("stop", range(8))
def test_finished_tensors_are_kept_and_the_rest_is_written_to_the_same_bytes(partial, again, limit, stop) -> None:
    expected = tensors()
    shards = plan_shards(planned(expected), limit)
    order = list(expected)

    def read(name: str) -> torch.Tensor:
        if name == order[stop]:
            raise KeyboardInterrupt
        return expected[name]

    with pytest.raises(KeyboardInterrupt):
        write_shards(partial, shards, read, {"format": "pt"})
    assert again(expected, limit) == order[stop:]
    whole = {path.name: path.read_bytes() for path in partial.path.iterdir()}
    for path in partial.path.iterdir():
        path.unlink()
    assert again(expected, limit) == [name for name in order if name != "empty"]
    assert {path.name: path.read_bytes() for path in partial.path.iterdir()} == whole


def test_what_is_not_there_as_it_was_finished_is_written_again(partial, again, flip_bit) -> None:
    expected = tensors()
    (shard,) = plan_shards(planned(expected), 1 << 30)
    file = partial.path / "model.safetensors"
    assert again(expected, 1 << 30) == list(expected)
    whole = file.read_bytes()
    assert again(expected, 1 << 30) == []
    flip_bit(file, "half")
    assert again(expected, 1 << 30) == ["half"]
    file.write_bytes(whole[:-1])
    assert again(expected, 1 << 30) == [shard.tensors[-2].name]  # the last one is empty
    file.write_bytes(whole + b"more")
    assert again(expected, 1 << 30) == []
    assert file.read_bytes() == whole
    file.write_bytes(b"something else altogether")
    assert again(expected, 1 << 30) == [name for name in expected if name != "empty"]
    assert file.read_bytes() == whole
