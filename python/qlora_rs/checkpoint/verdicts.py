"""What `verify` found: file by file, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from qlora_rs.report import fold
from qlora_rs.spec import QuantSpec

STATUSES = ("same", "rounding", "different", "missing", "extra")


@dataclass(frozen=True)
class PartDifference:
    """How much of a part of a tensor differs.

    Attributes:
        part: ``"codes"``, ``"absmax"``, ``"absmax_scale"`` or ``"absmax_offset"`` of a packed weight, counted in codes
            and scales; ``"bytes"`` of a tensor that is not packed.
        differing: how many differ.
        total: of how many.
        at_border: how many of those that differ belong to a value at the border between two codes, which bitsandbytes
            rounds in its own way; 0 for a native folder.
    """

    part: str
    differing: int
    total: int
    at_border: int = 0

    def __add__(self, other: PartDifference) -> PartDifference:
        """The same part of both."""
        differing, at_border = self.differing + other.differing, self.at_border + other.at_border
        return PartDifference(self.part, differing, self.total + other.total, at_border)

    def __str__(self) -> str:
        """``codes 1 of 5,184``."""
        borders = f" ({self.at_border:,} of them at a border)" if self.at_border else ""
        return f"{self.part} {self.differing:,} of {self.total:,}{borders}"


@dataclass(frozen=True)
class FileHash:
    """SHA-256 of a file of the source, in hex.

    Attributes:
        file: its name.
        recorded: in the packed files; None where they do not name it.
        found: in the source folder; None where it has no such file, or nothing to compare its hash with.
    """

    file: str
    recorded: str | None
    found: str | None

    @property
    def same(self) -> bool:
        """Whether the file is the recorded one."""
        return self.recorded is not None and self.recorded == self.found

    def __str__(self) -> str:
        """What was found, in one line."""
        if self.same:
            return f"{self.file}: the recorded SHA-256"
        if self.recorded is None:
            return f"{self.file}: not recorded"
        if self.found is None:
            return f"{self.file}: recorded, but not in the source folder"
        return f"{self.file}: SHA-256 {self.found}, but {self.recorded} is recorded"


@dataclass(frozen=True)
class TensorVerdict:
    """What was found of a tensor.

    Attributes:
        name: full name.
        kind: ``"packed"`` or ``"kept"``; None where the packed folder lacks it.
        status: ``"same"``; ``"rounding"``: all that differs is at a border, where bitsandbytes rounds in its own way;
            ``"different"``, ``"missing"`` (only the source has it) or ``"extra"`` (only the packed folder has it).
        parts: what was compared.
        reason: why it was not compared, or what explains a difference; else empty.
    """

    name: str
    kind: str | None
    status: str
    parts: tuple[PartDifference, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; ``str(report)`` is for people, `to_dict` for programs.

    Attributes:
        packed: the packed folder.
        source: the folder that it was checked against.
        spec: how the weights are packed.
        files: the source's files by their hashes; empty where none were checked.
        tensors: the tensors; empty where only hashes were checked.
        notes: anything else worth knowing.
    """

    packed: str
    source: str
    spec: QuantSpec | None
    files: tuple[FileHash, ...]
    tensors: tuple[TensorVerdict, ...]
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether the packed folder is what the source gives; by the hashes where only these were checked."""
        if self.tensors:
            return not self.differing
        return all(file.same for file in self.files)

    @property
    def same_files(self) -> bool | None:
        """Whether the source's files are the recorded ones; None where that was not checked."""
        return all(file.same for file in self.files) if self.files else None

    @property
    def differing(self) -> tuple[TensorVerdict, ...]:
        """The tensors that are not the same, nor only rounded in another way."""
        return tuple(tensor for tensor in self.tensors if tensor.status not in ("same", "rounding"))

    def to_dict(self) -> dict[str, Any]:
        """The same in plain lists and dicts, as ``--json`` prints it."""
        statuses = [tensor.status for tensor in self.tensors]
        return {
            "same": self.same,
            "same_files": self.same_files,
            "packed": self.packed,
            "source": self.source,
            "spec": None if self.spec is None else self.spec.to_config(),
            "files": [{**asdict(file), "same": file.same} for file in self.files],
            "summary": {status: statuses.count(status) for status in STATUSES},
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """A few lines; layers that differ alike are folded into one."""
        lines = [f"source {file}" for file in self.files]
        if self.tensors:
            requantized = sum(tensor.kind == "packed" and bool(tensor.parts) for tensor in self.tensors)
            as_bytes = sum(tensor.kind == "kept" and bool(tensor.parts) for tensor in self.tensors)
            how = "" if self.spec is None else f" as {self.spec.describe()}"
            lines.append(f"compared {requantized} weights quantized again{how}, and {as_bytes} tensors as they are")
        told = [tensor for tensor in self.tensors if tensor.status != "same"]
        for name, group in fold(told, lambda each: (each.status, each.reason)):
            counts = ", ".join(
                str(part) for part in add_parts(each for row in group for each in row.parts) if part.differing
            )
            found = "; ".join(filter(None, (counts, group[0].reason)))
            lines.append(f"{group[0].status} {name}{f' ({len(group)})' if len(group) > 1 else ''}: {found}")
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join([*lines, self._conclusion()])

    def _conclusion(self) -> str:
        if not self.tensors:
            if self.same:
                return f"{self.source} is what {self.packed} was made from; the packed tensors were not compared"
            return f"differs: {self.source} is not what {self.packed} was made from: another model or version of it"
        if self.same and any(tensor.status == "rounding" for tensor in self.tensors):
            return (
                f"verified: the tensors of {self.packed} are what quantizing {self.source} gives, but for values at "
                "the border between two codes, which bitsandbytes rounds in its own way"
            )
        if self.same:
            files = "" if self.same_files is not False else ", although the source's files are not the recorded ones"
            made = f"the tensors of {self.packed} are what quantizing {self.source} gives"
            return f"verified: {made}, to the last bit{files}"
        count = f"{len(self.differing)} of {len(self.tensors)} tensors"
        pair = f"{self.packed} was made from"
        if self.same_files:
            return f"differs: {count}; the source is the recorded one, so {self.packed} was changed or damaged"
        if len(self.differing) == len(self.tensors):
            return f"differs: all {len(self.tensors)} tensors: {self.source} is another model than {pair}"
        if self.same_files is False:
            return f"differs: {count}; {self.source} is not what {pair}, or was changed since"
        return f"differs: {count}; {self.packed} or {self.source} was changed, or belongs to another model"


def add_parts(found: Iterable[PartDifference]) -> tuple[PartDifference, ...]:
    """Differences of several tensors or experts added up, by part."""
    sums: dict[str, PartDifference] = {}
    for each in found:
        sums[each.part] = sums[each.part] + each if each.part in sums else each
    return tuple(sums.values())
