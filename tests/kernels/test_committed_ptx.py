"""The committed PTX and its manifest: of today's sources, complete, for every driver. Needs no CUDA toolkit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import build
import ptx_text
import pytest
import torch

from qlora_rs import reference

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
SOURCES = sorted(KERNELS.glob("*.cu"))
PTX = {path.stem: path for path in sorted(KERNELS.glob("ptx/*.ptx"))}


def manifest() -> dict[str, dict]:
    path = KERNELS / "ptx" / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8"))["ptx"] if path.is_file() else {}


def test_every_source_has_its_ptx_and_every_ptx_its_source() -> None:
    expected = {}
    for source in SOURCES:
        arches = ptx_text.arches_of(source.name, source.read_text(encoding="utf-8"))
        expected |= {stem: (source.name, arch) for arch, stem in ptx_text.ptx_stems(source.name, arches).items()}
    assert {stem: (entry["source"], entry["arch"]) for stem, entry in manifest().items()} == expected
    assert PTX.keys() == expected.keys()


def test_ptx_is_of_the_sources_and_headers_as_they_are() -> None:
    stale = [
        f"{stem}.ptx; hint: python kernels/build.py {Path(entry['source']).stem}"
        for stem, entry in manifest().items()
        if entry["source_sha256"]
        != ptx_text.sources_sha256(ptx_text.with_includes(KERNELS / entry["source"], KERNELS / "include"))
    ]
    assert not stale


@pytest.mark.parametrize("stem", sorted(manifest()))
def test_manifest_and_ptx_name_the_same_kernels(stem: str) -> None:
    entry = manifest()[stem]
    assert sorted(ptx_text.entries(PTX[stem].read_text(encoding="utf-8"))) == sorted(entry["kernels"])
    for kernel, by_sm in entry["kernels"].items():
        assert sorted(by_sm) == sorted(build.sms_for(entry["arch"], build.SMS)), kernel
        assert all(figures["registers"] > 0 for figures in by_sm.values()), kernel


@pytest.mark.parametrize("stem", sorted(PTX))
def test_ptx_asks_for_no_new_driver_and_names_no_folder(stem: str) -> None:
    text = PTX[stem].read_text(encoding="utf-8")
    versions = re.findall(r"^\.version (\d+)\.(\d+)$", text, re.MULTILINE)
    assert [(int(major), int(minor)) <= (8, 0) for major, minor in versions] == [True]
    arch = manifest()[stem]["arch"].replace("compute_", "sm_")
    assert re.findall(r"^\.target (\S+)$", text, re.MULTILINE) == [arch]
    assert not re.search(r"/(home|root|tmp|usr|opt|var)/", text)


def test_constants_header_has_the_references_bits() -> None:
    text = (KERNELS / "include" / "constants.cuh").read_text(encoding="utf-8")
    values = [float.fromhex(literal) for literal in re.findall(r"(-?0x[0-9a-f.]+p-?\d+)f\b", text)]
    assert torch.equal(torch.tensor(values), reference.dynamic_map())
    assert f"NESTED_BLOCK_SIZE = {reference.NESTED_BLOCK_SIZE};" in text
