"""What `diff` found, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from qlora_rs.checkpoint.inspection import TensorRow
from qlora_rs.checkpoint.verdicts import PartDifference
from qlora_rs.spec import QuantSpec

STATUSES = ("same", "different", "only_in_a", "only_in_b")


@dataclass(frozen=True)
class TensorDiff:
    """What was found of the tensors of one name.

    Attributes:
        name: full name.
        status: ``"same"``, ``"different"``, ``"only_in_a"`` or ``"only_in_b"``. What is stored in another way is
            different even where all values are equal.
        a: the tensor in A; None where it has none.
        b: the tensor in B.
        parts: what is stored alike, and how much of it differs.
        reasons: what differs besides the data: shape, dtype, quantization.
        differing_values: values that differ; like the next four None where values were not compared: equal bytes,
            different shapes, types that are no floats.
        max_abs_difference: the largest absolute difference of two values.
        norm_a: Frobenius norm of A's values.
        norm_difference: Frobenius norm of the difference.
        nonfinite: values that are NaN or infinite on one side; they are in no other figure but the count.
    """

    name: str
    status: str
    a: TensorRow | None
    b: TensorRow | None
    parts: tuple[PartDifference, ...] = ()
    reasons: tuple[str, ...] = ()
    differing_values: int | None = None
    max_abs_difference: float | None = None
    norm_a: float | None = None
    norm_difference: float | None = None
    nonfinite: int | None = None

    @property
    def relative_error(self) -> float | None:
        """``|B - A| / |A|`` in Frobenius norms; None where values were not compared."""
        return relative_error([self])

    def to_dict(self) -> dict[str, Any]:
        """The same in plain lists and dicts."""
        parts = [{"part": each.part, "differing": each.differing, "total": each.total} for each in self.parts]
        return {**asdict(self), "parts": parts, "relative_error": self.relative_error}


@dataclass(frozen=True)
class DiffReport:
    """What `diff` found; `to_dict` is for programs, ``qlora-rs diff`` prints it for people.

    Attributes:
        a: a folder.
        b: the other one.
        format_a: how A is quantized, as `inspect` says it.
        format_b: how B is.
        spec_a: how A's weights are packed; None unless by this library.
        spec_b: how B's are.
        tensors: in A's order, then those that only B has.
    """

    a: str
    b: str
    format_a: str
    format_b: str
    spec_a: QuantSpec | None
    spec_b: QuantSpec | None
    tensors: tuple[TensorDiff, ...]

    @property
    def same(self) -> bool:
        """Whether both hold the same tensors in the same bytes."""
        return all(tensor.status == "same" for tensor in self.tensors)

    @property
    def relative_error(self) -> float | None:
        """Of all tensors whose values were compared together."""
        return relative_error(self.tensors)

    @property
    def max_abs_difference(self) -> float | None:
        """The largest of all tensors whose values were compared."""
        return max((t.max_abs_difference for t in self.tensors if t.max_abs_difference is not None), default=None)

    def count(self, status: str) -> int:
        """How many tensors have this status."""
        return sum(tensor.status == status for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """The same in plain lists and dicts, as ``--json`` prints it."""
        sides = (("a", self.a, self.format_a, self.spec_a), ("b", self.b, self.format_b, self.spec_b))
        return {
            "same": self.same,
            **{
                key: {"path": path, "format": form, "spec": None if spec is None else spec.to_config()}
                for key, path, form, spec in sides
            },
            "summary": {
                **{status: self.count(status) for status in STATUSES},
                "max_abs_difference": self.max_abs_difference,
                "relative_error": self.relative_error,
            },
            "tensors": [tensor.to_dict() for tensor in self.tensors],
        }


def relative_error(tensors: Iterable[TensorDiff]) -> float | None:
    """``|B - A| / |A|`` of tensors taken together (Frobenius norms); None where no values were compared.

    Infinite where A is zero and B is not.
    """
    compared = [
        (t.norm_difference, t.norm_a) for t in tensors if t.norm_difference is not None and t.norm_a is not None
    ]
    if not compared:
        return None
    distance, norm = (sum(value**2 for value in column) ** 0.5 for column in zip(*compared, strict=True))
    return float(distance / norm) if norm else (0.0 if distance == 0 else float("inf"))
