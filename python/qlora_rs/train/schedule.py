"""The learning rate of a step."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, warmup: int, highest: float) -> float:
    """Linear from ``highest / warmup`` to ``highest`` over ``warmup`` steps, then a cosine to zero.

    The cosine reaches zero after the last step, not in it, so that no step is in vain.

    Args:
        step: from 1 to ``steps``.
        steps: in all.
        warmup: of them with a rising rate.
        highest: learning rate.

    >>> [round(learning_rate(step, 6, 2, 1.0), 3) for step in range(1, 7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step <= warmup:
        return highest * step / warmup
    done = (step - 1 - warmup) / (steps - warmup)
    return highest * 0.5 * (1 + math.cos(math.pi * done))
