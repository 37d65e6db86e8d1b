"""Compile kernels/*.cu to the PTX that is committed in kernels/ptx, or check that it is up to date.

The first line of a .cu file names what it is compiled for: `// arch: compute_80`, or several: `// arch: compute_80
compute_90` (told apart by __CUDA_ARCH__; the files are then NAME_sm80.ptx and NAME_sm90.ptx). Every PTX is lowered to
version 8.0 and assembled for all devices that it is for: by today's ptxas, and by one that ends at that version. What
this tells of each kernel (registers, spills, memory) goes into ptx/manifest.json.

The compilers come from PyPI into .cache/ (some 100 MB, once): --toolkit prints where. gcc has to be on PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ptx_text import (
    PTX_VERSION,
    KernelError,
    Report,
    arches_of,
    canonical_ptx,
    complaints,
    differences,
    entries,
    manifest_text,
    new_spills,
    parse_report,
    ptx_stems,
    sources_sha256,
    spill_table,
    with_includes,
)
from toolkit import NVCC_VERSION, Toolkit, ToolkitError, ensure_toolkit

KERNELS = Path(__file__).resolve().parent
ROOT = KERNELS.parent
CACHE = ROOT / ".cache"
CONSTANTS = "include/constants.cuh"
MANIFEST = "ptx/manifest.json"
FLAGS = ("-ptx", "-O3", "-std=c++17", "-Werror", "all-warnings")
OLD_SMS = ("75", "80", "86", "89", "90")
SMS = ("75", "80", "86", "87", "89", "90", "100", "120")


def sms_for(arch: str, known: tuple[str, ...]) -> list[str]:
    """Devices that run PTX of an architecture: all later ones, but for `compute_90a` only its own."""
    own = arch.removeprefix("compute_")
    return [f"sm_{own}"] if own.endswith("a") else [f"sm_{sm}" for sm in known if int(sm) >= int(own)]


def run(command: list[str | Path], what: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program whose failure is the kernel's; settings of this machine's CUDA do not reach it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("NVCC_")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise KernelError(f"{what}:\n{(done.stdout + done.stderr).strip()}")
    return done


def fresh_constants() -> str:
    """`constants.cuh` as the Rust crate that owns the constants writes it."""
    cargo: list[str | Path] = ["cargo", "run", "--quiet", "--locked", "-p", "qlora-core", "--example", "cuda_constants"]
    return run(cargo, f"kernels/{CONSTANTS}", ROOT).stdout


def compile_ptx(tools: Toolkit, source: str, arch: str, folder: Path) -> str:
    """Canonical PTX of one source for one architecture."""
    out = folder / f"{source}.{arch}.ptx"
    # Relative names, so that __FILE__ is the same everywhere.
    run(
        [tools.nvcc, *FLAGS, f"-arch={arch}", "-I", "include", source, "-o", out],
        f"kernels/{source} for {arch}",
        KERNELS,
    )
    private = {str(path) for path in (ROOT, ROOT.resolve(), Path.home(), Path(tempfile.gettempdir())) if path.name}
    return canonical_ptx(out.read_text(encoding="utf-8"), source, sorted(private))


def assemble(tools: Toolkit, path: Path, sm: str, *, old: bool) -> tuple[Report, list[str]]:
    """Prove that ptxas takes a PTX for a device; returns what it tells of the kernels, and its warnings."""
    what = f"ptxas does not take {path.name} for {sm}"
    if old:
        what = f"{path.name} needs more than PTX {PTX_VERSION}, where driver 525 ends; an old ptxas says, for {sm}"
    target = path.with_suffix(f".{sm}.{'old' if old else 'new'}")
    log = run([tools.old_ptxas if old else tools.ptxas, "-v", f"-arch={sm}", path, "-o", target], what, KERNELS).stderr
    return parse_report(log), complaints(log)


def generate(tools: Toolkit, sources: list[Path], folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Compile and assemble: the PTX of each stem, and what the manifest says of it."""
    texts: dict[str, str] = {}
    described: dict[str, Any] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        planned: dict[str, tuple[Path, str, Future[str]]] = {}
        for path in sources:
            for arch, stem in ptx_stems(path.name, arches_of(path.name, path.read_text(encoding="utf-8"))).items():
                if stem in planned:
                    raise KernelError(f"kernels/{path.name}: another file already makes {stem}.ptx; hint: rename one")
                planned[stem] = (path, arch, pool.submit(compile_ptx, tools, path.name, arch, folder))
        old_jobs, jobs = [], {}
        for stem, (_, arch, compiling) in planned.items():
            texts[stem] = compiling.result()
            ptx = folder / f"{stem}.ptx"
            ptx.write_text(texts[stem], encoding="utf-8")
            old_jobs += [pool.submit(assemble, tools, ptx, sm, old=True) for sm in sms_for(arch, OLD_SMS)]
            jobs[stem] = {sm: pool.submit(assemble, tools, ptx, sm, old=False) for sm in sms_for(arch, SMS)}
        for job in old_jobs:
            job.result()
        for stem, (path, arch, _) in planned.items():
            kernels: dict[str, Report] = {name: {} for name in entries(texts[stem])}
            for sm, assembling in jobs[stem].items():
                report, warnings = assembling.result()
                for kernel, by_sm in kernels.items():
                    by_sm[sm] = report[kernel]
                for warning in warnings:
                    print(f"{stem}.ptx, {sm}: {warning}", file=sys.stderr)
            described[stem] = {
                "arch": arch,
                "kernels": kernels,
                "ptx_version": PTX_VERSION,
                "source": path.name,
                "source_sha256": sources_sha256(with_includes(path, KERNELS / "include")),
            }
    return texts, described


