"""How many steps each parameter has made: ``state[parameter]["step"]``, counted by one operation for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class StepCounts:
    """Numbers of steps on the CPU: one tensor, of which each ``step`` is an element.

    Args:
        states: what the optimizer keeps for each parameter; a ``step`` in it is continued.
    """

    def __init__(self, states: Sequence[dict[str, Any]]) -> None:
        before = [float(state["step"]) if "step" in state else 0.0 for state in states]
        self._all = torch.tensor(before, dtype=torch.float32)
        self._seen = self._all.clone()
        for state, view in zip(states, self._all.unbind(), strict=True):
            state["step"] = view

    @property
    def unchanged(self) -> bool:
        """Has nobody else set a number?"""
        return torch.equal(self._all, self._seen)

    @property
    def numbers(self) -> list[int]:
        """Steps made so far."""
        return [int(number) for number in self._all.tolist()]

    def advance(self) -> None:
        """Count a step of each."""
        self._all += 1
        self._seen += 1

    def of(self, index: int) -> int:
        """Steps made by one."""
        return int(self._all[index])


def device_steps(states: Sequence[dict[str, Any]], device: torch.device) -> list[Tensor]:
    """Numbers of steps as float32 scalars of a device, where kernels count them; made and moved there as needed."""
    missing = [state for state in states if "step" not in state]
    for state, view in zip(missing, torch.zeros(len(missing), device=device).unbind(), strict=True):
        state["step"] = view
    for state in states:
        if state["step"].device != device or state["step"].dtype != torch.float32:
            state["step"] = state["step"].to(device, torch.float32)
    return [state["step"] for state in states]
