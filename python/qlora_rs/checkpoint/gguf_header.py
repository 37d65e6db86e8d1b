"""The header of a GGUF file, walked before gguf-py reads it: no count or length in it may lead beyond the file."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

from qlora_rs.errors import FormatError, UnsupportedError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Widths in bytes of the scalar types, by their numbers; 8 is a string, 9 an array.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
# Dimensions that a tensor may have in the format.
_MAX_DIMENSIONS = 4
_MAX_NESTING = 4
# What is shown of a name in a message.
_SHOWN_BYTES = 100


def check_header(path: Path) -> None:
    """Raise unless ``path`` begins with a whole GGUF header.

    gguf-py believes what a file says of itself, and would fill the memory with what a damaged one claims to hold.

    Raises:
        FormatError: it does not.
        UnsupportedError: a version that is not read, or numbers in the order of other machines.
        OSError: the system failed.
    """
    with open(path, "rb", buffering=1 << 20) as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise FormatError(f"{path}: does not begin with {MAGIC.decode()!r}, so it is no GGUF file")
        _Walk(path, file).all()


class _Walk:
    """A position in the header, and what is read there."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.at = path, file, len(MAGIC)
        self.size = os.fstat(file.fileno()).st_size

    def all(self) -> None:
        """Walk to the end of the header."""
        version = self._number("<I", "the version")
        if version & 0xFFFF == 0:
            raise UnsupportedError(f"{self.path}: is written for big-endian machines; convert it for this one first")
        if version not in VERSIONS:
            raise UnsupportedError(f"{self.path}: is GGUF version {version}; versions 2 and 3 are read")
        tensors = self._number("<Q", "the number of tensors")
        fields = self._number("<Q", "the number of fields")
        # The shortest field takes 13 bytes, the shortest tensor 24: a larger count cannot be true.
        self._room(13 * fields + 24 * tensors, f"{fields} fields and {tensors} tensors")
        for number in range(fields):
            name = self._string(f"the name of field {number}")
            self._value(self._number("<I", f"the type of {name!r}"), name, 0)
        for number in range(tensors):
            name = self._string(f"the name of tensor {number}")
            dimensions = self._number("<I", f"the dimensions of {name!r}")
            if dimensions > _MAX_DIMENSIONS:
                raise self._error(
                    f"tensor {name!r} has {dimensions} dimensions; at most {_MAX_DIMENSIONS} are possible"
                )
            self._skip(8 * dimensions + 12, f"what {name!r} is")

    def _value(self, kind: int, name: str, depth: int) -> None:
        if kind == _STRING:
            self._string(f"field {name!r}")
        elif kind == _ARRAY:
            inner = self._number("<I", f"the type in {name!r}")
            count = self._number("<Q", f"the length of {name!r}")
            if inner in _WIDTHS:
                self._skip(_WIDTHS[inner] * count, f"the {count} values of {name!r}")
                return
            if depth == _MAX_NESTING:
                raise self._error(f"field {name!r} holds arrays in arrays, {_MAX_NESTING} deep and more")
            self._room(8 * count, f"the {count} values of {name!r}")
            for _ in range(count):
                self._value(inner, name, depth + 1)
        elif kind in _WIDTHS:
            self._skip(_WIDTHS[kind], f"field {name!r}")
        else:
            raise self._error(f"field {name!r} has type {kind}, which the format does not know")

    def _string(self, what: str) -> str:
        length = self._number("<Q", f"the length of {what}")
        self._room(length, what)
        shown = self._read(min(length, _SHOWN_BYTES), what)
        self._skip(length - len(shown), what)
        return shown.decode("utf-8", "replace")

    def _number(self, form: str, what: str) -> int:
        return int(struct.unpack(form, self._read(struct.calcsize(form), what))[0])

    def _read(self, size: int, what: str) -> bytes:
        self._room(size, what)
        content = self.file.read(size)
        if len(content) < size:
            raise self._error(f"{what}: the file has become shorter")
        self.at += size
        return content

    def _skip(self, size: int, what: str) -> None:
        self._room(size, what)
        if size:
            self.file.seek(size, os.SEEK_CUR)
            self.at += size

    def _room(self, size: int, what: str) -> None:
        if size > self.size - self.at:
            raise self._error(f"{what}: {size} bytes are claimed, {self.size - self.at} are left")

    def _error(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: at byte {self.at}: {what}: the file is cut off or damaged")
