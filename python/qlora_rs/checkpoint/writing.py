"""A whole model folder, written from planned tensors: weights, config.json and the files that go along."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_rs.checkpoint.companions import companion_files
from qlora_rs.checkpoint.folder import copy_file, partial_folder, require_space, write_json
from qlora_rs.checkpoint.shards import PlannedShard, write_shards
from qlora_rs.checkpoint.source import CONFIG, Source
from qlora_rs.report import SkippedEntry


@dataclass(frozen=True)
class ModelPlan:
    """What a model folder will hold.

    Attributes:
        shards: its weight files.
        read: makes a tensor when it is due.
        config: ``config.json``.
        metadata: of each weight file.
        index_metadata: of the index, besides the size.
    """

    shards: Sequence[PlannedShard]
    read: Callable[[str], Tensor]
    config: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    index_metadata: Mapping[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the weight files."""
        return tuple(shard.file for shard in self.shards)


def write_model(
    source: Source, target: Path, plan: ModelPlan, *, overwrite: bool, notes: list[str]
) -> list[SkippedEntry]:
    """Write the planned model, with the companions of ``source``, to ``target``, which is absent or whole at any time.

    Args:
        source: where other files come from.
        target: as `resolve_destination` gave it.
        plan: the weights and ``config.json``.
        overwrite: replace an existing model once the new one is whole.
        notes: gets what the user should know.

    Returns:
        The files that stay behind.

    Raises:
        OSError: the disk is too small, or the system failed; what was written so far is removed.
    """
    carried, left_out = companion_files(source)
    require_space(target, plan.nbytes + sum((source.path / name).stat().st_size for name in carried))
    with partial_folder(target, overwrite, notes) as folder:
        write_shards(folder, plan.shards, plan.read, plan.metadata, plan.index_metadata)
        for name in carried:
            copy_file(source.path / name, folder / name)
        write_json(folder / CONFIG, plan.config)
    return left_out
