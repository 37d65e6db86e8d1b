"""Put a model on a device within a memory budget, and page what does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from qlora_rs.devices import resolve_device
from qlora_rs.paging.activations import saved_activations
from qlora_rs.paging.plan import Plan, Request, check_optimizer, plan
from qlora_rs.paging.weights import Load, PagedWeights, Progress, block_bytes, packed_blocks, page_weights
from qlora_rs.pool import PagedPool
from qlora_rs.report import parse_bytes

_LARGEST_PAGE = 16 << 20
_LEAST_PAGE = {"cuda": 2 << 20, "cpu": 4096}


@dataclass(frozen=True)
class Fitted:
    """A model within its budget; ``str`` gives the bytes of each part as a table.

    Attributes:
        device: where the model computes.
        plan: what takes how much (`Plan.parts`).
        pool: what does not fit lives there; None where everything fits. Paged optimizers take it as ``pool=``.
        weights: the packed weights in the pool; None as well.
    """

    device: torch.device
    plan: Plan
    pool: PagedPool | None
    weights: PagedWeights | None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Where the forward pass of a step belongs: saved activations go to the pool, where that was planned."""
        saved = any(part.name == "saved activations" and part.place == "pool" for part in self.plan.parts)
        if self.pool is None or not saved:
            yield
            return
        with saved_activations(self.pool):
            yield

    @property
    def stall_seconds(self) -> float:
        """How long computing has waited for copies so far."""
        return 0.0 if self.pool is None else self.pool.stats().stall_seconds

    def __str__(self) -> str:
        """The plan's table."""
        return str(self.plan)


def fit(
    model: nn.Module,
    budget: int | str,
    device: torch.device | str | None = None,
    *,
    tokens: int = 2048,
    optimizer: str = "adamw8bit",
    page_activations: bool | None = None,
    checkpointing: bool | None = None,
    keep_dequantized: bool = False,
    whole_logits: bool = False,
    page_size: int | str | None = None,
    load: Load | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Put a model on a device such that training it takes no more than a budget there.

    What is used all the time stays on the device: embeddings, norms, an output head in floats, adapters with their
    gradients and optimizer state, and room for one layer's work. The rest of the budget is a `PagedPool`, through which
    the packed weights go, and saved activations and optimizer state if asked. Where all of it fits, nothing is paged.
    Paged or not, the bits of losses and gradients are the same.

    Attach adapters and switch gradient checkpointing on before. The model may be on the host or on the device; its
    former tensors are freed as it goes. On the CPU the pool's frames are ordinary memory: nothing is saved, but it
    works alike.

    Args:
        model: with packed layers (`qlora_rs.Linear4bit`).
        budget: bytes of device memory for everything, e.g. ``"24GiB"``.
        device: by default a CUDA device if there is one, else the CPU.
        tokens: that go through the model at once (samples x length).
        optimizer: whose state needs room: ``"adamw"``, ``"adamw8bit"``, ``"lion"``, ``"lion8bit"``, ``"ademamix"``,
            ``"ademamix8bit"``, ``"sgd"`` (with momentum), ``"sgd8bit"``; ``"paged_..."`` has it in the pool (pass
            ``pool=`` to the optimizer).
        page_activations: whether what `Fitted.step` saves goes to the pool; by default where weights are paged and
            layers are checkpointed.
        checkpointing: whether layers are checkpointed; by default the model is asked.
        keep_dequantized: checkpointed layers keep dequantized weights from the recomputation to the backward pass (see
            `qlora_rs.keep_dequantized`).
        whole_logits: the loss holds all logits at once, as transformers' own does, not in chunks as
            `qlora_rs.chunked_loss.causal_lm_loss`.
        page_size: see `PagedPool`; by default an eighth of a block, 16 MiB at most.
        load: gives values to the packed layers of a model on the meta device, see `page_weights`.
        progress: called with (bytes done, bytes in all) of the packed weights.

    Raises:
        ValueError: the budget is too small (the message has the table, and says what would do), or an argument is
            out of its range.
        DeviceError: the host has no memory for what is paged.

    >>> import torch, qlora_rs
    >>> model = torch.nn.ModuleList(torch.nn.Linear(256, 256, bias=False) for _ in range(16))
    >>> report = qlora_rs.quantize_model(model)
    >>> fitted = fit(model, "600kB", "cpu", tokens=1)
    >>> len(fitted.weights.blocks), fitted.pool.budget < 16 * fitted.weights.blocks["0"]
    (16, True)
    """
    where = resolve_device("auto" if device is None else device)
    if tokens < 1:
        raise ValueError(f"tokens is at least 1, got {tokens}")
    check_optimizer(optimizer)
    if checkpointing is None:  # transformers marks the modules
        checkpointing = any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())
    largest = max((block_bytes(layers) for layers in packed_blocks(model).values()), default=0)
    page = _page_size(largest, where) if page_size is None else parse_bytes(page_size)
    request = Request(
        budget=parse_bytes(budget),
        device=where,
        tokens=tokens,
        optimizer=optimizer,
        page_activations=page_activations,
        checkpointing=checkpointing,
        keep_dequantized=keep_dequantized,
        whole_logits=whole_logits,
        page_bytes=page,
    )
    planned = plan(model, request)
    if planned.frames is None:
        if load is not None:
            for layers in packed_blocks(model).values():
                load(layers)
                for layer in layers.values():
                    layer.to(where)
        model.to(where)
        return Fitted(where, planned, None, None)
    pool = PagedPool(planned.frames, where, page_size=page)
    weights = page_weights(model, pool, load=load, progress=progress)
    model.to(where)
    return Fitted(where, planned, pool, weights)


def _page_size(largest: int, device: torch.device) -> int:
    """A power of two of about an eighth of a block: a buffer takes whole pages, and leaves page by page."""
    eighth = max(1, largest // 8)
    return min(_LARGEST_PAGE, max(_LEAST_PAGE.get(device.type, 4096), 1 << (eighth.bit_length() - 1)))
