"""Training data as it lies in a JSONL file: every line checked, its form recognised by its keys."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qlora_rs.errors import FormatError

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}

# The prompts of the Alpaca project, for models without a chat template.
# Source: Taori et al., Stanford Alpaca, 2023 (its train.py).
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

FORMS = (
    'one of {"messages": [{"role": ..., "content": ...}]}, {"conversations": [{"from": ..., "value": ...}]}, '
    '{"instruction": ..., "input": ..., "output": ...} and {"text": ...}'
)


@dataclass(frozen=True)
class Record:
    """One line of the data.

    Attributes:
        line: its number, from 1.
        form: ``"messages"``, ``"sharegpt"``, ``"alpaca"`` or ``"text"``.
        messages: the chat (None for plain text).
        prompt: what is given, where there is no chat template (alpaca).
        completion: what has to be said: the output, or the whole text.
    """

    line: int
    form: str
    messages: list[dict[str, Any]] | None
    prompt: str = ""
    completion: str = ""


@dataclass(frozen=True)
class RecordFile:
    """All lines of a file.

    Attributes:
        path: the file.
        records: its lines, blank ones left out.
        sha256: of its bytes.
        ignored: keys that belong to no form, and on how many lines.
    """

    path: Path
    records: list[Record]
    sha256: str
    ignored: dict[str, int]


def read_records(path: Path) -> RecordFile:
    """Read and check every line.

    Raises:
        OSError: the file cannot be read.
        FormatError: it is empty, or a line is not of a known form; file, line and the way out are named.
    """
    records: list[Record] = []
    digest = hashlib.sha256()
    ignored: Counter[str] = Counter()
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            digest.update(raw)
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            record, unused = _Line(path, number).parse(raw)
            records.append(record)
            ignored.update(unused)
    if not records:
        raise FormatError(f"{path}: holds no samples; expected one JSON object a line, {FORMS}")
    return RecordFile(path, records, digest.hexdigest(), dict(ignored))


@dataclass(frozen=True)
class _Line:
    """Turns a line into a record; knows where it is, for messages."""

    path: Path
    number: int

    def fail(self, text: str) -> NoReturn:
        raise FormatError(f"{self.path}, line {self.number}: {text}")

    def parse(self, raw: bytes) -> tuple[Record, list[str]]:
        """The record and the keys that it does not use."""
        try:
            value = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repetition)
        except UnicodeDecodeError as error:
            self.fail(f"byte {error.start} is not UTF-8: convert the file to UTF-8")
        except (ValueError, RecursionError) as error:
            if self.number == 1 and raw.lstrip().startswith(b"["):
                self._fail_array()
            self.fail(f"is not a JSON object ({error}); mend or remove the line")
        if isinstance(value, list) and self.number == 1:
            self._fail_array()
        if not isinstance(value, dict):
            self.fail(f"expected a JSON object, got {_kind(value)}; a sample is {FORMS}")
        if "messages" in value:
            record = self._chat("messages", value["messages"])
            used = {"messages"}
        elif "conversations" in value:
            record = self._chat("sharegpt", value["conversations"])
            used = {"conversations"}
        elif "instruction" in value or "output" in value:
            record = self._alpaca(value)
            used = {"instruction", "input", "output"}
        elif "text" in value:
            record = Record(self.number, "text", None, completion=self._string(value, "text"))
            used = {"text"}
        else:
            keys = ", ".join(map(repr, list(value)[:5])) or "no keys"
            self.fail(f"its form is not known: it has {keys}; a sample is {FORMS}")
        return record, [key for key in value if key not in used]

    def _fail_array(self) -> NoReturn:
        self.fail(f"the file holds one JSON array, not one object a line: jq -c '.[]' {self.path} makes JSONL of it")

    def _chat(self, form: str, turns: Any) -> Record:
        key = "messages" if form == "messages" else "conversations"
        if not isinstance(turns, list):
            self.fail(f"{key!r} is {_kind(turns)}; expected a list of turns")
        if not turns:
            self.fail(f"{key!r} is empty; remove the line")
        read = self._message if form == "messages" else self._sharegpt_turn
        messages = [read(turn, f"{key}[{index}]") for index, turn in enumerate(turns)]
        return Record(self.number, form, messages)

    def _message(self, turn: Any, where: str) -> dict[str, Any]:
        if not isinstance(turn, dict):
            self.fail(f"{where} is {_kind(turn)}; expected an object with 'role' and 'content'")
        role = self._string(turn, "role", where)
        if role not in ROLES:
            self.fail(f"{where} has the role {role!r}; known are {', '.join(ROLES)}")
        self._string(turn, "content", where)
        return turn

    def _sharegpt_turn(self, turn: Any, where: str) -> dict[str, Any]:
        if not isinstance(turn, dict):
            self.fail(f"{where} is {_kind(turn)}; expected an object with 'from' and 'value'")
        speaker = self._string(turn, "from", where)
        if speaker not in SHAREGPT_ROLES:
            self.fail(f"{where} is from {speaker!r}; known are {', '.join(SHAREGPT_ROLES)}")
        return {"role": SHAREGPT_ROLES[speaker], "content": self._string(turn, "value", where)}

    def _alpaca(self, value: dict[str, Any]) -> Record:
        instruction, output = self._string(value, "instruction"), self._string(value, "output")
        given = self._string(value, "input") if value.get("input") is not None else ""
        asked = f"{instruction}\n\n{given}" if given else instruction
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
        prompt = (ALPACA_WITH_INPUT if given else ALPACA).format(instruction=instruction, input=given)
        return Record(self.number, "alpaca", messages, prompt, output)

    def _string(self, value: dict[str, Any], key: str, where: str = "") -> str:
        place = f"{where}.{key}" if where else repr(key)
        if key not in value:
            self.fail(f"{where or 'the object'} has no {key!r}; a sample is {FORMS}")
        text = value[key]
        if not isinstance(text, str):
            self.fail(f"{place} is {_kind(text)}; expected a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            self.fail(f"{place} holds half a surrogate pair at character {error.start}, which is no text: mend it")
        return text


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; json alone would keep the last of two values under one key, and lose the first in silence."""
    value = dict(pairs)
    if len(value) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} is given twice")
    return value


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {str: "a string", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return names[type(value)]
