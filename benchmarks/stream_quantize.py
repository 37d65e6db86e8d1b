"""Streaming quantize of a checkpoint that is larger than the memory allowed: GB/s of input, and peak memory.

Makes a synthetic Llama-shaped bfloat16 checkpoint (8 GB, sharded, random weights), quantizes it by the
command line in a process of its own, and prints speed and peak RSS beside the limits of this machine,
measured in the same run, each by the fastest way that there is:

    python benchmarks/stream_quantize.py --dir /tmp --gigabytes 8

SHA-256 is a limit of one thread. Files are hashed side by side where cores are idle, which may go beyond it.

Everything made under --dir is deleted afterwards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GIB = 1 << 30
PIECE = 8 << 20
REST = 5.0  # seconds
RSS_LIMIT_GIB = 1.5
HIDDEN, INTERMEDIATE, KV, VOCAB = 4096, 14336, 1024, 128_256


def tensor_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}self_attn.k_proj.weight": (KV, HIDDEN),
            f"{prefix}self_attn.v_proj.weight": (KV, HIDDEN),
            f"{prefix}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            f"{prefix}input_layernorm.weight": (HIDDEN,),
            f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
        }
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def size_of(shape: tuple[int, ...]) -> int:
    product = 2
    for size in shape:
        product *= size
    return product


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write about so many GB; returns the bytes of tensors. Each tensor is a window of one random pool."""
    per_layer = sum(map(size_of, tensor_shapes(1).values())) - sum(map(size_of, tensor_shapes(0).values()))
    fixed = sum(map(size_of, tensor_shapes(0).values()))
    layers = max(1, round((gigabytes * 1e9 - fixed) / per_layer))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    normal = np.random.default_rng(0).standard_normal(1 << 25, dtype=np.float32) * np.float32(0.02)
    window = memoryview((normal.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8))
    del normal
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensor_shapes(layers).items():
        if sum(map(size_of, shards[-1].values())) + size_of(shape) > 4.9e9:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / file_name, shard, window)
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(size_of(shape) for shard in shards for shape in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], window: memoryview) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size_of(shape)]}
        offset += size_of(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while offset:
            offset -= file.write(window[: min(offset, len(window))])
        file.flush()
        os.fsync(file.fileno())


def drop_cache(folder: Path) -> None:
    """Ask the system to forget the files' pages, so that reading means the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class Child:
    """What a Python process took: seconds, peak RSS in GiB, and core-seconds of its threads by their names."""

    seconds: float
    peak: float
    cores: Counter[str]


def run_child(program: str, *arguments: str) -> Child:
    """Run a Python process.

    NOTE: the process reads its own high-water mark: ru_maxrss would count this process's size at the fork.
    """
    with tempfile.NamedTemporaryFile("r") as peak:
        report = f"open({peak.name!r}, 'w').write(open('/proc/self/status').read())"
        program = f"import atexit\natexit.register(lambda: {report})\n{program}"
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.DEVNULL)
        threads: dict[str, tuple[str, float]] = {}
        while process.poll() is None:
            threads |= thread_times(process.pid)
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if process.returncode != 0:
            raise SystemExit(f"error: {' '.join(arguments)} ended with {process.returncode}")
        fields = dict(line.split(":", 1) for line in peak.read().splitlines())
    cores: Counter[str] = Counter()
    for name, took in threads.values():
        cores[name] += took
    return Child(seconds, int(fields["VmHWM"].split()[0]) * 1024 / GIB, cores)


def thread_times(process: int) -> dict[str, tuple[str, float]]:
    """Name and core-seconds of each thread of a process, by its number; pool threads go by one name."""
    times = {}
    for task in Path(f"/proc/{process}/task").glob("*"):
        with suppress(OSError):  # ended meanwhile
            name = (task / "comm").read_text().strip().rstrip("0123456789")
            times[task.name] = name, int((task / "schedstat").read_text().split()[0]) / 1e9
    return times


def read_speed(folder: Path) -> float:
    """GB/s of reading the files in 8 MiB pieces that leave the page cache again: fresh pages take time to find."""
    buffer, total = bytearray(PIECE), 0
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            done = 0
            while count := file.readinto(buffer):
                os.posix_fadvise(file.fileno(), max(0, done - PIECE), PIECE, os.POSIX_FADV_DONTNEED)
                done += count
            total += done
    return total / (time.perf_counter() - start) / 1e9


def write_speed(folder: Path, like: Path, total: int) -> float:
    """GB/s of writing ``total`` bytes like those to the disk, through the page cache or past it: the faster way.

    NOTE: it waits before it writes, as a command that starts up does: a virtual machine may give free memory back to
    its host, after which writing a page takes several times as long.
    """
    data = mmap.mmap(-1, 8 * PIECE)  # whole pages, as writing past the page cache needs
    with open(like, "rb", buffering=0) as file:
        file.readinto(data)
    fastest = 0.0
    for flag in (0, os.O_DIRECT):
        path = folder / "written"
        try:
            file_number = os.open(path, os.O_WRONLY | os.O_CREAT | flag)
        except OSError:  # a file system without: in memory, for instance
            continue
        try:
            pieces = -(-total // PIECE)
            time.sleep(REST)
            start = time.perf_counter()
            for piece in range(pieces):
                at = piece % 8 * PIECE
                os.write(file_number, memoryview(data)[at : at + PIECE])
            os.fsync(file_number)
            fastest = max(fastest, pieces * PIECE / (time.perf_counter() - start) / 1e9)
        finally:
            os.close(file_number)
            path.unlink()
    return fastest


def hash_speed() -> float:
    """GB/s of SHA-256 on one thread (OpenSSL's), best of five."""
    data, best = bytes(8 * PIECE), 0.0
    for _ in range(5):
        start = time.perf_counter()
        hashlib.sha256(data).digest()
        best = max(best, len(data) / (time.perf_counter() - start) / 1e9)
    return best


QUANTIZE_SPEED = f"""
import time, torch, qlora_rs
weight = torch.randn({INTERMEDIATE}, {HIDDEN}).to(torch.bfloat16)
best = 0.0
for _ in range(5):
    start = time.perf_counter()
    qlora_rs.quantize(weight)
    best = max(best, weight.nbytes / (time.perf_counter() - start) / 1e9)
print(best)
"""


def quantize_speed() -> float:
    """GB/s of bfloat16 input through `qlora_rs.quantize` in memory, best of five."""
    run = subprocess.run([sys.executable, "-c", QUANTIZE_SPEED], capture_output=True, text=True, check=True)
    return float(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--repeat", type=int, default=2, help="runs, of which the fastest counts")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="stream_quantize_", dir=options.dir))
    try:
        source, target = folder / "source", folder / "packed"
        total = make_checkpoint(source, options.gigabytes)
        files = len(list(source.glob("*.safetensors")))
        print(f"source: {total / 1e9:.2f} GB of bfloat16 in {files} files")
        imports = "import torch, qlora_rs"
        bare = run_child("pass").peak
        torch_rss = run_child(imports).peak
        all_rss = run_child(f"{imports}; from transformers import AutoConfig, LlamaForCausalLM").peak
        drop_cache(source)
        limits = {"disk, read": read_speed(source), "sha256": hash_speed(), "quantize in memory": quantize_speed()}
        command = ("from qlora_rs.cli import main; main()", "quantize", str(source), str(target))
        runs, startups = [], []
        for _ in range(options.repeat):
            shutil.rmtree(target, ignore_errors=True)
            startups.append(run_child(*command, "--dry-run").seconds)
            drop_cache(source)
            runs.append(run_child(*command))
            print(f"run: {runs[-1].seconds:.1f} s, start-up alone {startups[-1]:.1f} s, load {os.getloadavg()[0]:.1f}")
        fastest = min(runs, key=lambda run: run.seconds)
        startup, seconds, peak = min(startups), fastest.seconds, max(run.peak for run in runs)
        shards = list(target.glob("*.safetensors"))
        packed = sum(path.stat().st_size for path in shards)
        written = write_speed(folder, shards[0], packed)
        limits[f"disk, write at {written:.2f}"] = written * total / packed
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"packed: {packed / 1e9:.2f} GB")
    for name, speed in limits.items():
        print(f"limit: {name:<22} {speed:6.2f} GB/s of input")
    work = seconds - startup
    print(f"command: {seconds:.1f} s, of which start-up (imports, model on meta, plan) {startup:.1f} s")
    print(f"streaming: {total / work / 1e9:.2f} GB/s of input ({total / seconds / 1e9:.2f} with start-up)")
    parts = {name.removeprefix("qlora-rs-") or "pool": took for name, took in fastest.cores.items() if took >= 0.05}
    print("core-seconds: " + ", ".join(f"{name} {took:.2f}" for name, took in sorted(parts.items())))
    slowest = min(limits, key=lambda name: limits[name])
    print(f"share of the slowest limit ({slowest}): {total / work / 1e9 / limits[slowest]:.0%}")
    print(f"peak RSS: {peak:.2f} GiB (bar {RSS_LIMIT_GIB}): {'ok' if peak <= RSS_LIMIT_GIB else 'MISSED'}")
    print(
        f"  of which Python {bare:.2f}, + torch and qlora_rs {torch_rss - bare:.2f}, "
        f"+ transformers {all_rss - torch_rss:.2f}, + model on meta, buffers and scales {peak - all_rss:.2f}"
    )
    if peak > RSS_LIMIT_GIB:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
