"""What users may pass on the device: any shape, stride, offset and type, each element of a product judged by itself."""

from __future__ import annotations

import os
import random

import pytest
import torch

import qlora_rs
from qlora_rs import Linear4bit, NonFiniteError, PackedTensor, QuantSpec, direct
from qlora_rs.experts import expert_of

HALVES = [torch.bfloat16, torch.float16]
USER = (-1.0, -0.35, 0.1, 0.3, 0.5, 1.0)


def assert_product(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    where: object,
    bias: torch.Tensor | None = None,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> None:
    """Every element against float64, of random operands: a block that is left out, or one row of many, is seen.

    Rounding weights to 8 bits moves a sum by some 2^-10 of the root of its squares' sum: 12 times that is allowed, and
    two roundings of the result.
    """
    x, weight = x.double(), weight.double()
    want, squares = x @ weight.mT, x.square() @ weight.square().mT
    if bias is not None:
        want = want + bias.double()
    if lora is not None:
        xa, b, scale = lora[0].double(), lora[1].double(), lora[2]
        want, squares = want + scale * (xa @ b.mT), squares + scale**2 * (xa.square() @ b.square().mT)
    error = (y.double() - want).abs()
    wrong = ~(error <= 0.012 * squares.sqrt() + 0.005 * want.abs() + 1e-6)
    assert not wrong.any(), (where, int(wrong.sum()), wrong.nonzero()[0].tolist())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4", "codebook"])
def test_fused_products_of_random_shapes_are_right_in_every_element_and_repeat(quant_type: str) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(60):
        spec = QuantSpec(
            quant_type, 2 ** draw.randint(6, 12), draw.random() < 0.6, USER if quant_type == "codebook" else None
        )
        rows, columns = draw.choice([1, 7, 16, 33, 129, 1031, 2113, draw.randint(1, 9000)]), 64 * draw.randint(1, 140)
        tokens, rank = (
            draw.choice([draw.randint(1, 40), draw.randint(1, 256)]),
            draw.choice([0, 1, 3, 17, 64, 100, 256]),
        )
        dtype, scale = draw.choice(HALVES), draw.choice([0.5, -2.0])
        packed = qlora_rs.quantize(torch.randn(rows, columns, device="cuda"), spec)
        x, xa, b = (
            torch.randn(shape, device="cuda").to(dtype) for shape in ((tokens, columns), (tokens, rank), (rows, rank))
        )
        bias = torch.randn(rows, device="cuda").to(dtype) if draw.random() < 0.6 else None
        lora = (xa, b, scale) if rank else None
        torch.full((tokens * rows * 2,), 0xFF, dtype=torch.uint8, device="cuda")  # NaN for what is not written
        weight = direct.device_weight(packed)
        y = weight.linear(x, bias, lora)
        where = (spec, rows, columns, tokens, rank, dtype)
        assert_product(y, x, qlora_rs.dequantize(packed, torch.float32), where, bias, lora)
        for _ in range(2):
            assert torch.equal(y, weight.linear(x, bias, lora)), where


@pytest.mark.parametrize("rows", [8_388_479, 8_388_480, 8_388_481])  # around the most tiles that a grid has
def test_products_with_as_many_rows_as_a_grid_has_places(rows: int) -> None:
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free device memory")
    source = torch.empty(rows, 64, device="cuda", dtype=torch.bfloat16)
    for part in source.split(1 << 18):
        part.normal_()
    packed = qlora_rs.quantize(source)
    del source
    ends = torch.cat([torch.arange(40), torch.arange(rows - 140, rows)]).cuda()
    weight = qlora_rs.dequantize(packed)[ends].float()
    layer = Linear4bit.from_packed(packed)
    for tokens in (1, 12, 29, 33, 65):
        x = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            assert_product(layer(x)[:, ends], x, weight, tokens)


def test_products_with_more_than_2_to_the_31_elements() -> None:
    rows, columns = 40_003, 65_536
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free device memory")
    source = torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16)
    for part in source.split(1000):
        part.normal_()
    packed = qlora_rs.quantize(source)
    del source
    ends = torch.cat([torch.arange(5), torch.arange(32_760, 32_776), torch.arange(rows - 130, rows)]).cuda()
    weight = qlora_rs.dequantize(packed)[ends].float()
    layer = Linear4bit.from_packed(packed)
    for dtype in HALVES:
        for tokens in (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 256):
            x = torch.randn(tokens, columns, device="cuda").to(dtype)
            with torch.no_grad():
                assert_product(layer(x)[:, ends], x, weight, (tokens, dtype))


