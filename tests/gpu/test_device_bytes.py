"""Quantize and dequantize on the device against the CPU, which is held against the reference: bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qlora_rs
from qlora_rs import DeviceError, NonFiniteError, PackedTensor, QuantSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODEBOOKS = {"codebook": (-1.0, -0.35, 0.1, 0.3, 0.5, 1.0), "codebook of 8 bits": tuple(k / 99 - 1 for k in range(199))}
TYPES = ["nf4", "fp4", "int4", "int8", "dynamic8", "udynamic8", *CODEBOOKS]
# Rows that end in short blocks, odd rows, experts, one element, and whole blocks only.
SHAPES = [(5, 193), (1, 1), (3, 4096), (65, 64), (130, 257), (2, 3, 96), (3, 70, 256), (300, 192), (4097,)]


def spec_of(quant_type: str, block_size: int, double_quant: bool) -> QuantSpec:
    codebook = CODEBOOKS.get(quant_type)
    return QuantSpec(quant_type if codebook is None else "codebook", block_size, double_quant, codebook)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.element_size()])


def assert_same(ours: PackedTensor, theirs: PackedTensor) -> None:
    for name in ("codes", "absmax", "absmax_scale", "absmax_offset"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.shape == b.shape, name
            assert torch.equal(bits(a).cpu(), bits(b).cpu()), name


def adversarial(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Fresh values each run: zeros of both signs, zero rows, subnormals, huge and tiny scales, values on thresholds."""
    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "little"))
    print("seed", generator.initial_seed())
    weight = torch.randn(shape, generator=generator)
    scale = 2.0 ** torch.randint(-140, 120, (*shape[:-1], 1), generator=generator).float()
    weight = torch.where(torch.rand((*shape[:-1], 1), generator=generator) < 0.4, weight * scale, weight)
    weight[torch.rand(shape, generator=generator) < 0.1] = 0.0
    weight[torch.rand(shape, generator=generator) < 0.05] = -0.0
    table = qlora_rs.reference.NF4
    chosen = torch.rand(shape, generator=generator) < 0.2
    at = torch.randint(0, 15, (int(chosen.sum()),), generator=generator)
    weight[chosen] = (table[at] + table[at + 1]) / 2
    weight = weight * (torch.rand((*shape[:-1], 1), generator=generator) > 0.1)
    weight = weight.to(dtype)
    return torch.where(weight.isfinite(), weight, torch.ones((), dtype=dtype))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 4096])
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_and_values_equal_the_cpus(
    quant_type: str, block_size: int, double_quant: bool, dtype: torch.dtype
) -> None:
    spec = spec_of(quant_type, block_size, double_quant)
    for shape in SHAPES:
        weight = adversarial(shape, dtype)
        cpu = qlora_rs.quantize(weight, spec)
        device = qlora_rs.quantize(weight.cuda(), spec)
        assert device.device.type == "cuda"
        assert_same(device, cpu)
        for out in DTYPES:
            ours, theirs = qlora_rs.dequantize(device, out), qlora_rs.dequantize(cpu, out)
            assert torch.equal(bits(ours).cpu(), bits(theirs)), (shape, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("binades", [0, 5, 11, 13, 20, 30, 60, 200])
def test_doubly_quantized_scales_equal_the_cpus_however_far_they_lie_apart(dtype: torch.dtype, binades: int) -> None:
    # The device adds close scales in whole numbers, others in float64 in any order, the rest one after the other.
    spec = QuantSpec("nf4", 64, True)
    for rows in (257, 1031):
        weight = torch.randn(rows, 192) * 2.0 ** -torch.randint(0, binades + 1, (rows, 1)).float()
        weight[::7] = 0.0
        weight = weight.to(dtype)
        assert_same(qlora_rs.quantize(weight.cuda(), spec), qlora_rs.quantize(weight, spec))


@pytest.mark.parametrize("quant_type", TYPES)
def test_every_code_and_every_scale_byte_decode_as_on_the_cpu(quant_type: str) -> None:
    spec = spec_of(quant_type, 64, True)
    rows, columns = 256, 512
    entries = len(spec.values)
    codes = torch.randint(0, entries, (rows, columns), dtype=torch.uint8)
    stored = codes if spec.bits == 8 else codes[:, ::2] << 4 | codes[:, 1::2]
    absmax = torch.arange(rows * columns // 64).to(torch.uint8).view(rows, -1)
    groups = absmax.numel() // 256
    scale = torch.rand(groups)
    scale[0], scale[1], scale[2] = 0.0, float("nan"), 3e38
    for offset in (0.05, 0.0, -0.7):
        packed = PackedTensor(stored, absmax, scale, torch.tensor([offset]), spec, (rows, columns), torch.bfloat16)
        for out in DTYPES:
            ours = qlora_rs.dequantize(packed.to("cuda"), out)
            assert torch.equal(bits(ours).cpu(), bits(qlora_rs.dequantize(packed, out)))


def test_a_code_outside_the_table_becomes_nan() -> None:
    packed = qlora_rs.quantize(torch.ones(1, 64), QuantSpec("int4", double_quant=False)).to("cuda")
    packed.codes[0, 0] = 0xF0
    weight = qlora_rs.dequantize(packed)
    assert weight[0, 0].isnan()
    assert not weight[0, 1:].isnan().any()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(6, 64), (6, 65)])
