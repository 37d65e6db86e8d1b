"""AWQ folders (AutoAWQ, GPTQModel) in the gemm layout: codes and zero points packed along the outputs, in an order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qlora_rs.checkpoint.foreign import VALUE_DTYPES, FolderReader, ForeignWeight, ReadStored
from qlora_rs.checkpoint.grouped import PERIOD, GroupedWeight, groups_in_words, unpack
from qlora_rs.checkpoint.source import StoredTensor

METHOD = "awq"
PARTS = ("qweight", "qzeros", "scales")
# Nibble k of a word holds output 0, 2, 4, 6, 1, 3, 5, 7 of its eight: where each output is found.
_NIBBLE_OF_OUTPUT = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True)
class AwqWeight(GroupedWeight):
    """``qweight`` [in, out / 8], ``qzeros`` [groups, out / 8], ``scales`` [groups, out]."""

    def integers(self, stored: ReadStored, first: int, count: int) -> tuple[Tensor, Tensor | int, Tensor]:
        """See `GroupedWeight.integers`."""
        codes, zeros = (_outputs(stored(self.parts[part])[:, first // 8 : (first + count) // 8]) for part in PARTS[:2])
        return codes, zeros, stored(self.parts["scales"])[:, first : first + count].T.contiguous()


def _outputs(words: Tensor) -> Tensor:
    """Codes by output: int32 [inputs, outputs / 8] -> uint8 [outputs, inputs]."""
    codes = unpack(words, 4, 8 * words.shape[1])
    return codes.view(words.shape[0], -1, 8)[..., _NIBBLE_OF_OUTPUT].reshape(words.shape[0], -1).T.contiguous()


def read_weights(reader: FolderReader) -> dict[str, ForeignWeight]:
    """The weights of an AWQ folder by name, in the order of its files.

    Raises:
        FormatError: parts are missing, or do not fit together.
        UnsupportedError: another layout than gemm, or other than 4 bits.
    """
    layout = reader.config.get("version") or reader.config.get("format") or "gemm"
    if not isinstance(layout, str) or layout.lower() != "gemm":
        raise reader.unsupported(f"AWQ weights laid out as {layout!r} are not read, only 'gemm'")
    bits = reader.integer("bits", 4)
    if bits != 4:
        raise reader.unsupported(f"AWQ weights of {bits} bits are not read, only 4")
    weights: dict[str, ForeignWeight] = {}
    for base, parts in reader.groups(PARTS, PARTS).items():
        weights[f"{base}.weight"] = _read_weight(reader, base, parts)
    return weights


def _read_weight(reader: FolderReader, base: str, parts: dict[str, StoredTensor]) -> AwqWeight:
    qweight, qzeros, scales = (parts[part] for part in PARTS)
    reader.expect_matrix(qweight, ("I32",))
    columns, rows = qweight.shape[0], 8 * qweight.shape[1]
    size = min(reader.group_size() or columns, columns)
    if columns % size:
        raise reader.error(qweight, f"has {columns} columns, which are no whole groups of {size}")
    groups = columns // size
    what = f"4 bits of [{rows}, {columns}] in groups of {size}"
    reader.expect(scales, tuple(VALUE_DTYPES), (groups, rows), what)
    reader.expect(qzeros, ("I32",), (groups, rows // 8), what)
    return AwqWeight(
        name=f"{base}.weight",
        shape=(rows, columns),
        dtype=scales.dtype,
        parts=parts,
        kind="int4",
        scheme=f"4 bits, {groups_in_words(groups, size)}, gemm",
        row_step=PERIOD,
        source=reader.source,
        bits=4,
        groups=groups,
        group_size=size,
    )
