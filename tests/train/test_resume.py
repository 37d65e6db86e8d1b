"""`qlora_rs.train`: a run that stopped and went on is the run that did not stop, bit for bit."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch

from qlora_rs.errors import UnsupportedError
from qlora_rs.train import loop, read_log
from qlora_rs.train.state import read_state


def interrupt_now() -> None:
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "draw_curve", lambda *arguments: None)  # most of the time, and of no interest here


@pytest.mark.parametrize("stop", [0, 1, 3, 9])
def test_it_gives_the_same_losses_and_the_same_adapter(
    fine_tune, tmp_path, stop, losses, held_out_losses, adapter_bytes, everything
):
    fine_tune("whole", save_every=2, **everything)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"

    def interrupt(entry: Any, total: int) -> None:
        if entry.step == stop:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        if stop == 0:
            patch.setattr(loop.Trainer, "_advance", lambda self, log: interrupt_now())
        with pytest.raises(KeyboardInterrupt, match=rf"interrupted after step {stop} of 10.*--resume"):
            fine_tune("stopped", save_every=2, on_step=interrupt, **everything)
    assert len(losses(stopped)) == stop
    report = fine_tune("stopped", save_every=0, resume=True, **everything)
    assert losses(stopped) == losses(whole)
    assert held_out_losses(stopped) == held_out_losses(whole)
    assert adapter_bytes(stopped) == adapter_bytes(whole)
    entries = read_log(stopped / "log.jsonl")
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, report.steps + 1))
    assert (report.resumed_at, report.steps) == (stop, 10)
    states = [read_state(output / "training_state.safetensors").tensors for output in (stopped, whole)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_ctrl_c_does_not_break_a_backward_pass(fine_tune, tmp_path, losses, monkeypatch, everything):
    fine_tune("whole", **everything)
    backward, finished = torch.Tensor.backward, []

    def interrupted(self: torch.Tensor, *args: Any, **options: Any) -> None:
        self.register_hook(lambda grad: signal.raise_signal(signal.SIGINT))
        backward(self, *args, **options)
        finished.append(True)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", interrupted)
        with pytest.raises(KeyboardInterrupt, match="interrupted after step 0 of 10"):
            fine_tune("stopped", **everything)
    assert finished == [True]
    fine_tune("stopped", resume=True, **everything)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_steps_after_the_last_save_are_done_again(fine_tune, tmp_path, losses, adapter_bytes, everything):
    """As after a crash or a power cut, where nothing could be saved at the end."""
    fine_tune("whole", **everything)

    def crash(entry: Any, total: int) -> None:
        if entry.step == 5:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        fine_tune("crashed", save_every=3, on_step=crash, **everything)
    assert len(losses(tmp_path / "crashed")) == 5
    report = fine_tune("crashed", save_every=3, resume=True, **everything)
    assert report.resumed_at == 3
    assert losses(tmp_path / "crashed") == losses(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "crashed") == adapter_bytes(tmp_path / "whole")


def test_it_can_stop_after_every_step(fine_tune, tmp_path, losses, everything):
    fine_tune("whole", **everything)

    def interrupt(entry: Any, total: int) -> None:
        raise KeyboardInterrupt

    for number in range(3):
        with pytest.raises(KeyboardInterrupt):
            fine_tune("stopped", resume=number > 0, on_step=interrupt, **everything)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")[:3]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"lr": 2e-2}, "--lr was 0.01, now 0.02"),
        ({"seed": 1}, "--seed was 0, now 1"),
        ({"steps": 5}, "--steps was 4, now 5"),
        ({"r": 8}, "--r was 4, now 8"),
        ({"target_modules": ("q_proj",)}, "--target-modules was all-linear, now ['q_proj']"),
        ({"max_length": 77}, "--max-length was 512, now 77"),
        ({"dtype": "float32"}, "--dtype was auto, now float32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_is_refused_and_each_difference_named(fine_tune, tmp_path, change, difference):
    fine_tune(steps=4, save_every=0)
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    with pytest.raises(UnsupportedError, match="is of another run") as caught:
        fine_tune(**{"steps": 4, **change}, resume=True)
    assert difference in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before


def test_other_data_and_another_model_are_refused(fine_tune, tmp_path, write_chats, make_tiny_llama):
    fine_tune(steps=2)
    with pytest.raises(UnsupportedError, match="the file of --data has changed"):
        fine_tune(steps=2, data=write_chats(25, "more.jsonl"), resume=True)
    other = make_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(UnsupportedError, match="the model of --model has changed"):
        fine_tune(steps=2, model=other, resume=True)


def test_what_does_not_change_the_numbers_may_change(fine_tune, tmp_path, losses):
    def interrupt(entry: Any, total: int) -> None:
        raise KeyboardInterrupt

    fine_tune("whole", steps=4)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(steps=4, on_step=interrupt)
    fine_tune(steps=4, resume=True, save_every=1, gradient_checkpointing=True, keep_dequantized=True)
    assert losses(tmp_path / "adapter") == losses(tmp_path / "whole")


def test_a_finished_run_and_an_absent_one_have_nothing_to_resume(fine_tune):
    with pytest.raises(FileNotFoundError, match="nothing to resume: run without --resume"):
        fine_tune(steps=2, resume=True)
    fine_tune(steps=2)
    with pytest.raises(UnsupportedError, match="nothing left to do: 2 of 2 steps are done"):
        fine_tune(steps=2, resume=True)
