"""What `merge` refuses, before anything stands under the name of the destination."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora_rs import FormatError, UnsupportedError, checkpoint
from qlora_rs.merge import merge

Q_PROJ = "model.layers.0.self_attn.q_proj"


def rewrite(folder: Path, change: Callable[[dict, dict], object]) -> None:
    """Change tensors and metadata of a folder's one file: ``change(tensors, metadata)``."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_base_with_other_hashes_is_refused(packed, adapter, tiny_llama, make_tiny_llama, tmp_path) -> None:
    other = make_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(FormatError, match=r"other/model\.safetensors: SHA-256 is .* made from .*another model"):
        merge(packed, adapter, tmp_path / "merged", base=other)
    checkpoint.quantize(tiny_llama, tmp_path / "split", max_shard_size=20_000)
    with pytest.raises(UnsupportedError, match="is quantized"):
        merge(packed, adapter, tmp_path / "merged", base=tmp_path / "split")
    unrecorded = tmp_path / "unrecorded"
    shutil.copytree(packed, unrecorded)
    rewrite(unrecorded, lambda tensors, metadata: metadata.pop("source_sha256"))
    with pytest.raises(UnsupportedError, match="records no hashes"):
        merge(unrecorded, adapter, tmp_path / "merged", base=tiny_llama)
    renamed = tmp_path / "renamed"
    shutil.copytree(packed, renamed)
    rewrite(renamed, lambda tensors, metadata: metadata.update(source_sha256='{"model-00001.safetensors": ""}'))
    with pytest.raises(FormatError, match=r"its weight files are model\.safetensors, but .* made from model-00001"):
        merge(renamed, adapter, tmp_path / "merged", base=tiny_llama)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_on_a_tied_head_is_refused(packed, make_tiny_llama, save_for, tmp_path) -> None:
    checkpoint.quantize(make_tiny_llama(tmp_path / "source", tie_word_embeddings=True), tmp_path / "tied")
    adapter = save_for(tmp_path / "tied", target_modules=["lm_head"])
    with pytest.raises(UnsupportedError, match="lm_head is tied to the embedding"):
        merge(tmp_path / "tied", adapter, tmp_path / "merged")
    # The head's own weight is in the files, but config.json says that it is not used.
    said = tmp_path / "said"
    shutil.copytree(packed, said)
    edit_config(said, tie_word_embeddings=True)
    with pytest.raises(UnsupportedError, match="lm_head is tied to the embedding"):
        merge(said, adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("change", "match"),
    [({"intermediate_size": 133}, r"\[72, 131\].*\[72, 133\].*another model"), ({"num_hidden_layers": 1}, "7 layers")],
)
def test_an_adapter_of_another_model_is_refused(adapter, make_tiny_llama, tmp_path, change, match) -> None:
    checkpoint.quantize(make_tiny_llama(tmp_path / "source", **change), tmp_path / "other")
    with pytest.raises(FormatError, match=match):
        merge(tmp_path / "other", adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_librarys_format_is_refused(packed, adapter, tmp_path) -> None:
    shutil.copytree(packed, tmp_path / "hqq")
    edit_config(tmp_path / "hqq", quantization_config={"quant_method": "hqq"})
    with pytest.raises(UnsupportedError, match="'hqq'"):
        merge(tmp_path / "hqq", adapter, tmp_path / "merged")


@pytest.mark.parametrize("place", ["model", "model/in", "adapter", "adapter/in", "base/in", "."])
def test_a_destination_in_or_around_an_input_is_refused(packed, adapter, tiny_llama, tmp_path, place) -> None:
    for name, folder in (("model", packed), ("adapter", adapter), ("base", tiny_llama)):
        shutil.copytree(folder, tmp_path / "all" / name)
    at = tmp_path / "all"
    listed = sorted(at.rglob("*"))
    with pytest.raises(UnsupportedError, match="choose another"):
        merge(at / "model", at / "adapter", at / place, base=at / "base", overwrite=True)
    assert sorted(at.rglob("*")) == listed


def test_damage_names_file_and_tensor(packed, adapter, tmp_path) -> None:
    shutil.copytree(packed, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    nan = torch.tensor([float("nan")]).view(torch.int32)
    rewrite(tmp_path / "model", lambda tensors, metadata: tensors.update({f"{Q_PROJ}.weight_absmax_offset": nan}))
    with pytest.raises(FormatError, match=rf"model\.safetensors: {Q_PROJ}\.weight: .*NaN"):
        merge(tmp_path / "model", adapter, tmp_path / "merged")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(FormatError, match="cut off"):
        merge(tmp_path / "model", adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_float16_overflow_names_the_tensor(packed, adapter, tmp_path) -> None:
    shutil.copytree(adapter, tmp_path / "large")
    edited = json.loads((adapter / "adapter_config.json").read_text()) | {"lora_alpha": 1e9}
    (tmp_path / "large" / "adapter_config.json").write_text(json.dumps(edited))
    with pytest.raises(FormatError, match=r"model\.layers\.\d\.\S+: values up to .* do not fit float16"):
        merge(packed, tmp_path / "large", tmp_path / "merged", dtype=torch.float16)


@pytest.mark.parametrize(("option", "match"), [({"dtype": torch.int8}, "int8"), ({"max_shard_size": 0}, "at least 1")])
def test_wrong_arguments_are_refused(packed, adapter, tmp_path, option, match) -> None:
    with pytest.raises(ValueError, match=match):
        merge(packed, adapter, tmp_path / "merged", **option)
