"""Loading a packed 8B model onto a CUDA device: ours, through transformers, and bitsandbytes' of the same weights.

    python benchmarks/device_load.py

The first run writes both checkpoints (11.5 GB) into .bench/; the files then come from the page cache. Times are of a
model that can be used, in a process that has loaded one before (its first load also imports the model's code).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

import device_harness as device
import harness
import qlora_rs
from qlora_rs import _bridge, _core
from qlora_rs.checkpoint.source import open_source
from qlora_rs.integrations.transformers import QloraRsConfig

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
SHARD_BYTES = 2_000_000_000
MUST_REACH, AIM = 3.0, 0.80
Packed = dict[str, torch.Tensor]


def write(folder: Path, layers: int, quantization: dict, pack: Callable[[str, torch.Tensor], Packed]) -> None:
    """A Llama checkpoint of random weights, which are the same for every ``pack``; skipped where it is there."""
    if (folder / "config.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = transformers.LlamaConfig(**SHAPE, num_hidden_layers=layers, tie_word_embeddings=False)
    with torch.device("meta"):
        weights = transformers.LlamaForCausalLM(config).state_dict()
    generator = torch.Generator("cuda").manual_seed(0)
    shard: Packed = {}
    shards: list[Path] = []
    weight_map = {}

    def flush() -> None:
        shards.append(folder / f"model-{len(shards):05}.safetensors")
        save_file(shard, shards[-1], {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, shards[-1].name))
        shard.clear()

    for name, meta in weights.items():
        weight = torch.empty(meta.shape, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02, generator=generator)
        if name.endswith("norm.weight"):
            weight.fill_(1)
        parts = pack(name, weight) if "_proj." in name else {name: weight}
        shard.update({part: tensor.cpu() for part, tensor in parts.items()})
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    fields = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**fields, "quantization_config": quantization}))


def our_parts(name: str, weight: torch.Tensor) -> Packed:
    layer = qlora_rs.Linear4bit.from_packed(qlora_rs.quantize(weight))
    return {name.removesuffix("weight") + part: tensor.data for part, tensor in layer.named_parameters()}


def their_parts(name: str, weight: torch.Tensor) -> Packed:
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    return {name: codes, **{f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}}


def their_config() -> dict:
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return config.to_dict()


def link_speed() -> float:
    """Bytes a second of one copy of 1 GiB from pinned memory."""
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    median = device.eager_us({"copy": lambda _: target.copy_(source, non_blocking=True)}, 1, 15)["copy"]
    return source.nbytes / (median * 1e-6)


def timed(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds of one call, and the most device memory that it had allocated."""
    device.free()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    kept = work()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del kept
    return seconds, torch.cuda.max_memory_allocated()


def places_on_device(folder: Path) -> dict[str, list[tuple[str, torch.Tensor]]]:
    """Room on the device for every tensor of a folder, as `_bridge.loader` takes it."""
    source = open_source(folder)
    files: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in source.tensors.items():
        place = torch.empty(tensor.nbytes, dtype=torch.uint8, device="cuda")
        files.setdefault(str(folder / tensor.file), []).append((name, place))
    return files


