"""`qlora_rs.train.encoding` and `chat`: what counts for the loss is what the assistant has to say, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_rs.errors import FormatError, UnsupportedError
from qlora_rs.train.encoding import Encoder, Sample, load_tokenizer
from qlora_rs.train.records import ALPACA, Record

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# White space of a turn is taken away, and the beginning of the text is written by the template.
LLAMA3 = (
    "<|begin|>{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages %}<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
# No header before an answer: the end of the user's turn is what asks for it.
MISTRAL = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
# Adds a system turn of its own, as Qwen's and SmolLM2's do.
WITH_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
# Writes an earlier answer without its thoughts, the last one with them, as Qwen3's does.
FORGETTING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The number of turns stands in front, so that no chat begins as a shorter one does; answers have no known end.
UNSTABLE = "{{ messages | length }}:{% for m in messages %}{{ m['role'] }}={{ m['content'] | upper }};{% endfor %}"
UNSTABLE_MARKED = (
    "{{ messages | length }}:{% for m in messages %}{{ m['role'] }}={% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] | upper }};{% endgeneration %}{% else %}{{ m['content'] }};{% endif %}{% endfor %}"
)

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, you!"},
    {"role": "user", "content": "Say: Hello, you!"},
    {"role": "assistant", "content": "Grüß dich 👋"},
]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot|>", "<turn>", "</turn>", "</s>"]


def encoder(tokenizer: Any, template: str | None, max_length: int = 512) -> Encoder:
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.chat_template = template
    return Encoder(tokenizer, max_length, model=Path("model"), data=Path("data.jsonl"))


def chat(*turns: str, system: str | None = None) -> Record:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(turns)]
    return Record(1, "messages", messages)


def said(tokenizer: Any, sample: Sample) -> list[str]:
    """Texts of the runs of tokens that count."""
    runs: list[list[int]] = []
    before = False
    for token, counts in zip(sample.ids.tolist(), sample.counted.tolist(), strict=True):
        if counts:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = counts
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "end", "lead"),
    [
        pytest.param(CHATML, "<|im_end|>", "", id="chatml"),
        pytest.param(LLAMA3, "<|eot|>", "", id="llama3"),
        pytest.param(GEMMA, "</turn>", "", id="gemma"),
        pytest.param(MISTRAL, "</s>", " ", id="mistral"),
        pytest.param(WITH_SYSTEM, "<|im_end|>", "", id="with-system"),
        pytest.param(FORGETTING, "<|im_end|>", "", id="forgetting"),
    ],
)
def test_every_answer_counts_with_its_end_of_turn_and_nothing_else(tokenizer, template, end, lead):
    sample = encoder(tokenizer, template).encode(Record(1, "messages", CHAT))
    assert said(tokenizer, sample) == [f"{lead}Hello, you!{end}", f"{lead}Grüß dich 👋{end}"]
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(sample.ids.tolist()) == whole


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, FORGETTING])
@pytest.mark.parametrize("answer", ["Hi", "", " padded ", "two\nlines\n", "<|im_end|>", "assistant\n", "\ue0f0"])
def test_an_answer_that_repeats_the_question_or_looks_like_markup_is_still_the_only_one_that_counts(
    tokenizer, template, answer
):
    sample = encoder(tokenizer, template).encode(chat("Hi", answer, "Hi", system="Hi"))
    (text,) = said(tokenizer, sample)
    end = {CHATML: "<|im_end|>", LLAMA3: "<|eot|>", MISTRAL: "</s>", FORGETTING: "<|im_end|>"}[template]
    lead = " " if template == MISTRAL else ""
    assert text == f"{lead}{answer.strip() if template == LLAMA3 else answer}{end}"


def test_the_real_models_template_counts_each_answer(smollm2):
    tokenizer = load_tokenizer(smollm2)
    sample = Encoder(tokenizer, 512, model=smollm2, data=Path("data.jsonl")).encode(Record(1, "messages", CHAT))
    assert said(tokenizer, sample) == ["Hello, you!<|im_end|>", "Grüß dich 👋<|im_end|>"]


def test_a_token_that_reaches_into_an_answer_from_its_header_counts(smollm2):
    tokenizer = load_tokenizer(smollm2)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    sample = Encoder(tokenizer, 512, model=smollm2, data=Path("data.jsonl")).encode(chat("Well", "Yes"))
    assert said(tokenizer, sample) == [" Yes<|im_end|>"]


def test_thoughts_of_the_last_answer_count_and_those_that_the_template_forgets_are_refused(tokenizer):
    encode = encoder(tokenizer, FORGETTING).encode
    last = encode(chat("a", "one", "b", "<think>y</think>two"))
    assert said(tokenizer, last) == ["one<|im_end|>", "<think>y</think>two<|im_end|>"]
    with pytest.raises(UnsupportedError, match=r"differently once others follow it.* a line of its own"):
        encode(chat("a", "<think>x</think>one", "b", "<think>y</think>two"))


def test_a_turn_of_the_user_at_the_end_does_not_count(tokenizer):
    sample = encoder(tokenizer, CHATML).encode(chat("Hi", "Hello!", "And?"))
    assert said(tokenizer, sample) == ["Hello!<|im_end|>"]


def test_a_chat_without_an_answer_has_nothing_that_counts(tokenizer):
    assert encoder(tokenizer, CHATML).encode(chat("Hi")).counted_tokens == 0


def test_a_template_that_hides_where_answers_stand_is_refused_with_the_way_out(tokenizer):
    with pytest.raises(UnsupportedError, match=r"data\.jsonl, line 1: the chat template of model.*\{% generation %\}"):
        encoder(tokenizer, UNSTABLE).encode(Record(1, "messages", CHAT))


def test_generation_tags_tell_it_where_nothing_else_does(tokenizer):
    sample = encoder(tokenizer, UNSTABLE_MARKED).encode(chat("Hi", "Hello!", "And?", "Yes."))
    assert said(tokenizer, sample) == ["HELLO!;", "YES.;"]


def test_a_template_that_refuses_a_chat_is_told_with_the_line(tokenizer):
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
    with pytest.raises(FormatError, match=r"data\.jsonl, line 1: the chat template does not take.*no system turns"):
        encoder(tokenizer, refusing).encode(chat("Hi", "Hello!", system="Be kind."))


def test_a_chat_without_a_template_is_refused_with_the_way_out(tokenizer):
    with pytest.raises(UnsupportedError, match=r"data\.jsonl, line 1: is a chat.*chat_template\.jinja"):
        encoder(tokenizer, None).encode(chat("Hi", "Hello!"))


def test_alpaca_goes_through_the_template_or_through_its_own_prompt(tokenizer):
    prompt = ALPACA.format(instruction="Greet")
    messages = [{"role": "user", "content": "Greet"}, {"role": "assistant", "content": "Hello!"}]
    record = Record(1, "alpaca", messages, prompt, "Hello!")
    with_template = encoder(tokenizer, CHATML).encode(record)
    assert tokenizer.decode(with_template.ids.tolist()).startswith("<|im_start|>user\nGreet")
    assert said(tokenizer, with_template) == ["Hello!<|im_end|>"]
    without = encoder(tokenizer, None).encode(record)
    assert tokenizer.decode(without.ids.tolist()) == f"{prompt}Hello!<|end|>"
    assert said(tokenizer, without) == ["Hello!<|end|>"]


@pytest.mark.parametrize("template", [None, CHATML])
def test_all_of_a_text_counts_but_its_first_token_which_nothing_predicts(tokenizer, template):
    sample = encoder(tokenizer, template).encode(Record(1, "text", None, "", "Once"))
    assert tokenizer.decode(sample.ids.tolist()) == "Once<|end|>"
    assert said(tokenizer, sample) == ["nce<|end|>"]


def test_a_beginning_that_the_tokenizer_adds_does_not_count_and_is_not_doubled(tokenizer):
    from tokenizers.processors import TemplateProcessing

    begin = tokenizer.convert_tokens_to_ids("<|start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", begin)]
    )
    text = encoder(tokenizer, None).encode(Record(1, "text", None, "", "Once"))
    assert said(tokenizer, text) == ["Once<|end|>"]
    assert text.ids[0] == begin
    in_chat = encoder(tokenizer, "<|start|>" + CHATML).encode(chat("Hi", "Hello!"))
    assert in_chat.ids.tolist().count(begin) == 1


def test_an_end_that_the_tokenizer_adds_counts_once(tokenizer):
    from tokenizers.processors import TemplateProcessing

    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", end)]
    )
    sample = encoder(tokenizer, None).encode(Record(1, "text", None, "", "Once"))
    assert said(tokenizer, sample) == ["nce<|end|>"]


@pytest.mark.parametrize("limit", [2, 20, 40])
def test_a_longer_sample_is_cut_and_what_was_lost_is_known(tokenizer, limit):
    whole = encoder(tokenizer, CHATML).encode(chat("Hi", "Hello, you!"))
    cut = encoder(tokenizer, CHATML, limit).encode(chat("Hi", "Hello, you!"))
    kept = min(limit, whole.length)
    assert (cut.length, cut.lost) == (kept, whole.length - kept)
    assert torch.equal(cut.ids, whole.ids[:kept])
    assert torch.equal(cut.counted, whole.counted[:kept])


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FormatError, match=f"{tmp_path}: no tokenizer can be read"):
        load_tokenizer(tmp_path)
