"""What quantizing a model did: which weights were packed, which stayed and why, bytes before and after."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

Row = TypeVar("Row")

# Control characters but for line ends and tabs, and the bytes of file names that are no UTF-8, as Python holds them.
_SPELLED = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
_SPELLED |= {
    code: f"\\x{code & 0xFF:02x}" if 0xDC80 <= code < 0xDD00 else f"\\u{code:04x}" for code in range(0xD800, 0xE000)
}


def as_text(name: str) -> str:
    """A name out of a file, or of one, for people: what is no letter is spelled out, and commands no terminal.

    >>> as_text("a\\x1b[2J"), as_text("caf\\udce9")
    ('a\\\\x1b[2J', 'caf\\\\xe9')
    """
    return name.translate(_SPELLED)


@dataclass(frozen=True)
class PackedEntry:
    """A weight that was quantized.

    Attributes:
        name: full name of the tensor.
        shape: logical shape (out, in) or (experts, out, in).
        dtype: what was quantized: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        spec: how, in one line.
        bytes_before: bytes of the float weight.
        bytes_after: bytes of codes and scales.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class SkippedEntry:
    """What stayed as it was (or, for a file, behind), and why."""

    name: str
    reason: str
    bytes: int


@dataclass(frozen=True)
class QuantizeReport:
    """Nothing is left out of it in silence; ``str(report)`` is for people, `to_dict` for programs.

    Attributes:
        packed: weights that were quantized.
        skipped: tensors that stayed as they were.
        bytes_before: bytes of all tensors, before.
        bytes_after: bytes of all tensors, after.
        left_out: files of the source folder that were not carried over (files to files only).
        notes: anything else worth knowing.
    """

    packed: tuple[PackedEntry, ...]
    skipped: tuple[SkippedEntry, ...]
    bytes_before: int
    bytes_after: int
    left_out: tuple[SkippedEntry, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same in plain lists and dicts, as ``--json`` prints it."""
        return asdict(self)

    def __str__(self) -> str:
        """A few lines, repeated layers folded into one."""
        before = sum(entry.bytes_before for entry in self.packed)
        after = sum(entry.bytes_after for entry in self.packed)
        lines = [
            f"packed {len(self.packed)} weights: {format_bytes(before)} -> {format_bytes(after)}; "
            f"all tensors: {format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)}"
        ]
        if self.packed:
            lines.append(f"  as {', '.join(sorted({entry.spec for entry in self.packed}))}")
        lines += [*_reason_lines("kept", self.skipped), *left_out_lines(self.left_out)]
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)


def left_out_lines(entries: Iterable[SkippedEntry]) -> list[str]:
    """A line for each kind of files that were not carried over."""
    return _reason_lines("left out", entries)


def _reason_lines(title: str, entries: Iterable[SkippedEntry]) -> list[str]:
    return [
        f"{title} {name} ({format_bytes(sum(entry.bytes for entry in group))}): {group[0].reason}"
        for name, group in fold(entries, lambda entry: entry.reason)
    ]


def format_bytes(count: int) -> str:
    """A size in decimal units with three significant digits.

    >>> format_bytes(269_030_528)
    '269 MB'
    """
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    if units[0] == "B" or value >= 99.95:
        return f"{value:.0f} {units[0]}"
    return f"{value:.{1 if value >= 9.995 else 2}f} {units[0]}"


_UNITS = {"": 1, **{f"{p}B": 1000**i for i, p in enumerate(["", "K", "M", "G", "T"])}}
_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate(["", "K", "M", "G", "T"]) if i}


def parse_bytes(size: int | str) -> int:
    """A size as people write it, in bytes; units are decimal (``GB``) or binary (``GiB``).

    Raises:
        ValueError: not a size.

    >>> parse_bytes("24GiB"), parse_bytes("1.5 MB"), parse_bytes(4096)
    (25769803776, 1500000, 4096)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = match and _UNITS.get(match[2].upper())
    if not match or not unit:
        raise ValueError(f"expected a size such as '24GiB', '500MB' or a number of bytes, got {size!r}")
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def fold(rows: Iterable[Row], alike: Any = lambda row: None) -> list[tuple[str, list[Row]]]:
    """Group rows (with a ``name``) that differ in numbers between dots only and have equal ``alike(row)``.

    >>> rows = [SkippedEntry(f"layers.{i}.norm", "1-D", 2) for i in range(30)]
    >>> [name for name, _ in fold(rows)]
    ['layers.0-29.norm']
    """
    groups: dict[Hashable, list[Any]] = {}
    for row in rows:
        parts = tuple("" if part.isdigit() else part for part in _name(row).split("."))
        groups.setdefault((parts, alike(row)), []).append(row)
    folded = []
    for group in groups.values():
        columns = zip(*(_name(row).split(".") for row in group), strict=True)
        folded.append((".".join(_numbers(set(column)) for column in columns), group))
    return folded


def _name(row: Any) -> str:
    return str(row.name)


def _numbers(parts: set[str]) -> str:
    """``{"0", "1", "2", "7"}`` -> ``0-2,7``."""
    if len(parts) == 1:
        return parts.pop()
    runs: list[list[int]] = []
    for number in sorted(map(int, parts)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return re.sub(r"\b(\d+)-\1\b", r"\1", ",".join(f"{first}-{last}" for first, last in runs))
