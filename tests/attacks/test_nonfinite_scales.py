"""Packed files whose scales are NaN or infinite: no model in floats is made of them, and nothing is left of the try."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_rs import FormatError, QuantSpec, checkpoint
from qlora_rs.checkpoint import convert

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
UP = "model.layers.0.mlp.up_proj"
STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"


def change(folder: Path, name: str, values: torch.Tensor) -> None:
    """Overwrite the first of a stored tensor's bytes."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    flat = tensors[name].view(-1).view(torch.uint8).clone()
    content = values.view(torch.uint8)
    flat[: content.numel()] = content
    tensors[name] = flat.view(tensors[name].dtype).view(tensors[name].shape)
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture(scope="module")
def llama(make_tiny_llama, tmp_path_factory) -> Path:
    """Its rows are whole groups of 32."""
    return make_tiny_llama(tmp_path_factory.mktemp("llama") / "source", hidden_size=96, intermediate_size=160)


def packed(source: Path, folder: Path, *, double_quant: bool) -> Path:
    checkpoint.quantize(source, folder, QuantSpec(double_quant=double_quant))
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("to", ["bf16", "fp16", "gguf", "compressed-tensors"])
@pytest.mark.parametrize("part", ["absmax", "absmax_scale", "absmax_offset"])
def test_a_native_weight_without_finite_scales_is_named(llama, tmp_path, part, to, value) -> None:
    folder = packed(llama, tmp_path / "packed", double_quant=part != "absmax")
    change(folder, f"{UP}.weight_{part}", torch.tensor([value]))
    with pytest.raises((FormatError, ValueError), match=rf"packed/model\.safetensors: tensor '{UP}\.weight'.*NaN"):
        convert(folder, tmp_path / "out", to)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_values_beyond_float16_are_still_told_from_those_that_are_not_finite(llama, tmp_path) -> None:
    folder = packed(llama, tmp_path / "packed", double_quant=False)
    change(folder, f"{UP}.weight_absmax", torch.tensor([1e9]))
    with pytest.raises(FormatError, match="do not fit float16; choose bfloat16"):
        convert(folder, tmp_path / "out", "fp16")
    assert convert(folder, tmp_path / "out", "bf16").notes == ()


def test_an_offset_of_bitsandbytes_that_is_nan_is_named(tmp_path) -> None:
    folder = tmp_path / "flat"
    shutil.copytree(GOLDEN / "bitsandbytes" / "nf4-double", folder)
    tensors = load_file(folder / "model.safetensors")
    state = {**json.loads(bytes(tensors[STATE].tolist())), "nested_offset": float("nan")}
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=rf"{UP}\.weight'.*NaN"):
        convert(folder, tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["bf16", "fp16", "native", "compressed-tensors"])
@pytest.mark.parametrize(
    ("kind", "scales"),
    [("gptq-4bit-g32-sym", "scales"), ("awq-g32", "scales"), ("ct-int4-g32", "weight_scale")],
)
def test_scales_of_other_libraries_that_are_nan_are_named(tmp_path, kind, scales, to) -> None:
    folder = tmp_path / "model"
    source = next(path for path in (GOLDEN / "foreign").iterdir() if path.name.startswith(kind))
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith(f".{scales}"))
    change(folder, name, torch.tensor([float("nan")]).to(tensors[name].dtype))
    with pytest.raises((FormatError, ValueError), match=rf"{name.removesuffix(scales)}.*NaN"):
        convert(folder, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
