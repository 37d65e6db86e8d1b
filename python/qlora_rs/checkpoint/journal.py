"""The journal of an unfinished output folder: which command makes it, and what of it is finished."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qlora_rs import _core
from qlora_rs.checkpoint.source import CONFIG, Source

JOURNAL = ".qlora_rs_journal.jsonl"
VERSION = 3
# What a thing that is finished is known by.
_HASHES = {"tensor": "xxh3_128", "file": "sha256"}
# A line for each of a hundred thousand tensors takes some 20 MB; a longer journal is not ours.
_MAX_BYTES = 1 << 28

Command = Mapping[str, Any]


@dataclass
class Journal:
    """A file of JSON lines: first the command, then a line for each thing that is finished, written as it is.

    Nothing is synced: a line has a checksum of its data, so that what a power cut took is noticed and made again.

    Attributes:
        path: the file.
        command: what makes the folder, as plain JSON values.
        tensors: XXH3 (128 bits, hex) of the bytes of the tensors that were written, by name; where a tensor became
            several, theirs one after the other.
        files: SHA-256 of the source files that were read to their end, by name.
        results: what was found out while a tensor was made, where the command reports that.
        version: of the format; what is finished is known only of `VERSION`.
    """

    path: Path
    command: Command
    tensors: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    @classmethod
    def read(cls, path: Path) -> Journal | None:
        """A journal that a run has left; None where the file is none. A line that was cut off ends it."""
        try:
            if path.is_symlink() or path.stat().st_size > _MAX_BYTES:
                return None
            first, *lines = path.read_bytes().split(b"\n")
        except OSError:
            return None
        head = _parse(first) or {}
        version, command = head.get("format_version"), head.get("command")
        if not isinstance(version, int) or not isinstance(command, dict):
            return None
        journal = cls(path, command, version=version)
        for line in lines if version == VERSION else ():
            entry = _parse(line)
            if entry is None or not journal._take(entry):
                break
        return journal

    def write(self) -> None:
        """Write the file anew, whole or not at all."""
        draft = self.path.with_name(f"{JOURNAL}.draft")
        with open(draft, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in self._entries())
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self.path)

    def add_tensor(self, name: str, checksum: str, result: Any = None) -> None:
        """Append that a tensor is written, and what is to be known of it."""
        self.tensors[name] = checksum
        if result is not None:
            self.results[name] = result
        entry = self._tensor_entry(name)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def differences(self, command: Command) -> list[str]:
        """In what the command that began this differs from ``command``, for people."""
        then, now = _flat(json.loads(json.dumps(self.command))), _flat(json.loads(json.dumps(command)))
        return [
            f"{name} was {json.dumps(then.get(name))}, now {json.dumps(now.get(name))}"
            for name in {**then, **now}
            if then.get(name) != now.get(name)
        ]

    def _take(self, entry: Mapping[str, Any]) -> bool:
        kind = "tensor" if "tensor" in entry else "file"
        name, digest = entry.get(kind), entry.get(_HASHES[kind])
        if not isinstance(name, str) or not isinstance(digest, str):
            return False
        (self.tensors if kind == "tensor" else self.files)[name] = digest
        if "result" in entry:
            self.results[name] = entry["result"]
        return True

    def _tensor_entry(self, name: str) -> dict[str, Any]:
        entry = {"tensor": name, _HASHES["tensor"]: self.tensors[name]}
        return {**entry, "result": self.results[name]} if name in self.results else entry

    def _entries(self) -> Iterator[dict[str, Any]]:
        yield {"format_version": VERSION, "command": dict(self.command)}
        yield from map(self._tensor_entry, self.tensors)
        yield from ({"file": name, _HASHES["file"]: sha256} for name, sha256 in self.files.items())


def describe_command(name: str, source: Source, **options: Any) -> dict[str, Any]:
    """What has to be the same for a run to be resumed: the command, its options, and the state of what it reads.

    Args:
        name: of the command.
        source: the model folder that it reads.
        options: everything else that the output depends on, as plain JSON values.
    """
    # A GGUF file is all there is; what is made of it for a while has another place each time.
    names = source.files if source.beside is not None else (CONFIG, *source.files)
    read = describe_files(source.path, names)
    return {"command": name, "qlora_rs": _core.__version__, "source": read, **options}


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Where a folder is, and the size and time of change of its files."""
    return {"folder": os.path.realpath(folder), **{name: _stamp(folder / name) for name in names}}


def _stamp(path: Path) -> str:
    """Size and time of the last change: another content has the same two only by intent."""
    status = path.stat()
    seconds, nanoseconds = divmod(status.st_mtime_ns, 1_000_000_000)
    changed = datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    return f"{status.st_size} bytes, changed {changed}.{nanoseconds:09} UTC"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name} ") if isinstance(value, dict) else {prefix + name: value}
    return flat
