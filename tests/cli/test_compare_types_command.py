"""``qlora-rs compare-types``: a table, a picture, JSON, and what is refused before the work."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def text(tmp_path, brown_text):
    path = tmp_path / "text.txt"
    path.write_text(brown_text[:300], encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def test_a_row_a_type_and_a_picture(command, tiny_llama, text, tmp_path) -> None:
    from matplotlib.image import imread

    plot = tmp_path / "types.png"
    outcome = command("compare-types", tiny_llama, text, "--type", "nf4", "--type", "nf4+dq", "--plot", plot)
    assert outcome.code == 0, outcome.err
    rows = [line.split()[0] for line in outcome.out.splitlines() if line and line[0].islower()]
    assert rows[:4] == ["type", "bf16", "nf4", "nf4+dq"]
    assert "tokens scored in windows of 512" in outcome.out_words
    picture = imread(plot)
    assert picture.shape[1] > 1000
    assert picture[..., :3].min() < 0.3  # not blank


def test_json_is_one_document(command, tiny_llama, text) -> None:
    outcome = command("compare-types", tiny_llama, text, "--type", "int4", "--max-tokens", 40, "--json")
    document = json.loads(outcome.out)
    assert [row["name"] for row in document["results"]] == ["bf16", "int4"]
    assert (document["tokens"], document["text"], outcome.code) == (39, str(text), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--type", "nf5"], '"nf5"'),
        (["--block-size", "48"], "48"),
        (["--plot", "picture.jpg"], "picture.jpg"),
        (["--max-tokens", "1"], "max-tokens"),
    ],
)
def test_wrong_use_is_exit_code_2(command, tiny_llama, text, arguments, message) -> None:
    outcome = command("compare-types", tiny_llama, text, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err_words
