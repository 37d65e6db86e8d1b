"""Run a model without gradients and dropout, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context every module is in evaluation mode without gradients; afterwards each has its own mode again.

    >>> layer = nn.Dropout()
    >>> with evaluating(layer):
    ...     layer.training
    False
    >>> layer.training
    True
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def max_positions(model: nn.Module) -> int | None:
    """How many tokens the model can take at a time, or None where its config does not say."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


@contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Afterwards torch's generators of the CPU and of ``device`` are as they were."""
    with torch.random.fork_rng(devices=[] if device.index is None else [device.index], device_type="cuda"):
        yield


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs belong."""
    # Integers may be a paged weight's, which are on the host wherever the model computes.
    devices = [parameter.device for parameter in model.parameters() if parameter.is_floating_point()]
    return devices[0] if devices else torch.device("cpu")
