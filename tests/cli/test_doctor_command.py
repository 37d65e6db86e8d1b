"""``qlora-rs doctor``: it shows the machine, and a fault in the kernels is not passed over."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import torch

import qlora_rs
from qlora_rs import _core
from qlora_rs.spec import QUANT_TYPES


def test_a_sound_installation_is_exit_code_0(command):
    outcome = command("doctor")
    assert (outcome.code, outcome.err) == (0, "")
    for part in (qlora_rs.__version__, version("torch"), _core.simd_level(), "nf4: ok", "int8: ok", "platform"):
        assert part in outcome.out


def test_json_is_one_document(command, monkeypatch):
    monkeypatch.setenv("QLORA_RS_SIMD", "scalar")
    found = json.loads(command("doctor", "--json").out)
    assert found["qlora_rs"] == qlora_rs.__version__
    assert found["QLORA_RS_SIMD"] == "scalar"
    assert found["simd_level"] == _core.simd_level()
    assert found["cores"] >= 1
    assert 0 < found["memory_available_bytes"] <= found["memory_bytes"]
    assert found["torch_threads"] == torch.get_num_threads()
    assert found["cuda"] == _core.driver_probe()
    built_in = [quant_type for quant_type in QUANT_TYPES if quant_type != "codebook"]
    assert found["self_check"] == {"ok": True, "checks": dict.fromkeys(built_in, "ok")}


def test_a_package_that_is_absent_is_named(command, monkeypatch):
    from importlib.metadata import PackageNotFoundError, version

    def without_peft(name: str) -> str:
        if name == "peft":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("qlora_rs.cli.doctor.version", without_peft)
    (line,) = [line for line in command("doctor").out.splitlines() if line.startswith("peft")]
    assert "not installed" in line
    assert json.loads(command("doctor", "--json").out)["packages"]["peft"] is None


def test_devices_and_drivers_are_shown(command, monkeypatch):
    device = {"name": "Some GPU", "compute_capability": (9, 0), "memory_bytes": 80 * 10**9, "multiprocessors": 132}
    probe = {"available": True, "reason": None, "driver_version": "13.0", "devices": [device]}
    monkeypatch.setattr(_core, "driver_probe", lambda: probe)
    out = command("doctor").out
    assert "Some GPU, compute capability 9.0, 80.0 GB: usable" in out
    device["compute_capability"] = (7, 0)
    assert "too old for the kernels" in command("doctor").out
    assert "13.0" in out
    probe |= {"available": False, "reason": "no such driver", "driver_version": None, "devices": []}
    assert "not usable: no such driver" in command("doctor").out


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_failed_self_check_is_exit_code_3(command, monkeypatch, fault):
    right = qlora_rs.dequantize

    def wrong(packed, dtype=None):
        if fault == "raises":
            raise RuntimeError("illegal instruction")
        return right(packed, dtype) + (packed.spec.quant_type == "fp4")

    for place in ("qlora_rs.dequantize", "qlora_rs.quantization.dequantize"):
        monkeypatch.setattr(place, wrong)
    outcome = command("doctor")
    assert outcome.code == 3
    if fault == "wrong":
        assert "fp4: FAILED: dequantized values differ" in outcome.out
        assert "nf4: ok" in outcome.out
    else:
        assert "nf4: FAILED: RuntimeError: illegal instruction" in outcome.out
    assert "cannot be trusted" in outcome.err
