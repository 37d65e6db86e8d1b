"""Saved tensors in a pool: the same bits, written and read once, in the same buffers at every step."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qlora_rs
from qlora_rs.errors import PageError
from qlora_rs.paging import PagedPool, page_weights, saved_activations

PAGE = 4096
WIDTH, TOKENS = 67, 61
INPUT = WIDTH * TOKENS * 4  # bytes of a layer's input: four pages and a bit
LEAST = 4096


class Tower(nn.Module):
    def __init__(self, layers: int, *, checkpointing: bool = True) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 90), nn.Tanh(), nn.Linear(90, WIDTH)) for _ in range(layers)
        )
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x))
        return x


def inputs(step: int = 0) -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(step))


def step(model: nn.Module, number: int, pool: PagedPool | None = None) -> list[Tensor]:
    """The loss and all gradients."""
    if pool is None:
        loss = model(inputs(number)).square().mean()
    else:
        with saved_activations(pool, min_bytes=LEAST):
            loss = model(inputs(number)).square().mean()
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 1
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("frames", [6, 17, 200])
def test_gradients_have_the_bits_of_the_plain_run(frames: int, checkpointing: bool) -> None:
    pool = PagedPool(frames * PAGE, page_size=PAGE)
    for number in range(3):
        expected = step(Tower(5, checkpointing=checkpointing), number)
        assert_same(step(Tower(5, checkpointing=checkpointing), number, pool), expected)
        if number == 0:  # later, blank buffers are made ready for the next step
            assert pool.stats().resident_bytes == 0


def test_every_input_is_written_once_and_read_once_and_never_copied_back_when_it_fits() -> None:
    pool = PagedPool(100 * PAGE, page_size=PAGE)
    model = Tower(6)
    step(model, 0, pool)
    stats = pool.stats()
    assert stats.hits + stats.misses == 2 * 6 + 2  # and the result, which square() keeps
    assert (stats.bytes_in, stats.bytes_out) == (0, 0)


def test_steps_meet_the_same_buffers_so_that_their_order_is_learned() -> None:
    pool = PagedPool(17 * PAGE, page_size=PAGE)  # three of seven
    model = Tower(6)
    for number in range(3):
        step(model, number, pool)
    before = pool.stats()
    for number in range(3, 6):
        step(model, number, pool)
    after = pool.stats()
    assert after.buffers == 7
    assert after.trace_breaks == before.trace_breaks
    assert after.trace_period == 2 * 7 - 2
    # Blank buffers are no misses of content: only what had been written and pushed out is fetched.
    moved_in, moved_out = (getattr(after, name) - getattr(before, name) for name in ("bytes_in", "bytes_out"))
    assert 0 < moved_in <= 3 * 4 * INPUT
    assert 0 < moved_out <= 3 * 4 * INPUT


def test_a_context_for_each_step_and_one_for_all_are_alike() -> None:
    pool, model = PagedPool(17 * PAGE, page_size=PAGE), Tower(4)
    expected = [step(Tower(4), number) for number in range(3)]
    with saved_activations(pool, min_bytes=LEAST):
        found = [step(model, number) for number in range(3)]
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    assert pool.stats().buffers == 5


def test_a_graph_that_is_kept_can_be_walked_again() -> None:
    pool, model = PagedPool(8 * PAGE, page_size=PAGE), Tower(3, checkpointing=False)
    with saved_activations(pool, min_bytes=LEAST):
        loss = model(inputs()).square().mean()
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert_same(list(second), list(first))


def test_a_graph_that_is_dropped_gives_its_buffers_up() -> None:
    pool, model = PagedPool(100 * PAGE, page_size=PAGE), Tower(3)
    with saved_activations(pool, min_bytes=LEAST):
        loss = model(inputs()).sum()
    assert pool.stats().resident_bytes > 0
    del loss
    gc.collect()
    assert pool.stats().resident_bytes == 0


def test_what_is_saved_for_several_operations_is_written_once_unless_it_changed() -> None:
    pool = PagedPool(100 * PAGE, page_size=PAGE)
    x = torch.randn(TOKENS, WIDTH)
    before = x.clone()
    weights = [torch.randn(TOKENS, WIDTH, requires_grad=True) for _ in range(4)]
    with saved_activations(pool, min_bytes=LEAST):
        total = sum((x * weight).sum() for weight in weights[:3])
        x.add_(1)
        total = total + (x * weights[3]).sum()
    assert pool.stats().buffers == 2
    total.backward()
    assert all(torch.equal(weight.grad, before) for weight in weights[:3])
    assert torch.equal(weights[3].grad, x)


def test_parameters_small_and_strided_tensors_are_left_alone() -> None:
    pool = PagedPool(100 * PAGE, page_size=PAGE)
    parameter = nn.Parameter(torch.randn(TOKENS, WIDTH))
    strided = torch.randn(WIDTH, TOKENS).T
    small = torch.randn(1000, requires_grad=True)
    with saved_activations(pool, min_bytes=LEAST):
        loss = parameter.square().sum() + (parameter * strided).sum() + small.square().sum()
        loss = loss + (torch.randn(3, TOKENS) @ parameter.view(TOKENS, WIDTH)).sum()
    assert pool.stats().buffers == 0
    loss.backward()


def test_float16_integers_and_empty_tensors_come_back_as_they_were() -> None:
    pool = PagedPool(100 * PAGE, page_size=PAGE)
    half = torch.randn(3, 5, 7, dtype=torch.float16)
    index = torch.randint(50, (4, 9))
    table = torch.randn(50, 3, requires_grad=True)
    scale = torch.ones(3, 5, 7, dtype=torch.float16, requires_grad=True)
    with saved_activations(pool, min_bytes=0):
        loss = (half * scale).sum().float() + table[index].sum() + (torch.empty(0, 3) * table[:0]).sum()
    loss.backward()
    assert torch.equal(scale.grad, half)
    assert torch.equal(table.grad[:, 0], torch.bincount(index.flatten(), minlength=50).float())


def test_a_tensor_that_exceeds_the_budget_is_told_by_name() -> None:
    pool = PagedPool(2 * PAGE, page_size=PAGE)
    with pytest.raises(PageError, match="saved activation 0"), saved_activations(pool, min_bytes=LEAST):
        Tower(1)(inputs())


def test_weights_and_optimizer_share_the_pool() -> None:
    def run(pool: PagedPool | None) -> list[Tensor]:
        model = Tower(4)
        qlora_rs.quantize_model(model)
        qlora_rs.attach_lora(model, r=3, seed=1)
        trained = qlora_rs.lora_parameters(model)
        if pool is None:
            optimizer: Any = qlora_rs.optim.AdamW8bit(trained, lr=1e-2, min_8bit_size=0)
        else:
            page_weights(model, pool)
            optimizer = qlora_rs.optim.PagedAdamW8bit(trained, lr=1e-2, min_8bit_size=0, pool=pool)
        found: list[Tensor] = []
        for number in range(4):
            with saved_activations(pool or PagedPool(PAGE, page_size=PAGE), min_bytes=LEAST if pool else 1 << 40):
                loss = model(inputs(number)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return [*found, *(p.detach() for p in trained)]

    pool = PagedPool(14 * PAGE, page_size=PAGE)
    assert_same(run(pool), run(None))
    assert pool.stats().evicted_pages > 0


def test_threads_have_buffers_of_their_own() -> None:
    pool = PagedPool(60 * PAGE, page_size=PAGE)
    expected = [step(Tower(3), number) for number in range(4)]
    wrong: list[int] = []

    def work(number: int) -> None:
        model = models[number]
        for _ in range(5):
            with saved_activations(pool, min_bytes=LEAST):
                loss = model(inputs(number)).square().mean()
            grads = torch.autograd.grad(loss, list(model.parameters()))
            same = zip([loss, *grads], expected[number], strict=True)
            if not all(torch.equal(one, other) for one, other in same):
                wrong.append(number)

    models = [Tower(3) for _ in range(4)]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
