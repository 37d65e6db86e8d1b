"""What GGUF files call the parts of a model, and how they order the rows of queries and keys."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from qlora_rs.errors import require_extra

EXTRA = "gguf"
ARCHITECTURE = "llama"
# Parts of a layer that some families have besides those of all.
BIASES = tuple(f"self_attn.{part}_proj.bias" for part in "qkv")
NORMS = tuple(f"self_attn.{part}_norm.weight" for part in "qk")
# Of rotary embeddings whose frequencies are not those of `rope_theta` alone.
ROPE_FACTORS = "rope_freqs.weight"

_PERMUTED = re.compile(r"(?:^|\.)(attn_[qk]|[qk]_proj)\.(?:weight|bias)$")


def require_gguf(purpose: str) -> Any:
    """The package gguf-py.

    Raises:
        UnsupportedError: it is not installed.
    """
    return require_extra("gguf", EXTRA, purpose)


def tensor_names(
    gguf: Any, layers: int, architecture: str = ARCHITECTURE, others: Sequence[str] = ()
) -> dict[str, str]:
    """transformers' name of each tensor of a model, by its name in a GGUF file.

    Args:
        gguf: the package gguf-py, whose own table this is.
        layers: how many there are.
        architecture: as GGUF files name it.
        others: names of tensors of a layer, besides those that all families have.
    """
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, layers)
    parts = ["input_layernorm", "post_attention_layernorm"]
    parts += [f"self_attn.{part}_proj" for part in "qkvo"]
    parts += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    in_layer = [f"{part}.weight" for part in parts] + list(others)
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{layer}.{part}" for layer in range(layers) for part in in_layer]
    return {str(table.get_name(name, try_suffixes=(".weight", ".bias"))): name for name in names}


def rotated_heads(name: str, config: Mapping[str, Any]) -> int | None:
    """How many heads the rows of a tensor belong to if GGUF orders them in its own way, else None.

    Args:
        name: of the tensor, in a GGUF file or a model folder.
        config: ``config.json`` of the model.
    """
    match = _PERMUTED.search(name)
    if match is None:
        return None
    heads = int(config["num_attention_heads"])
    return heads if match[1] in ("attn_q", "q_proj") else int(config.get("num_key_value_heads") or heads)


def to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in GGUF's order: the two rows that rotate together lie side by side.

    transformers keeps the first rows of all pairs of a head, then the second ones.
    """
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def from_interleaved(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_interleaved`."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
