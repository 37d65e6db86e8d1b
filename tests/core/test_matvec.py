"""Products of few tokens on the CPU, which never dequantize the weight, against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qlora_rs
from qlora_rs import Linear4bit, PackedTensor, QuantSpec, _bridge, _core, ops, reference

USER = (-1.0, -0.35, 0.1, 0.3, 0.5, 1.0)
CODEBOOKS = {"codebook": USER, "codebook of 8 bits": tuple(k / 99 - 1 for k in range(199))}
TYPES = ["nf4", "fp4", "int4", "int8", "dynamic8", *CODEBOOKS]
# Error of a whole product, relative to it or, where its terms cancel, to what |x| |w| / sqrt(columns) makes one expect.
# Where the processor multiplies bfloat16 itself, table entries are rounded to that.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
SIZES = [1, 63, 64, 65, 257]


def spec_of(quant_type: str, block_size: int = 64, double_quant: bool = False) -> QuantSpec:
    codebook = CODEBOOKS.get(quant_type)
    return QuantSpec(quant_type if codebook is None else "codebook", block_size, double_quant, codebook)


def product(packed: PackedTensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    parts = (packed.codes, packed.absmax, packed.absmax_scale, packed.absmax_offset)
    return _bridge.linear_cpu(x, *parts, packed.spec, bias)


def expected(packed: PackedTensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return reference.linear(x, qlora_rs.dequantize(packed, torch.float32), bias)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))


def error(got: torch.Tensor, packed: PackedTensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    want = expected(packed, x, bias)
    weight = qlora_rs.dequantize(packed, torch.float32).double()
    usual = x.double().norm() * weight.norm() / weight.shape[-1] ** 0.5
    return float((got.double() - want).norm() / torch.maximum(want.norm(), usual))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_products_are_those_of_the_dequantized_weight(
    quant_type: str, double_quant: bool, block_size: int, dtype: torch.dtype
) -> None:
    spec = spec_of(quant_type, block_size, double_quant)
    for rows in (1, 19, 65):
        for columns in (*SIZES, 4099):
            packed = qlora_rs.quantize(torch.randn(rows, columns), spec)
            for tokens in (1, 2, 5):
                x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype)
                tolerance = TOLERANCE[dtype] * (1 if rows > 1 else 2)  # a few numbers scatter more than many
                for term in (None, bias):
                    got = product(packed, x, term)
                    assert got.dtype == dtype
                    assert got.shape == (tokens, rows)
                    assert error(got, packed, x, term) < tolerance, (rows, columns, tokens)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "dynamic8"])
def test_every_token_and_row_has_the_bits_that_it_has_alone(quant_type: str, dtype: torch.dtype) -> None:
    packed = qlora_rs.quantize(torch.randn(41, 331), spec_of(quant_type, 64, True))
    x = torch.randn(33, 331).to(dtype)
    # A processor with tiles takes four tokens and more by these, fewer in float32.
    by_tiles = dtype == torch.bfloat16 and packed.spec.bits == 4 and "amx_bf16" in Path("/proc/cpuinfo").read_text()
    for first, last in ((1, 3), (4, 33)) if by_tiles else ((1, 33),):
        together = product(packed, x[:last])
        for tokens in range(first, last):
            assert torch.equal(product(packed, x[:tokens]), together[:tokens]), tokens
    rows = qlora_rs.quantize(torch.randn(41, 331), spec_of(quant_type))
    whole = product(rows, x)
    for row in range(41):
        one = PackedTensor(
            rows.codes[row : row + 1], rows.absmax[row : row + 1], None, None, rows.spec, (1, 331), x.dtype
        )
        assert torch.equal(product(one, x)[:, 0], whole[:, row]), row


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 31])
@pytest.mark.parametrize("quant_type", ["nf4", "dynamic8"])
def test_bits_do_not_depend_on_the_number_of_threads(quant_type: str, dtype: torch.dtype, tokens: int) -> None:
    packed = qlora_rs.quantize(torch.randn(1031, 389), spec_of(quant_type, 64, True))
    x, bias = torch.randn(tokens, 389).to(dtype), torch.randn(1031).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(product(packed, x, bias))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(bits(result), bits(results[0])) for result in results)


PRINT_PRODUCTS = """
import torch, qlora_rs
from qlora_rs import _bridge, QuantSpec
torch.manual_seed(0)
results = []
for columns in (1, 63, 101, 4099):
    for spec in (
        QuantSpec(),
        QuantSpec("int4", 32, False),
        QuantSpec("fp4", 128, False),
        QuantSpec("int8"),
        QuantSpec(codebook=[k / 99 - 1 for k in range(199)]),
    ):
        packed = qlora_rs.quantize(torch.randn(37, columns), spec)
        parts = (packed.codes, packed.absmax, packed.absmax_scale, packed.absmax_offset)
        for tokens in (1, 3, 9):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(37).to(dtype)
                got = _bridge.linear_cpu(x, *parts, spec, bias)
                results.append((packed, x, bias, got))
