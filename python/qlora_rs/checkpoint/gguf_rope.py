"""Rotary embeddings that were stretched to longer contexts, as GGUF files hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_rs.errors import UnsupportedError

DEFAULT_THETA = 10000.0


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_type``, ``rope_theta`` and what else the type needs, from a ``config.json`` of transformers 4 or 5."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = found.get("rope_type", found.get("type", "default"))
    theta = found.get("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    return {**found, "rope_type": kind, "rope_theta": float(theta)}


def llama3_factors(parameters: Mapping[str, Any], head_dim: int) -> Tensor:
    """What each frequency is divided by: float32 ``[head_dim / 2]``.

    Long waves are slowed by ``factor``, short ones are not, those between by something between.

    Raises:
        UnsupportedError: a parameter is missing.

    Source: Llama 3.1's rotary embedding, as transformers computes it (``rope_type: llama3``).
    """
    try:
        factor, low, high = (float(parameters[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        context = float(parameters["original_max_position_embeddings"])
    except (KeyError, TypeError) as error:
        raise UnsupportedError(f"rope_type llama3 needs {error} in config.json") from None
    frequencies = parameters["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelengths < context / high, 1.0, torch.where(wavelengths > context / low, factor, between))
    return factors.float()
