"""Tests of layers run on every device that has kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """New tensors are made there."""
    name: str = request.param
    with torch.device(name):
        yield name
