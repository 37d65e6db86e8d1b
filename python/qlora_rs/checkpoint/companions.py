"""The files beside a model's weights: which of them go along into a folder made from it."""

from __future__ import annotations

import os
from pathlib import Path

from qlora_rs.checkpoint.journal import JOURNAL
from qlora_rs.checkpoint.source import CONFIG, INDEX, Source
from qlora_rs.report import SkippedEntry

# Weights in formats that are not carried along: they would be the source's weights once more.
FOREIGN_SUFFIXES = frozenset(
    (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot")
)
LEFT_OUT_FOLDERS = {".git": "version control", ".cache": "download cache"}


def companion_files(source: Source) -> tuple[list[str], list[SkippedEntry]]:
    """Relative names of the files to carry over (tokenizer, templates, licence), and what stays behind and why."""
    carried: list[str] = []
    left_out: list[SkippedEntry] = []
    root = source.companions_folder()

    def leave(name: str, reason: str, entry: Path) -> None:
        left_out.append(SkippedEntry(name, reason, entry.lstat().st_size if not entry.is_dir() else 0))

    def walk(prefix: str) -> None:
        for name in sorted(os.listdir(root / prefix)):
            relative, entry = prefix + name, root / prefix / name
            if relative in (CONFIG, INDEX) or relative in source.files:
                continue
            if entry.is_dir():
                if entry.is_symlink():
                    leave(relative + "/", "a link to a folder", entry)
                elif name in LEFT_OUT_FOLDERS:
                    leave(relative + "/", LEFT_OUT_FOLDERS[name], entry)
                else:
                    walk(relative + "/")
            elif not entry.is_file():
                leave(relative, "not a regular file", entry)
            elif name.startswith(JOURNAL):
                leave(relative, "the journal of a run that was interrupted", entry)
            elif entry.suffix == ".safetensors":
                leave(relative, "weights that are not part of the model's index", entry)
            elif entry.suffix in FOREIGN_SUFFIXES or name.endswith((".bin.index.json", ".safetensors.index.json")):
                leave(relative, "weights in another form", entry)
            else:
                carried.append(relative)

    walk("")
    return carried, left_out
