"""Addresses, dtype codes and streams of tensors, as the extension takes them: for the bridges alone."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def memory_of(tensor: Tensor) -> tuple[int, int]:
    """(address, number of elements) of a contiguous tensor.

    Raises:
        ValueError: it is strided, or has no memory.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"expected contiguous memory, got strides {tensor.stride()}")
    address, elements = tensor.data_ptr(), tensor.numel()
    if address == 0 and elements > 0:
        raise ValueError(f"a tensor of shape {list(tensor.shape)} has no memory: it was freed, or is sharded elsewhere")
    return address, elements


def queue_of(device: torch.device) -> tuple[int, int]:
    """(device index, handle of torch's current stream there)."""
    index: int = device.index
    # torch.cuda.current_stream() makes an object, which takes longer than a launch.
    return index, torch._C._cuda_getCurrentRawStream(index)
