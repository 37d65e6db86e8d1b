"""``qlora-rs eval``: figures, messages and exit codes."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import qlora_rs
from qlora_rs.eval import perplexity


@pytest.fixture
def text(tmp_path, brown_text):
    path = tmp_path / "text.txt"
    path.write_text(brown_text[:700], encoding="utf-8")
    return path


def test_figures_are_those_of_the_library(command, packed_llama, text):
    outcome = command("eval", packed_llama, text, "--window", 100, "--dtype", "float32", "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(packed_llama)(text.read_text()).input_ids
    expected = perplexity(qlora_rs.from_pretrained(packed_llama, dtype=torch.float32), tokens, window=100)
    assert result["perplexity"] == pytest.approx(expected.ppl)
    assert result["nats_per_token"] == pytest.approx(expected.nll)
    assert (result["tokens"], result["windows"], result["window"]) == (expected.tokens, expected.windows, 100)
    assert (result["model"], result["adapter"], result["dtype"]) == (str(packed_llama), None, "float32")
    assert result["seconds"] > 0


def test_results_go_to_stdout_and_what_was_measured_to_stderr(command, packed_llama, tiny_llama, llama_adapter, text):
    packed = command("eval", packed_llama, text, "--adapter", llama_adapter)
    assert [line.split()[0] for line in packed.out.splitlines()] == ["perplexity", "nats/token", "tokens", "seconds"]
    assert packed.err.count("\n") == 1
    for part in ("packed", "nf4", str(llama_adapter), "arithmetic in"):
        assert part in packed.err
    plain = command("eval", tiny_llama, text)
    assert "not packed: used as it is" in plain.err
    assert plain.err.count("\n") == 1
    assert len({outcome.out.splitlines()[0] for outcome in (packed, plain)}) == 2


def test_a_float_model_is_not_quantized(command, tiny_llama, text):
    outcome = command("eval", tiny_llama, text, "--dtype", "float32", "--json")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tiny_llama)(text.read_text()).input_ids
    expected = perplexity(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), tokens)
    assert json.loads(outcome.out)["nats_per_token"] == pytest.approx(expected.nll)


def test_max_tokens_cuts_the_text(command, packed_llama, text):
    result = json.loads(command("eval", packed_llama, text, "--max-tokens", 50, "--json").out)
    assert result["tokens"] == 49


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "text.txt: No such file"),
        (b"", "text.txt: is empty"),
        (b" \n\t", "text.txt: is empty"),
        (b"caf\xe9", "text.txt: is not UTF-8 text (byte 3 is 0xe9)"),
        (b"x", "text.txt: gives 1 token(s)"),
    ],
)
def test_text_that_cannot_be_scored_is_exit_code_2(command, packed_llama, tmp_path, content, message):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    outcome = command("eval", packed_llama, tmp_path / "text.txt")
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", 1], "--window"),
        (["--window", 513], "512 tokens at most"),
        (["--dtype", "int8"], "float32, bfloat16"),
        (["--adapter", "nowhere"], "not an adapter folder"),
    ],
)
def test_wrong_use_is_exit_code_2_with_a_message_that_helps(command, packed_llama, text, arguments, message):
    outcome = command("eval", packed_llama, text, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err_words
    assert "Traceback" not in outcome.err


def test_an_adapter_of_another_model_is_exit_code_2(command, llama_adapter, make_tiny_llama, text, tmp_path):
    other = make_tiny_llama(tmp_path / "other", intermediate_size=99)
    outcome = command("eval", other, text, "--adapter", llama_adapter)
    assert outcome.code == 2
    assert "is this adapter for another model?" in outcome.err


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_that_lacks_weights_is_not_filled_with_noise(command, make_tiny_llama, text, tmp_path, packed):
    folder = make_tiny_llama(tmp_path / "model")
    if packed:
        qlora_rs.checkpoint.quantize(folder, tmp_path / "packed")
        folder = tmp_path / "packed"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    outcome = command("eval", folder, text)
    assert (outcome.code, outcome.out) == (2, "")
    assert "model.layers.2." in outcome.err


def test_a_missing_model_tokenizer_or_library_is_exit_code_2(command, make_tiny_llama, text, tmp_path, monkeypatch):
    outcome = command("eval", tmp_path / "nowhere", text)
    assert outcome.code == 2
    assert "no such model folder" in outcome.err
    folder = make_tiny_llama(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    outcome = command("eval", folder, text)
    assert outcome.code == 2
    assert "no tokenizer" in outcome.err
    monkeypatch.setitem(sys.modules, "transformers", None)
    outcome = command("eval", folder, text)
    assert outcome.code == 2
    assert "pip install 'qlora-rs[transformers]'" in outcome.err


def test_help_teaches_with_an_example(command):
    outcome = command("eval", "--help")
    assert outcome.code == 0
    assert "qlora-rs eval Llama-3.2-1B-nf4" in outcome.out
    for option in ("--adapter", "--window", "--max-tokens", "--dtype", "--json"):
        assert option in outcome.out


@pytest.mark.parametrize(
    ("device", "code", "message"),
    [("cuda:63", 3, "there is no CUDA device"), ("mps", 2, "computes on cpu and cuda"), ("gpu", 2, "gpu")],
)
def test_a_device_that_there_is_not_is_named(command, packed_llama, text, device, code, message):
    outcome = command("eval", packed_llama, text, "--device", device)
    assert outcome.code == code
    assert message in outcome.err
    assert outcome.out == ""


def test_where_it_was_computed_is_said(command, packed_llama, text):
    outcome = command("eval", packed_llama, text, "--device", "cpu", "--json")
    assert json.loads(outcome.out)["device"] == "cpu"
    assert "arithmetic in" in outcome.err
    assert " on cpu" in outcome.err
