"""GPTQ folders (AutoGPTQ, GPTQModel, optimum): codes packed along the inputs, zero points along the outputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qlora_rs.checkpoint.foreign import VALUE_DTYPES, FolderReader, ForeignWeight, ReadStored
from qlora_rs.checkpoint.grouped import PERIOD, GroupedWeight, groups_in_words, unpack, words_of
from qlora_rs.checkpoint.source import StoredTensor

METHOD = "gptq"
BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class GptqWeight(GroupedWeight):
    """``qweight`` [in * bits / 32, out], ``qzeros`` [groups, out * bits / 32], ``scales`` [groups, out], ``g_idx``.

    Attributes:
        version: 1 stores zero points less one.
    """

    version: int

    def integers(self, stored: ReadStored, first: int, count: int) -> tuple[Tensor, Tensor | int, Tensor]:
        """See `GroupedWeight.integers`."""
        bits = self.bits
        columns = stored(self.parts["qweight"])[:, first : first + count]
        codes = unpack(columns.T, bits, self.shape[1])
        words = stored(self.parts["qzeros"])[:, first * bits // 32 : words_of(first + count, bits)]
        if self.version == 1 and bits != 3:
            # NOTE: as one sum over the word, because GPTQModel writes it as one difference: where a zero point is 0
            # the field beside it lends a bit, and gets it back only so. AutoGPTQ's files never hold such a field whole.
            words = words + _ONES[bits]
        zeros = unpack(words, bits, count)
        if self.version == 1 and bits == 3:
            zeros = (zeros + 1) & 7
        scales = stored(self.parts["scales"])[:, first : first + count]
        return codes, zeros.T.contiguous(), scales.T.contiguous()


# 1 in each field of a word.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def read_weights(reader: FolderReader) -> dict[str, ForeignWeight]:
    """The weights of a GPTQ folder by name, in the order of its files.

    Raises:
        FormatError: parts are missing, or do not fit together.
        UnsupportedError: a layout of the codes that is not GPTQ's own.
    """
    config = reader.config
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    if config.get("is_marlin_format"):
        layout = "marlin"
    if layout not in VERSIONS:
        raise reader.unsupported(f"GPTQ weights laid out as {layout!r} are not read, only {' and '.join(VERSIONS)}")
    bits = reader.integer("bits")
    if bits not in BITS:
        raise reader.unsupported(f"GPTQ weights of {bits} bits are not read, only {', '.join(map(str, BITS))}")
    weights: dict[str, ForeignWeight] = {}
    for base, parts in reader.groups(PARTS, PARTS[:3]).items():
        weights[f"{base}.weight"] = _read_weight(reader, base, parts, bits, VERSIONS[layout])
    return weights


def _read_weight(
    reader: FolderReader, base: str, parts: dict[str, StoredTensor], bits: int, version: int
) -> GptqWeight:
    qweight, qzeros, scales = (parts[part] for part in PARTS[:3])
    reader.expect_matrix(qweight, ("I32",))
    reader.expect_matrix(scales, tuple(VALUE_DTYPES))
    groups, rows = scales.shape
    varies = bool(reader.config.get("dynamic"))
    if varies and qzeros.shape != (groups, words_of(rows, bits)):
        bits = next((other for other in BITS if qzeros.shape == (groups, words_of(rows, other))), bits)
    g_idx = parts.get("g_idx")
    if g_idx is None and reader.config.get("desc_act"):
        raise reader.error(qweight, f"desc_act asks for {base}.g_idx, which no file holds")
    columns = qweight.shape[0] * 32 // bits
    if g_idx is not None and len(g_idx.shape) == 1:
        columns = min(columns, g_idx.shape[0])
    what = f"{bits} bits of [{rows}, {columns}]"
    reader.expect(qweight, ("I32",), (words_of(columns, bits), rows), what)
    reader.expect(qzeros, ("I32",), (groups, words_of(rows, bits)), what)
    if g_idx is not None:
        reader.expect(g_idx, ("I32", "I64"), (columns,), what)
    if bits == 3 and (rows % PERIOD or columns % PERIOD):
        raise reader.error(qweight, f"3 bits take rows and columns in multiples of {PERIOD}; got [{rows}, {columns}]")
    asked = reader.group_size() or columns
    size = -(-columns // groups) if varies else min(asked, columns)
    expected = -(-columns // size)
    if groups != expected:
        raise reader.error(scales, f"has {groups} groups; {columns} columns in groups of {size} are {expected}")
    order = ", act-order" if reader.config.get("desc_act") else ""
    kind = "symmetric" if reader.config.get("sym", True) else "asymmetric"
    scheme = f"{bits} bits, {groups_in_words(groups, size)}, {kind}{order}, version {version}"
    return GptqWeight(
        name=f"{base}.weight",
        shape=(rows, columns),
        dtype=scales.dtype,
        parts=parts,
        kind=f"int{bits}",
        scheme=scheme,
        row_step=PERIOD,
        source=reader.source,
        bits=bits,
        groups=groups,
        group_size=size,
        version=version,
    )
