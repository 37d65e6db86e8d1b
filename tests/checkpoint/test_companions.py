"""What goes along with a model's weights, and what stays behind and why."""

from __future__ import annotations

import os

from qlora_rs.checkpoint.companions import companion_files
from qlora_rs.checkpoint.source import open_source

CARRIED = ["LICENSE", "chat_template.jinja", "nested/deep/vocab.txt", "tokenizer.json"]
LEFT = {
    ".qlora_rs_journal.jsonl": "the journal of a run that was interrupted",
    ".cache/": "download cache",
    ".git/": "version control",
    "elsewhere/": "a link to a folder",
    "extra.safetensors": "weights that are not part of the model's index",
    "model.gguf": "weights in another form",
    "nested/pytorch_model.bin": "weights in another form",
    "pipe": "not a regular file",
    "dangling": "not a regular file",
    "pytorch_model.bin.index.json": "weights in another form",
    "other.safetensors.index.json": "weights in another form",
}


def test_every_file_is_carried_or_left_out_with_its_reason(make_model, tmp_path) -> None:
    folder = make_model(shards=2)
    links = {"elsewhere/", "dangling", "pipe"}
    for name in [*CARRIED, *(name for name in LEFT if name not in links)]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
            (path / "content").write_text("x")
        else:
            path.write_text("xyz")
    (tmp_path / "outside").mkdir()
    (folder / "elsewhere").symlink_to(tmp_path / "outside")
    (folder / "dangling").symlink_to(tmp_path / "absent")
    os.mkfifo(folder / "pipe")
    carried, left_out = companion_files(open_source(folder))
    assert carried == CARRIED
    assert {entry.name: entry.reason for entry in left_out} == LEFT
    assert {entry.name: entry.bytes for entry in left_out}["model.gguf"] == 3


def test_a_link_to_a_file_is_carried_as_its_content(make_model, tmp_path) -> None:
    folder = make_model()
    (tmp_path / "LICENSE").write_text("free")
    (folder / "LICENSE").symlink_to(tmp_path / "LICENSE")
    assert companion_files(open_source(folder)) == (["LICENSE"], [])
