"""What happens before a command does its work: help, a reader that is gone, Ctrl-C while torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-c", "from qlora_rs.cli import main; main()"]
COMMANDS = {
    "quantize": ["model", "packed"],
    "inspect": ["model"],
    "train": ["--model", "model", "--data", "data.jsonl", "--output", "adapter"],
    "eval": ["model", "data.jsonl"],
    "generate": ["model", "--prompt", "Hi!"],
    "merge": ["model", "adapter", "merged"],
    "doctor": [],
}


@pytest.fixture
def with_torch(tmp_path: Path):
    """Run the command line where importing torch runs this code instead."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "data.jsonl").write_text('{"text": "Hi!"}\n')

    def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "torch.py").write_text(code)
        path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
        return subprocess.run(
            [*PROGRAM, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_torch_is_imported_is_exit_code_130_and_one_line(with_torch, command):
    run = with_torch("import signal\nsignal.raise_signal(signal.SIGINT)\n", command, *COMMANDS[command])
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_before_the_commands_are_known_is_exit_code_130_and_one_line(tmp_path):
    (tmp_path / "typer.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([*PROGRAM, "--help"], env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_does_not_wait_for_torch(with_torch, arguments):
    run = with_torch("raise AssertionError('torch was imported')\n", *arguments)
    assert (run.returncode, run.stderr) == (0, "")
    assert "qlora-rs" in run.stdout


def test_help_to_a_reader_that_is_gone_is_the_systems_failure_and_silent():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        run = subprocess.run([*PROGRAM, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert (run.returncode, run.stderr) == (3, "")


@pytest.mark.parametrize(("given", "expected"), [(None, "passive"), ("active", "active")])
def test_torch_is_imported_with_idle_threads_that_sleep_unless_told_otherwise(with_torch, monkeypatch, given, expected):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    code = "import os, sys; print(os.environ['OMP_WAIT_POLICY'], file=sys.stderr); os._exit(0)"
    assert with_torch(code, "doctor").stderr.split() == [expected]
