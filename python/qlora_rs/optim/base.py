"""What all optimizers here share: stepping, clipping, and state dicts that fit torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlora_rs.errors import UnsupportedError
from qlora_rs.optim import _bridge
from qlora_rs.optim._bridge import FactorSet, Run, StateArray
from qlora_rs.optim.plan import DTYPES, Part, StepPlan, to_local
from qlora_rs.optim.rules import Rule, StateKind

_SCALES = "_absmax"  # after a state's name: its scales

# What gradients are multiplied by: a number, or for a CUDA device a float32 there.
Clip = float | Tensor | None


class StateOptimizer(torch.optim.Optimizer):
    """Base of the optimizers; see `qlora_rs.optim`.

    ``state[parameter]`` holds ``step`` and each state under the name that torch's optimizer gives it; an 8-bit one is
    uint8 codes of the parameter's shape, with float32 scales [ceil(n / 256)] under the name + ``_absmax``.
    """

    rule: ClassVar[Rule]
    bits: ClassVar[int] = 32

    max_grad_norm: float | None
    min_8bit_size: int
    _plan: StepPlan | None = None
    _norm: float | Tensor | None = None

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None,
        capturable: bool = False,
        min_8bit_size: int | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(map(repr, unknown))}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, or None for no clipping; got {max_grad_norm}")
        if min_8bit_size is not None and self.bits != 8:
            raise TypeError(f"{type(self).__name__} has no 8-bit state: min_8bit_size is an option of the ...8bit ones")
        self.max_grad_norm = max_grad_norm
        self.min_8bit_size = 4096 if min_8bit_size is None else min_8bit_size
        super().__init__(params, {**defaults, "capturable": capturable})

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the gradients at the last step with ``max_grad_norm``; asking a CUDA device waits for it."""
        if isinstance(self._norm, Tensor):
            return float(self._norm)
        return self._norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        On a CUDA device the work is queued on torch's current stream, and nothing is waited for.

        Args:
            closure: computes the loss anew, with gradients; its value is returned.

        Raises:
            UnsupportedError: a parameter whose type or device has no update here.
            RuntimeError: it is being captured into a graph, but is not capturable, or is the first step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan, copies = self._planned()
        clips = self._clip(plan)
        for part, clip in zip(plan.parts, clips, strict=True):
            self._run(part, part.factors(), clip)
        for target, dense in copies:
            target.copy_(dense)
        plan.done()
        return loss

    def _planned(self) -> tuple[StepPlan, list[tuple[Tensor, Tensor]]]:
        """The plan of this step, told where everything is; strided parameters and copies that are updated instead."""
        capture = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if capture:
            self._check_capture()
        plan = None if capture else self._plan
        copies = None if plan is None else plan.take(self)
        if plan is None or copies is None:
            # A captured step's tables belong to its graph: an eager step must not write to them, nor it to theirs.
            plan = StepPlan(self, capture=capture)
            copies = plan.take(self)
            if copies is None:
                raise RuntimeError("parameters, gradients or states changed while a step was being made")
            if not capture:
                self._plan = plan
        return plan, copies

    def _check_capture(self) -> None:
        if not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}.step() is being captured into a CUDA graph, where the host cannot count steps: "
                "make the optimizer with capturable=True"
            )

    def _checked(self, key: Tensor) -> Tensor:
        """The part of a parameter that is here, whose type and device have an update."""
        param = to_local(key.detach())
        if param.device.type not in ("cpu", "cuda") or param.dtype not in DTYPES:
            raise UnsupportedError(
                f"{type(self).__name__} updates float32, bfloat16 and float16 parameters on CPU and CUDA devices; "
                f"one of shape {list(key.shape)} is {param.dtype} on {param.device}: use torch.optim for it"
            )
        return param

    def _clip(self, plan: StepPlan) -> list[Clip]:
        """For each part, what brings the gradients' global norm down to `max_grad_norm`."""
        most, parts = self.max_grad_norm, plan.parts
        if most is None or not parts:
            return [None] * len(parts)
        if any(part.sharded for part in parts):
            raise UnsupportedError(
                "max_grad_norm does not see the other shards of a DTensor: pass max_grad_norm=None and clip with "
                "torch.nn.utils.clip_grad_norm_"
            )
        for part in parts:
            if isinstance(part.program, _bridge.DeviceProgram):
                part.program.measure(most)
        first = parts[0].program
        if len(parts) == 1 and isinstance(first, _bridge.DeviceProgram):
            self._norm = first.norm
            return [first.clip_factor]
        squares = [
            torch.tensor(part.program.squared_norm(), dtype=torch.float64)
            if isinstance(part.program, _bridge.HostProgram)
            else part.program.squares
            for part in parts
        ]
        device = max((part.device for part in parts), key=lambda device: device.type)  # a CUDA one where there is one
        total = squares[0].to(device)
        for other in squares[1:]:
            total = total + other.to(device)
        norm = total.sqrt()
        self._norm = float(norm) if device.type == "cpu" else norm
        # min(1, ...), but NaN stays NaN, as in torch.
        factor = (most / (norm + 1e-6)).clamp(max=1.0).float()
        return [float(factor) if part.device.type == "cpu" else factor.to(part.device) for part in parts]

    def _run(self, part: Part, sets: list[FactorSet] | None, clip: Clip) -> None:
        """All updates of a part in one call."""
        self._run_pages(part, (0, 1), [], sets, clip)

    @staticmethod
    def _run_pages(
        part: Part, pages: tuple[int, int], memory: list[int], sets: list[FactorSet] | None, clip: Clip
    ) -> None:
        program = part.program
        if isinstance(program, _bridge.DeviceProgram):
            program.step(pages, memory, sets, clip if isinstance(clip, Tensor) else None)
        else:
            assert sets is not None  # made by the host, since steps are counted there
            program.step(pages, memory, sets, 1.0 if clip is None else float(clip))

    def _traits(self, group: dict[str, Any]) -> tuple[bool, bool]:
        """Options that say what a group's parameters keep and where."""
        return self.rule.needs_states(group), bool(group["capturable"])

    def _runs_of(self, key: Tensor, group: dict[str, Any]) -> list[Run]:
        """Where a parameter's states are; they are made of zeros where there are none."""
        return [_bridge.resident_run(to_local(key.detach()).numel(), self._arrays(key, group))]

    def _kinds(self, group: dict[str, Any]) -> tuple[StateKind, ...]:
        return self.rule.states if self.rule.needs_states(group) else ()

    def _is_8bit(self, key: Tensor) -> bool:
        return self.bits == 8 and key.numel() >= self.min_8bit_size

    def _arrays(self, key: Tensor, group: dict[str, Any]) -> list[StateArray]:
        """A parameter's states, made of zeros where there are none."""
        state, local = self.state[key], to_local(key.detach())
        arrays = []
        for name, signed in self._kinds(group):
            if name not in state:
                self._store(key, name, None)
            array = StateArray(to_local(state[name]), state.get(name + _SCALES), signed)
            self._check_array(name, local, array)
            arrays.append(array)
        return arrays

    @staticmethod
    def _check_array(name: str, param: Tensor, array: StateArray) -> None:
        """States may have been set by anybody; kernels trust their sizes."""
        values, absmax, _ = array
        blocks = -(-param.numel() // _bridge.BLOCK_SIZE)
        form = (param.numel(), torch.float32 if absmax is None else torch.uint8, param.device)
        fits = (values.numel(), values.dtype, values.device) == form and values.is_contiguous()
        if absmax is not None:
            own = (absmax.numel(), absmax.dtype, absmax.device)
            fits = fits and own == (blocks, torch.float32, param.device) and absmax.is_contiguous()
        if not fits:
            raise ValueError(
                f"state {name!r} of a parameter of shape {list(param.shape)} on {param.device} is {list(values.shape)} "
                f"of {values.dtype} on {values.device}: load_state_dict() puts states where parameters are"
            )

    def _store(self, key: Tensor, name: str, values: tuple[Tensor, Tensor | None] | None) -> None:
        """Put a state of this form into ``state``: zeros, or a copy of values (with scales)."""
        state, form = self.state[key], torch.contiguous_format
        if values is not None:
            state[name] = values[0].to(key.device).clone(memory_format=form)
            if values[1] is not None:
                state[name + _SCALES] = values[1].to(key.device).clone()
        elif self._is_8bit(key):
            local = to_local(key.detach())
            state[name] = torch.zeros(local.shape, dtype=torch.uint8, device=local.device)
            blocks = -(-local.numel() // _bridge.BLOCK_SIZE)
            state[name + _SCALES] = torch.zeros(blocks, dtype=torch.float32, device=local.device)
        else:
            state[name] = torch.zeros_like(key.detach(), dtype=torch.float32, memory_format=form)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, here or in torch's optimizer of the same name; 8-bit and float32 states are
        converted into each other.

        Torch's optimizers take float32 states; for them load 8-bit ones here first, into the class without ``8bit``.

        Raises:
            ValueError: the parameter groups or the states do not fit.
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
        self._plan = None
        self._forget()
        numbers = [number for group in loaded["param_groups"] for number in group["params"]]
        keys = [(key, group) for group in self.param_groups for key in group["params"]]
        for number, (key, group) in zip(numbers, keys, strict=True):
            saved = loaded["state"].get(number)
            if saved:
                self._load(key, group, saved)

    def _forget(self) -> None:
        """Drop what is kept outside of ``state``, which has been emptied."""

    def _reset(self, key: Tensor) -> None:
        """Let what is kept of a parameter outside of ``state`` be zeros, as nothing is in there."""

    def _load(self, key: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> None:
        # torch's SGD counts no steps, and saves None where there was no momentum yet.
        had_state = any(saved.get(name) is not None for name, _ in self._kinds(group))
        step = saved.get("step", 1.0 if had_state else 0.0)
        self.state[key]["step"] = torch.tensor(float(step))  # where it is counted is seen to by the next step
        for name, signed in self._kinds(group):
            values = saved.get(name)
            if values is None:
                if name not in saved and saved.keys() - {"step"}:
                    raise ValueError(
                        f"state {name!r} of a parameter of shape {list(key.shape)} is not in what is loaded, which "
                        f"has {', '.join(map(repr, saved))}: it is not of a {type(self).__name__}"
                    )
                continue
            scales = saved.get(name + _SCALES)
            self._store(key, name, self._converted(key, values, scales, signed))

    def _converted(
        self, key: Tensor, values: Tensor, scales: Tensor | None, signed: bool
    ) -> tuple[Tensor, Tensor | None]:
        """A saved state in the form that this optimizer keeps."""
        eight, elements = self._is_8bit(key), to_local(key.detach()).numel()
        blocks = -(-elements // _bridge.BLOCK_SIZE)
        if to_local(values).numel() != elements or (scales is not None and scales.numel() != blocks):
            own = "" if scales is None else f" with {scales.numel()} scales"
            raise ValueError(
                f"a parameter of shape {list(key.shape)} cannot take a saved state of shape {list(values.shape)}{own}: "
                "it is of another model, or its parameters are in another order"
            )
        if scales is not None:
            values, scales = values.cpu(), scales.cpu()
            return (values, scales) if eight else (_bridge.dequantize_state(values, scales, signed), None)
        if eight:
            return _bridge.quantize_state(to_local(values).cpu().float(), signed)
        return (values if hasattr(values, "to_local") else values.cpu()).float(), None

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and copying."""
        own = {"max_grad_norm": self.max_grad_norm, "min_8bit_size": self.min_8bit_size, "_norm": self.grad_norm}
        return {**super().__getstate__(), **own}
