"""The rules of docs/architecture.md that a program can check."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "qlora_rs"
RUST = ROOT / "rust"

TOP_LEVEL = {
    *("rust", "python", "kernels", "tests", "docs", "benchmarks", "examples", ".ci"),
    *("Cargo.toml", "Cargo.lock", "rustfmt.toml", "pyproject.toml", "Makefile", ".gitignore"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"),
}

# A module may import from its own row and from rows above it, at any depth of its code.
LAYERS = (
    {"_core", "errors"},
    {"reference", "spec"},
    {"_addresses", "devices", "packed", "report"},
    {"_bridge", "torch_memory"},
    {"ops"},
    {"recomputation"},
    {"direct", "pool", "quantization"},
    {"optim", "transformed_product"},
    {"operator_product"},
    {"paged_product"},
    {"linear"},
    {"experts", "selection"},
    {"checkpoint"},
    {"chunked_loss", "lora"},
    {"adapters", "adapter_merge"},
    {"paging"},
    {"merge"},
    {"model_building"},
    {"integrations", "model", "model_quantization"},
    {"_exports"},
    {"eval"},
    {"pictures"},
    {"train"},
    {"cli"},
)

CRATE_MAY_USE = {
    "qlora-core": set(),
    "qlora-checkpoint": {"qlora-core"},
    "qlora-cuda": {"qlora-core", "qlora-paging"},
    "qlora-paging": set(),
    "qlora-py": {"qlora-core", "qlora-checkpoint", "qlora-cuda", "qlora-paging"},
}


def listed_files() -> list[Path]:
    """Files that are or would be committed, relative to the root."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(git, capture_output=True, check=False)
    if run.returncode != 0:
        pytest.skip(f"not a git checkout: {run.stderr.decode().strip()}")
    names = [name for name in run.stdout.decode().split("\0") if name]
    return [Path(name) for name in sorted(set(names)) if (ROOT / name).is_file()]


