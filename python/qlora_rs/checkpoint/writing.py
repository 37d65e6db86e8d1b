"""A whole model folder, written from planned tensors: weights, config.json and the files that go along."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_rs.checkpoint.companions import companion_files
from qlora_rs.checkpoint.folder import copy_file, require_space, write_json
from qlora_rs.checkpoint.journal import Command
from qlora_rs.checkpoint.partial import kept_bytes, partial_folder
from qlora_rs.checkpoint.shards import PlannedShard, write_shards
from qlora_rs.checkpoint.source import CONFIG, Source
from qlora_rs.report import SkippedEntry


@dataclass(frozen=True)
class ModelPlan:
    """What a model folder will hold.

    Attributes:
        shards: its weight files.
        read: makes a tensor when it is due.
        read_bytes: what of the source each tensor takes, in bytes, for those who watch.
        config: ``config.json``.
        metadata: of each weight file.
        index_metadata: of the index, besides the size.
        result: what was found out while a tensor was made, in plain JSON values.
        restore: takes such a result of a tensor that an interrupted run has made.
    """

    shards: Sequence[PlannedShard]
    read: Callable[[str], Tensor]
    read_bytes: Mapping[str, int]
    config: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    index_metadata: Mapping[str, int] = field(default_factory=dict)
    result: Callable[[str], Any] = lambda name: None
    restore: Callable[[str, Any], None] = lambda name, result: None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the weight files."""
        return tuple(shard.file for shard in self.shards)


def write_model(
    source: Source,
    target: Path,
    plan: ModelPlan,
    command: Command,
    *,
    overwrite: bool,
    notes: list[str],
    advance: Callable[[int], None],
) -> list[SkippedEntry]:
    """Write the planned model, with the companions of ``source``, to ``target``, which is absent or whole at any time.

    Args:
        source: where other files come from.
        target: as `resolve_destination` gave it.
        plan: the weights and ``config.json``.
        command: what makes it; the same one resumes it.
        overwrite: replace an existing model once the new one is whole.
        notes: gets what the user should know.
        advance: called with the bytes of the source that are done.

    Returns:
        The files that stay behind.

    Raises:
        UnsupportedError: another command has left an unfinished folder there.
        OSError: the disk is too small, or the system failed; what is finished stays for the same command.
    """
    carried, left_out = companion_files(source)
    needed = plan.nbytes + sum((source.companions_folder() / name).stat().st_size for name in carried)
    require_space(target, needed - kept_bytes(target))
    with partial_folder(target, command, plan.files, overwrite=overwrite, notes=notes) as partial:

        def done(name: str, kept: bool) -> object:
            advance(plan.read_bytes.get(name, 0))
            if kept:
                plan.restore(name, partial.journal.results.get(name))
                return None
            return plan.result(name)

        write_shards(partial, plan.shards, plan.read, plan.metadata, done=done, index_metadata=plan.index_metadata)
        for name in carried:
            copy_file(source.companions_folder() / name, partial.path / name)
        write_json(partial.path / CONFIG, plan.config)
    return left_out
