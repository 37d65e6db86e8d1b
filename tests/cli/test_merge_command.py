"""``qlora-rs merge``: results, messages and exit codes."""

from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from qlora_rs.merge import merge


def test_results_go_to_stdout_and_messages_to_stderr(command, packed_llama, llama_adapter, tmp_path):
    outcome = command("merge", packed_llama, llama_adapter, tmp_path / "merged")
    assert outcome.code == 0, outcome.err
    assert "14 layers merged over the dequantized base into bfloat16" in outcome.out
    assert outcome.err == f"written to {tmp_path / 'merged'}\n"
    merge(packed_llama, llama_adapter, tmp_path / "expected")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_the_type_and_the_base_are_chosen(command, packed_llama, tiny_llama, llama_adapter, tmp_path, name, dtype):
    arguments = ("--dtype", name, "--base", tiny_llama, "--json")
    outcome = command("merge", packed_llama, llama_adapter, tmp_path / "merged", *arguments)
    report = json.loads(outcome.out)
    assert report["dtype"] == str(dtype).removeprefix("torch.")
    assert report["base"] == f"the weights of {tiny_llama}"
    assert 0.05 < report["max_base_error"] < 0.2
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {dtype}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{packed}", "{adapter}", "merged", "--dtype", "int8"], "bf16, fp16, fp32"),
        (["{packed}", "{adapter}", "taken"], "--overwrite"),
        (["{packed}", "nowhere", "merged"], "not an adapter folder"),
        (["nowhere", "{adapter}", "merged"], "no such model folder"),
        (["{packed}", "{adapter}", "merged", "--base", "nowhere"], "no such model folder"),
        (["{packed}", "{adapter}", "merged", "--base", "{packed}"], "is quantized"),
        (["{packed}", "{adapter}"], "DST"),
    ],
)
def test_wrong_use_is_exit_code_2_and_makes_nothing(
    command, packed_llama, llama_adapter, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    filled = [argument.format(packed=packed_llama, adapter=llama_adapter) for argument in arguments]
    outcome = command("merge", *filled)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err_words
    assert os.listdir(tmp_path) == ["taken"]


def test_ctrl_c_is_exit_code_130_and_says_what_is_left(command, packed_llama, llama_adapter, tmp_path, monkeypatch):
    @contextmanager
    def interrupting(label):
        yield lambda done, total: signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("qlora_rs.cli.output.progress_bytes", interrupting)
    outcome = command("merge", packed_llama, llama_adapter, tmp_path / "merged")
    assert outcome.code == 130
    assert "merged.partial" in outcome.err
    assert os.listdir(tmp_path) == ["merged.partial"]


def test_help_teaches_with_an_example(command):
    outcome = command("merge", "--help")
    assert "qlora-rs merge Llama-3.2-1B-nf4 adapter merged" in outcome.out
    for option in ("--dtype", "--base", "--overwrite", "--json"):
        assert option in outcome.out
