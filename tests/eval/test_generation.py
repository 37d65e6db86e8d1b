"""Generation: greedy by default, drawn by a seed, and nothing that is not asked for."""

from __future__ import annotations

import pytest
import torch

from qlora_rs import UnsupportedError
from qlora_rs.eval import generate


@pytest.fixture(scope="module")
def model(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture
def tokenizer(tiny_llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def unending(model):
    """Without tokens that end an answer, so that lengths are known."""
    stated = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None
    yield model
    model.generation_config.eos_token_id = stated


def greedy(model, ids: list[int], count: int) -> list[int]:
    """The most likely token, again and again."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def test_greedy_answers_follow_the_chat_template_and_are_the_likeliest_tokens(model, tokenizer) -> None:
    answer = generate(model, tokenizer, "Hi", system="Be kind.", max_new_tokens=9)
    prompt = "<|start|>system\nBe kind.<|end|>\n<|start|>user\nHi<|end|>\n<|start|>assistant\n"
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    expected = greedy(model, ids, 9)
    end = tokenizer.eos_token_id
    if end in expected:
        expected = expected[: expected.index(end) + 1]
    assert answer.prompt_tokens == len(ids)
    assert answer.new_tokens == len(expected)
    assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.finished == (expected[-1] == end)
    assert generate(model, tokenizer, "Hi", system="Be kind.", max_new_tokens=9) == answer


def test_a_plain_prompt_is_continued(model, tokenizer) -> None:
    answer = generate(model, tokenizer, "Once upon", max_new_tokens=3, chat_template=False)
    assert answer.prompt_tokens == len("Once upon")
    assert answer.text == tokenizer.decode(greedy(model, tokenizer("Once upon").input_ids, 3))


def test_the_models_own_end_token_ends_the_answer(model, tokenizer) -> None:
    first = greedy(model, tokenizer("Once upon").input_ids, 1)[0]
    stated = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [stated, first]
    try:
        answer = generate(model, tokenizer, "Once upon", max_new_tokens=8, chat_template=False)
    finally:
        model.generation_config.eos_token_id = stated
    assert (answer.new_tokens, answer.finished) == (1, True)
    cut = generate(model, tokenizer, "Once upon", max_new_tokens=1, chat_template=False)
    assert (cut.new_tokens, cut.finished) == (1, False)


def test_a_seed_repeats_the_draw_and_leaves_torchs_state(unending, tokenizer) -> None:
    tokenizer.eos_token = None

    def draw(**options):
        return generate(unending, tokenizer, "Hi", max_new_tokens=40, temperature=1.5, **options).text

    before = torch.get_rng_state()
    one = draw(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert draw(seed=1) == one
    assert draw(seed=2) != one
    assert draw() != draw()
    assert not torch.equal(torch.get_rng_state(), before)


def test_sampling_settings_of_the_model_do_not_apply(unending, tokenizer) -> None:
    tokenizer.eos_token = None
    settings = {"temperature": 1.5, "seed": 3, "max_new_tokens": 40}
    plain = generate(unending, tokenizer, "Hi", **settings)
    stated = unending.generation_config
    changes = {"do_sample": True, "top_k": 1, "top_p": 0.01, "repetition_penalty": 3.0}
    before = {name: getattr(stated, name) for name in changes}
    stated.update(**changes)
    try:
        assert generate(unending, tokenizer, "Hi", **settings) == plain
        greedy_text = generate(unending, tokenizer, "Hi", max_new_tokens=5).text
    finally:
        stated.update(**before)
    assert generate(unending, tokenizer, "Hi", max_new_tokens=5).text == greedy_text


def test_a_small_top_p_leaves_only_the_likeliest(unending, tokenizer) -> None:
    tokenizer.eos_token = None
    likeliest = generate(unending, tokenizer, "Hi", max_new_tokens=7)
    assert generate(unending, tokenizer, "Hi", max_new_tokens=7, temperature=2.0, top_p=1e-6) == likeliest
    assert generate(unending, tokenizer, "Hi", max_new_tokens=7, temperature=2.0, top_p=1.0, seed=0) != likeliest


def test_training_mode_comes_back(model, tokenizer) -> None:
    model.train()
    generate(model, tokenizer, "Hi", max_new_tokens=2)
    assert all(module.training for module in model.modules())
    model.eval()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_new_tokens": 0}, "positive integer; got 0"),
        ({"max_new_tokens": 2.0}, "positive integer"),
        ({"temperature": -1}, "temperature is 0"),
        ({"temperature": float("nan")}, "temperature is 0"),
        ({"temperature": 1.0, "top_p": 0}, r"top_p lies in \(0, 1\]; got 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p lies"),
        ({"top_p": 0.9}, "no meaning at temperature 0"),
        ({"system": "x", "chat_template": False}, "needs the chat template"),
        ({"max_new_tokens": 500}, r"takes 512 in all: at most \d+ can be generated, not 500"),
    ],
)
def test_wrong_arguments_are_refused(model, tokenizer, options, match) -> None:
    with pytest.raises(ValueError, match=match):
        generate(model, tokenizer, "Hi", **options)


def test_an_empty_plain_prompt_is_refused(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(model, tokenizer, "", chat_template=False)


def test_templates_that_are_missing_or_refuse_are_named(model, tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(UnsupportedError, match="refuses these messages: no system here"):
        generate(model, tokenizer, "Hi", system="x")
    tokenizer.chat_template = None
    with pytest.raises(UnsupportedError, match="--no-chat-template"):
        generate(model, tokenizer, "Hi")
