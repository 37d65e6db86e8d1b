"""`qlora_rs.train.records`: forms are recognised, and a bad line is told with its place and the way out."""

from __future__ import annotations

import hashlib

import pytest

from qlora_rs.errors import FormatError
from qlora_rs.train.records import read_records

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
MESSAGES = CHAT["messages"]


def test_every_form_is_recognised_by_its_keys(write_lines):
    path = write_lines(
        CHAT,
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
        {"instruction": "Greet", "output": "Hello!"},
        {"instruction": "Greet", "input": "Ann", "output": "Hello, Ann!"},
        {"text": "Once upon a time"},
    )
    records = read_records(path).records
    assert [record.form for record in records] == ["messages", "sharegpt", "alpaca", "alpaca", "text"]
    assert [record.line for record in records] == [1, 2, 3, 4, 5]
    assert records[0].messages == records[1].messages == MESSAGES
    assert records[2].messages == [{"role": "user", "content": "Greet"}, MESSAGES[1]]
    assert records[3].messages[0]["content"] == "Greet\n\nAnn"
    assert "### Instruction:\nGreet\n\n### Input:\nAnn\n\n### Response:\n" in records[3].prompt
    assert "### Input" not in records[2].prompt
    assert (records[4].messages, records[4].prompt, records[4].completion) == (None, "", "Once upon a time")


def test_an_empty_or_null_input_is_none(write_lines):
    path = write_lines(*({"instruction": "Greet", "input": empty, "output": "Hello!"} for empty in ("", None)))
    assert all("### Input" not in record.prompt for record in read_records(path).records)


def test_braces_in_an_instruction_stay_as_they_are(write_lines):
    path = write_lines({"instruction": "Say {input} {0}", "output": "no"})
    assert "Say {input} {0}" in read_records(path).records[0].prompt


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_change_nothing(write_lines):
    path = write_lines(b'\xef\xbb\xbf{"text": "a"}\r', b"", b"  \r", b'{"text": "b"}\r')
    records = read_records(path).records
    assert [(record.line, record.completion) for record in records] == [(1, "a"), (4, "b")]


def test_keys_that_no_form_has_are_counted(write_lines):
    path = write_lines({**CHAT, "id": 1}, {**CHAT, "id": 2, "text": "both"}, CHAT)
    assert read_records(path).ignored == {"id": 2, "text": 1}


def test_the_digest_is_of_the_bytes(write_lines):
    path = write_lines(CHAT, b"", CHAT)
    assert read_records(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("lines", [(), (b"", b"  ")])
def test_a_file_without_samples_is_refused_with_the_forms(write_lines, lines):
    path = write_lines(*lines)
    with pytest.raises(FormatError, match="holds no samples") as caught:
        read_records(path)
    assert str(path) in str(caught.value)
    assert '"messages"' in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"messages": [', "is not a JSON object"),
        (b"{'text': 'a'}", "is not a JSON object"),
        (b'{"text": "a"} {"text": "b"}', "is not a JSON object"),
        (b"[" * 100_000, "is not a JSON object"),
        (b'{"text": "caf\xe9"}', "byte 13 is not UTF-8: convert the file to UTF-8"),
        (b'{"text": "a", "text": "b"}', "the key 'text' is given twice"),
        (b'{"messages": [{"role": "user", "role": "user", "content": "a"}]}', "the key 'role' is given twice"),
        ("a string", "expected a JSON object, got a string; a sample is one of"),
        (7, "expected a JSON object, got a number"),
        ({}, "its form is not known: it has no keys; a sample is one of"),
        ({"prompt": "a", "answer": "b"}, "its form is not known: it has 'prompt', 'answer'; a sample is one of"),
        ({"messages": []}, "'messages' is empty; remove the line"),
        ({"messages": "Hi"}, "'messages' is a string; expected a list of turns"),
        ({"messages": None}, "'messages' is null; expected a list of turns"),
        ({"messages": ["Hi"]}, "messages[0] is a string; expected an object with 'role' and 'content'"),
        ({"messages": [*MESSAGES, {"content": "a"}]}, "messages[2] has no 'role'"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0] has the role 'bot'; known are system, user"),
        ({"messages": [{"role": 1, "content": "a"}]}, "messages[0].role is a number; expected a string"),
        ({"messages": [{"role": "user"}]}, "messages[0] has no 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is null; expected a string"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content is a list; expected a string"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair at character 0"),
        (
            {"conversations": [{"from": "robot", "value": "a"}]},
            "conversations[0] is from 'robot'; known are human",
        ),
        ({"conversations": [{"from": "gpt"}]}, "conversations[0] has no 'value'"),
        ({"conversations": {}}, "'conversations' is an object; expected a list of turns"),
        ({"instruction": "a"}, "the object has no 'output'"),
        ({"output": "a"}, "the object has no 'instruction'"),
        ({"instruction": "a", "output": 4}, "'output' is a number; expected a string"),
        ({"instruction": "a", "input": {}, "output": "b"}, "'input' is an object; expected a string"),
        ({"text": True}, "'text' is true; expected a string"),
    ],
)
def test_a_bad_line_is_told_with_its_place_and_what_was_expected(write_lines, line, expected):
    path = write_lines(CHAT, CHAT, line, CHAT)
    with pytest.raises(FormatError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert expected in str(caught.value)


@pytest.mark.parametrize("lines", [(b'[{"text": "a"}]',), (b"[", b'{"text": "a"}', b"]")])
def test_a_json_array_is_told_how_to_become_lines(write_lines, lines):
    path = write_lines(*lines)
    with pytest.raises(FormatError, match=r"line 1: the file holds one JSON array.*jq -c") as caught:
        read_records(path)
    assert str(path) in str(caught.value)
