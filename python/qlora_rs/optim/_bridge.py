"""Where optimizers' tensors meet the extension: addresses, dtype codes and streams of steps, as `qlora_rs._bridge` has
those of weights.

A program is a list of parameters of one device, made once; a step with it passes what has changed. Work on a CUDA
device is queued on torch's current stream there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_rs import _core
from qlora_rs._addresses import DTYPE_CODES, memory_of, queue_of

MOST_PAGES = _core.MOST_STEP_PAGES  # that one step of a device program reaches
BLOCK_SIZE = _core.STATE_BLOCK_SIZE

# Factors of a rule, and what gradients are multiplied by before anything else.
FactorSet = tuple[list[float], float]


class StateArray(NamedTuple):
    """One state of a parameter: float32 values, or codes with scales and whether their map is signed."""

    values: Tensor
    absmax: Tensor | None
    signed: bool


class Place(NamedTuple):
    """One state of a run: where its values and scales (0: none) are, from the start of a page, or as addresses."""

    values: int
    absmax: int
    signed: bool


class Run(NamedTuple):
    """States of elements ``start:stop`` of a parameter; they are in a page, or (page 0) in tensors of their own."""

    start: int
    stop: int
    page: int
    eight: bool
    states: tuple[Place, ...]


def resident_run(elements: int, arrays: Iterable[StateArray]) -> Run:
    """All of a parameter, with states in tensors."""
    places, eight = [], False
    for values, absmax, signed in arrays:
        eight = absmax is not None
        places.append(Place(memory_of(values)[0], 0 if absmax is None else memory_of(absmax)[0], signed))
    return Run(0, elements, 0, eight, tuple(places))


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Where tensors begin."""
    return list(map(Tensor.data_ptr, tensors))


class _Program:
    """What programs of all devices share.

    Args:
        rule: name of the update rule.
        params: contiguous parameters of one device, of 16 or 32 bits.
        sets: index of the factors of each.
        runs: of each; together they are all its elements.
    """

    device: torch.device

    def __init__(self, rule: str, params: Sequence[Tensor], sets: Sequence[int], runs: Sequence[Sequence[Run]]) -> None:
        self.device = params[0].device
        self._tensors = [
            (*memory_of(param), DTYPE_CODES[param.dtype], chosen) for param, chosen in zip(params, sets, strict=True)
        ]
        placed = [(index, run) for index, own in enumerate(runs) for run in own if run.stop > run.start]
        placed.sort(key=lambda item: item[1].page)
        self._runs = [
            (index, run.start, run.stop - run.start, run.page, run.eight, list(run.states)) for index, run in placed
        ]
        self.pages = sorted({run.page for _, run in placed})


class HostProgram(_Program):
    """Steps over parameters in CPU memory."""

    def __init__(self, rule: str, params: Sequence[Tensor], sets: Sequence[int], runs: Sequence[Sequence[Run]]) -> None:
        super().__init__(rule, params, sets, runs)
        self._core = _core.HostStep(rule, tensors=self._tensors, runs=self._runs)

    def place(self, params: list[int], grads: list[int]) -> None:
        """Tell the addresses of parameters and gradients; the latter are of the former's types and sizes."""
        self._core.set_addresses(params, grads)

    def squared_norm(self) -> float:
        """Sum of the squares of all gradients, in float64."""
        return self._core.squared_norm(num_threads=torch.get_num_threads())

    def step(self, pages: tuple[int, int], memory: list[int], sets: list[FactorSet], clip: float) -> None:
        """Update what is in pages ``pages[0]`` to before ``pages[1]``, whose addresses are given (page 0 has none)."""
        self._core.step(pages=pages, addresses=memory, sets=sets, clip=clip, num_threads=torch.get_num_threads())


class Learning(NamedTuple):
    """Options of a group whose factors are made on the device: in the order of `rules.device_options`."""

    options: tuple[float, ...]
    lr: Tensor | None  # a float32 or float64 scalar there, instead of the last option


