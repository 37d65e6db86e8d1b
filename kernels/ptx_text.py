"""Texts that the build reads or changes: kernel sources, PTX, ptxas' reports, the manifest. No program runs here."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Newer PTX asks for a newer driver; 8.0 is taken by every driver from 525 (CUDA 12.0) on.
PTX_VERSION = "8.0"
ARCHES = ("compute_75", "compute_80", "compute_86", "compute_89", "compute_90", "compute_90a")

FIGURES = ("registers", "spill_store_bytes", "spill_load_bytes", "stack_bytes", "shared_bytes", "constant_bytes")
# {kernel: {figure: value}}
Report = dict[str, dict[str, int]]


class KernelError(Exception):
    """A kernel file that cannot be built: which, why, and the way out."""


def arches_of(name: str, source: str) -> list[str]:
    """Architectures that the first line of a .cu file names: ``// arch: compute_80 compute_90``."""
    first = source.partition("\n")[0]
    marker = re.fullmatch(r"// arch:((?: compute_\w+)+)\s*", first)
    if marker is None:
        raise KernelError(f"{name}: line 1 is {first!r}; it has to name architectures: '// arch: compute_80'")
    arches = marker[1].split()
    unknown = sorted(set(arches) - set(ARCHES))
    if unknown or len(set(arches)) < len(arches):
        wrong = f"unknown {', '.join(unknown)}" if unknown else "one is named twice"
        raise KernelError(f"{name}: line 1: {wrong}; hint: choose from {' '.join(ARCHES)}")
    return arches


def ptx_stems(name: str, arches: list[str]) -> dict[str, str]:
    """Stem of the PTX file for each architecture: the source's, with the architecture where there are several."""
    stem = name.removesuffix(".cu")
    return {arch: stem if len(arches) == 1 else f"{stem}_{arch.replace('compute_', 'sm')}" for arch in arches}


def with_includes(source: Path, include: Path) -> list[Path]:
    """A source and every file of this repository that it includes, directly or not; sorted by name."""
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            names = re.findall(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
            candidates = (folder / name for name in names for folder in (path.parent, include))
            waiting += [candidate for candidate in candidates if candidate.is_file()]
    return sorted(found, key=lambda path: path.name)


def sources_sha256(paths: Iterable[Path]) -> str:
    """One hash for files and their names."""
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def canonical_ptx(text: str, source: str, private: Iterable[str]) -> str:
    """PTX that is the same on every machine, for every driver that takes its instructions.

    nvcc's banner goes; the version becomes :data:`PTX_VERSION` (that it is enough is for ptxas to prove); the hash of
    the source's absolute path, which names of internal linkage carry, becomes zeros of the same length.

    Raises:
        KernelError: ``private`` text (a path of this machine) is left, as such or in a string constant.
    """
    banner, version, body = text.partition("\n.version ")
    if not version or re.search(r"^\s*[^/\s]", banner, re.MULTILINE):
        raise KernelError(f"{source}: nvcc's output does not begin with comments and .version: {text[:200]!r}")
    body = re.sub(r"(_INTERNAL_|_GLOBAL__N__)[0-9a-f]{8}(?=_)", r"\g<1>00000000", body.partition("\n")[2])
    for secret in private:
        # nvcc writes strings as decimal bytes.
        if secret in body or ", ".join(str(byte) for byte in secret.encode()) in body:
            raise KernelError(f"{source}: its PTX holds {secret!r}; hint: does it use __FILE__ or assert in a header?")
    head = f"// Written by kernels/build.py from kernels/{source}: change that, then `make generate`.\n\n"
    lines = (line.rstrip() for line in body.splitlines())
    return head + f".version {PTX_VERSION}\n" + "\n".join(lines).rstrip() + "\n"


def entries(ptx: str) -> list[str]:
    """Kernels that a PTX text defines and lets be found by name."""
    return re.findall(r"^\.visible \.entry (\w+)", ptx, re.MULTILINE)


def parse_report(log: str) -> Report:
    """Figures of each kernel in what `ptxas -v` prints; the spills of a function that it calls count as its own."""
    report: Report = {}
    figures: dict[str, int] = {}
    kernel = function = ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = function = match[1]
            figures = report[kernel] = dict.fromkeys(FIGURES, 0)
        elif match := re.search(r"Function properties for (\w+)", line):
            function = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, match.groups())
            figures["spill_store_bytes"] += stores
            figures["spill_load_bytes"] += loads
            if function == kernel:
                figures["stack_bytes"] = stack
        elif match := re.search(r"Used (\d+) registers", line):
            figures["registers"] = int(match[1])
            figures["shared_bytes"] = sum(map(int, re.findall(r"(\d+) bytes smem", line)))
            figures["constant_bytes"] = sum(map(int, re.findall(r"(\d+) bytes cmem\[", line)))
    return report


def complaints(log: str) -> list[str]:
    """Lines of a ptxas log that ask for attention."""
    return [line for line in log.splitlines() if "warning" in line or "Performance Loss" in line]


def spills(manifest: dict[str, Any]) -> Iterator[tuple[str, str, str, int]]:
    """PTX file, kernel, device and bytes (stored and loaded) of everything in a manifest that spills."""
    for stem, ptx in sorted(manifest.get("ptx", {}).items()):
        for kernel, by_sm in ptx["kernels"].items():
            for sm, figures in sorted(by_sm.items(), key=lambda item: int(re.sub(r"\D", "", item[0]))):
                if spilled := figures["spill_store_bytes"] + figures["spill_load_bytes"]:
                    yield f"{stem}.ptx", kernel, sm, spilled


def spill_table(manifest: dict[str, Any]) -> list[str]:
    """One line for each kernel that spills: bytes on each device."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, kernel, sm, spilled in spills(manifest):
        rows.setdefault((name, kernel), []).append(f"{sm} {spilled}")
    return [f"warning: {name}: {kernel} spills (bytes): {', '.join(on)}" for (name, kernel), on in rows.items()]


def new_spills(committed: dict[str, Any], fresh: dict[str, Any]) -> list[str]:
    """One line for each kernel and device that spills more than the committed manifest says."""
    allowed = {(name, kernel, sm): spilled for name, kernel, sm, spilled in spills(committed)}
    found = []
    for name, kernel, sm, spilled in spills(fresh):
        before = allowed.get((name, kernel, sm), 0)
        if spilled > before:
            found.append(f"{name}: kernel {kernel} spills {spilled} bytes on {sm}; the manifest allows {before}")
    return found


def manifest_text(manifest: dict[str, Any]) -> str:
    """JSON with sorted keys and one line for each kernel on each device."""
    text = json.dumps(manifest, indent=2, sort_keys=True)
    return re.sub(r"\{([^{}]+)\}", lambda match: "{" + " ".join(match[1].split()) + "}", text) + "\n"


def differences(committed: dict[str, str], fresh: dict[str, str], *, lines: int = 12) -> list[str]:
    """A short unified diff for each file that is stale, missing, or no longer made."""
    found = []
    for name in sorted(committed.keys() | fresh.keys()):
        old, new = committed.get(name, ""), fresh.get(name, "")
        if old != new:
            was, now = f"kernels/{name} (committed)", f"kernels/{name} (fresh)"
            diff = list(difflib.unified_diff(old.splitlines(), new.splitlines(), was, now, lineterm="", n=1))
            more = [f"... and {len(diff) - lines} lines more"] if len(diff) > lines else []
            found.append("\n".join(diff[:lines] + more))
    return found
