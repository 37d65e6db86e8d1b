"""Paged optimizers: the bits of the unpaged ones, under any budget."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from qlora_rs import optim
from qlora_rs.errors import PageError
from qlora_rs.paging import PagedPool

SHAPES = ((97, 91), (1,), (0,), (5003,), (64, 67), (33,), (4096,))
PAIRS = [
    (optim.PagedAdamW32bit, optim.AdamW),
    (optim.PagedAdamW8bit, optim.AdamW8bit),
    (optim.PagedLion32bit, optim.Lion),
    (optim.PagedLion8bit, optim.Lion8bit),
    (optim.PagedAdEMAMix32bit, optim.AdEMAMix),
    (optim.PagedAdEMAMix8bit, optim.AdEMAMix8bit),
]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def play(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for index, param in enumerate(params):
            missing = (index + step) % 5 == 0
            param.grad = None if missing else torch.randn(param.shape, generator=generator)
        optimizer.step()


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def assert_same(left: object, right: object) -> None:
    if isinstance(left, Tensor):
        assert torch.equal(left, right)  # type: ignore[arg-type]
    elif isinstance(left, dict):
        assert isinstance(right, dict)
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        assert isinstance(right, list)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def small_pool() -> PagedPool:
    return PagedPool(3 * 4096, page_size=4096)


@pytest.mark.parametrize(("paged", "plain"), PAIRS)
def test_paged_steps_have_the_bits_of_unpaged_ones_after_100_steps(paged: type, plain: type) -> None:
    params, other = parameters(), parameters()
    pool = small_pool()
    ours, theirs = paged(params, pool=pool, max_grad_norm=3.0), plain(other, max_grad_norm=3.0)
    play(ours, params, range(100))
    play(theirs, other, range(100))
    assert_same(values(params), values(other))
    assert_same(ours.state_dict(), theirs.state_dict())
    stats = pool.stats()
    assert stats.bytes_out > 0
    assert stats.resident_bytes <= pool.budget < stats.resident_bytes + stats.paged_bytes


@pytest.mark.parametrize(("paged", "plain"), PAIRS)
def test_saved_state_comes_back_paged_and_goes_on_with_the_same_bits(paged: type, plain: type) -> None:
    params = parameters()
    optimizer = paged(params, pool=small_pool(), lr=0.01)
    play(optimizer, params, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    pool = small_pool()
    runs = [(optimizer, params)]
    for cls, options in ((paged, {"pool": pool}), (plain, {})):
        own = [nn.Parameter(value) for value in values(params)]
        resumed = cls(own, **options)
        resumed.load_state_dict(copy.deepcopy(saved))
        runs.append((resumed, own))
    assert pool.stats().buffers > 3
    for one, its in runs:
        play(one, its, range(5, 10))
    for one, its in runs[1:]:
        assert_same(values(its), values(params))
        assert_same(one.state_dict()["state"], optimizer.state_dict()["state"])


def test_loading_replaces_all_that_was_there() -> None:
    params, pool = parameters(), small_pool()
    optimizer, fresh = optim.PagedAdamW32bit(params, pool=pool), optim.PagedAdamW32bit(params, pool=small_pool())
    play(fresh, params[:1], range(1, 4))
    saved = copy.deepcopy(fresh.state_dict())
    play(optimizer, params, range(1, 4))
    buffers = pool.stats().buffers
    optimizer.load_state_dict(saved)
    assert pool.stats().buffers < buffers
    assert_same(optimizer.state_dict()["state"], saved["state"])


def test_known_order_is_fetched_ahead() -> None:
    params, pool = parameters(), small_pool()
    optimizer = optim.PagedAdamW32bit(params, pool=pool)
    for step in range(8):
        for param in params:
            param.grad = torch.ones_like(param)
        before = pool.stats()
        optimizer.step()
        after = pool.stats()
        if step > 1:
            assert after.misses == before.misses


def test_optimizers_share_a_pool_and_own_one_where_none_is_given() -> None:
    pool, params = small_pool(), parameters()
    first, second = optim.PagedAdamW8bit(params[:3], pool=pool), optim.PagedLion8bit(params[3:], pool=pool)
    assert first.pool is second.pool
    play(first, params[:3], range(3))
    play(second, params[3:], range(3))
    own = optim.PagedAdamW8bit(params, budget="64MiB")
    assert own.pool.budget == 64 << 20


def test_paged_optimizers_are_not_copied_by_accident() -> None:
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optim.PagedAdamW8bit(parameters(), pool=small_pool()))


def test_step_that_finds_no_room_says_so() -> None:
    pool, params = PagedPool(4096, page_size=4096), parameters()
    held = pool.zeros(10)
    with held.acquired(), pytest.raises(PageError, match=r"PagedAdamW32bit page 0.*release some"):
        play(optim.PagedAdamW32bit(params, pool=pool), params, range(1))


@pytest.mark.parametrize(("paged", "plain"), PAIRS)
def test_state_that_is_cleared_begins_anew(paged: type, plain: type) -> None:
    results = []
    for make in (lambda params: paged(params, pool=small_pool()), plain):
        params = parameters()
        optimizer = make(params)
        play(optimizer, params, range(3))
        del optimizer.state[params[0]]
        play(optimizer, params, range(3, 5))
        optimizer.state.clear()
        play(optimizer, params, range(5, 9))
        results.append(values(params))
    assert_same(*results)


def test_a_parameter_of_another_size_is_refused() -> None:
    params = parameters()
    optimizer = optim.PagedAdamW32bit(params, pool=small_pool())
    play(optimizer, params, range(1, 2))
    for size in (7, 20_000):
        params[0].data, params[0].grad = torch.zeros(size), None
        params[0].grad = torch.ones(size)
        with pytest.raises(ValueError, match=rf"shape \[{size}\] has paged state of 8827 elements"):
            optimizer.step()


def test_groups_may_be_empty_and_wrong_pools_are_told() -> None:
    params = parameters()
    optimizer = optim.PagedAdamW8bit([{"params": []}, {"params": params}], budget="32MiB")
    play(optimizer, params, range(2))
    assert optimizer.pool.budget == 32 << 20
    optim.PagedAdamW8bit([{"params": []}]).step()
    with pytest.raises(TypeError, match=r"pool is a PagedPool, got '1GiB'.*budget="):
        optim.PagedAdamW8bit(params, pool="1GiB")  # type: ignore[arg-type]
