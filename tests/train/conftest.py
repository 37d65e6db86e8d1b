"""What the tests of training share: a packed tiny model, one thread, a short way to run, and what a run wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_rs
from qlora_rs.train import TrainOptions, TrainReport, read_log, train
from qlora_rs.train.encoding import load_tokenizer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Matrices this small only wait for each other on more.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, packed; read-only."""
    folder = tmp_path_factory.mktemp("packed") / "tiny"
    qlora_rs.checkpoint.quantize(tiny_llama, folder)
    return folder


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    """One token a byte; a fresh one, as tests change its template."""
    return load_tokenizer(tiny_llama)


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Write values as JSONL, bytes as they are; returns the file."""

    def write(*lines: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"".join(line + b"\n" for line in raw))
        return path

    return write


@pytest.fixture
def fine_tune(packed: Path, write_chats: Callable[..., Path], tmp_path: Path) -> Callable[..., TrainReport]:
    """Train on 24 chats with options that show an effect in a few steps; ``output`` is a name in tmp_path."""

    def run(output: str = "adapter", *, on_step: Any = None, on_message: Any = None, **changes: Any) -> TrainReport:
        settings: dict[str, Any] = {"model": packed, "r": 4, "lr": 1e-2, "batch_size": 3, **changes}
        if "data" not in settings:
            settings["data"] = tmp_path / "chats.jsonl"
            if not settings["data"].exists():
                write_chats()
        options = TrainOptions(output=tmp_path / output, **settings)
        return train(options, on_step=on_step, on_message=on_message)

    return run


@pytest.fixture
def everything() -> dict[str, Any]:
    """Options of a run with all that has a state.

    Held-out samples, updates from several batches, a last step that is smaller, dropout.
    """
    return {
        "epochs": 2,
        "batch_size": 2,
        "grad_accum": 2,
        "lora_dropout": 0.2,
        "eval_fraction": 0.2,
        "eval_every": 2,
    }


@pytest.fixture(scope="session")
def held_out_losses() -> Callable[[Path], list[tuple[int, float]]]:
    """Steps and held-out losses of a run, read from its output folder."""

    def read(output: Path) -> list[tuple[int, float]]:
        return [(entry["step"], entry["eval_loss"]) for entry in read_log(output / "log.jsonl") if "eval_loss" in entry]

    return read


@pytest.fixture(scope="session")
def adapter_bytes() -> Callable[[Path], bytes]:
    """The file of an adapter folder that holds its weights."""
    return lambda output: (output / "adapter_model.safetensors").read_bytes()
