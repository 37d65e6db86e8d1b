"""`qlora_rs.train.options`: what fits together, and what is refused with the option's name."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from qlora_rs.cli.train import train as command
from qlora_rs.train.options import TrainOptions, plan_max_length, plan_steps


def options(**changes: object) -> TrainOptions:
    return TrainOptions(model=Path("m"), data=Path("d"), output=Path("o"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 5, "epochs": 1}, "--steps 5 and --epochs 1 exclude each other"),
        ({"resume": True, "overwrite": True}, "--resume .* --overwrite"),
        ({"r": 0}, "--r is at least 1; got 0"),
        ({"steps": 0}, "--steps is at least 1"),
        ({"epochs": -1}, "--epochs is at least 1"),
        ({"batch_size": 0}, "--batch-size is at least 1"),
        ({"grad_accum": 0}, "--grad-accum is at least 1"),
        ({"max_length": 1}, "--max-length is at least 2"),
        ({"warmup": -1}, "--warmup is at least 0"),
        ({"save_every": -1}, "--save-every is at least 0"),
        ({"eval_fraction": 0.1, "eval_every": 0}, "--eval-every is at least 1"),
        ({"eval_every": 5}, "--eval-every needs held-out samples"),
        ({"eval_fraction": 1.0}, r"--eval-fraction lies in \[0, 1\); got 1.0"),
        ({"lora_dropout": 1.0}, "--lora-dropout lies in"),
        ({"lr": 0.0}, "--lr is positive and finite"),
        ({"lr": float("nan")}, "--lr is positive and finite"),
        ({"lora_alpha": float("inf")}, "--lora-alpha is positive and finite"),
        ({"max_grad_norm": -0.1}, "--max-grad-norm is zero or positive"),
        ({"weight_decay": float("nan")}, "--weight-decay is zero or positive"),
        ({"seed": -1}, "--seed lies in"),
        ({"keep_dequantized": True}, "--keep-dequantized keeps what --gradient-checkpointing computes again"),
        ({"dtype": "float16"}, "--dtype is one of auto, float32, bfloat16; got 'float16'"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_that_the_user_typed(changes, message):
    with pytest.raises(ValueError, match=message):
        options(**changes)


def test_steps_follow_from_epochs_and_the_last_may_be_smaller():
    assert plan_steps(options(batch_size=4, grad_accum=2), 17)[0] == 3
    assert plan_steps(options(batch_size=4, grad_accum=2, epochs=3), 17)[0] == 7
    assert plan_steps(options(steps=9), 17)[0] == 9


def test_warm_up_is_three_percent_of_the_steps_unless_given():
    assert plan_steps(options(steps=100), 1) == (100, 3)
    assert plan_steps(options(steps=33), 1) == (33, 0)
    assert plan_steps(options(steps=33, warmup=33), 1) == (33, 33)
    with pytest.raises(ValueError, match="--warmup 34 is longer than the run of 33 steps"):
        plan_steps(options(steps=33, warmup=34), 1)


def test_the_longest_sample_is_1024_tokens_or_what_the_model_takes():
    assert plan_max_length(options(), 8192) == 1024
    assert plan_max_length(options(), 512) == 512
    assert plan_max_length(options(), None) == 1024
    assert plan_max_length(options(max_length=2048), 2048) == 2048
    with pytest.raises(ValueError, match="--max-length 2049 is more than the 2048 tokens"):
        plan_max_length(options(max_length=2049), 2048)


def test_the_command_line_has_the_same_options_with_the_same_defaults():
    fields = {name: field.default for name, field in inspect.signature(TrainOptions).parameters.items()}
    typed = {name: field.default for name, field in inspect.signature(command).parameters.items()}
    typed["output"] = typed.pop("destination")
    assert typed.pop("as_json") is False
    assert typed.pop("target_modules") is None
    assert fields.pop("target_modules") == "all-linear"
    assert typed == fields
