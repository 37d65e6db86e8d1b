"""Optimizers whose state is small: float32 or 8-bit blocks, resident or paged; drop-in for those of ``torch.optim``.

A step updates all parameters of a device in one call. Weight decay is decoupled and comes before the update (SGD's is
torch's); `max_grad_norm` clips by the global norm and leaves ``.grad`` as it is. Parameters are on the CPU or on CUDA
devices, where a step only queues work; with ``capturable=True`` it counts its steps on the device and takes the
learning rate from there if it is a tensor there, so that it can be captured into a CUDA graph and replayed.

>>> import torch
>>> from qlora_rs.optim import AdamW8bit
>>> layer = torch.nn.Linear(100, 100)
>>> optimizer = AdamW8bit(layer.parameters(), lr=1e-3, max_grad_norm=1.0)
>>> layer(torch.ones(3, 100)).sum().backward()
>>> optimizer.step()
>>> optimizer.state[layer.weight]["exp_avg"].dtype
torch.uint8
"""

from __future__ import annotations

from qlora_rs.optim.classes import (
    SGD,
    AdamW,
    AdamW8bit,
    AdEMAMix,
    AdEMAMix8bit,
    Lion,
    Lion8bit,
    PagedAdamW8bit,
    PagedAdamW32bit,
    PagedAdEMAMix8bit,
    PagedAdEMAMix32bit,
    PagedLion8bit,
    PagedLion32bit,
    SGD8bit,
)

__all__ = [
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdamW",
    "AdamW8bit",
    "Lion",
    "Lion8bit",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedLion8bit",
    "PagedLion32bit",
    "SGD8bit",
]
