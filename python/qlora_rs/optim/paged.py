"""Optimizer state in the pages of a pool: a page holds states of whole runs of elements, so that one page at a time is
enough to make a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qlora_rs.errors import PageError, UnsupportedError
from qlora_rs.optim import _bridge
from qlora_rs.optim._bridge import BLOCK_SIZE, FactorSet, Place, Run, StateArray
from qlora_rs.optim.base import Clip, StateOptimizer
from qlora_rs.optim.plan import Part, to_local
from qlora_rs.optim.rules import StateKind
from qlora_rs.pool import PagedBuffer, PagedPool

_ALIGNMENT = 64  # bytes


class PagedOptimizer(StateOptimizer):
    """State in a `qlora_rs.paging.PagedPool`.

    ``state[parameter]`` holds only ``step``; `state_dict` has everything, `load_state_dict` puts it into pages again.

    Args:
        args: those of the optimizer without paging; ``options`` too, but not ``capturable``: pages move.
        pool: where the state lives, on the parameters' device; several optimizers may share one.
        budget: without ``pool``: bytes of memory of a pool of its own.
    """

    def __init__(self, *args: Any, pool: PagedPool | None = None, budget: int | str = "1GiB", **options: Any) -> None:
        if pool is not None and not isinstance(pool, PagedPool):
            raise TypeError(f"pool is a PagedPool, got {pool!r}: a number of bytes is given as budget=")
        self._pool, self._budget = pool, budget
        self._forget()
        super().__init__(*args, **options)
        if pool is None and self._device.type == "cpu":
            self._pool = PagedPool(budget)  # so that a budget that cannot be is refused at once

    @property
    def pool(self) -> PagedPool:
        """Where the state lives. One of its own is made together with the state, on the parameters' device."""
        if self._pool is None:
            self._pool = PagedPool(self._budget, self._device)
        return self._pool

    @property
    def _device(self) -> torch.device:
        """Of the parameters; groups may be empty, as in torch."""
        first = next((key for group in self.param_groups for key in group["params"]), None)
        return torch.device("cpu") if first is None else to_local(first.detach()).device

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            UnsupportedError: it is capturable.
        """
        if param_group.get("capturable", self.defaults["capturable"]):
            raise UnsupportedError(
                f"{type(self).__name__} cannot be capturable, since pages move: capture the optimizer without paging"
            )
        super().add_param_group(param_group)

    def _forget(self) -> None:
        self._pages: list[PagedBuffer] = []  # those of before give their memory up
        self._used = 0  # bytes of the last page
        self._paged: dict[Tensor, list[Run]] = {}

    def _run(self, part: Part, sets: list[FactorSet] | None, clip: Clip) -> None:
        """As many pages in one call as there is room for at once; where not all have room, one after the other, so that
        the pool fetches and writes back while others are updated.
        """
        pages = part.program.pages  # 0, and numbers in `_pages` from 1 on
        if pages and pages[0] == 0:
            self._run_pages(part, (0, 1), [], sets, clip)
            pages = pages[1:]
        fit = len(pages) <= self.pool.budget // self.pool.page_size
        while pages:
            most = min(_bridge.MOST_PAGES, len(pages)) if fit else 1
            together = [page for index, page in enumerate(pages[:most]) if page == pages[0] + index]
            held = self._acquire(together)
            try:
                self._run_pages(part, (pages[0], pages[0] + len(held)), held, sets, clip)
            finally:
                for page in pages[: len(held)]:
                    self._pages[page - 1].release()
            pages = pages[len(held) :]

    def _acquire(self, pages: list[int]) -> list[int]:
        """Addresses of pages from the first on, fewer than asked for where others hold the room."""
        held: list[int] = []
        for page in pages:
            try:
                held.append(self._pages[page - 1]._acquire("write"))
            except PageError:
                if not held:
                    raise
                break
        return held

    @staticmethod
    def _views(memory: Tensor, run: Run, kinds: tuple[StateKind, ...]) -> Iterator[tuple[str, StateArray]]:
        count = run.stop - run.start
        for (name, _), (values, scales, signed) in zip(kinds, run.states, strict=True):
            if run.eight:
                absmax = memory[scales : scales + 4 * -(-count // BLOCK_SIZE)].view(torch.float32)
                yield name, StateArray(memory[values : values + count], absmax, signed)
            else:
                yield name, StateArray(memory[values : values + 4 * count].view(torch.float32), None, signed)

    def _runs_of(self, key: Tensor, group: dict[str, Any]) -> list[Run]:
        kinds = self._kinds(group)
        return self._paged_runs(key, kinds) if kinds else super()._runs_of(key, group)

    def _paged_runs(self, key: Tensor, kinds: tuple[StateKind, ...]) -> list[Run]:
        """Where a parameter's states are; zeros where it had none."""
        param, pool = to_local(key.detach()), self.pool
        if param.device.type != pool.device.type or pool.device.index not in (None, param.device.index):
            raise UnsupportedError(
                f"{type(self).__name__}: a parameter of shape {list(key.shape)} is on {param.device}, the pool on "
                f"{pool.device}: give parameters of each device an optimizer and a pool of their own"
            )
        if key not in self._paged:
            elements, runs, start = param.numel(), [], 0
            eight = self._is_8bit(key)
            block = (BLOCK_SIZE + 4 if eight else 4 * BLOCK_SIZE) * len(kinds)
            padding = 2 * _ALIGNMENT * len(kinds)
            while start < elements:
                blocks = (pool.page_size - self._used - padding) // block if self._pages else 0
                if blocks <= 0:
                    name = f"{type(self).__name__} page {len(self._pages)}"
                    self._pages.append(pool.zeros(pool.page_size, torch.uint8, name=name))
                    self._used = 0
                    continue
                stop = min(elements, start + blocks * BLOCK_SIZE)
                places = []
                for _, signed in kinds:
                    values = self._take((stop - start) * (1 if eight else 4))
                    scales = self._take(4 * -(-(stop - start) // BLOCK_SIZE)) if eight else 0
                    places.append(Place(values, scales, signed))
                runs.append(Run(start, stop, len(self._pages), eight, tuple(places)))
                start = stop
            self._paged[key] = runs
        runs = self._paged[key]
        held = runs[-1].stop if runs else 0
        if held != param.numel():
            raise ValueError(
                f"a parameter of shape {list(key.shape)} has paged state of {held} elements: give one that has changed "
                "its size to an optimizer of its own"
            )
        return runs

    def _reset(self, key: Tensor) -> None:
        for run in self._paged.get(key, ()):
            with self._pages[run.page - 1].acquired("write") as memory:
                for _, array in self._views(memory, run, self.rule.states):
                    array.values.zero_()
                    if array.absmax is not None:
                        array.absmax.zero_()

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
                if key in self._paged:
                    packed["state"][number] = {**packed["state"][number], **self._gathered(key, self._kinds(group))}
                number += 1
        return packed

    def _gathered(self, key: Tensor, kinds: tuple[StateKind, ...]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = defaultdict(list)
        if not self._paged[key]:  # it has no elements
            eight = self._is_8bit(key)
            for name, _ in kinds:
                parts[name].append(torch.zeros(0, dtype=torch.uint8 if eight else torch.float32))
                if eight:
                    parts[f"{name}_absmax"].append(torch.zeros(0))
        for run in self._paged[key]:
            for name, array in self._views(self._pages[run.page - 1].host(), run, kinds):
                parts[name].append(array.values.clone())
                if array.absmax is not None:
                    parts[f"{name}_absmax"].append(array.absmax.clone())
        shape = to_local(key.detach()).shape
        whole = {name: torch.cat(pieces) for name, pieces in parts.items()}
        return {name: values if name.endswith("_absmax") else values.view(shape) for name, values in whole.items()}

    def _store(self, key: Tensor, name: str, values: tuple[Tensor, Tensor | None] | None) -> None:
        if values is None:
            return
        kinds = self.rule.states
        flat, scales = to_local(values[0]).reshape(-1), values[1]
        for run in self._paged_runs(key, kinds):
            with self._pages[run.page - 1].acquired("write") as memory:
                array = dict(self._views(memory, run, kinds))[name]
                array.values.copy_(flat[run.start : run.stop])
                if array.absmax is not None and scales is not None:
                    array.absmax.copy_(scales[run.start // BLOCK_SIZE : -(-run.stop // BLOCK_SIZE)])

    def __getstate__(self) -> dict[str, Any]:
        """Refused: a copy would share the pages."""
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled: save its state_dict() instead")
