"""A model's packed weights in a pool, block by block; the model stays what it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qlora_rs.linear import Linear4bit
from qlora_rs.paged_product import PagedBlock
from qlora_rs.pool import PagedPool

Progress = Callable[[int, int], object]
Load = Callable[[Mapping[str, Linear4bit]], object]


class PagedWeights:
    """The packed layers of a model that live in a pool.

    Args:
        pool: where they go.

    Attributes:
        pool: where they are.
        blocks: bytes of each block, by its name.
    """

    def __init__(self, pool: PagedPool) -> None:
        self.pool = pool
        self.blocks: dict[str, int] = {}
        self._layers: list[Linear4bit] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(self.blocks.values())

    def add(self, name: str, layers: Mapping[str, Linear4bit]) -> None:
        """Page a block of layers: what their parameters held before is freed, unless others hold it too.

        Args:
            name: what messages call the block.
            layers: by name, in the order of their use.

        Raises:
            PageError: the block has more pages than the pool's budget.
            ValueError: a layer is paged already, or has no values (meta device).
            DeviceError: the host has no memory for it.
        """
        for layer_name, layer in layers.items():
            if layer.paged is not None:
                raise ValueError(f"{layer_name} is paged already: unpage it first")
            if layer.weight.is_meta:
                raise ValueError(f"{layer_name} is on the meta device and has no values: load the model first")
        members = list(layers.values())
        block = PagedBlock(self.pool, name, [layer.parts() for layer in members])
        for number, layer in enumerate(members):
            layer.page(layer.paged_in(block, number))
        self._layers += members
        self.blocks[name] = block.buffer.nbytes

    def prefetch(self) -> None:
        """Begin to fetch the first blocks, as many as there is room for."""
        self.pool.prefetch(dict.fromkeys(layer.paged.buffer for layer in self._layers if layer.paged is not None))

    def unpage(self, device: torch.device | str | None = None) -> None:
        """Make the layers ordinary ones again, one by one, and give the pool's memory up.

        Args:
            device: where their parameters go; the CPU by default.
        """
        while self._layers:
            layer = self._layers.pop()
            layer.page(None, torch.device("cpu" if device is None else device))
        self.blocks.clear()

    def __repr__(self) -> str:
        """How many blocks and bytes."""
        return f"PagedWeights({len(self.blocks)} blocks, {self.nbytes} bytes, {self.pool!r})"


def page_weights(
    model: nn.Module, pool: PagedPool, *, load: Load | None = None, progress: Progress | None = None
) -> PagedWeights:
    """Move the packed weights of a model into a pool, which brings each block to its device while it is used.

    A block is what a model repeats (``model.layers.7``, an expert): the nearest member of a ``ModuleList`` that a
    `qlora_rs.Linear4bit` is in. Outside of all lists, as a packed output head, each is a block of its own. Everything
    else of the model stays where it is: move it to the pool's device with ``model.to``, which leaves packed weights.

    The former tensors are freed block by block, so the host needs room for one block beside the model.

    Args:
        model: any module with packed layers; adapters, PEFT's too, may be on them.
        pool: where they go; the largest block must fit into its budget, two blocks should.
        load: called with the layers of a block, by name, before it goes; may give values to those of a model on the
            meta device, so that no more than one block is ever outside of the pool.
        progress: called with (bytes done, bytes in all).

    Raises:
        ValueError: the model has no packed layers, or some are paged already.
        PageError: a block has more pages than the pool's budget; the blocks before it are paged.

    >>> import torch, qlora_rs
    >>> from torch import nn
    >>> model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    >>> report = qlora_rs.quantize_model(model)
    >>> expected = model(torch.ones(1, 64))
    >>> pool = qlora_rs.paging.PagedPool("16KiB", page_size=4096)  # four of the eight layers
    >>> weights = page_weights(model, pool)
    >>> torch.equal(model(torch.ones(1, 64)), expected)
    True
    >>> len(weights.blocks), pool.stats().resident_bytes <= 16384
    (8, True)
    """
    blocks = packed_blocks(model)
    if not blocks:
        raise ValueError("the model has no packed layers to page: quantize_model or from_pretrained makes them")
    total = sum(block_bytes(layers) for layers in blocks.values())
    weights, done = PagedWeights(pool), 0
    for name, layers in blocks.items():
        size = block_bytes(layers)
        if load is not None:
            load(layers)
        weights.add(name, layers)
        done += size
        if progress is not None:
            progress(done, total)
    return weights


def packed_blocks(model: nn.Module) -> dict[str, dict[str, Linear4bit]]:
    """The packed layers of each block, both by their names, in the model's order."""
    modules: dict[str, Any] = dict(model.named_modules())
    blocks: dict[str, dict[str, Linear4bit]] = {}
    for name, module in modules.items():
        if isinstance(module, Linear4bit):
            blocks.setdefault(_block_of(name, modules), {})[name] = module
    return blocks


def block_bytes(layers: Mapping[str, Linear4bit]) -> int:
    """Bytes of all codes and scales."""
    return sum(part.nbytes for layer in layers.values() for part in layer.parts() if part is not None)


def _block_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        parent = modules.get(".".join(parts[: end - 1]))
        if isinstance(parent, nn.ModuleList):
            return ".".join(parts[:end])
    return name
