"""What all optimizers here share: collecting parameters, clipping, stepping, and state dicts that fit torch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from qlora_rs import _bridge
from qlora_rs._bridge import StateArray, Update
from qlora_rs.errors import UnsupportedError
from qlora_rs.optim.rules import Rule, StateKind

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SCALES = "_absmax"  # after a state's name: its scales


class Work(NamedTuple):
    """A parameter that is to be updated; param and grad are contiguous and on the CPU."""

    key: Tensor
    group: dict[str, Any]
    factors: list[float]
    sign: float
    param: Tensor
    grad: Tensor


class StateOptimizer(torch.optim.Optimizer):
    """Base of the optimizers; see `qlora_rs.optim`.

    ``state[parameter]`` holds ``step`` and each state under the name that torch's optimizer gives it; an 8-bit one is
    uint8 codes of the parameter's shape, with float32 scales [ceil(n / 256)] under the name + ``_absmax``.
    """

    rule: ClassVar[Rule]
    bits: ClassVar[int] = 32

    max_grad_norm: float | None
    min_8bit_size: int
    grad_norm: float | None

    def __init__(
        self, params: Any, defaults: dict[str, Any], *, max_grad_norm: float | None, min_8bit_size: int | None = None
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, or None for no clipping; got {max_grad_norm}")
        if min_8bit_size is not None and self.bits != 8:
            raise TypeError(f"{type(self).__name__} has no 8-bit state: min_8bit_size is an option of the ...8bit ones")
        self.max_grad_norm = max_grad_norm
        self.min_8bit_size = 4096 if min_8bit_size is None else min_8bit_size
        self.grad_norm = None
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: computes the loss anew, with gradients; its value is returned.

        Raises:
            UnsupportedError: a parameter whose type or device has no update here.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work, copies = self._collect()
        clip = self._clip(work)
        self._run(work, clip)
        for target, dense in copies:
            target.copy_(dense)
        return loss

    def _collect(self) -> tuple[list[Work], list[tuple[Tensor, Tensor]]]:
        """What is to be done, and strided parameters with the contiguous copies that are updated in their place."""
        work, copies = [], []
        for group in self.param_groups:
            factors: dict[int, list[float]] = {}  # by step: all parameters of a group are usually at the same one
            for key in group["params"]:
                if key.grad is None:
                    continue
                if key.grad.is_sparse:
                    raise UnsupportedError("sparse gradients have no update here: use torch.optim.SparseAdam for them")
                param = self._local(key)
                dense = param.contiguous()
                if dense is not param:
                    copies.append((param, dense))
                grad = _to_local(key.grad).to(param.dtype).contiguous()
                state = self.state[key]
                step = self._advance(state)
                if step not in factors:
                    factors[step] = self.rule.factors(group, step)
                work.append(Work(key, group, factors[step], -1.0 if group["maximize"] else 1.0, dense, grad))
        return work, copies

    def _local(self, key: Tensor) -> Tensor:
        param = _to_local(key.detach())
        if param.device.type != "cpu" or param.dtype not in _DTYPES:
            raise UnsupportedError(
                f"{type(self).__name__} updates float32, bfloat16 and float16 parameters on the CPU; "
                f"one of shape {list(key.shape)} is {param.dtype} on {param.device}: use torch.optim for it"
            )
        return param

    @staticmethod
    def _advance(state: dict[str, Any]) -> int:
        """Number of the step that is made now, counted for each parameter as torch does."""
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
        state["step"] += 1
        return int(state["step"])

    def _clip(self, work: Iterable[Work]) -> float:
        """What gradients are multiplied by so that their global norm is at most `max_grad_norm`."""
        if self.max_grad_norm is None:
            return 1.0
        work = list(work)
        if any(hasattr(item.key, "to_local") for item in work):
            raise UnsupportedError(
                "max_grad_norm does not see the other shards of a DTensor: pass max_grad_norm=None and clip with "
                "torch.nn.utils.clip_grad_norm_"
            )
        self.grad_norm = math.sqrt(_bridge.squared_norm([item.grad for item in work]))
        factor = self.max_grad_norm / (self.grad_norm + 1e-6)
        return 1.0 if factor > 1 else factor  # NaN stays NaN, as in torch

    def _run(self, work: list[Work], clip: float) -> None:
        """All updates in one call."""
        updates = [
            Update(item.factors, item.sign * clip, item.param, item.grad, self._arrays(item.key, item.group))
            for item in work
        ]
        _bridge.optimizer_step(self.rule.name, updates)

    def _kinds(self, group: dict[str, Any]) -> tuple[StateKind, ...]:
        return self.rule.states if self.rule.needs_states(group) else ()

    def _is_8bit(self, key: Tensor) -> bool:
        return self.bits == 8 and key.numel() >= self.min_8bit_size

    def _arrays(self, key: Tensor, group: dict[str, Any]) -> list[StateArray]:
        """A parameter's states, made of zeros where there are none."""
        state = self.state[key]
        arrays = []
        for name, signed in self._kinds(group):
            if name not in state:
                self._store(key, name, None)
            scales = state.get(name + _SCALES)
            arrays.append(StateArray(_to_local(state[name]), scales, signed))
        return arrays

    def _store(self, key: Tensor, name: str, values: tuple[Tensor, Tensor | None] | None) -> None:
        """Put a state of this form into ``state``: zeros, or a copy of values (with scales)."""
        state, form = self.state[key], torch.contiguous_format
        if values is not None:
            state[name] = values[0].clone(memory_format=form)
            if values[1] is not None:
                state[name + _SCALES] = values[1].clone()
        elif self._is_8bit(key):
            local = _to_local(key.detach())
            state[name] = torch.zeros(local.shape, dtype=torch.uint8)
            state[name + _SCALES] = torch.zeros(-(-local.numel() // 256), dtype=torch.float32)
        else:
            state[name] = torch.zeros_like(key.detach(), dtype=torch.float32, memory_format=form)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, here or in torch's optimizer of the same name; 8-bit and float32 states are
        converted into each other.

        Raises:
            ValueError: the parameter groups do not fit.
            UnsupportedError: it asks for AMSGrad.
        """
        loaded: dict[str, Any] = {}

        def take(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            loaded.update(given)  # torch would cast states to the parameter's type
            return {**given, "state": {}}

        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise UnsupportedError("there is no AMSGrad here: this state is of an optimizer made with amsgrad=True")
        handle = self.register_load_state_dict_pre_hook(take)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)  # what torch's optimizer does not have
        self._forget()
        numbers = [number for group in loaded["param_groups"] for number in group["params"]]
        keys = [(key, group) for group in self.param_groups for key in group["params"]]
        for number, (key, group) in zip(numbers, keys, strict=True):
            saved = loaded["state"].get(number)
            if saved:
                self._load(key, group, saved)

    def _forget(self) -> None:
        """Drop what is kept outside of ``state``, which has been emptied."""

    def _load(self, key: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> None:
        # torch's SGD counts no steps, and saves None where there was no momentum yet.
        had_state = any(saved.get(name) is not None for name, _ in self._kinds(group))
        step = saved.get("step", 1.0 if had_state else 0.0)
        self.state[key]["step"] = torch.tensor(float(step))
        for name, signed in self._kinds(group):
            values = saved.get(name)
            if values is None:
                continue
            scales = saved.get(name + _SCALES)
            self._store(key, name, self._converted(key, values, scales, signed))

    def _converted(
        self, key: Tensor, values: Tensor, scales: Tensor | None, signed: bool
    ) -> tuple[Tensor, Tensor | None]:
        """A saved state in the form that this optimizer keeps."""
        eight = self._is_8bit(key)
        if scales is not None:
            values, scales = values.cpu(), scales.cpu()
            return (values, scales) if eight else (_bridge.dequantize_state(values, scales, signed), None)
        if eight:
            return _bridge.quantize_state(_to_local(values).cpu().float(), signed)
        return (values if hasattr(values, "to_local") else values.cpu()).float(), None

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and copying."""
        own = {name: getattr(self, name) for name in ("max_grad_norm", "min_8bit_size", "grad_norm")}
        return {**super().__getstate__(), **own}


def _to_local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor; any other tensor itself."""
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
