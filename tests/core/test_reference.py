"""The specification itself: worked examples, derivations, published tables."""

from __future__ import annotations

import hashlib
from statistics import NormalDist

import pytest
import torch

from qlora_rs import QuantSpec, _core, reference


def sha256(values: torch.Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def test_nf4_values_are_the_normalized_quantiles_of_the_paper() -> None:
    offset = 0.9677083
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in torch.linspace(offset, 0.5, 9, dtype=torch.float64).tolist()[:-1]]
    negative = [-quantile(p) for p in torch.linspace(offset, 0.5, 8, dtype=torch.float64).tolist()[:-1]]
    values = torch.tensor(sorted([*positive, 0.0, *negative]), dtype=torch.float64)
    assert (values / values.abs().max() - reference.NF4.double()).abs().max() < 1e-6


def test_dynamic_maps_have_the_reference_implementations_bytes() -> None:
    signed = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    unsigned = "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"
    assert sha256(reference.dynamic_map()) == signed
    assert sha256(reference.dynamic_map(signed=False)) == unsigned
    assert sha256(torch.tensor(_core.dynamic_map(), dtype=torch.float32)) == signed
    assert sha256(torch.tensor(_core.dynamic_map(signed=False), dtype=torch.float32)) == unsigned


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4", "int8", "dynamic8", "udynamic8"])
def test_the_extensions_tables_are_the_references(quant_type: str) -> None:
    spec = QuantSpec(quant_type)
    table = reference.codebook_of(quant_type)
    assert torch.equal(torch.tensor(spec.values, dtype=torch.float32), table)
    assert spec.zero_code == reference.zero_code(table)
    assert spec.bits == (8 if quant_type.endswith("8") else 4)


def test_worked_example_of_the_blockwise_scheme() -> None:
    book = [-1, 0.3, 0.5, 1]
    codes, absmax = reference.quantize_blocks(torch.tensor([10.0, -3, 5, 4]), 64, "codebook", book)
    assert codes.tolist() == [3, 1, 2, 2]
    restored = reference.dequantize_blocks(codes, absmax, 64, torch.float32, "codebook", book)
    assert restored.tolist() == [10, 3, 5, 5]


ROUND_TRIP = {
    "nf4": (0.067746, 0.072798, 0.076831, 0.080337, 0.083547, 0.086610, 0.089592, 0.092547),
    "fp4": (0.088925, 0.096543, 0.102969, 0.108684, 0.114115, 0.119333, 0.124556, 0.129536),
}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("power", range(5, 13))
def test_mean_round_trip_error_on_normal_weights_is_the_published_one(quant_type: str, power: int) -> None:
    from qlora_rs import dequantize, quantize

    weight = torch.randn(512, 4096, generator=torch.Generator().manual_seed(power))
    spec = QuantSpec(quant_type, 2**power, double_quant=False)
    error = (dequantize(quantize(weight, spec)) - weight).abs()
    # Errors of one block depend on its absmax: its own spread, not 1/sqrt(n) of one element, bounds the mean.
    per_block = error.view(-1, 2**power).mean(1)
    sigma = float(per_block.std()) / len(per_block) ** 0.5
    expected = ROUND_TRIP[quant_type][power - 5]
    assert abs(float(error.mean()) - expected) < 7 * sigma + 1e-6
