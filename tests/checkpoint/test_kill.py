"""kill -9 at any moment: the source is intact, the output absent or whole, and the same command finishes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_rs import checkpoint

QUANTIZE = {"include": ["up"], "max_shard_size": 2_000_000}


@pytest.fixture
def large(write_tensors, tmp_path):
    """A model whose quantizing takes long enough to be killed in."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{n}.up.weight": torch.randn(900, 1088, generator=generator) for n in range(16)}
    tensors |= {f"layers.{n}.norm.weight": torch.randn(1088, generator=generator) for n in range(16)}
    source = write_tensors(tmp_path / "source", tensors, 3, model_type="unknown")
    (source / "tokenizer.json").write_text("{}")
    return source


def kill(call, source, tmp_path, arguments, kills):
    paths = {"source": source, "target": tmp_path / "out", "expected": tmp_path / "expected"}
    getattr(checkpoint, call)(source, paths["expected"], **arguments)
    task = {name: str(path) for name, path in paths.items()}
    task |= {"call": call, "arguments": arguments, "kills": kills, "seed": kills}
    program = Path(__file__).with_name("killing.py")
    run = subprocess.run([sys.executable, program, json.dumps(task)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    print(call, arguments.get("to", ""), seen)
    assert seen["kills"] == kills
    assert seen["in_work"] > 0


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_quantize_survives_kills(large, tmp_path, kills):
    kill("quantize", large, tmp_path, QUANTIZE, kills)


@pytest.mark.parametrize(
    ("to", "kills"),
    [
        ("bitsandbytes", 4),
        pytest.param("bitsandbytes", 100, marks=pytest.mark.slow),
        pytest.param("bf16", 100, marks=pytest.mark.slow),
    ],
)
def test_convert_survives_kills(large, tmp_path, to, kills):
    checkpoint.quantize(large, tmp_path / "native", **QUANTIZE)
    arguments = {"to": to, "max_shard_size": 3_000_000}
    kill("convert", tmp_path / "native", tmp_path, arguments, kills)
