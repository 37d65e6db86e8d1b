"""``qlora-rs generate``: the answer alone on stdout."""

from __future__ import annotations

import json

import pytest
import torch

import qlora_rs
from qlora_rs.eval import generate

SHORT = ("--max-new-tokens", 9, "--dtype", "float32")


@pytest.fixture
def expected(packed_llama):
    from transformers import AutoTokenizer

    def answer(adapter=None, **options):
        model = qlora_rs.from_pretrained(packed_llama, dtype=torch.float32)
        if adapter is not None:
            qlora_rs.load_adapter(model, adapter)
        return generate(model, AutoTokenizer.from_pretrained(packed_llama), "Hi!", max_new_tokens=9, **options)

    return answer


def test_the_answer_alone_goes_to_stdout(command, packed_llama, expected):
    outcome = command("generate", packed_llama, "--prompt", "Hi!", *SHORT)
    assert outcome.code == 0, outcome.err
    assert outcome.out == expected().text + "\n"
    assert outcome.err.splitlines()[0].startswith(f"{packed_llama}: packed")
    assert outcome.err.splitlines()[1:] == ["cut after 9 tokens; --max-new-tokens allows more"]


def test_options_reach_the_model(command, packed_llama, llama_adapter, expected):
    settings = {"system": "Be brief.", "temperature": 1.0, "top_p": 0.9, "seed": 3}
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    outcome = command(
        "generate", packed_llama, "--prompt", "Hi!", "--adapter", llama_adapter, *options, *SHORT, "--json"
    )
    result = json.loads(outcome.out)
    answer = expected(llama_adapter, **settings)
    assert (result["text"], result["prompt_tokens"], result["new_tokens"], result["finished"]) == (
        answer.text,
        answer.prompt_tokens,
        answer.new_tokens,
        answer.finished,
    )
    assert result["adapter"] == str(llama_adapter)
    assert "with the adapter" in outcome.err


def test_an_adapter_changes_the_answer_and_the_template_can_be_left_out(command, packed_llama, llama_adapter):
    plain = command("generate", packed_llama, "--prompt", "Hi!", *SHORT)
    adapted = command("generate", packed_llama, "--prompt", "Hi!", "--adapter", llama_adapter, *SHORT)
    bare = command("generate", packed_llama, "--prompt", "Hi!", "--no-chat-template", *SHORT)
    assert plain.out != adapted.out
    assert plain.out != bare.out


def test_a_float_model_is_used_as_it_is(command, tiny_llama):
    outcome = command("generate", tiny_llama, "--prompt", "Hi!", *SHORT)
    assert outcome.code == 0
    assert "not packed: used as it is" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt"),
        (["--prompt", "Hi!", "--max-new-tokens", 0], "--max-new-tokens"),
        (["--prompt", "Hi!", "--temperature", -1], "--temperature"),
        (["--prompt", "Hi!", "--top-p", 0.5], "top_p has no meaning at temperature 0"),
        (["--prompt", "Hi!", "--max-new-tokens", 1000], "takes 512 in all"),
        (["--prompt", "", "--no-chat-template"], "the prompt is empty"),
        (["--prompt", "Hi!", "--system", "x", "--no-chat-template"], "needs the chat template"),
    ],
)
def test_wrong_use_is_exit_code_2_with_a_message_that_helps(command, packed_llama, arguments, message):
    outcome = command("generate", packed_llama, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err_words
    assert "Traceback" not in outcome.err


def test_help_teaches_with_an_example(command):
    outcome = command("generate", "--help")
    assert "qlora-rs generate SmolLM2-135M-nf4 --prompt" in outcome.out
    for option in ("--prompt", "--adapter", "--system", "--temperature", "--top-p", "--seed", "--no-chat-template"):
        assert option in outcome.out
