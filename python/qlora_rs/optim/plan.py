"""What a step does, worked out once: it holds until a parameter, a gradient's presence, a state or an option changes.

A training step should not spend its time on asking hundreds of tensors what they are. So everything that the kernels
need is kept, and a step asks only what can have changed, all tensors at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from qlora_rs.errors import UnsupportedError
from qlora_rs.optim import _bridge
from qlora_rs.optim._bridge import FactorSet, Learning, Program
from qlora_rs.optim.counts import StepCounts, device_steps
from qlora_rs.optim.rules import device_options

if TYPE_CHECKING:
    from qlora_rs.optim.base import StateOptimizer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = {Tensor, torch.nn.Parameter}
_grad, _dtype = attrgetter("grad"), attrgetter("dtype")


class _Member(NamedTuple):
    """A parameter that has a gradient."""

    key: Tensor
    group: int
    state: dict[str, Any]


class Part:
    """Parameters of one device that are updated together; those whose steps are counted there are apart."""

    def __init__(self, optimizer: StateOptimizer, members: list[_Member], capturable: bool) -> None:
        self.keys = [member.key for member in members]
        self.capturable = capturable
        self._groups = [member.group for member in members]
        self._options = optimizer.param_groups
        self._rule = optimizer.rule
        states = [member.state for member in members]
        params = [to_local(key.detach()) for key in self.keys]
        self.device = params[0].device
        sets: list[int]
        if capturable:
            self._steps = device_steps(states, self.device)
            sets = list(range(len(members)))
        else:
            self._counts = StepCounts(states)
            # Parameters of a group that are at the same step have the same factors.
            numbers: dict[tuple[int, int], int] = {}
            sets = [numbers.setdefault(item, len(numbers)) for item in zip(self._groups, self._counts.numbers)]  # noqa: B905
            first = {chosen: index for index, chosen in reversed(list(enumerate(sets)))}
            self._sets = [(group, first[index]) for index, (group, _) in enumerate(numbers)]
        runs = [optimizer._runs_of(member.key, optimizer.param_groups[member.group]) for member in members]
        self._used: tuple[Sequence[Tensor], list[Tensor]] | None = None
        self._elements = [param.numel() for param in params]
        self._dtypes = [param.dtype for param in params]
        self._plain = set(map(type, self.keys)) <= _PLAIN
        self.sharded = any(hasattr(key, "to_local") for key in self.keys)
        self.program: Program = _bridge.program(self._rule.name, [param.contiguous() for param in params], sets, runs)
        self._states = [optimizer.state[key] for key in self.keys]
        self._kept = list(chain.from_iterable(map(dict.values, self._states)))
        # Numbers of steps are told by their values, not by their place.
        tensors = [item for state in self._states for name, item in state.items() if name != "step"]
        self._locals = [to_local(tensor) for tensor in tensors if isinstance(tensor, Tensor)]
        self._addresses = _bridge.addresses(self._locals)
        self._param_addresses = _bridge.addresses(params)

    def holds(self) -> bool:
        """Are states and numbers of steps those that were seen?"""
        return (
            sum(map(len, self._states)) == len(self._kept)
            and all(map(is_, chain.from_iterable(map(dict.values, self._states)), self._kept))
            and _bridge.addresses(self._locals) == self._addresses
            and (self.capturable or self._counts.unchanged)
        )

    def take(self, grads: list[Tensor]) -> list[tuple[Tensor, Tensor]] | None:
        """Tell the program where parameters and gradients are.

        Returns strided parameters with the contiguous copies that are updated in their place, or None where a parameter
        is no longer what it was.
        """
        copies: list[tuple[Tensor, Tensor]] = []
        params: Sequence[Tensor] = self.keys
        if not self._plain:
            params = [to_local(key.detach()) for key in self.keys]
        addresses = _bridge.addresses(params)
        if addresses != self._param_addresses:
            # Elsewhere: it may be anything. In its place, what is asked of its gradient says enough.
            if list(map(Tensor.numel, params)) != self._elements or list(map(_dtype, params)) != self._dtypes:
                return None
            if any(param.device != self.device for param in params):
                return None
            self._param_addresses = addresses
        if not all(map(Tensor.is_contiguous, params)):
            dense = [param.detach().contiguous() for param in params]
            copies = [(param, copy) for param, copy in zip(params, dense, strict=True) if not param.is_contiguous()]
            params, addresses = dense, _bridge.addresses(dense)
        if (
            not set(map(type, grads)) <= _PLAIN
            or list(map(_dtype, grads)) != self._dtypes
            or list(map(Tensor.numel, grads)) != self._elements
            or not all(map(Tensor.is_contiguous, grads))
        ):
            grads = [self._dense(*item) for item in zip(self.keys, grads, params, strict=True)]
        self._used = (params, grads)  # copies live until the step is queued
        self.program.place(addresses, _bridge.addresses(grads))
        return copies

    @staticmethod
    def _dense(key: Tensor, grad: Tensor, param: Tensor) -> Tensor:
        if grad.is_sparse:
            raise UnsupportedError("sparse gradients have no update here: use torch.optim.SparseAdam for them")
        grad = to_local(grad)
        if grad.device != param.device or grad.shape != param.shape:
            raise ValueError(
                f"a parameter of shape {list(key.shape)} on {param.device} has a gradient of shape {list(grad.shape)} "
                f"on {grad.device}"
            )
        return grad.to(param.dtype).contiguous()

    def factors(self) -> list[FactorSet] | None:
        """Count a step; the factors of each set, or None where they are made on the device."""
        groups = self._options
        if self.capturable and isinstance(self.program, _bridge.DeviceProgram):
            learning = [self._learning(group) for group in groups]
            self.program.make_factors(self._steps, self._groups, learning)
            return None
        self._counts.advance()
        return [
            (self._rule.factors(groups[group], self._counts.of(first)), -1.0 if groups[group]["maximize"] else 1.0)
            for group, first in self._sets
        ]

    def _learning(self, group: dict[str, Any]) -> Learning:
        lr = group["lr"]
        there = isinstance(lr, Tensor) and lr.device == self.device and lr.dtype in (torch.float32, torch.float64)
        return Learning(device_options({**group, "lr": 0.0} if there else group), lr if there else None)

    def done(self) -> None:
        """Forget what only this step needed."""
        self._used = None


class StepPlan:
    """All parts of an optimizer's step.

    Args:
        optimizer: whose step it is.
        capture: for a step that is being captured into a graph: then nothing may be made that the graph would not keep.

    Raises:
        UnsupportedError: a parameter whose type or device has no update here.
    """

    def __init__(self, optimizer: StateOptimizer, *, capture: bool = False) -> None:
        self._groups = list(optimizer.param_groups)
        self._lists = [list(group["params"]) for group in self._groups]
        self._traits = [optimizer._traits(group) for group in self._groups]
        self._keys = list(chain.from_iterable(self._lists))
        idle = map(is_, map(_grad, self._keys), repeat(None))
        self._idle = list(idle)
        by_part: dict[tuple[torch.device, bool], list[int]] = {}
        group_of = list(chain.from_iterable([index] * len(keys) for index, keys in enumerate(self._lists)))
        for index, (key, no_grad) in enumerate(zip(self._keys, self._idle, strict=True)):
            if no_grad:
                continue
            device = optimizer._checked(key).device
            capturable = bool(self._groups[group_of[index]]["capturable"]) and device.type == "cuda"
            by_part.setdefault((device, capturable), []).append(index)
        if capture:
            self._refuse_first_steps(optimizer, by_part)
        for key in (self._keys[index] for indices in by_part.values() for index in indices):
            if "step" not in optimizer.state[key]:
                optimizer._reset(key)
        self._states = optimizer.state
        self._indices = list(by_part.values())
        self.parts = [
            Part(
                optimizer,
                [_Member(self._keys[i], group_of[i], optimizer.state[self._keys[i]]) for i in indices],
                capturable,
            )
            for (_, capturable), indices in by_part.items()
        ]
        self._state_values = list(optimizer.state.values())

    def _refuse_first_steps(
        self, optimizer: StateOptimizer, by_part: dict[tuple[torch.device, bool], list[int]]
    ) -> None:
        for (device, _), indices in by_part.items():
            for key in (self._keys[index] for index in indices):
                steps = optimizer.state[key].get("step") if key in optimizer.state else None
                if steps is None or steps.device != device:
                    raise RuntimeError(
                        f"{type(optimizer).__name__}: a step can be captured into a graph once the state is there: "
                        "make a step before"
                    )

    def take(self, optimizer: StateOptimizer) -> list[tuple[Tensor, Tensor]] | None:
        """Tell where parameters and gradients are; None where the plan does not hold any more.

        Returns strided parameters and their copies, as `Part.take`.
        """
        groups = optimizer.param_groups
        if len(groups) != len(self._groups) or not all(map(is_, groups, self._groups)):
            return None
        lists = [group["params"] for group in groups]
        if (
            list(map(len, lists)) != list(map(len, self._lists))
            or not all(map(is_, chain.from_iterable(lists), self._keys))
            or [optimizer._traits(group) for group in groups] != self._traits
        ):
            return None
        grads = list(map(_grad, self._keys))
        if list(map(is_, grads, repeat(None))) != self._idle:
            return None
        values = optimizer.state.values()
        if len(values) != len(self._state_values) or not all(map(is_, values, self._state_values)):
            return None
        if not all(part.holds() for part in self.parts):
            return None
        copies: list[tuple[Tensor, Tensor]] = []
        for part, indices in zip(self.parts, self._indices, strict=True):
            own = part.take(grads if len(indices) == len(grads) else [grads[index] for index in indices])
            if own is None:
                return None
            copies += own
        return copies

    def done(self) -> None:
        """Forget what only this step needed."""
        for part in self.parts:
            part.done()


def to_local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor; any other tensor itself."""
    method = getattr(tensor, "to_local", None)
    local: Tensor = tensor if method is None else method()
    return local
