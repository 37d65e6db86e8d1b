"""What `analyze` found of a packed model: the figures of its weights, and of the parts that they belong to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from qlora_rs.checkpoint.inspection import TensorRow
from qlora_rs.packed import PackedShapes
from qlora_rs.spec import QuantSpec

# A block is an outlier block where its largest value is beyond this many times its matrix's root mean square: of
# normally distributed weights two in a thousand million are, so that nearly no block is.
OUTLIER_RATIO = 6.0


@dataclass(frozen=True)
class WeightError:
    """How far a packed weight is from the one that it was made from.

    A block's step is the mean distance of neighbouring values of its codebook, times its absmax. Blocks of zeros have
    none and are not in the three figures in steps.

    Attributes:
        mean_abs: mean of ``|packed - source|``.
        rms: root of the mean of its square.
        max_abs: the largest.
        relative: Frobenius norm of the difference over that of the source.
        mean_steps: mean of ``|packed - source| / step``.
        rms_steps: root of the mean of its square.
        max_steps: the largest.
    """

    mean_abs: float
    rms: float
    max_abs: float
    relative: float
    mean_steps: float
    rms_steps: float
    max_steps: float


@dataclass(frozen=True)
class OutlierBlock:
    """A block whose largest value stands far out of its matrix.

    Attributes:
        name: of the weight.
        expert: which matrix of a stack; 0 of a single one.
        row: of the matrix; where the block begins, if it runs over the end of a row.
        block: of the row, from 0; of the whole weight where blocks run over the ends of rows.
        absmax: the block's largest absolute value, as packed.
        ratio: the same over the root mean square of the matrix.
        zeros: share of the block's values that have the code of the value nearest zero.
    """

    name: str
    expert: int
    row: int
    block: int
    absmax: float
    ratio: float
    zeros: float


@dataclass(frozen=True)
class WeightFigures:
    """A packed weight.

    Attributes:
        name: full name.
        shape: logical shape (..., out, in).
        bits_per_weight: storage bits of an element, scales included.
        code_counts: how often each code of the codebook occurs.
        blocks: how many there are.
        outlier_blocks: of these, how many have a largest value beyond `OUTLIER_RATIO` times the matrix's root mean
            square.
        largest_ratio: the largest such ratio.
        median_ratio: that of the median block.
        error: None without a source.
    """

    name: str
    shape: tuple[int, ...]
    bits_per_weight: float
    code_counts: tuple[int, ...]
    blocks: int
    outlier_blocks: int
    largest_ratio: float
    median_ratio: float
    error: WeightError | None

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Part:
    """Tensors that play the same part in every layer, such as ``self_attn.q_proj``.

    Attributes:
        name: the part.
        kind: ``"packed"`` or ``"kept"``.
        tensors: how many.
        parameters: their elements.
        code_bytes: bytes of codes, or of all data of kept tensors.
        scale_bytes: bytes of scales, and what else describes codes.
    """

    name: str
    kind: str
    tensors: int
    parameters: int
    code_bytes: int
    scale_bytes: int

    @property
    def bytes(self) -> int:
        """Of codes and scales together."""
        return self.code_bytes + self.scale_bytes

    @property
    def bits_per_parameter(self) -> float:
        """Storage bits of an element."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Analysis:
    """What `analyze` found.

    Attributes:
        path: the packed folder.
        source: the folder that errors are measured against, or None.
        format: of the packed folder.
        spec: how weights are packed.
        parameters: elements of all tensors.
        total_bytes: bytes of all tensors.
        weights: the packed ones in the order of the files.
        outliers: the outlier blocks with the largest ratios, largest first.
        step_edges: edges of the bins of ``(packed - source) / step``.
        step_counts: values in each bin, what lies outside in the outer ones; empty without a source.
        parts: of the whole model, in the order of the files.
        notes: anything else worth knowing.
    """

    path: str
    source: str | None
    format: str
    spec: QuantSpec
    parameters: int
    total_bytes: int
    weights: tuple[WeightFigures, ...]
    outliers: tuple[OutlierBlock, ...]
    step_edges: tuple[float, ...]
    step_counts: tuple[int, ...]
    parts: tuple[Part, ...]
    notes: tuple[str, ...]

    @property
    def code_counts(self) -> tuple[int, ...]:
        """How often each code occurs in all weights."""
        return tuple(sum(counts) for counts in zip(*(weight.code_counts for weight in self.weights), strict=True))

    @property
    def entropy(self) -> float:
        """Bits of information that a code carries on average, of the 4 or 8 that it takes."""
        counts = [count for count in self.code_counts if count]
        total = sum(counts)
        return sum(count / total * math.log2(total / count) for count in counts)

    @property
    def bits_per_parameter(self) -> float:
        """Storage bits of an element of the whole model."""
        return 8 * self.total_bytes / self.parameters if self.parameters else 0.0

    @property
    def relative_error(self) -> float | None:
        """Of all packed weights together (Frobenius norms); None without a source."""
        squares = norms = 0.0
        for weight in self.weights:
            if weight.error is None or weight.error.relative == 0:
                continue
            squared = weight.error.rms**2 * weight.elements
            squares += squared
            norms += squared / weight.error.relative**2
        if self.source is None:
            return None
        return math.sqrt(squares / norms) if norms else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            **asdict(self),
            "spec": self.spec.to_config(),
            "entropy": self.entropy,
            "bits_per_parameter": self.bits_per_parameter,
            "relative_error": self.relative_error,
            "parts": [
                {**asdict(part), "bytes": part.bytes, "bits_per_parameter": part.bits_per_parameter}
                for part in self.parts
            ],
        }


def part_of(name: str) -> tuple[str, int | None]:
    """What part a tensor plays, and in which layer: its name without numbers, and the first of them.

    >>> part_of("model.layers.17.self_attn.q_proj.weight")
    ('self_attn.q_proj', 17)
    >>> part_of("model.layers.3.mlp.experts.5.up_proj.weight")
    ('mlp.experts.up_proj', 3)
    >>> part_of("model.embed_tokens.weight")
    ('embed_tokens', None)
    """
    words = name.removesuffix(".weight").split(".")
    numbers = [index for index, word in enumerate(words) if word.isdigit()]
    if not numbers:
        return words[-1], None
    rest = [word for word in words[numbers[0] + 1 :] if not word.isdigit()]
    return ".".join(rest) or words[numbers[0] - 1], int(words[numbers[0]])


def parts_of(rows: Iterable[TensorRow], spec: QuantSpec) -> tuple[Part, ...]:
    """The rows of a checkpoint added up by the part that they play."""
    groups: dict[tuple[str, str], list[TensorRow]] = {}
    for row in rows:
        groups.setdefault((part_of(row.name)[0], row.kind), []).append(row)
    parts = []
    for (name, kind), group in groups.items():
        size = sum(row.bytes for row in group)
        codes = size
        if kind == "packed":
            codes = sum(math.prod(PackedShapes.of(row.shape, spec, flat=row.flat).codes) for row in group)
        parts.append(Part(name, kind, len(group), sum(row.elements for row in group), codes, size - codes))
    return tuple(parts)