def test_nonfinite_weights_raise_the_cpus_message(shape: tuple[int, int], double_quant: bool) -> None:
    weight = torch.randn(shape)
    weight[3, 5], weight[4, 1] = float("nan"), float("-inf")
    spec = QuantSpec(double_quant=double_quant)
    with pytest.raises(NonFiniteError) as cpu:
        qlora_rs.quantize(weight, spec)
    with pytest.raises(NonFiniteError) as device:
        qlora_rs.quantize(weight.cuda(), spec)
    assert str(cpu.value) == str(device.value)


@pytest.mark.parametrize("block_size", [64, 512])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_propagated_nonfinite_blocks_equal_the_cpus(dtype: torch.dtype, double_quant: bool, block_size: int) -> None:
    weight = torch.randn(9, 4096).to(dtype)
    weight[0, 70], weight[1, 3], weight[1, 4] = float("inf"), float("nan"), float("-inf")
    spec = QuantSpec("nf4", block_size, double_quant)
    cpu = qlora_rs.quantize(weight, spec, nonfinite="propagate")
    device = qlora_rs.quantize(weight.cuda(), spec, nonfinite="propagate")
    assert_same(device, cpu)
    for out in DTYPES:
        assert torch.equal(bits(qlora_rs.dequantize(device, out)).cpu(), bits(qlora_rs.dequantize(cpu, out)))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_propagating_does_not_wait_for_the_device() -> None:
    weight = torch.randn(64, 64, device="cuda")
    qlora_rs.quantize(weight, nonfinite="propagate")
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed = qlora_rs.quantize(weight, nonfinite="propagate")
        qlora_rs.dequantize(packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0, 3, 64), (2, 0, 64)])
def test_empty_weights_come_back_empty(shape: tuple[int, ...]) -> None:
    weight = torch.empty(shape)
    packed = qlora_rs.quantize(weight.cuda())
    assert_same(packed, qlora_rs.quantize(weight))
    assert qlora_rs.dequantize(packed).shape == shape


def test_strided_and_unaligned_tensors_give_the_bytes_of_their_copies() -> None:
    base = torch.randn(130, 513, device="cuda").bfloat16()
    for weight in (base.t(), base[:, 1:], base[::2, :512]):
        assert_same(qlora_rs.quantize(weight), qlora_rs.quantize(weight.contiguous().cpu()))
    packed = qlora_rs.quantize(base[:, :512])
    room = torch.empty(packed.codes.numel() + 1, dtype=torch.uint8, device="cuda")
    shifted = room[1:].view(packed.codes.shape).copy_(packed.codes)
    unaligned = PackedTensor(
        shifted, packed.absmax, packed.absmax_scale, packed.absmax_offset, packed.spec, packed.shape, packed.dtype
    )
    assert torch.equal(qlora_rs.dequantize(unaligned), qlora_rs.dequantize(packed))


def test_every_element_of_a_poisoned_output_is_written_run_after_run() -> None:
    for rows in (1, 7, 33, 257):
        weight = torch.randn(rows, 576, device="cuda").bfloat16()
        first = qlora_rs.quantize(weight)
        want = qlora_rs.dequantize(first)
        for _ in range(5):
            # What the allocator hands out next holds these bytes.
            for size in (weight.nbytes, first.codes.nbytes, first.absmax.nbytes):
                torch.full((size,), 0xAB, dtype=torch.uint8, device="cuda")
            again = qlora_rs.quantize(weight)
            assert_same(again, first)
            assert torch.equal(qlora_rs.dequantize(again), want)


