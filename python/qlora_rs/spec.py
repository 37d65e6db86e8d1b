"""What a quantization is: data type, block size, double quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from qlora_rs import _core
from qlora_rs.errors import FormatError

QUANT_TYPES: tuple[str, ...] = tuple(_core.QUANT_TYPES)


@dataclass(frozen=True)
class QuantSpec:
    """How weights become codes: blockwise absmax quantization to the nearest value of a codebook.

    Args:
        quant_type: ``"nf4"``, ``"fp4"``, ``"int4"``; in 8 bits ``"int8"``, ``"dynamic8"`` (the signed dynamic map,
            finer towards zero), ``"udynamic8"`` (the unsigned one: negative weights become 0); or ``"codebook"``.
        block_size: elements that share one scale, a power of two from 32 to 4096.
        double_quant: store the float32 scales as 8-bit codes in groups of 256 (QLoRA, section 3).
        codebook: 2 to 256 ascending, distinct values in [-1, 1]; up to 16 take a nibble each, more take a byte.

    Raises:
        ValueError: an argument is outside what is listed above.

    Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023; the dynamic maps are those of Dettmers
    et al., 8-bit Optimizers via Block-wise Quantization, 2022.

    >>> QuantSpec()
    QuantSpec(quant_type='nf4', block_size=64, double_quant=True, codebook=None)
    >>> QuantSpec(codebook=[-1, 0.25, 0.5, 1]).bits
    4
    """

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    codebook: Sequence[float] | None = None
    # Kept, because a compiler that traces Python cannot look into the extension's object.
    _bits: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check once; whoever holds a spec holds a valid one."""
        if not isinstance(self.quant_type, str):
            raise TypeError(f"quant_type is one of {', '.join(QUANT_TYPES)}; got {self.quant_type!r}")
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int):
            raise TypeError(f"block_size is an integer; got {self.block_size!r}")
        if not isinstance(self.double_quant, bool):
            raise TypeError(f"double_quant is True or False; got {self.double_quant!r}")
        if self.block_size not in _core.BLOCK_SIZES:
            raise ValueError(f"block_size is one of {', '.join(map(str, _core.BLOCK_SIZES))}; got {self.block_size}")
        if self.codebook is not None:
            if self.quant_type not in ("nf4", "codebook"):
                raise ValueError(
                    f"codebook=... defines the data type; it cannot go with quant_type={self.quant_type!r}"
                )
            object.__setattr__(self, "quant_type", "codebook")
            values = [float(value) for value in self.codebook]
            core = _core.Spec("codebook", self.block_size, self.double_quant, values)
            # float32, as stored: equal specs compare equal whatever the precision they were typed in.
            object.__setattr__(self, "codebook", tuple(core.values))
        object.__setattr__(self, "_bits", self.core().bits)

    def core(self) -> _core.Spec:
        """The same, as the extension's own object."""
        return _core_spec(self)

    @property
    def bits(self) -> int:
        """Bits that one code takes in storage: 4 (a nibble) or 8."""
        return self._bits

    @property
    def values(self) -> tuple[float, ...]:
        """The codebook, ascending (FP4: by code), exactly float32."""
        return tuple(self.core().values)

    @property
    def zero_code(self) -> int:
        """Code of the value nearest zero; what zero blocks and padding hold."""
        return self.core().zero_code

    def describe(self) -> str:
        """One short line, as modules and tables print it."""
        table = f", {len(self.codebook)} values" if self.codebook is not None else ""
        return f"{self.quant_type}{table}, block_size={self.block_size}, double_quant={self.double_quant}"

    def to_config(self) -> dict[str, Any]:
        """The fields of ``config.json``'s ``quantization_config`` that this spec determines."""
        config: dict[str, Any] = {
            "quant_type": self.quant_type,
            "block_size": self.block_size,
            "double_quant": self.double_quant,
        }
        if self.codebook is not None:
            config["codebook"] = list(self.codebook)
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuantSpec:
        """Read what `to_config` wrote.

        Raises:
            FormatError: a field is missing or holds what no spec allows.
        """
        missing = [key for key in ("quant_type", "block_size", "double_quant") if key not in config]
        if missing:
            raise FormatError(f"quantization_config lacks {', '.join(missing)}")
        if (config["quant_type"] == "codebook") != (config.get("codebook") is not None):
            raise FormatError("quantization_config: quant_type 'codebook' goes with a 'codebook' list, and only that")
        try:
            return cls(config["quant_type"], config["block_size"], config["double_quant"], config.get("codebook"))
        except (ValueError, TypeError) as error:
            raise FormatError(f"quantization_config: {error}") from None


@lru_cache(maxsize=256)
def _core_spec(spec: QuantSpec) -> _core.Spec:
    codebook = None if spec.codebook is None else list(spec.codebook)
    return _core.Spec(spec.quant_type, spec.block_size, spec.double_quant, codebook)