def python_modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imported_modules(path: Path) -> Iterator[tuple[str, int]]:
    """Full names of modules that a file imports anywhere, and the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def layer_of(part: str) -> int:
    for number, names in enumerate(LAYERS):
        if part in names:
            return number
    raise AssertionError(f"qlora_rs.{part} has no row in LAYERS: give it one")


def cargo_manifest(crate: str) -> dict[str, dict[str, object]]:
    return tomllib.loads((RUST / crate / "Cargo.toml").read_text(encoding="utf-8"))


def crates() -> list[str]:
    """Of the workspace; rust/fuzz is no part of it, so that no other build needs libFuzzer."""
    return sorted(path.parent.name for path in RUST.glob("*/Cargo.toml") if path.parent.name != "fuzz")


def code_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a Rust file without their comments (string literals stay)."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        yield number, line.split("//")[0]


def test_top_level_holds_only_what_the_tree_names() -> None:
    assert {path.parts[0] for path in listed_files()} <= TOP_LEVEL


def test_no_source_file_is_longer_than_its_limit() -> None:
    limits = {".py": 600, ".rs": 600, ".cu": 600, ".cuh": 600, ".pyi": 600}
    long = []
    for path in listed_files():
        limit = limits.get(path.suffix)
        if limit is None:
            continue
        if "tests" in path.parts:
            limit = 800
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        if lines > limit:
            long.append(f"{path}: {lines} lines, limit {limit}")
    assert not long


def test_no_module_is_named_utils_misc_or_common() -> None:
    vague = re.compile(r"^(utils?|misc|common|helpers?)$")
    assert not [path for path in listed_files() if any(vague.match(part) for part in (*path.parent.parts, path.stem))]


def test_python_modules_import_only_in_the_direction_of_the_data() -> None:
    wrong = []
    for name, path in python_modules():
        if not name:
            continue  # qlora_rs/__init__.py collects the public names
        own = layer_of(name.split(".")[0])
        for imported, line in imported_modules(path):
            parts = imported.split(".")
            if parts[0] != "qlora_rs" or len(parts) == 1:
                continue
            if not any(parts[1] in names for names in LAYERS) and not (PACKAGE / f"{parts[1]}.py").exists():
                wrong.append(f"{path.name}:{line}: imports {parts[1]!r} from the package, not from its own module")
            elif layer_of(parts[1]) > own:
                wrong.append(f"qlora_rs.{name}, line {line}: imports qlora_rs.{parts[1]}, which builds on it")
    assert not wrong


def test_reference_imports_torch_alone() -> None:
    allowed = {"torch", "__future__", *sys.stdlib_module_names}
    found = {name.split(".")[0] for name, _ in imported_modules(PACKAGE / "reference.py")}
    assert found <= allowed


def test_raw_pointers_and_streams_appear_only_in_the_bridges() -> None:
    wrong = []
    for _, path in python_modules():
        if path.name in ("_addresses.py", "_bridge.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in {
                "data_ptr",
                "cuda_stream",
                "_cuda_getCurrentRawStream",
            }:
                wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.attr}")
    assert not wrong


def test_optional_packages_are_imported_inside_functions_or_by_their_own_integration() -> None:
    optional = {"transformers", "peft", "matplotlib", "accelerate", "datasets", "gguf"}
    wrong = []
    for name, path in python_modules():
        if name.startswith("integrations."):
            continue
        # A guard on TYPE_CHECKING, or a function, keeps the name out of what runs at import.
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            wrong += [f"qlora_rs.{name}: {found}" for found in names if found.split(".")[0] in optional]
    assert not wrong


def test_crates_depend_on_each_other_only_along_the_arrows() -> None:
    assert {f"qlora-{crate}" for crate in crates()} == set(CRATE_MAY_USE)
    for crate in crates():
        manifest = cargo_manifest(crate)
        used = {name for name in manifest["dependencies"] if name.startswith("qlora-")}
        assert used <= CRATE_MAY_USE[f"qlora-{crate}"], crate


def test_core_depends_on_four_small_crates_and_nothing_more() -> None:
    assert set(cargo_manifest("core")["dependencies"]) <= {"half", "bytemuck", "rayon", "thiserror"}


def test_paging_knows_no_device_and_no_framework() -> None:
    assert set(cargo_manifest("paging")["dependencies"]) <= {"rustix", "thiserror"}


@pytest.mark.parametrize(("dependency", "home"), [("pyo3", "py"), ("cudarc", "cuda")])
def test_pyo3_and_cudarc_stay_in_their_crates(dependency: str, home: str) -> None:
    for crate in crates():
        if crate == home:
            continue
        manifest = cargo_manifest(crate)
        for table in ("dependencies", "dev-dependencies", "build-dependencies"):
            assert dependency not in manifest.get(table, {}), f"{crate}: {table}"
        for path in (RUST / crate).rglob("*.rs"):
            assert not [n for n, line in code_lines(path) if f"{dependency}::" in line], path


@pytest.mark.parametrize(("crate", "home"), [("core", "simd"), ("paging", "host.rs")])
def test_core_and_paging_are_unsafe_in_one_place_only(crate: str, home: str) -> None:
    word = re.compile(r"\bunsafe\b")
    source = RUST / crate / "src"
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted(source.rglob("*.rs"))
        if path.relative_to(source).parts[0] != home
        for number, line in code_lines(path)
        if word.search(line)
    ]
    assert not wrong


def test_every_crate_takes_the_workspace_lints_and_is_never_published() -> None:
    workspace = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))["workspace"]
    assert workspace["lints"]["clippy"]["undocumented_unsafe_blocks"] == "deny"
    assert workspace["package"]["publish"] is False
    for crate in crates():
        manifest = cargo_manifest(crate)
        assert manifest["lints"] == {"workspace": True}, crate
        assert manifest["package"]["publish"] == {"workspace": True}, crate


def test_import_is_silent_offline_and_loads_no_optional_package() -> None:
    program = """
import socket, sys
import torch
before = set(sys.modules)
def refuse(*args, **kwargs):
    raise AssertionError("import opened a socket")
socket.socket.connect = refuse
from qlora_rs import *  # all that is loaded on demand
heavy = {"transformers", "peft", "accelerate", "matplotlib", "typer", "rich", "datasets", "bitsandbytes"}
loaded = {name.split(".")[0] for name in set(sys.modules) - before} & heavy
assert not loaded, loaded
assert not torch.cuda.is_initialized()
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert run.stderr == ""


def test_extension_links_only_to_the_system_libraries() -> None:
    from qlora_rs import _core

    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed (apt-get install binutils)")
    run = subprocess.run(["readelf", "-d", str(_core.__file__)], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"NEEDED.*\[(.+?)\.so", run.stdout))
    assert needed <= {"libc", "libm", "libpthread", "libdl", "librt", "libgcc_s", "ld-linux-x86-64"}
