"""``qlora-rs doctor``: what this machine and installation are, and whether the kernels compute what they should."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_rs.cli import SYSTEM, output

REQUIRED = ("torch", "numpy", "safetensors", "typer", "rich")
# Optional packages, and what each is for here.
OPTIONAL = {
    "transformers": "loading models and training need it: pip install 'qlora-rs[transformers]'",
    "matplotlib": "the picture of the loss needs it: pip install 'qlora-rs[train]'",
    "peft": "not needed: its adapter files are read and written without it",
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON document.")] = False,
) -> None:
    """Show versions and machine, and check the kernels.

    The self-check compares the kernels with the reference bit for bit; exit code 3 where they differ. Put the output
    into a report of a fault.

    Example:

        qlora-rs doctor
    """
    findings = examine()
    if as_json:
        output.print_json(findings)
    else:
        _print_findings(findings)
    if not findings["self_check"]["ok"]:
        output.message("the self-check failed: results on this machine cannot be trusted; please report it")
        raise typer.Exit(SYSTEM)


def examine() -> dict[str, Any]:
    """Everything that `doctor` shows, as plain JSON values."""
    import torch

    from qlora_rs import _core

    checks = self_check()
    return {
        "qlora_rs": _core.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})",
        "packages": {name: _version_of(name) for name in (*REQUIRED, *OPTIONAL)},
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory_available_bytes": _available_memory(),
        "simd_level": _core.simd_level(),
        "QLORA_RS_SIMD": os.environ.get("QLORA_RS_SIMD"),
        "torch_threads": torch.get_num_threads(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "cuda": _core.driver_probe(),
        "self_check": {"ok": all(result == "ok" for result in checks.values()), "checks": checks},
    }


def self_check() -> dict[str, str]:
    """Per data type ``"ok"``, or what differs between the kernels and the reference on a small weight."""
    import torch

    from qlora_rs.spec import QUANT_TYPES, QuantSpec

    generator = torch.Generator().manual_seed(0)
    # Rows end in a short block and in half a byte; there is more than one group of 256 scales.
    weight = torch.randn(67, 259, generator=generator).to(torch.bfloat16)
    results = {}
    for quant_type in QUANT_TYPES:
        if quant_type == "codebook":
            continue
        try:
            differing = _differences(weight, QuantSpec(quant_type))
        except Exception as error:  # a broken installation may fail in any way; all of it belongs in the report
            results[quant_type] = f"FAILED: {type(error).__name__}: {error}"
        else:
            results[quant_type] = f"FAILED: {', '.join(differing)} differ" if differing else "ok"
    return results


def _differences(weight: Any, spec: Any) -> list[str]:
    import torch

    from qlora_rs import reference
    from qlora_rs.quantization import dequantize, quantize

    packed = quantize(weight, spec)
    codes, absmax = reference.quantize_blocks(weight, spec.block_size, spec.quant_type)
    codes8, scale, offset = reference.double_quantize(absmax)
    nested = reference.nested_absmax(codes8, scale, offset)
    zero = reference.zero_code(reference.codebook_of(spec.quant_type))
    pairs = {
        "codes": (packed.codes, reference.pack(codes, zero) if spec.bits == 4 else codes.to(torch.uint8)),
        "absmax": (packed.absmax, codes8),
        "absmax_scale": (packed.absmax_scale, scale),
        "absmax_offset": (packed.absmax_offset, offset),
        "dequantized values": (
            dequantize(packed, torch.float32),
            reference.dequantize_blocks(codes, nested, spec.block_size, torch.float32, spec.quant_type),
        ),
    }
    return [name for name, (ours, theirs) in pairs.items() if ours is None or not torch.equal(ours, theirs)]


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _available_memory() -> int | None:
    """What the system could give now; a container's own limit may be lower."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def _print_findings(findings: dict[str, Any]) -> None:
    from qlora_rs.report import format_bytes

    def say(label: str, value: object) -> None:
        output.print_result(f"{label:<14}{value}")

    say("qlora-rs", findings["qlora_rs"])
    say("Python", findings["python"])
    for name, found in findings["packages"].items():
        say(name, found or f"not installed ({OPTIONAL.get(name, f'pip install {name}')})")
    say("platform", findings["platform"])
    available = findings["memory_available_bytes"]
    free = "" if available is None else f", {format_bytes(available)} available"
    say("cores", f"{findings['cores']} usable; torch computes with {findings['torch_threads']} threads")
    hint = "set it before torch is imported in programs of yours too, or they compute slower on a CPU"
    say("idle threads", f"OMP_WAIT_POLICY={findings['OMP_WAIT_POLICY']} ({hint})")
    say("memory", f"{format_bytes(findings['memory_bytes'])}{free}")
    asked = findings["QLORA_RS_SIMD"]
    say("instructions", findings["simd_level"] + (f" (QLORA_RS_SIMD={asked})" if asked else ""))
    cuda = findings["cuda"]
    if cuda["driver_version"] is not None:
        say("CUDA driver", cuda["driver_version"])
    for device in cuda["devices"]:
        capability = device["compute_capability"]
        shown = capability if isinstance(capability, str) else ".".join(map(str, capability))
        memory = format_bytes(device["memory_bytes"])
        say("CUDA device", f"{device['name']}, compute capability {shown}, {memory}: {_kernels(tuple(capability))}")
    if cuda["reason"]:
        say("CUDA", f"not usable: {cuda['reason']}")
    for name, result in findings["self_check"]["checks"].items():
        say("self-check", f"{name}: {result}")


def _kernels(capability: tuple[int, int]) -> str:
    from qlora_rs.devices import LEAST_CAPABILITY

    least = ".".join(map(str, LEAST_CAPABILITY))
    return "usable" if capability >= LEAST_CAPABILITY else f"too old for the kernels ({least})"
