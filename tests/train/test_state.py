"""`qlora_rs.train.state`: a state comes back whole, and a damaged one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import qlora_rs
from qlora_rs.errors import FormatError, UnsupportedError
from qlora_rs.train.state import (
    TrainingState,
    capture,
    check_same_run,
    model_digest,
    read_state,
    restore,
    save_state,
)


def model_and_optimizer(r: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    qlora_rs.attach_lora(model, r=r, target_modules=["0", "1"], seed=0)
    return model, torch.optim.AdamW(qlora_rs.lora_parameters(model), lr=0.1)


def stepped() -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = model_and_optimizer()
    model(torch.ones(2, 5)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    return TrainingState(1, {"--lr": 0.1, "--target-modules": ["0", "1"]}, 77, -1, capture(model, optimizer))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "training_state.safetensors"
    save_state(path, state_of(*stepped()))
    return path


def test_everything_comes_back(saved):
    state = read_state(saved)
    expected = state_of(*stepped())
    assert (state.step, state.settings, state.log_bytes, state.evaluated) == (1, expected.settings, 77, -1)
    model, optimizer = model_and_optimizer()
    restore(model, optimizer, state.tensors, saved)
    again = capture(model, optimizer)
    assert again.keys() == expected.tensors.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.tensors.items())


def test_before_the_first_step_there_is_no_state_of_the_optimizer(tmp_path):
    model, optimizer = model_and_optimizer()
    path = tmp_path / "state"
    save_state(path, state_of(model, optimizer))
    restore(*model_and_optimizer(), read_state(path).tensors, path)


def test_a_file_cut_anywhere_is_refused_with_the_way_out(saved):
    content = saved.read_bytes()
    for length in (0, 1, 8, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        with pytest.raises(FormatError, match=r"not a whole safetensors file .*: start anew with --overwrite"):
            read_state(saved)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, "expected the state of a run, version 1; got version None"),
        ({"qlora_rs_training_state": "2"}, "got version '2'"),
        ({"qlora_rs_training_state": "1"}, "its metadata is damaged"),
        ({"qlora_rs_training_state": "1", "run": "{"}, "its metadata is damaged"),
        ({"qlora_rs_training_state": "1", "run": "[]"}, "its metadata is damaged"),
        ({"qlora_rs_training_state": "1", "run": json.dumps({"step": "x"})}, "its metadata is damaged"),
    ],
)
def test_another_file_or_version_is_refused(tmp_path, metadata, message):
    path = tmp_path / "state"
    save_file({"a": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(FormatError, match=message):
        read_state(path)


def without(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("lora.0.A"), r"lora\.0\.A should be \[2, 5\], is absent"),
        (without("optimizer.3.exp_avg"), r"optimizer\.3\.exp_avg should be \[3, 2\], is absent"),
        (lambda tensors: tensors.update({"lora.1.B": torch.zeros(3, 3)}), r"should be \[3, 2\], is \[3, 3\]"),
        (lambda tensors: tensors.update({"optimizer.0.exp_avg_sq": torch.zeros(1)}), r"should be \[2, 5\], is \[1\]"),
        (lambda tensors: tensors.update({"optimizer.x": torch.zeros(1)}), r"optimizer\.x should be absent"),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_named_and_change_nothing(saved, damage, message):
    tensors = dict(read_state(saved).tensors)
    damage(tensors)
    model, optimizer = model_and_optimizer()
    before = capture(model, optimizer)
    with pytest.raises(FormatError, match=message):
        restore(model, optimizer, tensors, saved)
    after = capture(model, optimizer)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_adapters_of_another_rank_are_refused(saved):
    with pytest.raises(FormatError, match="is not the state of this model's adapters"):
        restore(*model_and_optimizer(r=3), read_state(saved).tensors, saved)


def test_settings_are_the_same_across_what_json_changes(tmp_path):
    saved = {"--lr": 0.1, "--target-modules": ["0"], "--lora-alpha": 32}
    check_same_run(saved, {"--lr": 0.1, "--target-modules": ("0",), "--lora-alpha": 32.0}, tmp_path)
    with pytest.raises(UnsupportedError, match=r"--lr was 0\.1, now 0\.2; the data has changed"):
        check_same_run({"--lr": 0.1, "the data": "x"}, {"--lr": 0.2, "the data": "y"}, tmp_path)
    with pytest.raises(UnsupportedError, match="--warmup was None, now 3"):
        check_same_run({}, {"--warmup": 3}, tmp_path)


def test_an_earlier_state_stays_where_the_new_one_fails(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(self: Path, content: bytes) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        save_state(saved, state_of(*stepped()))
    assert caught.value.filename == str(saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert saved.read_bytes() == before


def test_the_digest_of_a_model_knows_its_config_and_its_weights(tmp_path):
    def digest(config: str, **weights: torch.Tensor) -> str:
        (tmp_path / "config.json").write_text(config)
        save_file(weights, tmp_path / "model.safetensors")
        return model_digest(tmp_path)

    weight = torch.arange(1_000_000, dtype=torch.float32)
    one = digest("{}", a=weight)
    assert one == digest("{}", a=weight)
    assert one != digest('{"a": 1}', a=weight)
    assert one != digest("{}", a=weight + 1)
    assert one != digest("{}", b=weight)
    assert one != digest("{}", a=weight[:-1])
