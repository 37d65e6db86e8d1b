"""Models brought to a device from their files: the same bytes as on the CPU, in bounded memory, at the right time."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import qlora_rs
from qlora_rs import Linear4bit, QuantSpec, _addresses, _bridge, _core, checkpoint

MIB = 1 << 20
SPECS = [QuantSpec(), QuantSpec("fp4", 32, False), QuantSpec("int8", 128), QuantSpec(codebook=[-1, -0.2, 0, 0.4, 1])]
DEVICE = torch.device("cuda", 0)
# Large enough that a tensor is not lost in the allocator's rounding.
LARGER = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3}


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same(device: torch.nn.Module, cpu: torch.nn.Module) -> None:
    ours, theirs = tensors_of(device), tensors_of(cpu)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].device == DEVICE, name
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].cpu(), tensor), name


class Peak:
    """Bytes of device memory allocated at most, over what was there before."""

    def __enter__(self) -> Peak:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bytes = torch.cuda.max_memory_allocated() - self.before
        self.kept = torch.cuda.memory_allocated() - self.before


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_packed_model_on_the_device_is_the_one_that_the_cpu_loads(
    make_tiny_llama: Callable[..., Path], tmp_path: Path, tied: bool, shards: bool, dtype: torch.dtype
) -> None:
    source = make_tiny_llama(tmp_path / "source", tie_word_embeddings=tied, attention_bias=True)
    packed = tmp_path / "packed"
    checkpoint.quantize(source, packed, **({"max_shard_size": 20_000} if shards else {}))
    device = qlora_rs.from_pretrained(packed, dtype=dtype, device="cuda")
    cpu = qlora_rs.from_pretrained(packed, dtype=dtype)
    assert_same(device, cpu)
    assert (device.lm_head.weight is device.model.embed_tokens.weight) == tied
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        ours, theirs = device(tokens.cuda()).logits, cpu(tokens).logits
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=2e-4 if dtype == torch.float32 else 4e-2)
        assert torch.equal(ours, cpu.to("cuda")(tokens.cuda()).logits)


def test_auto_is_bfloat16_and_the_model_generates(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint.quantize(tiny_llama, tmp_path / "packed")
    model = qlora_rs.from_pretrained(tmp_path / "packed", device="cuda")
    assert model.dtype == torch.bfloat16
    assert model.generate(torch.arange(3, 9, device="cuda")[None], max_new_tokens=3, min_new_tokens=3).shape == (1, 9)


def test_the_device_holds_a_packed_model_once(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    source, packed = make_tiny_llama(tmp_path / "source", **LARGER), tmp_path / "packed"
    checkpoint.quantize(source, packed)
    qlora_rs.from_pretrained(packed, device="cuda")
    with Peak() as peak:
        model = qlora_rs.from_pretrained(packed, device="cuda", dtype="bfloat16")
    size = sum(tensor.nbytes for tensor in tensors_of(model).values())
    # Each tensor takes a multiple of 512 bytes.
    assert size <= peak.bytes <= size + 2 * 512 * len(tensors_of(model)) + MIB // 4


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
def test_a_16_bit_model_is_quantized_on_the_device_to_the_packers_bytes(
    tiny_llama: Path, tmp_path: Path, spec: QuantSpec
) -> None:
    checkpoint.quantize(tiny_llama, tmp_path / "packed", spec)
    device = qlora_rs.from_pretrained(tiny_llama, spec, device="cuda", dtype="float32")
    assert_same(device, qlora_rs.from_pretrained(tmp_path / "packed", dtype="float32"))
    assert sum(isinstance(module, Linear4bit) for module in device.modules()) == 14


def test_quantizing_on_the_way_in_holds_the_packed_model_and_one_weight(
    make_tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_tiny_llama(tmp_path / "source", **LARGER)
    qlora_rs.from_pretrained(source, device="cuda")  # kernels are loaded now
    with Peak() as peak:
        model = qlora_rs.from_pretrained(source, device="cuda", dtype="bfloat16")
    size = sum(tensor.nbytes for tensor in tensors_of(model).values())
    largest = 2 * 1024 * 2816
    # Beside the weight: its float32 scales, and what double quantization works in.
    assert peak.bytes <= size + largest * (1 + 1 / 16) + MIB // 2
    assert peak.bytes < sum(module.in_features * module.out_features for module in model.modules()
                            if isinstance(module, Linear4bit)) * 2  # fmt: skip
    assert peak.kept <= size + 2 * 512 * len(tensors_of(model)) + MIB // 4


def test_packing_a_model_that_is_on_the_device_frees_each_weight(
    make_tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_tiny_llama(tmp_path / "source", **LARGER)
    cpu, device = qlora_rs.model.load_float(source), qlora_rs.model.load_float(source, cpu_dtype(), device="cuda")
    size = sum(tensor.nbytes for tensor in tensors_of(device).values())
    largest = 1024 * 2816 * device.dtype.itemsize
    with Peak() as peak:
        qlora_rs.quantize_model(device)
    qlora_rs.quantize_model(cpu)
    assert_same(device, cpu)
    assert peak.bytes <= largest // 2 + MIB // 2
    assert -peak.kept > size // 2


def cpu_dtype() -> torch.dtype:
    return qlora_rs.model.resolve_dtype("auto")


def test_a_float_model_is_loaded_as_it_is(tiny_llama: Path) -> None:
    assert_same(
        qlora_rs.model.load_float(tiny_llama, "bfloat16", "cuda"), qlora_rs.model.load_float(tiny_llama, "bfloat16")
    )


@pytest.mark.parametrize("on_the_fly", [False, True])
def test_transformers_own_route_gives_the_same_model(tiny_llama: Path, tmp_path: Path, on_the_fly: bool) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    from qlora_rs.integrations.transformers import QloraRsConfig

    checkpoint.quantize(tiny_llama, tmp_path / "packed")
    options = {"quantization_config": QloraRsConfig()} if on_the_fly else {}
    folder = tiny_llama if on_the_fly else tmp_path / "packed"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda", **options)
    assert_same(model, qlora_rs.from_pretrained(tmp_path / "packed", dtype="bfloat16"))


def file_of(path: Path, sizes: list[int]) -> dict[str, torch.Tensor]:
    tensors = {f"t{i}": torch.randint(0, 256, (size,), dtype=torch.uint8) for i, size in enumerate(sizes)}
    save_file(tensors, path)
    return tensors


def load(path: Path, places: dict[str, torch.Tensor], buffer_bytes: int, num_threads: int, progress=None) -> None:  # type: ignore[no-untyped-def]
    files = [(str(path), [(name, (place.data_ptr(), place.nbytes)) for name, place in places.items()])]
    queue = _addresses.queue_of(DEVICE)
    _core.cuda_load(files, queue=queue, buffer_bytes=buffer_bytes, num_threads=num_threads, progress=progress)


@pytest.mark.parametrize(("buffer_bytes", "num_threads"), [(1, 3), (997, 1), (4096, 5), (MIB, 16)])
def test_every_byte_arrives_and_no_other_is_written(tmp_path: Path, buffer_bytes: int, num_threads: int) -> None:
    sizes = [1, 4097, 0, 63, 996, 997, 998, 20_011] if buffer_bytes < 4096 else [1, 3 * MIB + 1, 0, 63, 500_000, 4095]
    if buffer_bytes == 1:
        sizes = [1, 37, 0, 64]
    tensors = file_of(tmp_path / "x.safetensors", sizes)
    room = {
        name: torch.full((tensor.numel() + 6,), 0xAA, dtype=torch.uint8, device=DEVICE)
        for name, tensor in tensors.items()
    }
    places = {name: room[name][3 : 3 + tensor.numel()] for name, tensor in tensors.items()}
    load(tmp_path / "x.safetensors", places, buffer_bytes, num_threads)
    for name, tensor in tensors.items():
        guard = torch.full((3,), 0xAA, dtype=torch.uint8)
        assert torch.equal(room[name].cpu(), torch.cat([guard, tensor, guard])), name


def test_memory_that_the_callers_stream_still_writes_is_filled_afterwards(tmp_path: Path) -> None:
    tensors = file_of(tmp_path / "x.safetensors", [3 * MIB])
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            place = torch.zeros(3 * MIB, dtype=torch.uint8, device=DEVICE)
            torch.cuda._sleep(100_000_000)
            place.fill_(7)
            _bridge.loader({str(tmp_path / "x.safetensors"): [("t0", place)]}, DEVICE)(None)
        assert torch.equal(place.cpu(), tensors["t0"])


def test_errors_name_file_and_tensor_and_a_later_load_works(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = file_of(path, [100, 5000])
    places = {name: torch.empty(tensor.numel(), dtype=torch.uint8, device=DEVICE) for name, tensor in tensors.items()}
    with pytest.raises(qlora_rs.FormatError, match=r"x\.safetensors: tensor \"t1\": expected 4999 bytes"):
        load(path, {"t1": places["t1"][1:]}, 64, 2)
    with pytest.raises(qlora_rs.FormatError, match=r"x\.safetensors: tensor \"t9\" is not in it"):
        load(path, {"t9": places["t1"]}, 64, 2)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.safetensors", places, 64, 2)
    with pytest.raises(qlora_rs.DeviceError, match="cuMemHostAlloc"):
        load(path, places, 1 << 50, 2)
    load(path, places, 64, 2)
    assert all(torch.equal(places[name].cpu(), tensor) for name, tensor in tensors.items())


def test_progress_is_told_and_its_exception_ends_the_load(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = file_of(path, [64 * MIB])
    place = torch.zeros(64 * MIB, dtype=torch.uint8, device=DEVICE)
    told: list[tuple[int, int]] = []
    load(path, {"t0": place}, 4096, 1, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (64 * MIB, 64 * MIB)
    assert torch.equal(place.cpu(), tensors["t0"])

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for _ in range(20):
        with pytest.raises(KeyboardInterrupt):
            load(path, {"t0": place}, 512, 3, progress=stop)
    load(path, {"t0": place.zero_()}, MIB, 4)
    assert torch.equal(place.cpu(), tensors["t0"])


def test_a_second_device_is_filled_too(tiny_llama: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    checkpoint.quantize(tiny_llama, tmp_path / "packed")
    second = qlora_rs.from_pretrained(tmp_path / "packed", dtype="float32", device="cuda:1")
    first = qlora_rs.from_pretrained(tmp_path / "packed", dtype="float32", device="cuda:0")
    for name, tensor in tensors_of(second).items():
        assert tensor.device.index == 1, name
        assert torch.equal(tensor.cpu(), tensors_of(first)[name].cpu()), name


@pytest.mark.parametrize("name", ["awq-g32", "gptq-4bit-g32-asym-act-order", "ct-int4-g32-sym"])
def test_what_another_library_quantized_becomes_the_same_model_as_on_the_cpu(repository: Path, name: str) -> None:
    folder = repository / "tests" / "golden" / "foreign" / name
    device = qlora_rs.from_pretrained(folder, dtype=torch.bfloat16, device="cuda")
    assert_same(device, qlora_rs.from_pretrained(folder, dtype=torch.bfloat16))
