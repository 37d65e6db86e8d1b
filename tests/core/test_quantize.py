"""`quantize` and `dequantize` against the reference, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qlora_rs
from qlora_rs import NonFiniteError, PackedTensor, QuantSpec, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
USER = (-1.0, -0.35, 0.1, 0.3, 0.5, 1.0)
# No zero, and finer towards it, so that some thresholds share a sign, exponent and six bits of the mantissa.
USER_8_BITS = tuple(sign * (k / 100) ** 2 for sign in (-1, 1) for k in range(1, 101)[::sign])
CODEBOOKS = {"codebook": USER, "codebook of 8 bits": USER_8_BITS, "codebook of 2 bits": (-1.0, 0.3, 0.5, 1.0)}
TYPES = ["nf4", "fp4", "int4", "int8", "dynamic8", "udynamic8", *CODEBOOKS]


def spec_of(quant_type: str, block_size: int = 64, double_quant: bool = False) -> QuantSpec:
    codebook = CODEBOOKS.get(quant_type)
    return QuantSpec(quant_type if codebook is None else "codebook", block_size, double_quant, codebook)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.element_size()])


def reference_packed(weight: torch.Tensor, spec: QuantSpec) -> PackedTensor:
    codes, absmax = reference.quantize_blocks(weight, spec.block_size, spec.quant_type, spec.codebook)
    stored = codes.to(torch.uint8) if spec.bits == 8 else reference.pack(codes, spec.zero_code)
    if not spec.double_quant:
        return PackedTensor(stored, absmax, None, None, spec, tuple(weight.shape), weight.dtype)
    experts = absmax.reshape(-1, *absmax.shape[-2:]) if absmax.ndim > 2 else absmax[None]
    parts = [reference.double_quantize(expert) for expert in experts]
    lead = weight.shape[:-2]
    return PackedTensor(
        stored,
        torch.stack([p[0] for p in parts]).view(absmax.shape),
        torch.stack([p[1] for p in parts]).view(*lead, -1),
        torch.cat([p[2] for p in parts]).view(*lead) if lead else parts[0][2],
        spec,
        tuple(weight.shape),
        weight.dtype,
    )


def assert_same(ours: PackedTensor, theirs: PackedTensor) -> None:
    for name in ("codes", "absmax", "absmax_scale", "absmax_offset"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.shape == b.shape, name
            assert torch.equal(bits(a), bits(b)), name


def adversarial(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal values with zeros, whole zero rows, subnormals, huge and tiny scales, and values on thresholds."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=g)
    scale = 2.0 ** torch.randint(-140, 120, (*shape[:-1], 1), generator=g).float()
    weight = torch.where(torch.rand(shape[:-1], generator=g)[..., None] < 0.4, weight * scale, weight)
    weight[torch.rand(shape, generator=g) < 0.1] = 0.0
    weight[torch.rand(shape, generator=g) < 0.05] = -0.0
    midpoints = (reference.NF4[:-1] + reference.NF4[1:]) / 2
    chosen = torch.rand(shape, generator=g) < 0.2
    weight[chosen] = midpoints[torch.randint(0, 15, (int(chosen.sum()),), generator=g)]
    weight = weight.to(dtype)
    if dtype == torch.float16:
        weight = weight.clamp(-60000, 60000)
    return weight.nan_to_num(0, 1, -1)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TYPES),
    st.sampled_from([32, 64, 128, 4096]),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(0, 3), st.integers(0, 19), st.sampled_from([0, 1, 2, 31, 63, 64, 65, 127, 191, 257])),
    st.integers(0, 2**31),
)
def test_packed_bytes_equal_the_reference(
    quant_type: str,
    block_size: int,
    double_quant: bool,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    seed: int,
) -> None:
    spec = spec_of(quant_type, block_size, double_quant)
    dimensions = shape if shape[0] != 1 else shape[1:]
    weight = adversarial(dimensions, dtype, seed)
    packed = qlora_rs.quantize(weight, spec)
    if weight.numel():
        assert_same(packed, reference_packed(weight, spec))
    restored = qlora_rs.dequantize(packed)
    assert restored.shape == weight.shape
    assert restored.dtype == dtype


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantized_bits_equal_the_reference(quant_type: str, out: torch.dtype, double_quant: bool) -> None:
    spec = spec_of(quant_type, 32, double_quant)
    weight = adversarial((23, 101), torch.float32, 5)
    packed = qlora_rs.quantize(weight, spec)
    absmax = packed.absmax
    if packed.absmax_scale is not None:
        absmax = reference.nested_absmax(absmax, packed.absmax_scale, packed.absmax_offset)
    codes = packed.codes.long() if spec.bits == 8 else reference.unpack(packed.codes, 101)
    expected = reference.dequantize_blocks(codes, absmax, 32, out, spec.quant_type, spec.codebook)
    assert torch.equal(bits(qlora_rs.dequantize(packed, out)), bits(expected))


def test_double_quantization_over_several_groups_and_experts_equals_the_reference() -> None:
    for shape in ((3, 41, 2048), (700, 127), (1, 70001)):
        weight = adversarial(shape, torch.float32, 11)
        spec = spec_of("nf4", 32, True)
        assert_same(qlora_rs.quantize(weight, spec), reference_packed(weight, spec))


def test_a_one_dimensional_weight_is_one_row() -> None:
    weight = torch.randn(101, generator=torch.Generator().manual_seed(1))
    row = qlora_rs.quantize(weight[None], spec_of("nf4"))
    assert torch.equal(qlora_rs.quantize(weight, spec_of("nf4")).codes, row.codes[0])


def test_strided_input_gives_the_bytes_of_its_contiguous_copy() -> None:
    weight = torch.randn(96, 70).T
    assert_same(qlora_rs.quantize(weight), qlora_rs.quantize(weight.contiguous()))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    weight = torch.randn(257, 1031, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            packed = qlora_rs.quantize(weight)
            results.append((packed, qlora_rs.dequantize(packed)))
    finally:
        torch.set_num_threads(before)
    for packed, restored in results[1:]:
        assert_same(packed, results[0][0])
        assert torch.equal(bits(restored), bits(results[0][1]))


def test_flush_to_zero_in_the_caller_changes_nothing() -> None:
    weight = torch.full((3, 65), 1e-41)
    expected = qlora_rs.quantize(weight, spec_of("nf4"))
    try:
        torch.set_flush_denormal(True)
        packed = qlora_rs.quantize(weight, spec_of("nf4"))
        restored = qlora_rs.dequantize(packed)
    finally:
        torch.set_flush_denormal(False)
    assert_same(packed, expected)
    assert torch.equal(bits(restored), bits(weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_weights_raise_with_count_and_first_index(dtype: torch.dtype) -> None:
    weight = torch.ones(5, 67, dtype=dtype)
    weight[3, 2] = float("nan")
    weight[4, 66] = float("-inf")
    with pytest.raises(NonFiniteError, match=rf"2 .*{3 * 67 + 2}"):
        qlora_rs.quantize(weight)


def test_propagated_nonfinite_blocks_are_nan_and_the_others_are_untouched() -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(3))
    clean = qlora_rs.dequantize(qlora_rs.quantize(weight, spec_of("nf4")))
    weight[1, 70], weight[2, 0] = float("inf"), float("nan")
    packed = qlora_rs.quantize(weight, spec_of("nf4"), nonfinite="propagate")
    assert_same(packed, reference_packed(weight, spec_of("nf4")))
    restored = qlora_rs.dequantize(packed)
    expected_nan = torch.zeros(4, 128, dtype=torch.bool)
    expected_nan[1, 64:] = expected_nan[2, :64] = True
    assert torch.equal(restored.isnan(), expected_nan)
    assert torch.equal(restored[~expected_nan], clean[~expected_nan])


def test_a_code_outside_the_table_is_an_error() -> None:
    packed = qlora_rs.quantize(torch.ones(3, 64), spec_of("int4"))
    packed.codes[1, 5] = 0xFF
    with pytest.raises(ValueError, match="code"):
        qlora_rs.dequantize(packed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quant_type": "nf5"}, "nf4"),
        ({"block_size": 48}, "32"),
        ({"codebook": [0.0]}, "codebook"),
        ({"codebook": [0.5, 0.1]}, "ascending"),
        ({"codebook": [0.0, 2.0]}, "-1"),
        ({"codebook": [0.0, float("nan")]}, "codebook"),
        ({"codebook": [0.0, 1.0], "quant_type": "fp4"}, "codebook"),
        ({"quant_type": "codebook"}, "codebook"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantSpec(**arguments)


def test_a_codebook_is_the_same_spec_in_float32_and_in_float64() -> None:
    values = [-1, 0.3, 0.5, 1]
    assert QuantSpec(codebook=values) == QuantSpec(codebook=torch.tensor(values).tolist())


@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_example_of_the_blockwise_scheme(dtype: torch.dtype) -> None:
    weight = torch.tensor([10.0, -3, 5, 4], dtype=dtype)
    packed = qlora_rs.quantize(weight, QuantSpec(codebook=[-1, 0.3, 0.5, 1], double_quant=False))
    assert reference.unpack(packed.codes, 4).tolist() == [3, 1, 2, 2]
    assert packed.absmax.tolist() == [10.0]
    assert qlora_rs.dequantize(packed).tolist() == [10.0, 3.0, 5.0, 5.0]


def test_zero_is_exact_in_the_dynamic_maps_and_negative_weights_are_zero_in_the_unsigned_one() -> None:
    weight = torch.tensor([[0.5, -0.5, 0.0, -0.0, 1e-9, -1e-9]])
    signed = qlora_rs.quantize(weight, spec_of("dynamic8"))
    assert signed.codes.tolist() == [[255, 0, 127, 127, 127, 127]]
    unsigned = qlora_rs.quantize(weight, spec_of("udynamic8"))
    assert qlora_rs.dequantize(unsigned).tolist() == [[0.5, 0.0, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("quant_type", ["dynamic8", "udynamic8"])
def test_a_tie_between_entries_of_a_dynamic_map_goes_to_the_even_code(quant_type: str) -> None:
    table = reference.codebook_of(quant_type)
    middle = (table[:-1].double() + table[1:].double()) / 2
    exact = middle.float().double() == middle  # ties that a float32 can be
    assert exact.sum() > 20
    weight = torch.cat([torch.ones(1), middle.float()[exact]])
    lower = torch.arange(255)[exact]
    packed = qlora_rs.quantize(weight, spec_of(quant_type, 4096))
    assert torch.equal(packed.codes[1:].long(), lower + lower % 2)


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512"])
def test_every_simd_level_gives_the_same_bytes(level: str) -> None:
    """The level is read once a process, so each runs in its own."""
    program = (
        "import torch, hashlib, qlora_rs\n"
        "g = torch.Generator().manual_seed(9)\n"
        "digest = hashlib.sha256()\n"
        "tables = [tuple(i / 99 - 1 for i in range(199)), (-1.0, 0.3, 0.5, 1.0)]\n"
        "types = [t for t in qlora_rs.spec.QUANT_TYPES if t != 'codebook']\n"
        "specs = [(t, 64, dq) for t in types for dq in (False, True)] + [('codebook', 64, True, t) for t in tables]\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    for shape in ((67, 1031), (64, 4096), (3, 5, 96)):\n"
        "        w = (torch.randn(shape, generator=g) * 0.02).to(dtype)\n"
        "        for spec in specs:\n"
        "            p = qlora_rs.quantize(w, qlora_rs.QuantSpec(*spec))\n"
        "            digest.update(p.codes.numpy().tobytes() + p.absmax.numpy().tobytes())\n"
        "            for out in (torch.float32, torch.bfloat16, torch.float16):\n"
        "                digest.update(qlora_rs.dequantize(p, out).view(torch.uint8).numpy().tobytes())\n"
        "print(qlora_rs._core.simd_level(), digest.hexdigest())\n"
    )
    digests = {}
    for wanted in ("scalar", level):
        result = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "QLORA_RS_SIMD": wanted},
            capture_output=True,
            text=True,
        )
        if result.returncode and "QLORA_RS_SIMD" in result.stderr:
            pytest.skip(f"this processor has no {level}")
        assert result.returncode == 0, result.stderr
        digests[wanted] = result.stdout.split()
    assert digests[level][0] == level
    assert digests[level][1] == digests["scalar"][1]


def test_a_forked_child_computes_after_the_parent_did() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(4))
    expected = int(qlora_rs.quantize(weight).codes.long().sum())
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        # NOTE: summed by numpy: torch's own OpenMP threads do not survive a fork, and a sum of this size uses them.
        total = int(qlora_rs.quantize(weight).codes.numpy().sum(dtype="int64"))
        os.write(write, str(total).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert int(pipe.read() or -1) == expected
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # the compiler's own import
@pytest.mark.parametrize("spec", [None, QuantSpec("int8", 32, False), QuantSpec(codebook=USER)], ids=str)
def test_a_compiler_traces_quantize_and_dequantize_whole(spec: QuantSpec | None) -> None:
    torch._dynamo.reset()

    def there_and_back(weight: torch.Tensor) -> torch.Tensor:
        return qlora_rs.dequantize(qlora_rs.quantize(weight, spec, nonfinite="propagate"), torch.float32)

    compiled = torch.compile(there_and_back, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((5, 193), (3, 64), (2, 3, 70)):
        weight = torch.randn(shape)
        assert torch.equal(compiled(weight), there_and_back(weight))


@pytest.mark.parametrize(("device", "told"), [("cpu", "got cpu"), ("meta", "got meta"), ("gpu", "device 'gpu': ")])
def test_only_kernels_of_cuda_devices_can_be_warmed_up(device: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        qlora_rs.warmup(device)
