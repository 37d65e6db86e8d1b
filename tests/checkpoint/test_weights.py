"""Reading single tensors of a model folder by the names that its model uses."""

from __future__ import annotations

import json

import pytest
import torch

import qlora_rs
from qlora_rs import FormatError, QuantSpec, UnsupportedError, checkpoint
from qlora_rs.checkpoint.source import open_source
from qlora_rs.checkpoint.weights import TensorReader, open_weights, stored_name

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_read_as_they_are_stored(make_model, load_folder, shards, dtype) -> None:
    folder = make_model(dtype, shards)
    weight = open_weights(folder)
    for name, expected in load_folder(folder).items():
        assert weight(name).dtype == dtype
        assert torch.equal(weight(name), expected)


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(), QuantSpec("int8", 32, False), QuantSpec("dynamic8", 32), QuantSpec(codebook=[-1, 0, 0.5])],
    ids=QuantSpec.describe,
)
def test_packed_weights_of_odd_columns_are_read_as_values(make_model, load_folder, tmp_path, spec) -> None:
    folder = make_model(torch.float32)
    checkpoint.quantize(folder, tmp_path / "packed", spec)
    reader = TensorReader(open_source(tmp_path / "packed"))
    packed = reader.packed(DOWN, (72, 131), spec)
    expected = qlora_rs.quantize(load_folder(folder)[DOWN], spec)
    assert torch.equal(qlora_rs.dequantize(packed, torch.float32), qlora_rs.dequantize(expected, torch.float32))


def test_names_are_found_with_and_without_the_prefix_of_the_base_model() -> None:
    stored = ["layers.0.up.weight", "norm.weight", "model.layers.1.up.weight"]
    assert stored_name("layers.0.up.weight", stored) == "layers.0.up.weight"
    assert stored_name("model.layers.0.up.weight", stored) == "layers.0.up.weight"
    assert stored_name("layers.1.up.weight", stored) == "model.layers.1.up.weight"
    assert stored_name("layers.2.up.weight", stored) is None
    # "model." is no prefix where nothing but the leaf would be left: this would be another layer's weight.
    assert stored_name("lm_head.weight", ["weight"]) is None
    # Two candidates are none.
    assert stored_name("up.weight", ["a.up.weight", "b.up.weight"]) is None


def test_what_is_absent_or_no_float_is_an_error(write_tensors, tmp_path) -> None:
    folder = write_tensors(tmp_path / "m", {"a.b.weight": torch.arange(3), "a.c.weight": torch.ones(2, 2)})
    weight = open_weights(folder)
    assert torch.equal(weight("a.c.weight"), torch.ones(2, 2))
    with pytest.raises(FormatError, match=r"none of its files holds the tensor 'a\.d\.weight'"):
        weight("a.d.weight")
    with pytest.raises(FormatError, match=r"model\.safetensors: tensor 'a\.b\.weight': expected .* got I64"):
        weight("a.b.weight")


def test_a_quantized_folder_is_refused(make_model, tmp_path) -> None:
    checkpoint.quantize(make_model(), tmp_path / "packed")
    with pytest.raises(UnsupportedError, match="is quantized"):
        open_weights(tmp_path / "packed")


def test_a_file_that_changed_since_it_was_opened_is_an_error(make_model) -> None:
    folder = make_model()
    weight = open_weights(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FormatError, match=r"model\.safetensors: the file changed since its header was read"):
        weight(DOWN)


def test_a_type_that_torch_does_not_have_is_named(tmp_path) -> None:
    header = json.dumps({"a.weight": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    try:
        source = open_source(tmp_path)
    except qlora_rs.QloraError:
        pytest.skip("this version's header reader does not take the type at all")
    with pytest.raises((UnsupportedError, FormatError), match=r"'a\.weight'"):
        TensorReader(source).stored("a.weight")
