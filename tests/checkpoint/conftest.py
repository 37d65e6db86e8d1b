"""Small random models, with sizes that are odd on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_rs import _core

ModelMaker = Callable[..., Path]


def llama_config(**changes: object) -> dict[str, object]:
    """``config.json`` of a two-layer Llama; keys in an unusual order, which has to be kept."""
    return {
        "vocab_size": 101,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 72,
        "intermediate_size": 131,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
        "dtype": "bfloat16",
        "our_own_key": {"b": 1, "a": [2.5, None]},
        **changes,
    }


def llama_tensors(dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {"model.embed_tokens.weight": draw(101, 72), "model.norm.weight": draw(72)}
    tensors["lm_head.weight"] = draw(101, 72)
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", 72, 72),
            ("self_attn.k_proj", 36, 72),
            ("self_attn.v_proj", 36, 72),
            ("self_attn.o_proj", 72, 72),
            ("mlp.gate_proj", 131, 72),
            ("mlp.up_proj", 131, 72),
            ("mlp.down_proj", 72, 131),
        ):
            tensors[f"{prefix}{name}.weight"] = draw(rows, columns)
        tensors[f"{prefix}input_layernorm.weight"] = draw(72)
        tensors[f"{prefix}post_attention_layernorm.weight"] = draw(72)
    return tensors


def write_model(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, object], shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def make_model(tmp_path: Path) -> ModelMaker:
    """Write a model folder: ``make_model(dtype, shards=1, **changes to config.json)``."""

    def make(dtype: torch.dtype = torch.bfloat16, shards: int = 1, name: str = "source", **changes: object) -> Path:
        tensors = llama_tensors(dtype)
        if changes.get("tie_word_embeddings"):
            del tensors["lm_head.weight"]
        return write_model(tmp_path / name, tensors, llama_config(**changes), shards)

    return make


@pytest.fixture
def can_swap(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether folders can change places in one step where tests write."""
    folder = tmp_path_factory.mktemp("swap")
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    return _core.swap_paths(folder / "a", folder / "b")


@pytest.fixture
def write_tensors() -> Callable[..., Path]:
    """Write a model folder of given tensors: ``write_tensors(folder, tensors, shards=1, **changes)``."""

    def write(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **changes: object) -> Path:
        return write_model(folder, tensors, llama_config(**changes), shards)

    return write


@pytest.fixture
def load_folder() -> Callable[[Path], dict[str, torch.Tensor]]:
    """All tensors of a model folder, read by safetensors' own code."""

    def load(folder: Path) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(file)
        return tensors

    return load
