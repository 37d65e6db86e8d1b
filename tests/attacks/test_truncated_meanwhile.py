"""Files that another process cuts off while they are read: an error that names the file, never a dead process.

A mapped file that was cut off kills whoever looks at it. Each command runs in a process of its own, which cuts the file
off between the check of its size and the first byte that is read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_rs import checkpoint

GOLDEN = Path(__file__).resolve().parent.parent / "golden"

CUT = """
import os, sys
from qlora_rs import FormatError, checkpoint
from qlora_rs.checkpoint import stored
import numpy

folder, command = sys.argv[1], sys.argv[2]
victim = folder if folder.endswith(".gguf") else folder + "/model.safetensors"
opened, fromfile = stored.FilePlaces.open, numpy.fromfile

def cut():
    os.truncate(victim, os.path.getsize(victim) // 3)

def open_and_cut(places, name):
    result = opened(places, name)
    cut()
    return result

def cut_and_read(*arguments, **options):
    cut()
    return fromfile(*arguments, **options)

stored.FilePlaces.open, numpy.fromfile = open_and_cut, cut_and_read
try:
    exec(command)
except FormatError as error:
    print("FormatError:", error)
else:
    print("nothing was noticed")
"""

COMMANDS = {
    "convert": "checkpoint.convert(folder, folder + '-out', 'fp16')",
    "quantize": "checkpoint.quantize(folder, folder + '-out')",
    "diff": "checkpoint.diff(folder, folder)",
    "load": "import qlora_rs; qlora_rs.from_pretrained(folder)",
    "weights": "read = checkpoint.open_weights(folder); read('model.norm.weight'); read('lm_head.weight')",
}


def run(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", CUT, str(folder), COMMANDS[command]]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, env={**os.environ}, check=False)


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("native", "convert"),
        ("native", "diff"),
        ("bitsandbytes", "convert"),
        ("bitsandbytes", "load"),
        ("gptq", "quantize"),
        ("gptq", "diff"),
        ("float", "weights"),
        ("gguf", "convert"),
        ("gguf", "quantize"),
    ],
)
def test_a_file_that_is_cut_off_while_it_is_read_is_an_error(make_tiny_llama, tmp_path, kind, command) -> None:
    folder = tmp_path / "model"
    if kind in ("bitsandbytes", "gptq"):
        name = "bitsandbytes/nf4-crossing" if kind == "bitsandbytes" else "foreign/gptq-4bit-g32-sym"
        folder.mkdir()
        for file in (GOLDEN / name).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    else:
        make_tiny_llama(folder, hidden_size=96, intermediate_size=160, num_attention_heads=8, vocab_size=260)
        content = json.loads((folder / "tokenizer.json").read_text())  # transformers wants one that merges
        content["model"]["merges"].append(["A", "f"])
        content["model"]["vocab"]["Af"] = 259
        (folder / "tokenizer.json").write_text(json.dumps(content))
        if kind == "native":
            checkpoint.quantize(folder, tmp_path / "packed")
            folder = tmp_path / "packed"
        elif kind == "gguf":
            checkpoint.convert(folder, tmp_path / "model.gguf", "gguf")
            folder = tmp_path / "model.gguf"
    done = run(folder, command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("FormatError:"), (done.stdout, done.stderr[-2000:])
    assert str(folder) in done.stdout
    assert "changed since its header was read" in done.stdout
