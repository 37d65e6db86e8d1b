"""`qlora_rs.train.schedule`: the learning rate of every step."""

from __future__ import annotations

import math

import pytest

from qlora_rs.train.schedule import learning_rate


def test_warm_up_is_linear_and_reaches_the_highest_rate_in_its_last_step():
    assert [learning_rate(step, 10, 4, 2.0) for step in (1, 2, 3, 4)] == [0.5, 1.0, 1.5, 2.0]


def test_a_cosine_falls_from_the_highest_rate_to_above_zero():
    rates = [learning_rate(step, 12, 2, 1.0) for step in range(3, 13)]
    assert rates == [pytest.approx(0.5 * (1 + math.cos(math.pi * done / 10))) for done in range(10)]
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (5, 5)])
def test_the_shortest_runs_have_a_rate_in_every_step(steps, warmup):
    rates = [learning_rate(step, steps, warmup, 3.0) for step in range(1, steps + 1)]
    assert all(0 < rate <= 3.0 for rate in rates)
    assert max(rates) == 3.0
