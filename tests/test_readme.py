"""What README and docs tell people to type works, on a tiny model: the blocks marked `<!-- run: ... -->`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)
MARKED = re.compile(r"^<!-- run: .*? -->\n```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)\)")


def marked_blocks(language: str) -> list[object]:
    blocks = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for match in MARKED.finditer(text):
            line = text[: match.start()].count("\n") + 1
            if match[1] == language:
                blocks.append(pytest.param(match[2], id=f"{page}:{line}"))
    return blocks


def run(command: list[str], folder: Path, **variables: str) -> None:
    binaries = os.path.dirname(sys.executable)
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", **variables}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="session")
def packed_tiny_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import qlora_rs

    folder = tmp_path_factory.mktemp("packed") / "tiny-llama-nf4"
    qlora_rs.checkpoint.quantize(tiny_llama, folder)
    return folder


@pytest.mark.parametrize("block", marked_blocks("bash"))
def test_commands_run_as_printed(
    block: str, tmp_path: Path, tiny_llama: Path, write_chats: Callable[..., Path], brown_text: str
) -> None:
    write_chats()
    (tmp_path / "text.txt").write_text(brown_text[:1500], encoding="utf-8")
    run(["bash", "-euo", "pipefail", "-c", block], tmp_path, MODEL=str(tiny_llama))


@pytest.mark.parametrize("block", marked_blocks("python"))
def test_python_runs_as_printed(block: str, tmp_path: Path, tiny_llama: Path, packed_tiny_llama: Path) -> None:
    names = f"MODEL, PACKED = {str(tiny_llama)!r}, {str(packed_tiny_llama)!r}\n"
    run([sys.executable, "-c", names + block], tmp_path)


def test_reading_recipe_gives_what_the_library_gives(packed_tiny_llama: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    (block,) = [match[2] for match in MARKED.finditer(text)]
    check = """
import qlora_rs
layer = qlora_rs.from_pretrained(PACKED).model.layers[0].self_attn.q_proj
assert torch.equal(weight, layer.dequantize(torch.bfloat16))
"""
    run([sys.executable, "-c", f"PACKED = {str(packed_tiny_llama)!r}\n{block}{check}"], tmp_path)


@pytest.mark.parametrize(
    "page", [*PAGES, "rust/README.md", "kernels/README.md", "examples/README.md", "benchmarks/README.md"]
)
def test_links_lead_to_files_that_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target for target in LINK.findall(text) if "://" not in target]
    assert not [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()]


def test_readme_names_every_command(tiny_llama: Path) -> None:
    from qlora_rs.cli.app import app

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [command.name for command in app.registered_commands]
    assert commands
    assert not [name for name in commands if f"qlora-rs {name}" not in readme]


def test_every_make_target_explains_itself() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    for target in phony[1].split():
        assert re.search(rf"^{target}:.*## \S", makefile, re.MULTILINE), target
