"""The samples of a run: held out and trained on, with a report of what was cut and dropped."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from qlora_rs.errors import FormatError
from qlora_rs.train.batches import permutation
from qlora_rs.train.encoding import Encoder, Sample
from qlora_rs.train.records import RecordFile


@dataclass(frozen=True)
class DataReport:
    """What became of the lines of the data.

    Attributes:
        path: the file.
        lines: samples in it.
        forms: how many of each form.
        ignored_keys: keys that belong to no form, and on how many lines.
        training: samples to train on; a run of few steps reads only as many as it needs.
        held_out: samples that are only measured.
        unread: lines that this run has no use for.
        max_length: tokens of the longest sample.
        cut: samples that were longer.
        lost_tokens: tokens cut off from them.
        dropped: lines of samples without a token that counts.
        tokens: of the samples to train on.
        counted_tokens: of them, those that count for the loss.
    """

    path: str
    lines: int
    forms: dict[str, int]
    ignored_keys: dict[str, int]
    training: int
    held_out: int
    unread: int
    max_length: int
    cut: int
    lost_tokens: int
    dropped: tuple[int, ...]
    tokens: int
    counted_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The same in plain lists and dicts, as ``--json`` prints it."""
        return asdict(self)

    def __str__(self) -> str:
        """A line, and one more for each thing that was lost or not used."""
        forms = ", ".join(f"{count:,} as {form}" for form, count in self.forms.items())
        held_out = f", {self.held_out:,} held out" if self.held_out else ""
        unread = f", {self.unread:,} not needed for these steps" if self.unread else ""
        lines = [
            f"{self.path}: {_samples(self.lines)} ({forms}); {self.training:,} to train on{held_out}{unread}",
            f"{self.tokens:,} tokens to train on, {self.counted_tokens:,} of them count for the loss",
        ]
        if self.cut:
            lines.append(
                f"cut {_samples(self.cut)} to {self.max_length:,} tokens (--max-length): "
                f"{self.lost_tokens:,} tokens lost"
            )
        if self.dropped:
            shown = ", ".join(map(str, self.dropped[:5])) + (", ..." if len(self.dropped) > 5 else "")
            lines.append(f"dropped {_samples(len(self.dropped))} without a token that counts: line {shown}")
        if self.ignored_keys:
            keys = ", ".join(f"{key!r} ({count:,})" for key, count in list(self.ignored_keys.items())[:8])
            lines.append(f"keys that are not used: {keys}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Dataset:
    """Encoded samples.

    Attributes:
        training: in the order of the first epoch.
        held_out: only measured.
        report: what became of the lines.
        digest: of all tokens and what counts of them.
    """

    training: list[Sample]
    held_out: list[Sample]
    report: DataReport
    digest: str


def split(lines: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the lines to train on, in the order of the first epoch, and of those held out.

    Raises:
        ValueError: none is left to train on.
    """
    count = max(1, round(fraction * lines)) if fraction else 0
    if count >= lines:
        raise ValueError(
            f"--eval-fraction {fraction} holds out {count} of {lines} samples and leaves none to train on: lower it, "
            "or add data"
        )
    held_out = set(permutation(lines, seed, "held-out")[:count])
    rest = [number for number in permutation(lines, seed, "order", 0) if number not in held_out]
    return rest, sorted(held_out)


def make_dataset(
    file: RecordFile, encoder: Encoder, *, fraction: float, seed: int, max_length: int, needed: int | None
) -> Dataset:
    """Encode the held-out samples, and of the others the first ``needed`` (all of them where it is None).

    Raises:
        FormatError, UnsupportedError: a record cannot be encoded, or no sample has a token that counts.
        ValueError: the held-out share leaves none to train on.
    """
    order, held_out_numbers = split(len(file.records), fraction, seed)
    dropped: list[int] = []

    def encode(number: int) -> Sample | None:
        sample = encoder.encode(file.records[number])
        if sample.counted_tokens:
            return sample
        dropped.append(sample.line)
        return None

    held_out = [sample for number in held_out_numbers if (sample := encode(number)) is not None]
    training: list[Sample] = []
    read = 0
    for number in order:
        if needed is not None and len(training) >= needed:
            break
        read += 1
        if (sample := encode(number)) is not None:
            training.append(sample)
    for samples, what in ((training, "to train on"), (held_out, "held out")):
        if not samples and (what == "to train on" or held_out_numbers):
            raise FormatError(
                f"{file.path}: no sample {what} has a token that counts for the loss within {max_length} tokens: "
                "chats need an assistant's turn within --max-length"
            )
    cut = [sample for sample in (*training, *held_out) if sample.lost]
    report = DataReport(
        path=str(file.path),
        lines=len(file.records),
        forms=dict(Counter(record.form for record in file.records)),
        ignored_keys=file.ignored,
        training=len(training),
        held_out=len(held_out),
        unread=len(order) - read,
        max_length=max_length,
        cut=len(cut),
        lost_tokens=sum(sample.lost for sample in cut),
        dropped=tuple(sorted(dropped)),
        tokens=sum(sample.length for sample in training),
        counted_tokens=sum(sample.counted_tokens for sample in training),
    )
    return Dataset(training, held_out, report, _digest((*training, *held_out)))


def _digest(samples: Iterable[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.length.to_bytes(8, "little"))
        digest.update(sample.ids.numpy().tobytes())
        digest.update(sample.counted.numpy().tobytes())
    return digest.hexdigest()


def _samples(count: int) -> str:
    return f"{count:,} sample{'' if count == 1 else 's'}"
