"""`qlora_rs.train.log`: a JSON object a line; what will be done again is taken away."""

from __future__ import annotations

import json

import pytest

from qlora_rs.errors import FormatError
from qlora_rs.train.log import EvalEntry, Log, StepEntry, read_log


def step(number: int) -> StepEntry:
    return StepEntry(number, 1.5, 0.1, 2.0, 10, 4, 0.5)


def test_entries_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "log.jsonl"
    with Log(path) as log:
        log.append(EvalEntry(0, 2.5, 7, 0.25))
        log.append(step(1))
        assert log.sync() == path.stat().st_size
    assert [json.loads(line) for line in path.read_text().splitlines()] == read_log(path)
    assert read_log(path)[0] == {"step": 0, "eval_loss": 2.5, "eval_counted_tokens": 7, "seconds": 0.25}
    assert (read_log(path)[1]["loss"], read_log(path)[1]["learning_rate"]) == (1.5, 0.1)


def test_what_stands_behind_the_kept_bytes_is_taken_away(tmp_path):
    path = tmp_path / "log.jsonl"
    with Log(path) as log:
        log.append(step(1))
        kept = log.sync()
        log.append(step(2))
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')  # as a crash leaves it
    with Log(path, kept) as log:
        log.append(step(2))
    assert [entry["step"] for entry in read_log(path)] == [1, 2]


@pytest.mark.parametrize("content", [None, b"{}\n"])
def test_a_log_that_lost_lines_is_refused(tmp_path, content):
    path = tmp_path / "log.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FormatError, match="the saved state knows of 100"):
        Log(path, 100)


@pytest.mark.parametrize("line", ["{", "[]", "3"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(FormatError, match=f"{path}, line 2"):
        read_log(path)
