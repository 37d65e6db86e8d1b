"""A packed model on disk, and adapters on it that change what it computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_rs

IDS = torch.arange(3, 26)[None]


@pytest.fixture(scope="session")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama`, packed by the defaults; read-only."""
    folder = tmp_path_factory.mktemp("packed") / "tiny-llama-nf4"
    qlora_rs.checkpoint.quantize(tiny_llama, folder)
    return folder


@pytest.fixture(scope="session")
def adapted_model(packed: Path) -> Callable[..., Any]:
    """Load a packed folder in float32 with a random adapter: ``adapted_model(folder, **settings of attach_lora)``."""

    def make(folder: Path = packed, seed: int = 1, **settings: Any) -> Any:
        model = qlora_rs.from_pretrained(folder, dtype=torch.float32)
        qlora_rs.attach_lora(model, **{"r": 3, "lora_alpha": 5, "seed": seed, **settings})
        generator = torch.Generator().manual_seed(seed)
        for layer in qlora_rs.lora_modules(model).values():
            layer.lora_B.data.normal_(std=0.05, generator=generator)
        return model

    return make


@pytest.fixture(scope="session")
def adapter(adapted_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter for `packed`; read-only."""
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    qlora_rs.save_adapter(adapted_model(), folder)
    return folder


@pytest.fixture(scope="session")
def logits() -> Callable[[Any], torch.Tensor]:
    """What a model computes for a fixed input, in float32."""

    def compute(model: Any) -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = model.eval()(IDS).logits
        return output.float()

    return compute


@pytest.fixture
def save_for(adapted_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """Save a random adapter for a packed folder: ``save_for(folder, **settings of attach_lora)``."""

    def save(folder: Path, **settings: Any) -> Path:
        qlora_rs.save_adapter(adapted_model(folder, **settings), tmp_path / "its-adapter")
        return tmp_path / "its-adapter"

    return save


@pytest.fixture
def plain_model(packed: Path) -> Callable[[], Any]:
    """Load the packed model as an ordinary float32 Llama without any layer of ours."""
    from transformers import AutoModelForCausalLM

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).dequantize()

    return load
