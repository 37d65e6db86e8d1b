"""Where to compute: what people call devices, and those that there are."""

from __future__ import annotations

import torch

from qlora_rs import _core
from qlora_rs.errors import DeviceError, UnsupportedError, first_line

# Of a CUDA device that has kernels here.
LEAST_CAPABILITY = (7, 5)


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device that ``device`` stands for, a CUDA one with its index; ``"auto"`` is torch's current one where it has
    kernels here, else the CPU.

    Raises:
        ValueError: torch knows no such device.
        UnsupportedError: nothing here computes there.
        DeviceError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if _has_usable_cuda_device() else "cpu"
    try:
        asked = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r}: {first_line(error)}; it is auto, cpu, cuda or cuda:N") from None
    if asked.type == "cpu":
        return asked
    if asked.type != "cuda":
        raise UnsupportedError(f"no kernels for {device}: this version computes on cpu and cuda")
    count = torch.cuda.device_count()
    if count == 0:
        reason = _core.driver_probe()["reason"] or f"torch {torch.__version__} finds none"
        raise DeviceError(f"there is no CUDA device: {reason}")
    index = torch.cuda.current_device() if asked.index is None else asked.index
    if index >= count:
        raise DeviceError(f"there is no CUDA device {index}: torch sees {count}")
    return torch.device("cuda", index)


def _has_usable_cuda_device() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= LEAST_CAPABILITY
