"""Names that are no text, or that command a terminal: every command does its work and tells it in what can be shown."""

from __future__ import annotations

import html.parser
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_rs import FormatError, checkpoint

NOT_UTF8 = os.fsdecode(b"caf\xe9$")
ESCAPE = "\x1b[2J$x<script>"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def source(tiny_llama, tmp_path) -> Path:
    """A model whose folder, one of its files and one of its tensors have such names."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / NOT_UTF8).write_text("x")
    os.mkfifo(folder / f"pipe{NOT_UTF8}")
    add_tensor(folder, ESCAPE)
    return folder.rename(tmp_path / NOT_UTF8)


def add_tensor(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.ones(2, 3)}, folder / "model.safetensors", {"format": "pt"})


def run(*arguments: object, expected: int = 0, encoding: str = "utf-8") -> str:
    program = "from qlora_rs import cli; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        timeout=120,
        check=False,
    )
    assert done.returncode == expected, done.stderr.decode(errors="replace")[-2000:]
    assert b"\x1b" not in done.stdout + done.stderr
    return done.stdout.decode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_commands_read_and_write_beside_such_names(source, tmp_path, encoding) -> None:
    packed = tmp_path / f"packed{NOT_UTF8}"
    assert r"left out pipecaf\xe9$" in run("quantize", source, packed, encoding=encoding)
    assert (packed / NOT_UTF8).read_text() == "x"
    assert r"\x1b[2J$x<scri" in run("inspect", packed, "--all", encoding=encoding)
    found = json.loads(run("inspect", packed, "--json", encoding=encoding))
    assert found["path"] == str(packed)
    assert ESCAPE in {tensor["name"] for tensor in found["tensors"]}
    if encoding == "utf-8":
        run("diff", source, packed, "--all", expected=1)
        assert json.loads(run("verify", packed, "--source", source, "--json"))["same"]
        assert json.loads(run("convert", packed, tmp_path / "plain", "--to", "bf16", "--json"))["left_out"] == []


@pytest.mark.parametrize("end", ["html", "png"])
def test_reports_are_drawn_of_such_names(source, tmp_path, end) -> None:
    checkpoint.quantize(source, tmp_path / f"packed{NOT_UTF8}", include=["*x<script>"])
    report = tmp_path / f"report.{end}"
    run("inspect", tmp_path / f"packed{NOT_UTF8}", "--source", source, "--report", report)
    if end == "html":
        tags: list[str] = []
        parser = html.parser.HTMLParser()
        parser.handle_starttag = lambda tag, attributes: tags.append(tag)  # type: ignore[method-assign]
        parser.feed(report.read_text(encoding="utf-8"))
        assert "svg" in tags
        assert "script" not in tags


def test_a_gguf_file_gets_a_name_of_letters(make_tiny_llama, tmp_path) -> None:
    folder = make_tiny_llama(tmp_path / "model", hidden_size=96, intermediate_size=160)
    folder = folder.rename(tmp_path / NOT_UTF8)
    checkpoint.convert(folder, tmp_path / "model.gguf", "gguf")
    assert checkpoint.inspect(tmp_path / "model.gguf").format == "gguf"


@pytest.mark.parametrize(
    ("name", "to"), [(f"{Q_PROJ}.absmax", "bitsandbytes"), (f"{Q_PROJ}_packed", "compressed-tensors")]
)
def test_a_tensor_that_has_the_name_of_a_part_is_refused(make_tiny_llama, tmp_path, name, to) -> None:
    folder = make_tiny_llama(tmp_path / "model", hidden_size=64, intermediate_size=128)
    add_tensor(folder, name)
    checkpoint.quantize(folder, tmp_path / "packed")
    for dry_run in (True, False):
        with pytest.raises(FormatError, match=rf"packed: tensor '{name}' would be written twice"):
            checkpoint.convert(tmp_path / "packed", tmp_path / "out", to, dry_run=dry_run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "packed"]