def sweep(folder: Path, speed: float) -> str:
    """Threads and buffers of the copying alone."""
    size = open_source(folder).total_bytes
    room = places_on_device(folder)
    files = [(path, [(name, (t.data_ptr(), t.nbytes)) for name, t in places]) for path, places in room.items()]
    queue = (torch.cuda.current_device(), 0)
    lines: list[list[object]] = []
    for threads in (1, 4, 8, 12, 16):
        row: list[object] = [threads]
        for kib in (1024, 2048, 4096):
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                _core.cuda_load(files, queue=queue, buffer_bytes=kib << 10, num_threads=threads, progress=None)
                seconds.append(time.perf_counter() - start)
            rate = size / statistics.median(seconds)
            row.append(f"{rate / 1e9:.1f} ({rate / speed:.0%})")
        lines.append(row)
    return harness.table(["threads", "1 MiB", "2 MiB", "4 MiB"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="of the model (default 32)")
    parser.add_argument("--folder", type=Path, default=harness.ROOT / ".bench" / "device-load")
    parser.add_argument("--repetitions", type=int, default=5, help="of each measurement (default 5)")
    parser.add_argument("--float-layers", type=int, default=0, help="also quantize a bf16 model of so many layers")
    parser.add_argument("--sweep", action="store_true", help="also try numbers of threads and sizes of buffers")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints in their folder")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    os.environ["HF_HUB_OFFLINE"] = "1"
    qlora_rs.warmup("cuda")
    folders = {"ours": arguments.folder / f"packed-{arguments.layers}"}
    write(folders["ours"], arguments.layers, QloraRsConfig(modules_to_not_convert=["lm_head"]).to_dict(), our_parts)
    peer = len(harness.installed("bitsandbytes", "accelerate")) == 2
    if peer:
        folders["peer"] = arguments.folder / f"bitsandbytes-{arguments.layers}"
        write(folders["peer"], arguments.layers, their_config(), their_parts)

    speed = link_speed()
    size = open_source(folders["ours"]).total_bytes
    print(f"{device.machine()}\n{size / 1e9:.2f} GB in files; one pinned copy runs at {speed / 1e9:.1f} GB/s")

    def through_transformers(folder: Path) -> Callable[[], object]:
        cls = transformers.AutoModelForCausalLM
        return lambda: cls.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda")

    work: dict[str, Callable[[], object]] = {
        "qlora_rs.from_pretrained": lambda: qlora_rs.from_pretrained(folders["ours"], device="cuda"),
    }
    if harness.installed("accelerate"):
        work["the same folder through transformers"] = through_transformers(folders["ours"])
    if peer:
        work["transformers + bitsandbytes"] = through_transformers(folders["peer"])
    first = {name: timed(call)[0] for name, call in work.items()}
    results = {name: [] for name in work}
    for _ in range(arguments.repetitions):
        for name, call in work.items():
            results[name].append(timed(call))
    device.free()
    files, where = places_on_device(folders["ours"]), torch.device("cuda", torch.cuda.current_device())
    load = _bridge.loader(files, where)
    seconds = harness.interleaved({"bytes": lambda: load(None)}, arguments.repetitions)["bytes"]
    lines = [("its bytes alone", "-", f"{seconds:.3f}", f"{size / seconds / 1e9:.1f}", f"{size / seconds / speed:.0%}",
              "-", "-")]  # fmt: skip
    files.clear()
    slowest = statistics.median(s for s, _ in results["transformers + bitsandbytes"]) if peer else None
    for name, pairs in results.items():
        seconds, peak = statistics.median(s for s, _ in pairs), max(p for _, p in pairs)
        ratio = "-" if slowest is None else f"{slowest / seconds:.1f}x"
        lines.append((name, f"{first[name]:.2f}", f"{seconds:.3f}", f"{size / seconds / 1e9:.1f}",
                      f"{size / seconds / speed:.0%}", ratio, f"{peak / 1e9:.2f}"))  # fmt: skip
    header = ("what", "first s", "s", "GB/s", "of the link", "ratio to peer", "peak GB on the device")
    print(harness.table(header, lines))
    print(f"must reach: {MUST_REACH:.0f}x the peer; aim: the bytes at {AIM:.0%} of the link")
    if arguments.sweep:
        print(f"\nthe bytes alone, GB/s\n{sweep(folders['ours'], speed)}")
    if arguments.float_layers:
        if not arguments.keep:
            shutil.rmtree(arguments.folder)
        print(on_the_way_in(arguments.folder / f"bf16-{arguments.float_layers}", arguments.float_layers))
    if not arguments.keep:
        shutil.rmtree(arguments.folder)


def on_the_way_in(folder: Path, layers: int) -> str:
    """Quantizing a bf16 folder on the device while it is loaded, against the same on the CPU."""
    write(folder, layers, {}, lambda name, weight: {name: weight})
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    size = open_source(folder).total_bytes
    spec = qlora_rs.QuantSpec()
    qlora_rs.from_pretrained(folder, spec, device="cuda")
    device.free()
    model = qlora_rs.from_pretrained(folder, spec, device="cuda")
    packed = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(m.in_features * m.out_features * 2 for m in model.modules() if isinstance(m, qlora_rs.Linear4bit))
    del model
    seconds, peak = timed(lambda: qlora_rs.from_pretrained(folder, spec, device="cuda"))
    start = time.perf_counter()
    qlora_rs.from_pretrained(folder, spec, dtype=torch.bfloat16)
    cpu = time.perf_counter() - start
    return (
        f"\nbf16 model of {layers} layers, {size / 1e9:.2f} GB, quantized on the way in: {seconds:.2f} s "
        f"({size / seconds / 1e9:.1f} GB/s; on the CPU {cpu:.2f} s); peak {peak / 1e9:.3f} GB = "
        f"packed {packed / 1e9:.3f} + {(peak - packed) / largest:.2f} of the largest weight"
    )


if __name__ == "__main__":
    main()