def test_more_than_2_to_the_31_elements() -> None:
    rows, columns = (1 << 19) + 3, 4096 + 64
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free device memory")
    weight = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda")
    for part in weight.split(1 << 16):
        part.normal_()
    packed = qlora_rs.quantize(weight)
    plain = qlora_rs.quantize(weight, QuantSpec(double_quant=False))
    ends = [slice(0, 3), slice(rows // 2, rows // 2 + 3), slice(rows - 3, rows)]
    for end in ends:
        want = qlora_rs.quantize(weight[end].cpu(), QuantSpec(double_quant=False))
        assert torch.equal(packed.codes[end].cpu(), want.codes)
        assert torch.equal(plain.absmax[end].cpu(), want.absmax)
    del weight
    out = qlora_rs.dequantize(plain)
    nested = qlora_rs.dequantize(packed)
    for end in ends:
        want = qlora_rs.dequantize(
            PackedTensor(
                plain.codes[end].cpu(), plain.absmax[end].cpu(), None, None, plain.spec,
                (3, columns), torch.bfloat16,
            )
        )  # fmt: skip
        assert torch.equal(out[end].cpu(), want)
        assert (nested[end].cpu() - want).abs().max() < 0.1
    own = plain.absmax.cpu()
    codes, scale, offset = (torch.empty_like(part, device="cpu") for part in
                            (packed.absmax, packed.absmax_scale, packed.absmax_offset))  # fmt: skip
    memory = {"absmax": own, "codes": codes, "scale": scale, "offset": offset}
    qlora_rs._core.double_quantize(
        packed.spec.core(),
        layout=(1, rows, columns),
        num_threads=torch.get_num_threads(),
        **{name: (part.data_ptr(), part.numel()) for name, part in memory.items()},
    )
    assert torch.equal(codes, packed.absmax.cpu())
    assert torch.equal(scale, packed.absmax_scale.cpu())
    assert torch.equal(offset, packed.absmax_offset.cpu())


def test_work_runs_on_the_callers_stream() -> None:
    weight = torch.randn(2048, 2048, device="cuda")
    want = qlora_rs.dequantize(qlora_rs.quantize(weight))
    side = torch.cuda.Stream()
    source = torch.zeros_like(weight)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        source.copy_(weight)
        got = qlora_rs.dequantize(qlora_rs.quantize(source, nonfinite="propagate"))
    side.synchronize()
    assert torch.equal(got, want)


def test_captured_work_is_replayed_on_new_values() -> None:
    qlora_rs.warmup("cuda")
    weight = torch.randn(300, 576, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed = qlora_rs.quantize(weight, nonfinite="propagate")
        out = qlora_rs.dequantize(packed)
    for _ in range(3):
        weight.normal_()
        graph.replay()
        assert_same(packed, qlora_rs.quantize(weight.cpu()))
        assert torch.equal(out.cpu(), qlora_rs.dequantize(qlora_rs.quantize(weight.cpu())))


def test_each_device_computes_on_its_own_memory() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    weight = torch.randn(64, 128)
    for index in range(torch.cuda.device_count()):
        packed = qlora_rs.quantize(weight.to(f"cuda:{index}"))
        assert packed.device.index == index
        assert_same(packed, qlora_rs.quantize(weight))
        assert qlora_rs.dequantize(packed).device.index == index


def test_parts_on_two_devices_are_refused_by_name() -> None:
    packed = qlora_rs.quantize(torch.randn(4, 64), QuantSpec(double_quant=False))
    with pytest.raises(ValueError, match="absmax is on cuda:0, the codes are on cpu"):
        torch.ops.qlora_rs.dequantize(
            packed.codes, packed.absmax.cuda(), None, None, 64, "nf4", 64, None, torch.float32
        )


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_a_forked_child_is_told_why_it_cannot_use_the_device() -> None:
    program = """
import os, torch, qlora_rs
from qlora_rs import _core
qlora_rs.warmup("cuda")
if os.fork() == 0:
    try:
        _core.cuda_warmup(0)
    except qlora_rs.DeviceError as error:
        os._exit(7 if "forked" in str(error) and "spawn" in str(error) else 8)
    os._exit(9)
_, status = os.wait()
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    assert run_python(program).returncode == 7


def test_a_damaged_kernel_file_is_reported_with_the_assemblers_message(tmp_path: Path) -> None:
    program = "import qlora_rs; qlora_rs.warmup('cuda')"
    missing = run_python(program, QLORA_RS_PTX_DIR=str(tmp_path))
    assert "QLORA_RS_PTX_DIR: cannot read" in missing.stderr
    for name in ("dequantize_sm75", "dequantize_sm80"):
        (tmp_path / f"{name}.ptx").write_text(".version 8.0\n.target sm_75\n.address_size 64\nnonsense\n")
    damaged = run_python(program, QLORA_RS_PTX_DIR=str(tmp_path))
    assert damaged.returncode != 0
    assert "could not load the kernels of" in damaged.stderr
    assert "line" in damaged.stderr


def test_an_index_that_no_device_has_is_named() -> None:
    with pytest.raises(DeviceError, match="no CUDA device 63"):
        qlora_rs._core.cuda_warmup(63)
