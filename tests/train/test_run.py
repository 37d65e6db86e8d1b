"""`qlora_rs.train.run` and `loop`: the numbers of a run, what it writes, and when it ends."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch

import qlora_rs
from qlora_rs import _bridge
from qlora_rs.errors import FormatError
from qlora_rs.train import TrainReport, read_log
from qlora_rs.train.batches import IGNORED, collate
from qlora_rs.train.encoding import Encoder
from qlora_rs.train.loss import loss_sum
from qlora_rs.train.records import read_records
from qlora_rs.train.schedule import learning_rate

FILES = ["adapter_config.json", "adapter_model.safetensors", "log.jsonl", "loss.png", "training_state.safetensors"]


def test_the_loss_falls_and_the_adapter_that_is_written_has_it(fine_tune, packed, tokenizer, tmp_path):
    report = fine_tune(steps=30, lr=5e-2, eval_fraction=0.2)
    assert report.last_loss < report.first_loss - 0.25
    assert report.eval_loss_after < report.eval_loss_before - 0.25
    data = tmp_path / "chats.jsonl"
    encoder = Encoder(tokenizer, 512, model=packed, data=data)
    batch = collate([encoder.encode(record) for record in read_records(data).records], pad_id=0)
    counted = int((batch.labels != IGNORED).sum())
    model = qlora_rs.from_pretrained(packed)
    with torch.no_grad():
        before = loss_sum(model, batch).item() / counted
        qlora_rs.load_adapter(model, tmp_path / "adapter")
        after = loss_sum(model, batch).item() / counted
    assert before == pytest.approx(report.eval_loss_before, abs=0.1)
    assert after == pytest.approx(report.eval_loss_after, abs=0.1)


def test_what_is_written_is_listed_and_nothing_else_is_left(fine_tune, tmp_path):
    report = fine_tune(steps=2)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == FILES == sorted(report.files)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 32, "CAUSAL_LM")


def test_the_log_has_a_line_per_step_with_the_rate_of_the_schedule(fine_tune, tmp_path, held_out_losses):
    seen = []
    report = fine_tune(steps=5, warmup=2, eval_fraction=0.2, eval_every=2, on_step=lambda *values: seen.append(values))
    entries = read_log(tmp_path / "adapter" / "log.jsonl")
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5]
    assert [entry["learning_rate"] for entry in steps] == [learning_rate(step, 5, 2, 1e-2) for step in range(1, 6)]
    assert [step for step, _ in held_out_losses(tmp_path / "adapter")] == [0, 2, 4, 5]
    assert [(entry.step, entry.loss, total) for entry, total in seen] == [(e["step"], e["loss"], 5) for e in steps]
    assert report.tokens == sum(entry["tokens"] for entry in steps) > report.counted_tokens > 0


def test_epochs_see_every_sample(fine_tune):
    report = fine_tune(epochs=2, batch_size=5)
    assert (report.steps, report.epochs) == (10, 2.0)
    assert report.tokens == 2 * report.data.tokens
    one = fine_tune("default", batch_size=5)
    assert (one.steps, one.epochs) == (5, 1.0)


def test_accumulated_batches_equal_one_large_batch(fine_tune, tmp_path, losses):
    fine_tune("large", steps=4, batch_size=6)
    fine_tune("split", steps=4, batch_size=2, grad_accum=3)
    fine_tune("fewer", steps=4, batch_size=2)
    torch.testing.assert_close(losses(tmp_path / "split"), losses(tmp_path / "large"), rtol=2e-3, atol=0)
    assert abs(losses(tmp_path / "fewer")[0] - losses(tmp_path / "large")[0]) > 1e-3


def test_the_mean_is_over_tokens_not_over_batches(fine_tune, tmp_path, write_lines, losses):
    # Answers of very different lengths: a mean of means would give each the same weight.
    turns = [("a", "b" * 200), ("a", "c")]
    data = write_lines(
        *({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns)
    )
    fine_tune("large", data=data, steps=1, batch_size=2, dtype="float32")
    fine_tune("split", data=data, steps=1, batch_size=1, grad_accum=2, dtype="float32")
    torch.testing.assert_close(losses(tmp_path / "split"), losses(tmp_path / "large"), rtol=1e-5, atol=0)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    fine_tune, tmp_path, losses, held_out_losses, adapter_bytes, everything
):
    for output, seed in (("one", 5), ("two", 5), ("other", 6)):
        torch.manual_seed(hash(output) % 1000)  # what the caller drew before plays no part
        fine_tune(output, seed=seed, **everything)
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    assert losses(one) == losses(two)
    assert held_out_losses(one) == held_out_losses(two)
    assert adapter_bytes(one) == adapter_bytes(two)
    assert losses(one) != losses(other)


def test_the_callers_random_state_stays_as_it_is(fine_tune):
    before = torch.get_rng_state()
    fine_tune(steps=2, lora_dropout=0.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "change",
    [{"lora_dropout": 0.3}, {"max_grad_norm": 0.001}, {"weight_decay": 0.5}, {"use_rslora": True}, {"lora_alpha": 8}],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_of_the_update_reaches_it(fine_tune, tmp_path, change, losses):
    fine_tune("plain", steps=3)
    fine_tune("changed", steps=3, **change)
    assert losses(tmp_path / "plain") != losses(tmp_path / "changed")


def test_gradients_are_clipped_to_the_norm_and_logged_as_they_were(fine_tune, tmp_path, monkeypatch):
    norms = []
    update = torch.optim.AdamW.step

    def step(self: Any, *args: Any) -> Any:
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return update(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    fine_tune("clipped", steps=2, max_grad_norm=0.05)
    fine_tune("whole", steps=2, max_grad_norm=0)
    assert norms[:2] == [pytest.approx(0.05, rel=1e-3)] * 2
    whole = [entry["grad_norm"] for entry in read_log(tmp_path / "whole" / "log.jsonl")]
    assert norms[2:] == [pytest.approx(norm, rel=1e-5) for norm in whole]
    assert whole[0] > 0.05
    assert read_log(tmp_path / "clipped" / "log.jsonl")[0]["grad_norm"] == whole[0]


def test_adapters_go_only_where_they_are_wanted(fine_tune):
    assert fine_tune(steps=1, target_modules=("q_proj", "*.0.mlp.up_proj")).layers == 3
    with pytest.raises(ValueError, match="'q_porj' matches no Linear layer"):
        fine_tune("wrong", steps=1, target_modules=("q_porj",))


def test_gradient_checkpointing_gives_the_same_losses_without_a_warning(fine_tune, tmp_path, losses):
    settings = {"steps": 3, "lora_dropout": 0.2}
    fine_tune("kept", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine_tune("again", gradient_checkpointing=True, **settings)
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")


def test_gradient_checkpointing_computes_layers_twice(fine_tune, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(1) or forward(self, x))
    fine_tune("kept", steps=1)
    assert len(calls) == 2
    fine_tune("again", steps=1, gradient_checkpointing=True)
    assert len(calls) == 2 + 4


def test_kept_dequantized_weights_give_the_same_losses_from_two_thirds_of_the_dequantizing(
    fine_tune, tmp_path, losses, adapter_bytes, monkeypatch
):
    made: list[int] = []
    dequantize = _bridge.dequantize
    monkeypatch.setattr(_bridge, "dequantize", lambda *arguments: made.append(1) or dequantize(*arguments))
    settings = {"steps": 2, "lora_dropout": 0.2, "gradient_checkpointing": True}
    layers = fine_tune("again", **settings).layers
    assert len(made) == 2 * 3 * layers
    fine_tune("kept", keep_dequantized=True, **settings)
    assert len(made) == 2 * (3 + 2) * layers
    assert losses(tmp_path / "kept") == losses(tmp_path / "again")
    assert adapter_bytes(tmp_path / "kept") == adapter_bytes(tmp_path / "again")


def test_a_16_bit_model_is_quantized_on_the_way_in_and_gives_the_same(fine_tune, tiny_llama, tmp_path, losses):
    told: list[str] = []
    fine_tune("packed", steps=2)
    fine_tune("float", steps=2, model=tiny_llama, on_message=told.append)
    assert losses(tmp_path / "float") == losses(tmp_path / "packed")
    assert any(f"{tiny_llama} is not packed: quantized on the way in" in text for text in told)


def test_people_are_told_about_data_layers_and_held_out_losses(fine_tune):
    told: list[str] = []
    report: TrainReport = fine_tune(steps=2, eval_fraction=0.2, on_message=told.append)
    text = "\n".join(told)
    for part in ("24 samples (24 as messages)", "5 held out", "LoRA on 14 layers", "held-out loss after step 0: "):
        assert part in text
    assert "trained 2 steps" in str(report)
    assert f"{report.eval_loss_before:.4f} -> {report.eval_loss_after:.4f} (before and after, 5 samples)" in str(report)


def test_a_long_sample_is_cut_to_what_the_model_takes(fine_tune, write_lines):
    data = write_lines({"text": "a" * 600}, {"text": "b"})
    report = fine_tune(data=data, steps=1)
    assert (report.data.max_length, report.data.cut, report.data.lost_tokens) == (512, 1, 89)
    with pytest.raises(ValueError, match="--max-length 513 is more than the 512 tokens"):
        fine_tune("long", data=data, steps=1, max_length=513)


def test_a_tokenizer_of_another_model_is_refused(fine_tune, make_tiny_llama, tmp_path):
    model = make_tiny_llama(tmp_path / "small", vocab_size=100)
    with pytest.raises(FormatError, match=r"gives token \d+, but the model has 100 embeddings"):
        fine_tune(steps=1, model=model)


@pytest.mark.parametrize(("data", "error"), [("folder", IsADirectoryError), ("absent", FileNotFoundError)])
def test_data_that_is_no_file_is_told_before_anything_is_loaded(fine_tune, tmp_path, data, error, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("qlora_rs.train.run.load_tokenizer", lambda folder: pytest.fail("loaded"))
    with pytest.raises(error, match="--data takes") as caught:
        fine_tune(steps=1, data=tmp_path / data)
    assert caught.value.filename == str(tmp_path / data)
