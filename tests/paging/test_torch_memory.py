"""What torch calls for a device's memory, as far as it goes without a device."""

from __future__ import annotations

import ctypes

import pytest
import torch

from qlora_rs import _core, torch_memory
from qlora_rs.errors import UnsupportedError
from qlora_rs.paging import PagedPool


def test_functions_for_torch_are_exported_and_say_no_without_such_a_device() -> None:
    library = ctypes.CDLL(_core.__file__)
    library.qlora_rs_alloc.restype = ctypes.c_void_p
    library.qlora_rs_alloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
    library.qlora_rs_free.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
    for size, device in ((512, 99), (-1, 99), (0, -1), (1 << 62, 99)):
        assert library.qlora_rs_alloc(size, device, None) is None
    library.qlora_rs_free(None, 512, 99, None)


def test_pool_on_the_cpu_shares_without_doing_anything() -> None:
    pool = PagedPool("64KiB", page_size="4KiB")
    with pool.sharing_with_torch(), pool.sharing_with_torch():
        assert torch.ones(9).sum() == 9
    pool.reclaim()


def test_torch_whose_threads_decide_who_frees_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_MemPoolContext", object, raising=False)
    with pytest.raises(UnsupportedError, match=r"needs torch 2\.8 or newer, this is"), torch_memory.shared(0):
        pass
