"""`qlora_rs.train.dataset`: what is held out, trained on, cut and dropped, and that all of it is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_rs.errors import FormatError
from qlora_rs.train.dataset import Dataset, make_dataset, split
from qlora_rs.train.encoding import Encoder
from qlora_rs.train.records import read_records

LONG = "x" * 60


def chat(*turns: str) -> dict[str, Any]:
    return {
        "messages": [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]
    }


def dataset(path: Path, tokenizer: Any, max_length: int = 64, needed: int | None = None, **changes: Any) -> Dataset:
    encoder = Encoder(tokenizer, max_length, model=Path("model"), data=path)
    settings: dict[str, Any] = {"fraction": 0.0, "seed": 0, "max_length": max_length, "needed": needed, **changes}
    return make_dataset(read_records(path), encoder, **settings)


@pytest.mark.parametrize("lines", [2, 7, 100])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5])
def test_the_held_out_samples_are_disjoint_and_the_seed_decides_them(lines, fraction):
    training, held_out = split(lines, fraction, seed=3)
    assert sorted(training + held_out) == list(range(lines))
    assert len(held_out) == max(1, round(fraction * lines))
    assert (training, held_out) == split(lines, fraction, seed=3)
    if lines == 100:
        assert held_out != split(lines, fraction, seed=4)[1]
        assert training != sorted(training)


def test_nothing_is_held_out_unless_asked_for():
    training, held_out = split(9, 0.0, seed=0)
    assert sorted(training) == list(range(9))
    assert held_out == []


@pytest.mark.parametrize(("lines", "fraction"), [(1, 0.5), (2, 0.9)])
def test_a_share_that_leaves_nothing_to_train_on_is_refused(lines, fraction):
    with pytest.raises(ValueError, match=r"--eval-fraction .* leaves none to train on"):
        split(lines, fraction, seed=0)


def test_what_is_cut_and_dropped_is_counted_and_told(write_lines, tokenizer):
    # Without an answer; with an answer behind the cut; with one that is cut in two; short.
    path = write_lines(chat("Hi"), chat(LONG, "no"), chat("Hi", LONG), chat("Hi", "Yes"))
    report = dataset(path, tokenizer).report
    assert (report.lines, report.training, report.dropped) == (4, 2, (1, 2))
    whole = len(tokenizer.apply_chat_template(chat("Hi", LONG)["messages"])["input_ids"])
    short = len(tokenizer.apply_chat_template(chat("Hi", "Yes")["messages"])["input_ids"])
    assert (report.cut, report.lost_tokens) == (1, whole - 64)
    assert report.tokens == 64 + short
    header = len("<") + len("user\nHi") + len("<") + len("\n") + len("<") + len("assistant\n")
    assert report.counted_tokens == 64 - header + len("Yes<")
    text = str(report)
    assert "cut 1 sample to 64 tokens (--max-length)" in text
    assert f"{whole - 64} tokens lost" in text
    assert "dropped 2 samples without a token that counts: line 1, 2" in text


def test_forms_and_unused_keys_are_told(write_lines, tokenizer):
    path = write_lines({**chat("Hi", "Yes"), "source": "me"}, {"text": "Once"})
    text = str(dataset(path, tokenizer).report)
    assert "2 samples (1 as messages, 1 as text); 2 to train on" in text
    assert "keys that are not used: 'source' (1)" in text


def test_a_short_run_encodes_only_what_it_needs_and_says_so(write_lines, tokenizer):
    path = write_lines(*(chat("Hi", str(number)) for number in range(20)))
    part, whole = dataset(path, tokenizer, needed=5), dataset(path, tokenizer)
    assert [each.line for each in part.training] == [each.line for each in whole.training[:5]]
    assert part.report.unread == 15
    assert "15 not needed for these steps" in str(part.report)
    assert whole.report.unread == 0
    assert part.digest != whole.digest


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_data_in_which_nothing_counts_is_refused(write_lines, tokenizer, fraction):
    path = write_lines(chat("Hi"), chat(LONG, "no"), chat("Hi"))
    with pytest.raises(FormatError, match=r"no sample to train on has a token that counts .* within 64 tokens"):
        dataset(path, tokenizer, fraction=fraction)


def test_the_digest_knows_tokens_and_what_counts(write_lines, tokenizer):
    one = dataset(write_lines(chat("Hi", "Yes"), name="1"), tokenizer).digest
    assert one == dataset(write_lines(chat("Hi", "Yes"), name="2"), tokenizer).digest
    assert one != dataset(write_lines(chat("Hi", "Yet"), name="3"), tokenizer).digest
    assert one != dataset(write_lines(chat("Hi", "Yes", "Hi"), name="4"), tokenizer).digest
