"""Every kernel on small odd shapes, short enough to run under compute-sanitizer (`make sanitize`)."""

from __future__ import annotations

import copy

import pytest
import torch

import qlora_rs
from qlora_rs import QuantSpec, direct, optim

pytestmark = pytest.mark.sanitize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
USER = (-1.0, -0.35, 0.1, 0.3, 0.5, 1.0)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8", "codebook"])
@pytest.mark.parametrize("shape", [(5, 193), (37, 64), (3, 7, 320), (259, 128), (1, 1)])
def test_quantize_and_dequantize(shape: tuple[int, ...], quant_type: str) -> None:
    for dtype in DTYPES:
        weight = torch.randn(shape).to(dtype)
        for double_quant in (False, True):
            for block_size in (64, 128, 512):
                spec = QuantSpec(quant_type, block_size, double_quant, USER if quant_type == "codebook" else None)
                packed = qlora_rs.quantize(weight.cuda(), spec)
                for out in DTYPES:
                    want = qlora_rs.dequantize(qlora_rs.quantize(weight, spec), out)
                    assert torch.equal(qlora_rs.dequantize(packed, out).cpu(), want)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(17, 64), (48, 320), (259, 128), (33, 1088)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_products(shape: tuple[int, int], double_quant: bool, dtype: torch.dtype) -> None:
    packed = qlora_rs.quantize(torch.randn(shape), QuantSpec(double_quant=double_quant))
    want = qlora_rs.dequantize(packed, torch.float32).double()
    bias, b = torch.randn(shape[0], dtype=dtype), torch.randn(shape[0], 5, dtype=dtype)
    on_device = packed.to("cuda")  # owns the memory that `weight` names
    weight = direct.device_weight(on_device)
    for tokens in (1, 3, 8, 13, 16, 29, 33, 64, 70, 129, 255):
        x, xa = torch.randn(tokens, shape[1], dtype=dtype), torch.randn(tokens, 5, dtype=dtype)
        expected = x.double() @ want.T + bias.double() + 0.5 * xa.double() @ b.double().T
        got = weight.linear(x.cuda(), bias.cuda(), (xa.cuda(), b.cuda(), 0.5)).cpu().double()
        assert (got - expected).norm() / expected.norm() < 6e-3, tokens


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(17, 64), (48, 320), (264, 128), (1033, 192)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_gradients(shape: tuple[int, int], double_quant: bool, dtype: torch.dtype) -> None:
    packed = qlora_rs.quantize(torch.randn(shape), QuantSpec(double_quant=double_quant))
    want = qlora_rs.dequantize(packed, torch.float32).double()
    on_device = packed.to("cuda")  # owns the memory that `weight` names
    weight = direct.device_weight(on_device)
    for tokens in (1, 8, 13, 29, 33, 64, 70, 129, 255):
        grad = torch.randn(tokens, shape[0], dtype=dtype)
        expected = grad.double() @ want
        got = weight.linear_backward(grad.cuda()).cpu().double()
        assert (got - expected).norm() / expected.norm() < 6e-3, tokens


@pytest.mark.parametrize(("columns", "tokens"), [(128, 13), (2432, 29)])
def test_products_with_very_many_rows(columns: int, tokens: int) -> None:
    # Made and judged on the host: initcheck takes what kernels that it does not watch have written for unwritten.
    source, x, xa, b = (
        torch.randn(shape).bfloat16() for shape in ((65_537, columns), (tokens, columns), (tokens, 5), (65_537, 5))
    )
    packed = qlora_rs.quantize(source.cuda())
    want = qlora_rs.dequantize(packed, torch.float32).cpu()
    expected = x.float() @ want.T + 0.5 * xa.float() @ b.float().T
    got = direct.device_weight(packed).linear(x.cuda(), None, (xa.cuda(), b.cuda(), 0.5)).cpu().float()
    assert (got - expected).norm() / expected.norm() < 6e-3


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (optim.AdamW, {}),
        (optim.AdamW8bit, {"min_8bit_size": 300, "capturable": True}),
        (optim.Lion8bit, {"min_8bit_size": 1}),
        (optim.AdEMAMix8bit, {"min_8bit_size": 300}),
        (optim.SGD8bit, {"momentum": 0.9, "min_8bit_size": 300}),
        (optim.SGD, {}),
    ],
)
def test_optimizer_steps(cls: type, options: dict) -> None:
    for dtype in DTYPES:
        cpu = [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in (0, 1, 255, 256, 257, 1031, 4097, 9000)]
        theirs = cls(cpu, max_grad_norm=1.0, **options)
        for twin in cpu:
            twin.grad = torch.randn(twin.shape).to(dtype)
        theirs.step()
        # Everything comes by a copy: what torch's kernels write, initcheck does not see.
        device = [torch.nn.Parameter(twin.detach().cuda()) for twin in cpu]
        ours = cls(device, max_grad_norm=1.0, **options)
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for _ in range(2):
            for param, twin in zip(device, cpu, strict=True):
                twin.grad = torch.randn(twin.shape).to(dtype)
                param.grad = twin.grad.cuda()
            ours.step()
            theirs.step()
        for param, twin in zip(device, cpu, strict=True):
            torch.testing.assert_close(param.cpu(), twin, rtol=2e-2, atol=1e-5)
        assert ours.grad_norm == theirs.grad_norm