class DeviceProgram(_Program):
    """Steps over parameters of one CUDA device. Made and used on torch's current stream."""

    def __init__(self, rule: str, params: Sequence[Tensor], sets: Sequence[int], runs: Sequence[Sequence[Run]]) -> None:
        super().__init__(rule, params, sets, runs)
        size = _core.DeviceStep.table_bytes(self._tensors, len(self._runs))
        self._table = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._core = _core.DeviceStep(
            rule, tensors=self._tensors, runs=self._runs, table=memory_of(self._table), queue=queue_of(self.device)
        )
        self._streams = {queue_of(self.device)[1]}  # those that have used the table
        self._params = [tensor[0] for tensor in self._tensors]
        self._grads: list[int] | None = None
        self._counters: object = None
        self.squares, self.norm = self._table[:16].view(torch.float64)  # of gradients; what `measure` leaves
        self.clip_factor = self._table[16:20].view(torch.float32)

    def place(self, params: list[int], grads: list[int]) -> None:
        """As `HostProgram.place`; what has not changed is not written again."""
        if queue_of(self.device)[1] not in self._streams:
            # Dropped, the table must not be handed out again before this stream has passed, too.
            self._table.record_stream(torch.cuda.current_stream(self.device))
            self._streams.add(queue_of(self.device)[1])
        if params == self._params and grads == self._grads:
            return
        moved = None if params == self._params else params
        self._core.set_addresses(queue_of(self.device), moved, None if grads == self._grads else grads)
        self._params, self._grads = params, grads

    def measure(self, most: float) -> None:
        """Fill `squares`, `norm` and `clip_factor`, which brings the norm down to ``most``."""
        self._core.clip(queue_of(self.device), most)

    def make_factors(self, steps: Sequence[Tensor], groups: Sequence[int], learning: Sequence[Learning]) -> None:
        """Count a step of each parameter in its scalar of this device, and make its factors there.

        Args:
            steps: float32 scalars, one for each parameter.
            groups: index of the group of each.
            learning: options of the groups.
        """
        counters = list(zip(addresses(steps), groups, strict=True))
        own = [
            (item.options, 0 if item.lr is None else item.lr.data_ptr(), item.lr is not None and item.lr.itemsize == 8)
            for item in learning
        ]
        if self._counters != (counters, own):
            self._core.set_counters(queue_of(self.device), counters, own)
            self._counters = (counters, own)
        self._core.make_factors(queue_of(self.device))

    def step(
        self, pages: tuple[int, int], memory: list[int], sets: list[FactorSet] | None, clip: Tensor | None
    ) -> None:
        """As `HostProgram.step`.

        Args:
            pages: at most `MOST_PAGES` of them.
            memory: addresses of the pages.
            sets: factors; None: those of `make_factors`.
            clip: a float32 on the device that multiplies all gradients.
        """
        factor = None if clip is None else clip.data_ptr()
        self._core.step(queue_of(self.device), pages=pages, addresses=memory, sets=sets, clip=factor)


Program = HostProgram | DeviceProgram


def program(rule: str, params: Sequence[Tensor], sets: Sequence[int], runs: Sequence[Sequence[Run]]) -> Program:
    """A program for the device of the parameters."""
    kind = DeviceProgram if params[0].device.type == "cuda" else HostProgram
    return kind(rule, params, sets, runs)


def quantize_state(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """uint8 codes of the shape of float32 values, and float32 scales [ceil(n / 256)]; all on the CPU."""
    values = values.contiguous()
    codes = torch.empty(values.shape, dtype=torch.uint8)
    absmax = torch.empty(-(-values.numel() // BLOCK_SIZE), dtype=torch.float32)
    _core.quantize_state(signed=signed, values=memory_of(values), codes=memory_of(codes), absmax=memory_of(absmax))
    return codes, absmax


def dequantize_state(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The float32 values of codes and scales; all on the CPU."""
    codes, absmax = codes.contiguous(), absmax.contiguous()
    values = torch.empty(codes.shape, dtype=torch.float32)
    _core.dequantize_state(signed=signed, codes=memory_of(codes), absmax=memory_of(absmax), values=memory_of(values))
    return values
