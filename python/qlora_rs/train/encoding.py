"""Records to tokens, with a mark on every token that counts for the loss."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_rs.checkpoint.gguf_source import is_gguf_file, open_gguf
from qlora_rs.errors import FormatError, UnsupportedError, require_extra
from qlora_rs.train.chat import ChatTemplate, Messages, Span
from qlora_rs.train.records import Record

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\b")


@dataclass(frozen=True)
class Sample:
    """A record in tokens.

    Attributes:
        line: of the record.
        ids: (length,) int32.
        counted: (length,) bool: the tokens whose prediction the loss counts; never the first, which nothing predicts.
        lost: tokens that were cut off.
    """

    line: int
    ids: Tensor
    counted: Tensor
    lost: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    @property
    def counted_tokens(self) -> int:
        """Number of tokens that count."""
        return int(self.counted.sum())


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder, or of a GGUF file.

    Raises:
        FormatError: there is none that can be read.
        UnsupportedError: transformers is not installed, or the tokenizer cannot tell the place of its tokens.
    """
    transformers = require_extra("transformers", "train", "training")
    source = open_gguf(path) if is_gguf_file(path) else None  # what it makes is there as long as it lives
    folder = path if source is None else source.companions_folder()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise FormatError(f"{path}: no tokenizer can be read: {error}") from error
    if not tokenizer.is_fast:
        raise UnsupportedError(
            f"{path}: its tokenizer ({type(tokenizer).__name__}) cannot tell which characters a token covers; "
            "training needs one with a tokenizer.json"
        )
    return tokenizer


def pad_token(tokenizer: Any) -> int:
    """What rows are filled up with; the model does not look at it."""
    return next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)


class Encoder:
    """Encodes records with one tokenizer, cut to ``max_length`` tokens."""

    def __init__(self, tokenizer: Any, max_length: int, *, model: Path, data: Path) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._model, self._data = model, data
        self._template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        self._special_ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    def encode(self, record: Record) -> Sample:
        """The tokens of a record.

        Raises:
            FormatError: the chat template does not take it.
            UnsupportedError: there is no chat template, or it does not tell where the assistant speaks.
        """
        if record.messages is not None and self._template is not None:
            ids, counted = self._chat(record, record.messages, self._template)
        elif record.form in ("alpaca", "text"):
            ids, counted = self._plain(record)
        else:
            raise UnsupportedError(
                f"{self._data}, line {record.line}: is a chat, but the tokenizer of {self._model} has no chat "
                "template: use an instruct model, put a chat_template.jinja into its folder, or give alpaca or text"
            )
        marks = torch.tensor(counted[: self._max_length], dtype=torch.bool)
        marks[:1] = False
        kept = torch.tensor(ids[: self._max_length], dtype=torch.int32)
        return Sample(record.line, kept, marks, len(ids) - len(kept))

    def _chat(self, record: Record, messages: Messages, template: ChatTemplate) -> tuple[list[int], list[bool]]:
        try:
            text = template.render(messages)
        except FormatError as error:
            raise FormatError(f"{self._data}, line {record.line}: {error}") from None
        # Not again a beginning-of-text token: the template writes its own.
        ids, offsets, _ = self._tokens(text, add_special_tokens=False)
        spans = template.spans(messages, text)
        if spans is not None:
            return ids, self._inside(ids, offsets, spans)
        if _GENERATION_TAG.search(str(self._tokenizer.get_chat_template())):
            marked = self._tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            if list(marked["input_ids"]) == ids:
                return ids, [bool(each) for each in marked["assistant_masks"]]
        raise UnsupportedError(
            f"{self._data}, line {record.line}: the chat template of {self._model} writes an assistant's turn "
            "differently once others follow it, so what counts for the loss cannot be told: mark the answers in the "
            "template with {% generation %} ... {% endgeneration %}, or give each answer a line of its own"
        )

    def _plain(self, record: Record) -> tuple[list[int], list[bool]]:
        text = record.prompt + record.completion
        ids, offsets, added = self._tokens(text, add_special_tokens=True)
        counted = self._inside(ids, offsets, [(len(record.prompt), len(text))])
        counted = [inside and not outside for inside, outside in zip(counted, added, strict=True)]
        end = self._tokenizer.eos_token_id
        if end is not None and ids[-1:] == [end] and added[-1]:
            counted[-1] = True  # the tokenizer itself ends every text
        elif end is not None:
            ids.append(end)
            counted.append(True)
        return ids, counted

    def _tokens(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[Span], list[bool]]:
        """Token numbers, the characters that each covers, and whether the tokenizer added it on its own."""
        # NOTE: verbose=False silences a warning about texts longer than the model takes: they are cut afterwards.
        encoded = self._tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            truncation=False,
            verbose=False,
        )
        offsets = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
        added = [
            bool(special) and start == end
            for special, (start, end) in zip(encoded["special_tokens_mask"], offsets, strict=True)
        ]
        return list(encoded["input_ids"]), offsets, added

    def _inside(self, ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
        """Whether each token lies in a span.

        By its last character, as a token that reaches into an answer from before is one that has to be said; a
        special token by its first, as some take the white space behind them along.
        """
        counted, number = [], 0
        for token, (start, end) in zip(ids, offsets, strict=True):
            place = start if token in self._special_ids else end - 1
            while number < len(spans) and spans[number][1] <= place:
                number += 1
            counted.append(number < len(spans) and spans[number][0] <= place)
        return counted
