"""The same seed on the same machine gives the same bits, on a CUDA device too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Within the context torch takes only algorithms that give the same bits every time; on the CPU it always does.

    Where an operation has none, torch raises: `settle_for_less` says what then.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when the first product is made
    torch.cuda.init()  # or there are no figures yet
    torch.cuda.reset_peak_memory_stats(device)
    switches: Any = torch.utils.deterministic  # its switch is made by a class of modules
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    filled = switches.fill_uninitialized_memory
    # With warnings only, attention would take its faster algorithms, which add in any order.
    torch.use_deterministic_algorithms(True)
    switches.fill_uninitialized_memory = False  # every output is written, and twice is once too often
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = filled


def settle_for_less(error: RuntimeError) -> str | None:
    """What to tell people where torch refused an operation that has no algorithm which gives the same bits every time.

    From then on, until the end of the context, torch takes what it has. None, and nothing changes, for any other error.
    """
    message = str(error)
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if not strict or "torch.use_deterministic_algorithms" not in message:
        return None
    torch.use_deterministic_algorithms(True, warn_only=True)
    return f"another run will not give exactly the same numbers: {message.split('. ')[0]}"