def chosen_sources(names: list[str]) -> list[Path]:
    """The .cu files of these names (with or without .cu), or all."""
    if not names:
        return sorted(KERNELS.glob("*.cu"))
    paths = [KERNELS / f"{Path(name).name.removesuffix('.cu')}.cu" for name in names]
    for path in paths:
        if not path.is_file():
            raise KernelError(f"there is no kernels/{path.name}")
    return sorted(set(paths))


def read_committed() -> dict[str, str]:
    """The generated files as they are in the tree, by their path in kernels/."""
    paths = [KERNELS / CONSTANTS, KERNELS / MANIFEST, *KERNELS.glob("ptx/*.ptx")]
    return {str(path.relative_to(KERNELS)): path.read_text(encoding="utf-8") for path in paths if path.is_file()}


def write(name: str, text: str) -> None:
    """Replace a generated file whole, if it differs."""
    path = KERNELS / name
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
    print(f"wrote kernels/{name}")


def build(tools: Toolkit, names: list[str], *, check: bool) -> int:
    """Remake the generated files, or compare them with what they would be; returns the exit status."""
    start = time.monotonic()
    fresh = {CONSTANTS: fresh_constants()}
    if not check:
        write(CONSTANTS, fresh[CONSTANTS])
    sources = chosen_sources(names)
    with tempfile.TemporaryDirectory(prefix="qlora-kernels.") as folder:
        texts, described = generate(tools, sources, Path(folder))
    # Read late: another build, of other names, may have ended meanwhile.
    committed = read_committed()
    old_manifest = json.loads(committed.get(MANIFEST, "{}"))
    spilling = spill_table({"ptx": described})
    took = f"{len(texts)} PTX files in {time.monotonic() - start:.1f} s"
    if names:  # what other sources made stays; what no source is known to have made is for a full build to judge
        entries_before = old_manifest.get("ptx", {})
        for stem in (Path(name).stem for name in committed if name.endswith(".ptx")):
            if stem not in entries_before:
                texts.setdefault(stem, committed[f"ptx/{stem}.ptx"])
            elif entries_before[stem]["source"] not in {path.name for path in sources}:
                texts[stem], described[stem] = committed[f"ptx/{stem}.ptx"], entries_before[stem]
    manifest = {"compiler": f"nvcc {NVCC_VERSION} {' '.join(FLAGS)}", "ptx": described}
    fresh |= {f"ptx/{stem}.ptx": text for stem, text in texts.items()} | {MANIFEST: manifest_text(manifest)}
    if check:
        wrong = differences(committed, fresh) + new_spills(old_manifest, manifest)
        print("\n".join([*wrong, f"checked {took}"]))
        if wrong:
            print("error: generated files are stale or kernels spill anew: above; hint: make generate", file=sys.stderr)
        return 1 if wrong else 0
    for name, text in fresh.items():
        write(name, text)
    for name in committed.keys() - fresh.keys():
        (KERNELS / name).unlink()
        print(f"deleted kernels/{name}: no source makes it")
    print("\n".join([*spilling, f"made {took}"]))
    return 0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only kernels/NAME.cu (default: all of them)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--toolkit", action="store_true", help="only install the compilers and print where they lie")
    what.add_argument("--check", action="store_true", help="change nothing; fail where a generated file is stale")
    options = parser.parse_args()
    try:
        tools = ensure_toolkit(CACHE)
        if options.toolkit:
            print(f"nvcc       {tools.nvcc}\nptxas      {tools.ptxas}\nold ptxas  {tools.old_ptxas}")
            return 0
        return build(tools, options.names, check=options.check)
    except (ToolkitError, KernelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