torch.save(results, __import__("sys").argv[1])
"""


def test_every_instruction_set_is_within_tolerance_and_adds_in_one_order(tmp_path: Path) -> None:
    levels = ["scalar", "avx2", "avx512"]
    levels = levels[: levels.index(_core.simd_level()) + 1]
    runs = []
    for level in levels:
        command = [sys.executable, "-c", PRINT_PRODUCTS, str(tmp_path / level)]
        subprocess.run(command, check=True, env={**os.environ, "QLORA_RS_SIMD": level})
        runs.append(torch.load(tmp_path / level, weights_only=False))
    for level, run in zip(levels, runs, strict=True):
        for (packed, x, bias, got), (*_, scalar) in zip(run, runs[0], strict=True):
            assert error(got, packed, x, bias) < TOLERANCE[x.dtype]
            # Only a processor that multiplies bfloat16 itself, pairs or tiles, adds in another order.
            other = (x.dtype, level, packed.spec.bits) == (torch.bfloat16, "avx512", 4)
            assert other or torch.equal(bits(got), bits(scalar))


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_a_block_of_zeros_adds_nothing_and_a_scale_that_is_no_number_spoils_its_row_alone(quant_type: str) -> None:
    weight = torch.randn(9, 130)
    weight[2, :64] = 0.0
    weight[3] = 0.0
    for poison in (float("nan"), float("inf")):
        packed = qlora_rs.quantize(weight, spec_of(quant_type))
        packed.absmax[5, 1] = poison
        for dtype in TOLERANCE:
            for tokens in (1, 6):
                x = torch.randn(tokens, 130).to(dtype)
                y = product(packed, x)
                assert y[:, 5].isnan().all()
                assert bits(y[:, 5].contiguous()).unique().numel() == 1
                rest = [row for row in range(9) if row != 5]
                assert relative(y[:, rest], expected(packed, x)[:, rest]) < TOLERANCE[dtype]
                assert torch.equal(bits(y[:, 3].contiguous()), torch.zeros_like(bits(y[:, 3].contiguous())))


def test_nan_and_infinity_in_a_token_stay_in_that_token() -> None:
    packed = qlora_rs.quantize(torch.randn(8, 96))
    x = torch.randn(5, 96)
    clean = product(packed, x)
    x[1, 7], x[3, 95] = float("nan"), float("inf")
    y = product(packed, x)
    assert y[1].isnan().all()
    assert not y[3].isfinite().any()
    assert torch.equal(y[[0, 2, 4]], clean[[0, 2, 4]])


def test_every_output_is_written_and_nothing_else() -> None:
    packed = qlora_rs.quantize(torch.randn(67, 129))
    x, memory = torch.randn(7, 129), torch.full((8 + 7 * 67 + 8,), float("nan"))
    y = memory[8:-8]
    _core.linear(
        packed.spec.core(),
        layout=(1, 67, 129),
        codes=(packed.codes.data_ptr(), packed.codes.numel()),
        absmax=(packed.absmax.data_ptr(), packed.absmax.numel()),
        scale=(packed.absmax_scale.data_ptr(), packed.absmax_scale.numel()),
        offset=(packed.absmax_offset.data_ptr(), 1),
        x=(x.data_ptr(), x.numel()),
        bias=None,
        y=(y.data_ptr(), y.numel()),
        dtype=0,
        num_threads=2,
    )
    assert torch.equal(y.view(7, 67), product(packed, x))
    assert memory[:8].isnan().all()
    assert memory[-8:].isnan().all()


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(0, 5, 64), (3, 0, 64), (0, 0, 0), (2, 5, 0)])
def test_empty_products_have_their_shape(tokens: int, rows: int, columns: int) -> None:
    packed = qlora_rs.quantize(torch.randn(rows, columns))
    y = product(packed, torch.randn(tokens, columns), torch.ones(rows))
    assert torch.equal(y, torch.ones(tokens, rows))


@pytest.mark.parametrize("columns", [64, 65])
def test_a_code_that_the_table_lacks_is_an_error_that_locates_it(columns: int) -> None:
    for quant_type, code in (("int4", 15), ("codebook", 6), ("int8", 255), ("codebook of 8 bits", 199)):
        packed = qlora_rs.quantize(torch.randn(5, columns), spec_of(quant_type))
        packed.codes[3, -1] = code if packed.spec.bits == 8 else packed.codes[3, -1] & 0xF0 | code
        with pytest.raises(ValueError, match=f"code {code}"):
            product(packed, torch.randn(2, columns))


def test_wrong_lengths_are_refused() -> None:
    packed = qlora_rs.quantize(torch.randn(5, 64))
    with pytest.raises(ValueError, match="5 by 64"):
        product(packed, torch.randn(2, 64), torch.ones(4))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_layers_use_it_for_few_tokens_and_leave_their_weight_alone(
    quant_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Linear4bit.from_float(torch.nn.Linear(101, 37), spec_of(quant_type, 64, True))
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    most = ops.most_fused_tokens(layer.spec, dtype)
    x = torch.randn(most, 101).to(dtype)
    fused = product(layer.packed(), x, layer.bias.detach().to(dtype))
    monkeypatch.setattr(_bridge, "dequantize", lambda *_: pytest.fail("dequantized"))
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x), fused)
        assert torch.equal(layer(x.view(4, -1, 101)), fused.view(4, -1, 37))
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]), name
    with pytest.raises(pytest.fail.Exception, match="dequantized"):
        layer(torch.randn(most + 1, 101).to(dtype))
