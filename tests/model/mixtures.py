"""What tests of experts share: sizes of a tiny mixture, and how its model is loaded and asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qlora_rs.experts import PackedExperts
from qlora_rs.model import load_float

EXPERTS, HIDDEN, INNER = 5, 72, 43
SHARED = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
}
TOKENS = torch.arange(61)[None]


def experts_of(model: torch.nn.Module) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


def eager(folder: Path) -> torch.nn.Module:
    """The folder in floats, computed expert by expert."""
    model = load_float(folder, dtype="float32")
    model.set_experts_implementation("eager")
    return model


def plain(folder: Path, kind: str = "AutoModelForCausalLM") -> Any:
    """The folder as transformers alone loads it, which has to find all weights there, and no others."""
    import transformers

    model, info = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    model.set_experts_implementation("eager")
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits
