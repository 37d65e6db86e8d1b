"""Exit codes and messages for everything that can go wrong in a command."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import typer

from qlora_rs import DeviceError, FormatError, NonFiniteError, QuantSpec, UnsupportedError, adapters
from qlora_rs.cli import output
from qlora_rs.cli.guard import guarded


@pytest.fixture
def fail(capsys) -> Callable[..., tuple[int, str]]:
    """Run a command that raises; returns exit code and stderr. Nothing may be on stdout."""

    def run(body: Callable[[], object]) -> tuple[int, str]:
        with pytest.raises(typer.Exit) as caught:
            guarded(body)()
        captured = capsys.readouterr()
        assert captured.out == ""
        return caught.value.exit_code, " ".join(captured.err.split())

    return run


def raising(error: BaseException) -> Callable[[], object]:
    def body() -> None:
        raise error

    return body


def torch_out_of_memory() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (FormatError("a.safetensors: damaged"), 2, "error: a.safetensors: damaged"),
        (UnsupportedError("not this"), 2, "error: not this"),
        (NonFiniteError("w holds NaN"), 2, "error: w holds NaN"),
        (FileNotFoundError(errno.ENOENT, "no such model folder", "m"), 2, "error: m: no such model folder"),
        (FileExistsError(errno.EEXIST, "exists already", "m"), 2, "error: m: exists already"),
        (NotADirectoryError(errno.ENOTDIR, "not a folder", "m"), 2, "error: m: not a folder"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "m"), 2, "error: m: Is a directory"),
        (PermissionError(errno.EACCES, "Permission denied", "m"), 2, "error: m: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device", "m"), 3, "error: m: No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "m"), 3, "error: m: Read-only file system"),
        (OSError("nameless"), 3, "error: nameless"),
        (DeviceError("the driver failed"), 3, "error: the driver failed"),
        (MemoryError(), 3, "error: out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 3, "error: out of memory: CUDA"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("left in x.partial"), 130, "left in x.partial"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_class_has_its_exit_code_and_a_message_without_traceback(fail, error, code, message) -> None:
    got, text = fail(raising(error))
    assert got == code
    assert text.startswith(message)
    assert "Traceback" not in text


def test_torchs_own_lack_of_memory_is_the_systems_failure(fail) -> None:
    code, text = fail(torch_out_of_memory)
    assert code == 3
    assert text.startswith("error: out of memory: ")


@pytest.mark.parametrize(
    "body", [lambda: QuantSpec("nf5"), lambda: QuantSpec("nf4", 63), lambda: adapters.save_adapter(torch.nn.ReLU(), "")]
)
def test_a_value_that_our_own_checks_refuse_is_bad_input(fail, body) -> None:
    code, text = fail(body)
    assert code == 2
    assert "Traceback" not in text


@pytest.mark.parametrize(
    "body",
    [
        lambda: {}["key"],
        lambda: json.loads("{"),
        lambda: torch.ones(2) @ torch.ones(3),
        lambda: None + 1,
        lambda: [][3],
        raising(ValueError("of another library")),
        raising(RuntimeError("anything")),
        raising(AssertionError()),
    ],
)
def test_anything_else_is_our_fault_with_traceback_and_a_request(fail, body) -> None:
    code, text = fail(body)
    assert code == 70
    assert "Traceback (most recent call last)" in text
    assert "fault of qlora-rs: please report it" in text
    assert "qlora-rs doctor" in text


def test_a_bug_in_our_own_code_that_python_raises_is_our_fault(fail, monkeypatch) -> None:
    monkeypatch.setattr(adapters, "CONFIG_FILE", 3)  # `folder / 3` is a TypeError in a line of this package
    code, text = fail(lambda: adapters.read_adapter("absent"))
    assert code == 70
    assert "Traceback" in text


def test_the_result_and_other_exits_pass_through() -> None:
    assert guarded(lambda: 5)() == 5
    with pytest.raises(typer.Exit) as caught:
        guarded(raising(typer.Exit(1)))()
    assert caught.value.exit_code == 1


def test_json_has_no_numbers_that_json_does_not_know(capsys) -> None:
    output.print_json({"a": [float("inf"), 1.5, (float("nan"), "é")], "b": {"c": -1, "d": None}})
    text = capsys.readouterr().out
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, 1.5, [None, "é"]], "b": {"c": -1, "d": None}}


def test_text_is_printed_as_it_is_however_long(capsys) -> None:
    text = "[bold]x[/bold] " + "word " * 100 + ":smile: 12"
    output.print_result(text + "\ta tab")
    output.message(text)
    captured = capsys.readouterr()
    assert captured.out == text + "\ta tab\n"
    assert captured.err == text + "\n"


@pytest.mark.parametrize("options", ["--all", "--json"])
def test_a_reader_that_leaves_early_causes_no_noise(tiny_llama, options) -> None:
    command = (
        f'"{sys.executable}" -c "from qlora_rs.cli import main; main()" inspect "{tiny_llama}" {options} | head -c 9'
    )
    script = f"{command}\necho code=${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert run.stderr == ""
    assert run.stdout[9:].strip() in {"code=0", "code=3"}  # 0 where the pipe took all of it before head had gone


def test_a_closed_pipe_is_the_systems_failure_and_silent(tiny_llama) -> None:
    program = """
import os, sys
from qlora_rs.cli import main
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
main()
"""
    command = [sys.executable, "-c", program, "inspect", str(tiny_llama)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (run.returncode, run.stderr) == (3, "")


def test_a_full_disk_under_stdout_is_the_systems_failure(tiny_llama) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", "from qlora_rs.cli import main; main()", "inspect", str(tiny_llama)]
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    assert run.returncode == 3
    assert "No space left" in run.stderr
    assert "Traceback" not in run.stderr
