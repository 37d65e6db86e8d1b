"""One answer of a chat model to one prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_rs.errors import UnsupportedError, require_extra
from qlora_rs.eval.mode import device_of, evaluating, max_positions, own_random_state


@dataclass(frozen=True)
class Generation:
    """What a model wrote.

    Attributes:
        text: the answer, without special tokens.
        prompt_tokens: length of the prompt, the chat template's own tokens included.
        new_tokens: tokens that were generated, the one that ends the answer included.
        finished: whether the model ended its answer; else ``max_new_tokens`` did.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    finished: bool


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: int | None = None,
    chat_template: bool = True,
) -> Generation:
    """Answer ``prompt`` as one user turn, or continue it as plain text.

    Decoding is greedy at temperature 0: the same answer every time. Above, tokens are drawn, and nothing that the
    model's own ``generation_config`` says of sampling applies: only what is asked for here.

    Args:
        model: a transformers causal language model; it is left in the mode it was in.
        tokenizer: its tokenizer.
        prompt: what the user says.
        system: a system message before it, where the template knows one.
        max_new_tokens: length of the answer at most.
        temperature: 0 for greedy decoding; 1 draws from the model's own distribution.
        top_p: draw only from the most likely tokens that together have this probability; all by default.
        seed: draws from this seed alone and leaves torch's random state as it was; by default torch's own state.
        chat_template: False sends the prompt as it is.

    Raises:
        ValueError: an argument is out of range, or prompt and answer do not fit the model's context.
        UnsupportedError: the tokenizer has no chat template, or its template refuses the messages.

    >>> generate(model, tokenizer, "What is the capital of France?").text  # doctest: +SKIP
    'The capital of France is Paris.'
    """
    _check_arguments(system, max_new_tokens, temperature, top_p, chat_template)
    transformers = require_extra("transformers", "transformers", "generating text")
    ids = _chat_ids(tokenizer, prompt, system) if chat_template else _plain_ids(tokenizer, prompt)
    context = max_positions(model)
    if context is not None and len(ids) + max_new_tokens > context:
        raise ValueError(
            f"the prompt has {len(ids)} tokens and the model takes {context} in all: at most "
            f"{max(0, context - len(ids))} can be generated, not {max_new_tokens}"
        )
    sampling = temperature > 0
    ends = _end_tokens(model, tokenizer)
    settings = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampling,
        # Named even where they are neutral: what is not, transformers takes from the model's own generation config.
        temperature=temperature if sampling else 1.0,
        top_p=top_p if sampling and top_p is not None else 1.0,
        top_k=0 if sampling else 50,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0],
    )
    inputs = torch.tensor([ids], device=device_of(model))
    generating: Any = model
    with evaluating(model), _random_state(seed, inputs.device):
        written: Tensor = generating.generate(
            inputs, attention_mask=torch.ones_like(inputs), generation_config=settings
        )
    answer = written[0, len(ids) :].tolist()
    text = tokenizer.decode(answer, skip_special_tokens=True)
    return Generation(text, len(ids), len(answer), bool(answer) and answer[-1] in ends)


def _check_arguments(
    system: str | None, max_new_tokens: int, temperature: float, top_p: float | None, chat_template: bool
) -> None:
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is a positive integer; got {max_new_tokens!r}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is 0 (greedy) or a positive number; got {temperature!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p lies in (0, 1]; got {top_p!r}")
    if top_p is not None and temperature == 0:
        raise ValueError("top_p has no meaning at temperature 0, where the most likely token is always taken")
    if system is not None and not chat_template:
        raise ValueError("a system message needs the chat template")


def _chat_ids(tokenizer: Any, prompt: str, system: str | None) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise UnsupportedError(
            "the tokenizer has no chat template: this is no chat model; send the prompt without one "
            "(chat_template=False, --no-chat-template)"
        )
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    errors = require_extra("jinja2", "transformers", "chat templates").TemplateError
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except errors as error:
        raise UnsupportedError(f"the model's chat template refuses these messages: {error}") from None
    # The template writes the special tokens itself.
    return [int(token) for token in tokenizer(text, add_special_tokens=False).input_ids]


def _plain_ids(tokenizer: Any, prompt: str) -> list[int]:
    ids = [int(token) for token in tokenizer(prompt).input_ids]
    if not ids:
        raise ValueError("the prompt is empty: there is nothing to continue")
    return ids


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: what the model's generation config says, and the tokenizer's end of text."""
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    tokens = [*stated] if isinstance(stated, list | tuple) else [stated]
    return [int(token) for token in dict.fromkeys([*tokens, tokenizer.eos_token_id]) if token is not None]


@contextmanager
def _random_state(seed: int | None, device: torch.device) -> Iterator[None]:
    """Torch's own random state, or one that starts at ``seed`` and is forgotten afterwards."""
    if seed is None:
        yield
        return
    with own_random_state(device):
        torch.manual_seed(seed)
        yield
