"""Run commands in this process, and what they work on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import qlora_rs


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def out_words(self) -> str:
        """Results on one line: they may be wrapped to the terminal."""
        return " ".join(self.out.split())

    @property
    def err_words(self) -> str:
        """Messages on one line."""
        return " ".join(self.err.split())


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run ``qlora-rs`` with these arguments."""
    from qlora_rs import cli

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["qlora-rs", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        code = end.value.code
        assert code is None or isinstance(code, int)
        return Outcome(code or 0, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def packed_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, packed; read-only."""
    folder = tmp_path_factory.mktemp("packed") / "tiny-nf4"
    qlora_rs.checkpoint.quantize(tiny_llama, folder)
    return folder


@pytest.fixture(scope="session")
def llama_adapter(packed_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny Llama that clearly changes its answers; read-only."""
    model = qlora_rs.from_pretrained(packed_llama, dtype=torch.float32)
    qlora_rs.attach_lora(model, r=4, lora_alpha=8, seed=0)
    generator = torch.Generator().manual_seed(0)
    for layer in qlora_rs.lora_modules(model).values():
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.1)
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    qlora_rs.save_adapter(model, folder)
    return folder
