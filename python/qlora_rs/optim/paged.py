"""Optimizer state in the pages of a pool: a page holds states of whole runs of elements, so that one page at a time is
enough to make a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_rs import _bridge
from qlora_rs._bridge import StateArray, Update
from qlora_rs.optim.base import StateOptimizer, Work
from qlora_rs.optim.rules import StateKind
from qlora_rs.pool import PagedBuffer, PagedPool

_BLOCK = 256  # elements that share a scale: runs begin at multiples of it
_ALIGNMENT = 64  # bytes


class _Place(NamedTuple):
    """Where in a page one state of a run is: first byte of its values, and of its scales where it has some."""

    values: int
    scales: int | None


class _Run(NamedTuple):
    """States of elements ``start:stop`` of a parameter, in one page."""

    start: int
    stop: int
    page: int
    places: dict[str, _Place]


class PagedOptimizer(StateOptimizer):
    """State in a `qlora_rs.paging.PagedPool`.

    ``state[parameter]`` holds only ``step``; `state_dict` has everything, `load_state_dict` puts it into pages again.

    Args:
        args: those of the optimizer without paging; ``options`` too.
        pool: where the state lives; several optimizers may share one.
        budget: without ``pool``: bytes of memory of a pool of its own.
    """

    def __init__(self, *args: Any, pool: PagedPool | None = None, budget: int | str = "1GiB", **options: Any) -> None:
        super().__init__(*args, **options)
        self.pool = PagedPool(budget) if pool is None else pool
        self._forget()

    def _forget(self) -> None:
        self._pages: list[PagedBuffer] = []  # those of before give their memory up
        self._used = self.pool.page_size  # bytes of the last page
        self._runs: dict[Tensor, list[_Run]] = {}

    def _run(self, work: list[Work], clip: float) -> None:
        """Page by page, in the order in which they were filled."""
        by_page: dict[int, list[tuple[Work, _Run]]] = defaultdict(list)
        resident = []
        for item in work:
            kinds = self._kinds(item.group)
            if not kinds:
                resident.append(Update(item.factors, item.sign * clip, item.param, item.grad, []))
                continue
            for run in self._runs_of(item.key, kinds):
                by_page[run.page].append((item, run))
        if resident:
            _bridge.optimizer_step(self.rule.name, resident)
        for page in sorted(by_page):
            with self._pages[page].acquired("write") as memory:
                updates = []
                for item, run in by_page[page]:
                    param, grad = (tensor.view(-1)[run.start : run.stop] for tensor in (item.param, item.grad))
                    states = [array for _, array in self._views(memory, run, self._kinds(item.group))]
                    updates.append(Update(item.factors, item.sign * clip, param, grad, states))
                _bridge.optimizer_step(self.rule.name, updates)

    @staticmethod
    def _views(memory: Tensor, run: _Run, kinds: tuple[StateKind, ...]) -> Iterator[tuple[str, StateArray]]:
        count = run.stop - run.start
        for name, signed in kinds:
            values, scales = run.places[name]
            if scales is None:
                yield name, StateArray(memory[values : values + 4 * count].view(torch.float32), None, signed)
            else:
                absmax = memory[scales : scales + 4 * -(-count // _BLOCK)].view(torch.float32)
                yield name, StateArray(memory[values : values + count], absmax, signed)

    def _runs_of(self, key: Tensor, kinds: tuple[StateKind, ...]) -> list[_Run]:
        """Where a parameter's states are; zeros where it had none."""
        if key not in self._runs:
            elements, runs, start = self._local(key).numel(), [], 0
            eight = self._is_8bit(key)
            block = (_BLOCK + 4 if eight else 4 * _BLOCK) * len(kinds)
            padding = 2 * _ALIGNMENT * len(kinds)
            while start < elements:
                blocks = (self.pool.page_size - self._used - padding) // block
                if blocks <= 0:
                    name = f"{type(self).__name__} page {len(self._pages)}"
                    self._pages.append(self.pool.zeros(self.pool.page_size, torch.uint8, name=name))
                    self._used = 0
                    continue
                stop = min(elements, start + blocks * _BLOCK)
                places = {}
                for name, _ in kinds:
                    values = self._take((stop - start) * (1 if eight else 4))
                    places[name] = _Place(values, self._take(4 * -(-(stop - start) // _BLOCK)) if eight else None)
                runs.append(_Run(start, stop, len(self._pages) - 1, places))
                start = stop
            self._runs[key] = runs
        return self._runs[key]

    def _take(self, count: int) -> int:
        start = self._used
        self._used = -(-(start + count) // _ALIGNMENT) * _ALIGNMENT
        return start

    def state_dict(self) -> dict[str, Any]:
        """Everything, as ordinary tensors: what the optimizer of the same name without paging gives."""
        packed = super().state_dict()
        number = 0
        for group in self.param_groups:
            for key in group["params"]:
                if key in self._runs:
                    packed["state"][number] = {**packed["state"][number], **self._gathered(key, self._kinds(group))}
                number += 1
        return packed

    def _gathered(self, key: Tensor, kinds: tuple[StateKind, ...]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = defaultdict(list)
        for run in self._runs[key]:
            for name, array in self._views(self._pages[run.page].host(), run, kinds):
                parts[name].append(array.values.clone())
                if array.absmax is not None:
                    parts[f"{name}_absmax"].append(array.absmax.clone())
        shape = self._local(key).shape
        whole = {name: torch.cat(pieces) for name, pieces in parts.items()}
        return {name: values if name.endswith("_absmax") else values.view(shape) for name, values in whole.items()}

    def _store(self, key: Tensor, name: str, values: tuple[Tensor, Tensor | None] | None) -> None:
        if values is None:
            return
        kinds = self.rule.states
        flat, scales = values[0].reshape(-1), values[1]
        for run in self._runs_of(key, kinds):
            with self._pages[run.page].acquired("write") as memory:
                array = dict(self._views(memory, run, kinds))[name]
                array.values.copy_(flat[run.start : run.stop])
                if array.absmax is not None and scales is not None:
                    array.absmax.copy_(scales[run.start // _BLOCK : -(-run.stop // _BLOCK)])

    def __getstate__(self) -> dict[str, Any]:
        """Refused: a copy would share the pages."""
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled: save its state_dict() instead")
