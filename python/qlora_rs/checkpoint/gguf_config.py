"""``config.json`` of a model in a GGUF file, from the file's fields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, allclose

from qlora_rs.checkpoint.gguf_names import BIASES, NORMS, ROPE_FACTORS
from qlora_rs.checkpoint.gguf_rope import DEFAULT_THETA, llama3_factors
from qlora_rs.errors import FormatError, UnsupportedError

# What is shown of a field's value in a message.
_SHOWN = 100


@dataclass(frozen=True)
class Family:
    """An architecture that GGUF files name.

    Attributes:
        architecture: as they name it.
        model_type: what transformers calls it.
        model_class: the class of its causal language models.
        parts: of a layer, besides those that all families have.
        interleaved: whether the rows of queries and keys are in GGUF's own order.
    """

    architecture: str
    model_type: str
    model_class: str
    parts: tuple[str, ...] = ()
    interleaved: bool = False


FAMILIES = {
    "llama": Family("llama", "llama", "LlamaForCausalLM", interleaved=True),
    "qwen2": Family("qwen2", "qwen2", "Qwen2ForCausalLM", parts=BIASES),
    "qwen3": Family("qwen3", "qwen3", "Qwen3ForCausalLM", parts=NORMS),
}


def model_config(
    path: Path, fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: Tensor | None
) -> dict[str, Any]:
    """The config of the model in ``path``.

    Args:
        path: for messages.
        fields: of the file, by name.
        shapes: of its tensors.
        factors: what ``rope_freqs.weight`` holds, where it is there.

    Raises:
        FormatError: a field is missing or of another kind.
        UnsupportedError: a family, or a way to stretch its context, that is not known here.
    """
    architecture = fields.get("general.architecture")
    family = FAMILIES.get(str(architecture))
    if family is None:
        raise UnsupportedError(
            f"{path}: is of the architecture {architecture!r}; {', '.join(FAMILIES)} are read, as others name, order "
            "or offset tensors in ways of their own: load it with transformers, and save it as safetensors"
        )
    reading = _Fields(path, family.architecture, fields)
    heads, hidden = reading.size("attention.head_count"), reading.size("embedding_length")
    if reading.get("expert_count", 0):
        raise UnsupportedError(f"{path}: is a mixture of experts; these are not read from GGUF files")
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise FormatError(f"{path}: there is no embedding 'token_embd.weight'")
    layers = reading.size("block_count")
    if layers > len(shapes):  # before names are made for as many
        raise FormatError(f"{path}: says that it has {layers} layers, but holds {len(shapes)} tensors")
    rotated = None if reading.get("rope.dimension_count", None) is None else reading.size("rope.dimension_count")
    width = reading.size("attention.key_length", rotated or hidden // heads)
    if width % 2:
        raise FormatError(f"{path}: heads are {width} wide, but rotary embeddings turn pairs")
    if rotated not in (None, width):
        raise UnsupportedError(f"{path}: rotates a part of each head only, which {family.model_type} models do not")
    config: dict[str, Any] = {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": reading.size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": reading.size("attention.head_count_kv", heads),
        "head_dim": width,
        "max_position_embeddings": reading.size("context_length"),
        "vocab_size": embedding[0],
        "rms_norm_eps": reading.number("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_parameters": _rope(path, reading, factors, width),
        "tie_word_embeddings": "output.weight" not in shapes,
        "hidden_act": "silu",
        "attention_bias": False,
    }
    if family.model_type == "llama":
        config["mlp_bias"] = False
    for key, field in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = fields.get(f"tokenizer.ggml.{field}_token_id")
        if type(number) is int and 0 <= number < embedding[0]:
            config[f"{key}_token_id"] = number
    return config


@dataclass(frozen=True)
class _Fields:
    """The fields of an architecture."""

    path: Path
    architecture: str
    fields: Mapping[str, Any]

    def get(self, name: str, default: Any) -> Any:
        """A field that may be absent."""
        return self.fields.get(f"{self.architecture}.{name}", default)

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(name, default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise self._error(name, value, "a positive integer")
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self._error(name, value, "a number")
        return float(value)

    def _error(self, name: str, value: object, expected: str) -> FormatError:
        shown = repr(value)[:_SHOWN]
        return FormatError(f"{self.path}: field {self.architecture}.{name} is {shown}, not {expected}")


def _rope(path: Path, reading: _Fields, factors: Tensor | None, width: int) -> dict[str, Any]:
    theta = reading.number("rope.freq_base", DEFAULT_THETA)
    kind = reading.get("rope.scaling.type", "none")
    if kind == "linear":
        return {
            "rope_type": "linear",
            "rope_theta": theta,
            "factor": reading.number("rope.scaling.factor", 1.0),
        }
    if kind != "none":
        raise UnsupportedError(f"{path}: stretches its context by {kind!r}; linear and Llama 3's way are read")
    if factors is None:
        return {"rope_type": "default", "rope_theta": theta}
    if factors.shape != (width // 2,):
        raise FormatError(f"{path}: tensor {ROPE_FACTORS!r} has shape {list(factors.shape)}, not [{width // 2}]")
    # The file holds what became of these, not themselves; every Llama 3 has the same three.
    guess = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = llama3_factors(guess, width)
    if not allclose(factors, expected, rtol=1e-4):
        raise UnsupportedError(f"{path}: {ROPE_FACTORS} holds frequencies that are not those of a Llama 3 model")
    return guess
