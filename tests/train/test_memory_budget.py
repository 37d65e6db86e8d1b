"""`train` under a memory budget: the run is the same bits, stopped or not, whatever the budget."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import qlora_rs
from qlora_rs.errors import UnsupportedError
from qlora_rs.train import TrainOptions, loop, read_log
from qlora_rs.train.state import read_state


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "draw_curve", lambda *arguments: None)


@pytest.fixture(scope="module")
def deep(make_tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model of five layers: two are the least that a pool holds."""
    folder = tmp_path_factory.mktemp("deep")
    qlora_rs.checkpoint.quantize(make_tiny_llama(folder / "float", num_hidden_layers=5), folder / "packed")
    return folder / "packed"


@pytest.fixture
def everything(everything: dict[str, Any], deep: Path) -> dict[str, Any]:
    """The same on the deep model, in fewer steps."""
    return {**everything, "model": deep, "epochs": None, "steps": 6}


@pytest.fixture
def least(fine_tune) -> Any:
    """The smallest budget for a run, as the error for a smaller one says it."""

    def find(**options: Any) -> int:
        with pytest.raises(ValueError, match="is too small") as caught:
            fine_tune("refused", memory_budget="4096", **options)
        found = re.search(r"at least (\d+) bytes", str(caught.value))
        assert found is not None
        return int(found[1])

    return find


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_budget_changes_no_bit(
    fine_tune, tmp_path, losses, held_out_losses, adapter_bytes, everything, least, optimizer, gradient_checkpointing
):
    options = {**everything, "optimizer": optimizer, "gradient_checkpointing": gradient_checkpointing, "r": 16}
    fine_tune("resident", **options)
    heard: list[str] = []
    fine_tune("paged", memory_budget=str(least(**options) + 4096), on_message=heard.append, **options)
    resident, paged = tmp_path / "resident", tmp_path / "paged"
    assert losses(paged) == losses(resident)
    assert held_out_losses(paged) == held_out_losses(resident)
    assert adapter_bytes(paged) == adapter_bytes(resident)
    states = [read_state(output / "training_state.safetensors") for output in (paged, resident)]
    assert states[0].tensors.keys() == states[1].tensors.keys()
    assert all((tensor == states[1].tensors[name]).all() for name, tensor in states[0].tensors.items())
    assert any("the pool's frames" in line for line in heard)
    steps = [entry for entry in read_log(paged / "log.jsonl") if "loss" in entry]
    assert all(entry["stall_seconds"] >= 0 for entry in steps)


def test_kept_dequantized_weights_count_and_change_no_bit(
    fine_tune, tmp_path, losses, adapter_bytes, everything, least
):
    options = {**everything, "gradient_checkpointing": True}
    plain = least(**options)
    budget = least(keep_dequantized=True, **options)
    assert budget > plain
    fine_tune("resident", **options)
    fine_tune("paged", memory_budget=str(budget), keep_dequantized=True, **options)
    assert losses(tmp_path / "paged") == losses(tmp_path / "resident")
    assert adapter_bytes(tmp_path / "paged") == adapter_bytes(tmp_path / "resident")


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit"])
@pytest.mark.parametrize("stop", [1, 4])
def test_a_stopped_run_goes_on_with_the_same_bits_under_another_budget(
    fine_tune, tmp_path, losses, adapter_bytes, everything, least, optimizer, stop
):
    options = {**everything, "optimizer": optimizer, "gradient_checkpointing": True, "r": 16}
    budget = least(**options)
    fine_tune("whole", **options)

    def interrupt(entry: Any, total: int) -> None:
        if entry.step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune("stopped", memory_budget=str(budget), on_step=interrupt, **options)
    fine_tune("stopped", memory_budget=str(budget + 20_000), resume=True, **options)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "whole")


def test_a_crashed_run_goes_on_from_its_last_save(fine_tune, tmp_path, losses, adapter_bytes, everything, least):
    options = {**everything, "optimizer": "paged_adamw8bit", "save_every": 2}
    budget = str(least(**options))
    fine_tune("whole", memory_budget=budget, **options)

    def crash(entry: Any, total: int) -> None:
        if entry.step == 5:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        fine_tune("crashed", memory_budget=budget, on_step=crash, **options)
    assert fine_tune("crashed", memory_budget=budget, resume=True, **options).resumed_at == 4
    assert losses(tmp_path / "crashed") == losses(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "crashed") == adapter_bytes(tmp_path / "whole")


def test_another_optimizer_is_another_run(fine_tune, everything):
    def stop(entry: Any, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune("run", on_step=stop, **everything)
    with pytest.raises(UnsupportedError, match="--optimizer was adamw, now adamw8bit"):
        fine_tune("run", resume=True, optimizer="adamw8bit", **everything)


def test_a_budget_that_holds_everything_pages_nothing(fine_tune, tmp_path, losses, everything):
    heard: list[str] = []
    fine_tune("resident", **everything)
    fine_tune("roomy", memory_budget="4GiB", on_message=heard.append, **everything)
    assert any("no paging" in line for line in heard)
    assert losses(tmp_path / "roomy") == losses(tmp_path / "resident")


def test_wrong_options_are_told_before_anything_is_read():
    places = {"model": Path("m"), "data": Path("d"), "output": Path("o")}
    with pytest.raises(ValueError, match="--memory-budget:"):
        TrainOptions(**places, memory_budget="24 potatoes")
    with pytest.raises(ValueError, match=r"--optimizer is one of adamw.*'adam'"):
        TrainOptions(**places, optimizer="adam")
