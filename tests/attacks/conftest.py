"""Generators of hostile model folders: each breaks a good one in one way."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 13,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (11, 8),
    "model.norm.weight": (8,),
    f"{LAYER}input_layernorm.weight": (8,),
    f"{LAYER}post_attention_layernorm.weight": (8,),
    f"{LAYER}self_attn.q_proj.weight": (8, 8),
    f"{LAYER}self_attn.k_proj.weight": (4, 8),
    f"{LAYER}self_attn.v_proj.weight": (4, 8),
    f"{LAYER}self_attn.o_proj.weight": (8, 8),
    f"{LAYER}mlp.gate_proj.weight": (13, 8),
    f"{LAYER}mlp.up_proj.weight": (13, 8),
    f"{LAYER}mlp.down_proj.weight": (8, 13),
}
Q_PROJ = f"{LAYER}self_attn.q_proj.weight"
DOWN = f"{LAYER}mlp.down_proj.weight"

File = bytes
Break = Callable[[File], File]


def with_header(file: File, header: str | bytes, data: bytes | None = None) -> File:
    """The file with another header, and other data if given."""
    text = header.encode() if isinstance(header, str) else header
    length = struct.unpack("<Q", file[:8])[0]
    return struct.pack("<Q", len(text)) + text + (file[8 + length :] if data is None else data)


def header_of(file: File) -> dict[str, dict[str, object]]:
    length = struct.unpack("<Q", file[:8])[0]
    return json.loads(file[8 : 8 + length])


def edited(name: str, **fields: object) -> Break:
    """Other dtype, shape or data_offsets for one tensor."""

    def change(file: File) -> File:
        header = header_of(file)
        header[name] |= fields
        return with_header(file, json.dumps(header))

    return change


def duplicated(file: File) -> File:
    entry = json.dumps(header_of(file)[Q_PROJ])
    text = json.dumps(header_of(file))
    return with_header(file, f'{text[:-1]}, "{Q_PROJ}": {entry}}}')


def gap(file: File) -> File:
    """Every tensor moved by 4 bytes: nothing overlaps, but the first bytes belong to nobody."""
    header = header_of(file)
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]
    length = struct.unpack("<Q", file[:8])[0]
    return with_header(file, json.dumps(header), b"\0" * 4 + file[8 + length :])


def resized(length: int) -> Break:
    return lambda file: struct.pack("<Q", length) + file[8:]


# name -> (what is done to the file, what the message must say)
BROKEN_FILES: dict[str, tuple[Break, str]] = {
    "no bytes": (lambda file: b"", "holds 0 bytes"),
    "seven bytes": (lambda file: file[:7], "holds 7 bytes"),
    "header cut off": (lambda file: file[:100], "not a whole safetensors file"),
    "data cut off": (lambda file: file[:-1], "cut off"),
    "bytes behind the data": (lambda file: file + b"\0", "behind the data"),
    "header of 2^63 bytes": (resized(1 << 63), "not a whole safetensors file"),
    "header of 2^64 - 1 bytes": (resized((1 << 64) - 1), "not a whole safetensors file"),
    "header of no bytes": (resized(0), "does not begin with"),
    "header nine bytes short": (lambda f: resized(struct.unpack("<Q", f[:8])[0] - 9)(f), "not valid"),
    "header is a list": (lambda file: with_header(file, "[]"), "does not begin with"),
    "header is no UTF-8": (lambda file: with_header(file, b'{"\xff": 1}'), "not valid"),
    "header nested 100000 deep": (lambda file: with_header(file, '{"a":' + "[" * 100_000), "not valid"),
    "names twice": (duplicated, "occurs twice"),
    "offsets beyond the file": (edited(Q_PROJ, data_offsets=[1 << 40, (1 << 40) + 256]), "nothing"),
    "offsets of 2^64": (edited(Q_PROJ, data_offsets=[0, 1 << 64]), "not valid"),
    "offsets backwards": (edited(Q_PROJ, data_offsets=[256, 0]), "before it begins"),
    "offsets negative": (edited(Q_PROJ, data_offsets=[-256, 0]), "not valid"),
    "offsets overlap": (edited(Q_PROJ, data_offsets=[0, 256]), "overlap"),
    "gap before the data": (gap, "4 bytes of nothing"),
    "shape too large": (edited(Q_PROJ, shape=[8, 9]), "takes 288 bytes"),
    "shape overflows": (edited(Q_PROJ, shape=[1 << 33, 1 << 33]), "more elements than can be counted"),
    "shape of a fraction": (edited(Q_PROJ, shape=[8, 8.5]), "not valid"),
    "dtype of other width": (edited(Q_PROJ, dtype="BF16"), "takes 128 bytes"),
    "field unknown": (edited(Q_PROJ, stride=[1]), "unknown field"),
    "zip archive": (lambda file: b"PK\x03\x04" + file[4:], "zip archive"),
    "GGUF": (lambda file: b"GGUF\x03\0\0\0" + file[8:], "GGUF"),
    "Git LFS pointer": (lambda file: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "web page": (lambda file: b"<!doctype html><html>404</html>", "web page"),
}


def good_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def good_folder(tmp_path: Path) -> Path:
    """A whole model in one file."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(save(good_tensors(), {"format": "pt"}))
    return folder


@pytest.fixture(params=BROKEN_FILES)
def broken_folder(request: pytest.FixtureRequest, good_folder: Path) -> tuple[Path, str]:
    """A model whose file is broken in one way, and what the message must say."""
    change, reason = BROKEN_FILES[request.param]
    file = good_folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    return good_folder, reason


@pytest.fixture
def sharded_folder(tmp_path: Path) -> Path:
    """A whole model in two files with an index."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors, weight_map = list(good_tensors().items()), {}
    for number, part in enumerate((dict(tensors[:5]), dict(tensors[5:])), 1):
        name = f"model-{number:05}-of-00002.safetensors"
        (folder / name).write_bytes(save(part))
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    return folder


@pytest.fixture
def sparse_folder(tmp_path: Path) -> Path:
    """A model of 1 GB of zeros that takes no space: work that lasts long enough to be disturbed."""
    folder = tmp_path / "source"
    folder.mkdir()
    config = CONFIG | {"hidden_size": 4096, "intermediate_size": 20_000, "num_attention_heads": 32}
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 32}))
    sizes = {8: 4096, 4: 4096, 13: 20_000}
    shapes = {name: [sizes.get(size, size) for size in shape] for name, shape in SHAPES.items()}
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return folder
