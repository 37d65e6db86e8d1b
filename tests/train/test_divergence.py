"""`qlora_rs.train.loop` where the loss is no number any more: the run ends with the step, and what was saved stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_rs.train import DivergedError, evaluation, loop


def test_an_absurd_rate_ends_the_run_and_names_the_step(fine_tune, tmp_path):
    with pytest.raises(DivergedError, match=r"step \d of 9: .*no adapter was saved before.*Lower --lr"):
        fine_tune(steps=9, lr=1e30)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["log.jsonl"]


def test_the_adapter_saved_last_is_kept(fine_tune, tmp_path, monkeypatch, losses, adapter_bytes):
    real, calls = loop.loss_sum, []

    def poisoned(model: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        return real(model, batch) * (float("nan") if len(calls) == 4 else 1.0)

    fine_tune("short", steps=6)
    monkeypatch.setattr(loop, "loss_sum", poisoned)
    with pytest.raises(DivergedError, match=r"step 4 of 6: the loss is nan; the adapter after step 2 is kept in"):
        fine_tune(steps=6, save_every=2)
    assert losses(tmp_path / "adapter") == losses(tmp_path / "short")[:3]
    monkeypatch.setattr(loop, "loss_sum", real)
    fine_tune(steps=6, save_every=2, resume=True)
    assert adapter_bytes(tmp_path / "adapter") == adapter_bytes(tmp_path / "short")


def test_a_gradient_that_is_not_finite_ends_it_before_the_update(fine_tune, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: torch.tensor(float("inf")))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: pytest.fail("updated"))
    with pytest.raises(DivergedError, match="step 1 of 3: the gradient's norm is inf"):
        fine_tune(steps=3)


def test_a_held_out_loss_that_is_not_finite_ends_it(fine_tune, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "loss_sum", lambda model, batch: torch.tensor(float("nan")))
    with pytest.raises(DivergedError, match="after step 0 of 3: the held-out loss is nan"):
        fine_tune(steps=3, eval_fraction=0.2)
    assert (tmp_path / "adapter" / "log.jsonl").read_bytes() == b""


def test_an_adapter_that_is_not_finite_is_never_saved(fine_tune, tmp_path):
    def spoil(entry: Any, total: int) -> None:
        spoilt[0].data.fill_(float("inf"))

    spoilt: list[torch.nn.Parameter] = []
    with pytest.MonkeyPatch.context() as patch:
        original = loop.lora_parameters
        patch.setattr(loop, "lora_parameters", lambda model: spoilt.extend(original(model)) or spoilt)
        with pytest.raises(DivergedError, match="after step 1 of 1: the adapter is no longer finite"):
            fine_tune(steps=1, on_step=spoil)
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()
