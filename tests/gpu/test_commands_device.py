"""Commands with ``--device cuda``: what they compute on the CPU, there; a stopped run goes on bit for bit."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_rs import checkpoint
from qlora_rs.errors import UnsupportedError
from qlora_rs.train import TrainOptions, TrainReport, read_log, train


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, make_tiny_llama: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny_llama(folder / "source", hidden_size=64, intermediate_size=192)
    checkpoint.quantize(folder / "source", folder / "packed")
    return folder / "packed"


@pytest.fixture
def run_train(packed: Path, write_chats: Callable[..., Path], tmp_path: Path) -> Callable[..., TrainReport]:
    def run(output: str, *, on_step: Any = None, on_message: Any = None, **changes: Any) -> TrainReport:
        data = tmp_path / "chats.jsonl"
        if not data.exists():
            write_chats()
        settings = {"model": packed, "r": 4, "lr": 1e-2, "batch_size": 3, "steps": 6, "device": "cuda", **changes}
        options = TrainOptions(data=data, output=tmp_path / output, **settings)
        return train(options, on_step=on_step, on_message=on_message)

    return run


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(output / "log.jsonl") if "loss" in entry]


def test_training_there_follows_the_cpu(run_train, tmp_path):
    there = run_train("there", dtype="float32", eval_fraction=0.2)
    run_train("here", dtype="float32", eval_fraction=0.2, device="cpu")
    assert losses(tmp_path / "there") == pytest.approx(losses(tmp_path / "here"), rel=2e-3)
    assert there.peak_device_memory_bytes is not None
    assert there.settings["--device"] == "cuda"
    assert "on the device" in str(there)


@pytest.mark.parametrize(
    "checkpointing", [[], ["gradient_checkpointing"], ["gradient_checkpointing", "keep_dequantized"]]
)
def test_a_stopped_run_goes_on_bit_for_bit(run_train, tmp_path, checkpointing):
    options = {"lora_dropout": 0.2, "grad_accum": 2, **dict.fromkeys(checkpointing, True)}
    before = torch.cuda.get_rng_state()
    run_train("whole", **options)

    def interrupt(entry: Any, total: int) -> None:
        if entry.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="--resume"):
        run_train("stopped", on_step=interrupt, **options)
    report = run_train("stopped", resume=True, **options)
    assert report.resumed_at == 3
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("stopped", "whole")]
    assert adapters[0] == adapters[1]
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw8bit"])
def test_a_memory_budget_changes_no_bit_stopped_or_not(run_train, tmp_path, make_tiny_llama, optimizer):
    shape = {"hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 9, "num_attention_heads": 10}
    make_tiny_llama(tmp_path / "source", **shape)  # 2.7 MB a layer: two pages
    checkpoint.quantize(tmp_path / "source", tmp_path / "packed")
    options = {"model": tmp_path / "packed", "optimizer": optimizer, "gradient_checkpointing": True}
    heard: list[str] = []
    run_train("whole", **options)
    with pytest.raises(ValueError, match="is too small") as caught:
        run_train("refused", memory_budget="1MiB", **options)
    least = re.search(r"at least (\d+) bytes", str(caught.value))
    assert least is not None

    def interrupt(entry: Any, total: int) -> None:
        if entry.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_train("stopped", memory_budget=least[1], on_step=interrupt, on_message=heard.append, **options)
    assert any("the pool's frames" in line for line in heard)
    run_train("stopped", memory_budget=least[1], resume=True, **options)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("stopped", "whole")]
    assert adapters[0] == adapters[1]


def test_a_run_does_not_go_on_elsewhere(run_train):
    def interrupt(entry: Any, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_train("stopped", on_step=interrupt)
    with pytest.raises(UnsupportedError, match="--device was cuda, now cpu"):
        run_train("stopped", resume=True, device="cpu")


def test_commands_take_the_device_by_themselves(packed, run_train, tmp_path, brown_text, capsys, monkeypatch):
    from qlora_rs import cli

    run_train("adapter")
    text = tmp_path / "text.txt"
    text.write_text(brown_text[:700], encoding="utf-8")

    def command(*arguments: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["qlora-rs", *map(str, arguments), "--json"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    measure = ("eval", packed, text, "--window", 100, "--dtype", "float32", "--adapter", tmp_path / "adapter")
    there, here = command(*measure), command(*measure, "--device", "cpu")
    assert (there["device"], here["device"]) == ("cuda:0", "cpu")
    assert there["nats_per_token"] == pytest.approx(here["nats_per_token"], rel=1e-3)
    answer = ("generate", packed, "--prompt", "Hello", "--max-new-tokens", 7, "--temperature", 0.8, "--seed", 3)
    drawn = [command(*answer) for _ in range(2)]
    assert drawn[0]["text"] == drawn[1]["text"]
    compared = command("compare-types", packed.parent / "source", text, "--type", "nf4", "--type", "int8")
    assert compared["device"] == "cuda:0"
    assert len(compared["results"]) == 3
