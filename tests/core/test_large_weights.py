"""Weights of more than 2^31 elements: every index beyond 32 bits is hit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qlora_rs
from qlora_rs import Linear4bit, QuantSpec, reference

COLUMNS = 1024
PERIOD = 4099  # rows that repeat, so that a small weight tells what the large one must be
ROWS = (2**31 // COLUMNS // PERIOD + 1) * PERIOD
GIB = 2**30
MEMORY = Path("/proc/meminfo")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small() -> torch.Tensor:
    return torch.randn(PERIOD, COLUMNS, generator=torch.Generator().manual_seed(0)).half()


@pytest.fixture
def large(small: torch.Tensor) -> torch.Tensor:
    kilobytes = next(line.split()[1] for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable:"))
    available = int(kilobytes) * 1024
    if available < 12 * GIB:
        pytest.skip(f"needs 12 GiB of memory; {available / GIB:.1f} are available")
    weight = small.repeat(ROWS // PERIOD, 1)
    assert weight.numel() > 2**31
    return weight


def repeats(large: torch.Tensor, small: torch.Tensor) -> bool:
    return all(torch.equal(part, small) for part in large.split(len(small)))


@pytest.mark.parametrize("quant_type", ["nf4", "dynamic8"])
@pytest.mark.parametrize("experts", [False, True], ids=["2-D", "3-D"])
def test_a_weight_of_more_than_2_31_elements_has_the_codes_and_values_of_its_parts(
    small: torch.Tensor, large: torch.Tensor, quant_type: str, experts: bool
) -> None:
    spec = QuantSpec(quant_type, 64, double_quant=False)
    expected = qlora_rs.quantize(small, spec)
    packed = qlora_rs.quantize(large.view(-1, PERIOD, COLUMNS) if experts else large, spec)
    assert repeats(packed.codes.view(ROWS, -1), expected.codes)
    assert repeats(packed.absmax.view(ROWS, -1), expected.absmax)
    restored = qlora_rs.dequantize(packed).view(ROWS, COLUMNS)
    assert repeats(restored, qlora_rs.dequantize(expected))


def test_doubly_quantized_scales_of_a_large_weight_are_within_a_step_and_its_products_those_of_its_rows(
    small: torch.Tensor, large: torch.Tensor
) -> None:
    absmax = qlora_rs.quantize(small, QuantSpec(double_quant=False)).absmax
    packed = qlora_rs.quantize(large)
    assert packed.absmax_scale is not None
    assert packed.absmax_offset is not None
    assert repeats(packed.codes, qlora_rs.quantize(small).codes)
    assert float(packed.absmax_offset) == pytest.approx(float(absmax.double().mean()), rel=1e-6)
    restored = reference.nested_absmax(packed.absmax.flatten(), packed.absmax_scale, packed.absmax_offset)
    error = (restored.view(-1, PERIOD, COLUMNS // 64) - absmax).abs().max()
    assert error <= 0.0072 * packed.absmax_scale.max()  # half the widest step of the map
    layer = Linear4bit.from_packed(packed)
    x = torch.randn(1, COLUMNS, generator=torch.Generator().manual_seed(1))
    y = layer(x).view(-1, PERIOD)
    weight = layer.packed()
    for expert in (0, len(y) - 1):
        rows = slice(expert * PERIOD, (expert + 1) * PERIOD)
        codes = reference.unpack(weight.codes[rows], COLUMNS)
        scales = restored.view(ROWS, -1)[rows]
        values = reference.dequantize_blocks(codes, scales, 64, torch.float32)
        torch.testing.assert_close(y[expert], reference.linear(x, values)[0].float(), rtol=1e-4, atol=1e-3)
