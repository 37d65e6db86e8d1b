"""What each optimizer keeps, and the factors of its update at a given step; `reference` has the updates themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qlora_rs._core import STATE_BLOCK_SIZE

Group = Mapping[str, Any]


class StateKind(NamedTuple):
    """One state array of a rule."""

    name: str
    signed: bool


class Rule(NamedTuple):
    """An update rule.

    Attributes:
        name: what the extension calls it.
        states: what it keeps for each parameter.
        factors: of a parameter group at a step (1 is the first), in the order of the Rust rule's fields.
        needs_states: False where a group's options make it keep nothing.
    """

    name: str
    states: tuple[StateKind, ...]
    factors: Callable[[Group, int], list[float]]
    needs_states: Callable[[Group], bool] = lambda group: True

    def state_bytes(self, bits: int) -> float:
        """Of all states, for an element of a parameter: float32, or codes with a float32 scale for each block."""
        return len(self.states) * (4 if bits == 32 else 1 + 4 / STATE_BLOCK_SIZE)


def _decay(group: Group) -> float:
    return 1 - float(group["lr"]) * float(group["weight_decay"])


def _adamw(group: Group, step: int) -> list[float]:
    beta1, beta2 = group["betas"]
    step_size = float(group["lr"]) / (1 - beta1**step)
    correction2 = (1 - beta2**step) ** 0.5
    return [_decay(group), 1 - beta1, beta2, 1 - beta2, correction2, group["eps"], step_size]


def _lion(group: Group, step: int) -> list[float]:
    beta1, beta2 = group["betas"]
    return [_decay(group), beta1, 1 - beta1, beta2, 1 - beta2, float(group["lr"])]


def _ademamix(group: Group, step: int) -> list[float]:
    beta1, beta2, _ = group["betas"]
    alpha, beta3 = ademamix_schedule(group, step)
    corrections = [1 - beta1**step, (1 - beta2**step) ** 0.5]
    return [
        _decay(group),
        1 - beta1,
        beta2,
        1 - beta2,
        1 - beta3,
        *corrections,
        group["eps"],
        alpha,
        float(group["lr"]),
    ]


def ademamix_schedule(group: Group, step: int) -> tuple[float, float]:
    """Alpha and beta 3 of a step (AdEMAMix, section 3).

    Alpha grows linearly over ``t_alpha`` steps; beta 3 from beta 1 on over ``t_beta3``, its half-life linearly.
    """
    beta1, _, beta3 = group["betas"]
    alpha = group["alpha"]
    if group["t_alpha"]:
        alpha *= min(1.0, step / group["t_alpha"])
    if group["t_beta3"] and step < group["t_beta3"] and 0 < beta1 < beta3:
        share = step / group["t_beta3"]
        first, last = math.log(beta1), math.log(beta3)
        beta3 = min(math.exp(first * last / ((1 - share) * last + share * first)), beta3)
    return alpha, beta3


def _sgd(group: Group, step: int) -> list[float]:
    rest = 1.0 if step == 1 else 1 - group["dampening"]
    return [group["weight_decay"], group["momentum"], rest, float(group["nesterov"]), float(group["lr"])]


def device_options(group: Group) -> tuple[float, ...]:
    """What a kernel makes any rule's factors from, as the functions above do (``GroupOptions`` of optimizer.cu)."""
    betas = (*group.get("betas", ()), 0.0, 0.0, 0.0)[:3]
    names = ("eps", "alpha", "t_alpha", "t_beta3", "momentum", "dampening", "nesterov")
    sign = -1.0 if group["maximize"] else 1.0
    rest = (float(group.get(name) or 0.0) for name in names)
    return (float(group["weight_decay"]), *map(float, betas), *rest, sign, float(group["lr"]))


ADAMW = Rule("adamw", (StateKind("exp_avg", True), StateKind("exp_avg_sq", False)), _adamw)
LION = Rule("lion", (StateKind("exp_avg", True),), _lion)
ADEMAMIX = Rule(
    "ademamix",
    (StateKind("exp_avg", True), StateKind("exp_avg_sq", False), StateKind("exp_avg_slow", True)),
    _ademamix,
)
SGD = Rule("sgd", (StateKind("momentum_buffer", True),), _sgd, lambda group: group["momentum"] != 0)
RULES = (ADAMW, LION, ADEMAMIX, SGD)