def test_packed_parts_that_are_views_anywhere_in_memory() -> None:
    for double_quant in (True, False):
        stack = qlora_rs.quantize(torch.randn(5, 37, 192, device="cuda"), QuantSpec(double_quant=double_quant))
        dense = qlora_rs.dequantize(stack, torch.float32)
        layers = [(Linear4bit.from_packed(expert_of(stack, number)), dense[number]) for number in range(5)]
        packed = qlora_rs.quantize(torch.randn(48, 256, device="cuda"), QuantSpec(double_quant=double_quant))
        dense = qlora_rs.dequantize(packed, torch.float32)
        for offset in (1, 2, 3, 4, 8, 12, 16, 20):
            codes, absmax = (
                torch.empty(part.numel() + 64, dtype=part.dtype, device="cuda")[offset : offset + part.numel()]
                .view(part.shape)
                .copy_(part)
                for part in (packed.codes, packed.absmax)
            )
            layers.append((Linear4bit.from_packed(with_parts(packed, codes, absmax)), dense))
        strided = torch.stack([packed.codes, packed.codes], -1)[..., 1]
        layers.append((Linear4bit.from_packed(with_parts(packed, strided, packed.absmax.T.contiguous().T)), dense))
        for layer, weight in layers:
            assert torch.equal(layer.dequantize(torch.float32), weight)
            for tokens in (1, 1, 16, 100):
                x = torch.randn(tokens, layer.in_features, device="cuda", dtype=torch.bfloat16)
                assert_product(layer(x), x, weight, tokens)


def with_parts(packed: PackedTensor, codes: torch.Tensor, absmax: torch.Tensor) -> PackedTensor:
    scale, offset = packed.absmax_scale, packed.absmax_offset
    return PackedTensor(codes, absmax, scale, offset, packed.spec, packed.shape, packed.dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_inputs_at_any_offset_and_biases_of_any_stride_give_the_bits_of_their_copies(dtype: torch.dtype) -> None:
    rows, columns = 130, 256
    layer = Linear4bit.from_packed(qlora_rs.quantize(torch.randn(rows, columns, device="cuda")))
    biases = [
        torch.randn(rows, device="cuda"),
        torch.randn(rows + 1, device="cuda", dtype=dtype)[1:],
        torch.randn(2 * rows, device="cuda", dtype=dtype)[::2],
        torch.randn(1, device="cuda", dtype=dtype).expand(rows),
    ]
    for tokens in (1, 5, 12, 24):
        memory = torch.randn(tokens * columns + 33, device="cuda").to(dtype)
        inputs = [memory[at : at + tokens * columns].view(tokens, columns) for at in (1, 2, 3, 4, 7, 8, 16)]
        inputs += [memory[: tokens * columns].view(columns, tokens).T, inputs[0][:1].expand(tokens, columns)]
        inputs.append(inputs[3].view(1, tokens, 1, 1, columns).permute(2, 1, 0, 3, 4))
        for x in inputs:
            for bias in biases:
                layer.bias = torch.nn.Parameter(bias, requires_grad=False)
                y = layer(x)
                assert y.is_contiguous()
                assert y.shape == (*x.shape[:-1], rows)
                layer.bias = torch.nn.Parameter(bias.to(dtype).clone(), requires_grad=False)
                assert torch.equal(y, layer(x.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("view", ["transposed", "every other column", "cut", "experts"])
def test_nonfinite_values_are_found_in_views_as_on_the_cpu(view: str, dtype: torch.dtype) -> None:
    weight = torch.randn((3, 70, 130) if view == "experts" else (130, 257)).to(dtype)
    weight[(1, 3, 8) if view == "experts" else (129, 8)] = float("nan")
    cut = {
        "transposed": lambda w: w.T,
        "every other column": lambda w: w[:, ::2],
        "cut": lambda w: w[:, 1:9],
        "experts": lambda w: w,
    }[view]
    for spec in (QuantSpec(), QuantSpec("fp4", 512, False), QuantSpec("int8", 32)):
        told = []
        for each in (cut(weight), cut(weight.cuda())):
            with pytest.raises(NonFiniteError) as error:
                qlora_rs.quantize(each, spec)
            told.append(str(error.value))
        assert told[0] == told[1]
        cpu, device = (qlora_rs.quantize(cut(w), spec, nonfinite="propagate") for w in (weight, weight.cuda()))
        assert torch.equal(device.codes.cpu(), cpu.codes)
        ours, theirs = qlora_rs.dequantize(device), qlora_rs.dequantize(cpu)
        assert torch.equal(ours.cpu().isnan(), theirs.isnan())
        assert torch.equal(ours.cpu().nan_to_num(), theirs.nan_to_num())
