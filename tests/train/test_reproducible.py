"""Runs that give the same bits every time, and what happens where torch has no algorithm that does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qlora_rs.train import loop
from qlora_rs.train.log import read_log
from qlora_rs.train.reproducible import settle_for_less


@pytest.fixture
def strict() -> Iterator[None]:
    """As a run on a CUDA device has it; the CPU refuses `put_` too."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def unrepeatable() -> None:
    torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))


@pytest.mark.usefixtures("strict")
def test_only_the_refusal_of_torch_is_settled_and_only_once() -> None:
    assert settle_for_less(RuntimeError("out of memory")) is None
    with pytest.raises(RuntimeError) as caught:
        unrepeatable()
    message = settle_for_less(caught.value)
    assert message is not None
    assert "put_ does not have a deterministic implementation" in message
    assert torch.are_deterministic_algorithms_enabled()
    with pytest.warns(UserWarning, match="put_"):
        unrepeatable()
    assert settle_for_less(caught.value) is None


def test_an_error_elsewhere_that_speaks_of_it_changes_nothing() -> None:
    error = RuntimeError("see torch.use_deterministic_algorithms")
    assert settle_for_less(error) is None
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("strict")
def test_a_model_that_cannot_be_repeated_is_trained_all_the_same_and_it_is_said(
    fine_tune, tmp_path, monkeypatch
) -> None:
    options = {"steps": 4, "lora_dropout": 0.2, "grad_accum": 2, "eval_fraction": 0.2}
    fine_tune("plain", **options)
    honest, calls = loop.loss_sum, 0

    def loss_sum(*arguments):
        nonlocal calls
        calls += 1
        loss = honest(*arguments)
        if calls % 2 == 0:  # in the middle of a step, when one batch has left its gradients
            unrepeatable()
        return loss

    monkeypatch.setattr(loop, "loss_sum", loss_sum)
    messages: list[str] = []
    with pytest.warns(UserWarning, match="put_"):
        fine_tune("warned", on_message=messages.append, **options)
    assert sum("will not give exactly the same numbers" in line for line in messages) == 1
    logs = [
        [entry.get("loss", entry.get("eval_loss")) for entry in read_log(tmp_path / name / "log.jsonl")]
        for name in ("plain", "warned")
    ]
    assert logs[0] == logs[1]


@pytest.mark.usefixtures("strict")
def test_other_errors_of_a_step_are_raised(fine_tune, monkeypatch) -> None:
    def loss_sum(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(loop, "loss_sum", loss_sum)
    with pytest.raises(RuntimeError, match="something else"):
        fine_tune(steps=1)
