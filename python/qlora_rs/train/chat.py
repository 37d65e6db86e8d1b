"""A chat as its template writes it, and where in that text the assistant speaks."""

from __future__ import annotations

import re
from typing import Any

from qlora_rs.errors import FormatError

# Two private-use characters, put around an answer to find it again in the rendered text.
OPEN, CLOSE = "\ue0f0", "\ue0f1"

Messages = list[dict[str, Any]]
Span = tuple[int, int]


class ChatTemplate:
    """A tokenizer's chat template, and what it writes around an answer.

    A span starts after the header that inference writes (``add_generation_prompt``) and ends with the end-of-turn
    token; white space that the template writes after that token is no part of it, as generation stops there.

    Two ways lead to a border, and the first that applies is taken:

    1. The chat is rendered once more with marks around every answer. Where taking the marks out gives the same text,
       a mark that stands right at the known header, or at the known end of turn, tells the place.
    2. The chat up to that place is rendered, and has to be how the whole text begins.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        tokens = {str(token) for token in tokenizer.all_special_tokens}
        tokens |= {str(token.content) for token in tokenizer.added_tokens_decoder.values()}
        longest_first = sorted((token for token in tokens if token.strip()), key=lambda token: (-len(token), token))
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._around: tuple[str, str] | None = None

    def render(self, messages: Messages, *, answer_next: bool = False) -> str:
        """The text of a chat, with the header of an answer if one comes next.

        Raises:
            FormatError: the template does not take this chat.
        """
        from jinja2.exceptions import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise FormatError(f"the chat template does not take this chat: {error}") from None
        return str(text)

    def spans(self, messages: Messages, text: str) -> list[Span] | None:
        """Borders of every answer in ``text``, the rendered chat; None where they cannot be told for sure."""
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            return []
        if self._around is None:
            self._around = self._probe(messages[: turns[-1] + 1])
        spans: list[Span] = []
        for turn, (start, end) in zip(turns, self._marked_borders(messages, turns, text), strict=True):
            if start is None:
                start = self._length_of_prefix(messages[:turn], text, answer_next=True)
            if end is None:
                end = self._length_of_prefix(messages[: turn + 1], text)
            if start is None or end is None or not (spans[-1][1] if spans else 0) <= start <= end:
                return None
            spans.append((start, self._without_tail(text, start, end)))
        return spans

    def _probe(self, messages: Messages) -> tuple[str, str]:
        """Header and end of turn around the answer that ends this chat; empty where they cannot be told."""
        try:
            before = self.render(messages[:-1])
            asking = self.render(messages[:-1], answer_next=True)
            marked = self.render([*messages[:-1], _marked(messages[-1])])
        except FormatError:
            return "", ""
        header = asking[len(before) :] if asking.startswith(before) else ""
        end = self._special.match(marked.partition(CLOSE)[2].lstrip())
        return header, end[0] if end else ""

    def _marked_borders(self, messages: Messages, turns: list[int], text: str) -> list[tuple[int | None, int | None]]:
        unknown: list[tuple[int | None, int | None]] = [(None, None)] * len(turns)
        assert self._around is not None
        header, end_of_turn = self._around
        if not (header or end_of_turn) or OPEN in text or CLOSE in text:
            return unknown
        try:
            marked = self.render([_marked(each) if each["role"] == "assistant" else each for each in messages])
        except FormatError:
            return unknown
        pieces = re.split(f"[{OPEN}{CLOSE}]", marked)
        if len(pieces) != 2 * len(turns) + 1 or "".join(pieces) != text:
            return unknown
        borders: list[tuple[int | None, int | None]] = []
        place = 0
        for number, turn in enumerate(turns):
            before, answer, after = pieces[2 * number : 2 * number + 3]
            content = messages[turn]["content"]
            leading = content[: len(content) - len(content.lstrip())]
            place += len(before)
            start = None
            if header and before.endswith(header + leading):
                start = place - len(leading)
            elif header and before.endswith(header):
                start = place
            place += len(answer)
            end = None
            if end_of_turn and after.lstrip().startswith(end_of_turn):
                end = place + len(after) - len(after.lstrip()) + len(end_of_turn)
            borders.append((start, end))
        return borders

    def _length_of_prefix(self, messages: Messages, text: str, *, answer_next: bool = False) -> int | None:
        try:
            prefix = self.render(messages, answer_next=answer_next)
        except FormatError:
            return None  # some templates refuse parts of a chat that they take as a whole
        return len(prefix) if text.startswith(prefix) else None

    def _without_tail(self, text: str, start: int, end: int) -> int:
        """The end of a turn without white space behind its last special token."""
        said = text[start:end].rstrip()
        ends = {match.end() for match in self._special.finditer(said)}
        return start + len(said) if len(said) in ends else end


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    """The marks stand within the white space at both ends, which many templates take away."""
    content: str = message["content"]
    core = content.strip()
    leading = content[: len(content) - len(content.lstrip())]
    trailing = content[len(leading) + len(core) :]
    return {**message, "content": f"{leading}{OPEN}{core}{CLOSE}{trailing}"}
