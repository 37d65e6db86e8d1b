"""What optimizers remember from step to step never outlives its truth, and a step is cheap for the host."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qlora_rs import optim, reference
from qlora_rs.errors import UnsupportedError

SHAPES = ((64, 65), (1,), (4099,), (33, 5))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def drop_state(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    optimizer.state[param] = {}


def replace_moment(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    optimizer.state[param]["exp_avg"] = torch.zeros_like(param)


def move_moment(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    moment = optimizer.state[param]["exp_avg"]
    moment.data = moment.data.clone() * 3


def set_step(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    optimizer.state[param]["step"].fill_(100.0)


def replace_step(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    optimizer.state[param]["step"] = torch.tensor(50.0)


def move_parameter(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    param.data = param.data.clone() * 2


def change_options(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    optimizer.param_groups[0].update(lr=0.5, betas=(0.5, 0.6), maximize=True)


def add_group(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    removed = optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [removed], "lr": 1.0})


def strided_gradient(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    grad = torch.arange(2.0 * param.numel()).view(*param.shape, 2)[..., 1]
    assert not grad.is_contiguous()
    param.grad = grad


def no_gradient(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    param.grad = None


CHANGES = [
    drop_state,
    replace_moment,
    move_moment,
    set_step,
    replace_step,
    move_parameter,
    change_options,
    add_group,
    strided_gradient,
    no_gradient,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_steps_is_followed_as_torch_follows_it(
    change: Callable[[torch.optim.Optimizer, nn.Parameter], None],
) -> None:
    results = []
    for cls in (optim.AdamW, torch.optim.AdamW):
        params = parameters()
        optimizer = cls(params, lr=0.01)
        for step in range(9):
            give_gradients(params, step)
            if step in (3, 6):
                change(optimizer, params[0])
            optimizer.step()
        results.append((params, [float(optimizer.state[param]["step"]) for param in params]))
    (ours, counted), (theirs, expected) = results
    assert counted == expected
    for param, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)


def test_another_type_of_parameter_between_steps_is_followed() -> None:
    layer = nn.Linear(64, 65)
    optimizer = optim.AdamW(layer.parameters())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer.to(dtype)
        layer(torch.ones(1, 64, dtype=dtype)).sum().backward()
        before = layer.weight.detach().clone()
        optimizer.step()
        assert not torch.equal(before, layer.weight)


def test_a_state_of_another_size_is_refused() -> None:
    params = parameters()
    optimizer = optim.AdamW(params)
    give_gradients(params, 0)
    optimizer.step()
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"'exp_avg' of a parameter of shape \[64, 65\] on cpu is \[3\] of torch.float32"
    ):
        optimizer.step()


def test_sparse_gradients_are_refused_at_any_step() -> None:
    embedding = nn.Embedding(10, 3)
    sparse = nn.Embedding(10, 3, sparse=True)
    sparse.weight = embedding.weight
    optimizer = optim.AdamW([embedding.weight])
    embedding(torch.tensor([1])).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedError, match="SparseAdam"):
        optimizer.step()


def test_gradients_are_not_kept_alive() -> None:
    import weakref

    params = parameters()
    optimizer = optim.AdamW(params)
    give_gradients(params, 0)
    alive = weakref.ref(params[0].grad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert alive() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_global_norm_has_the_references_bits(dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (1, 0, 127, 4096, 4097, 20_011)]
    for param in params:
        param.grad = (torch.randn(param.shape) * 1e3).to(dtype)
    optimizer = optim.AdamW(params, max_grad_norm=1.0)
    optimizer.step()
    grads: list[Tensor] = [param.grad for param in params]  # type: ignore[misc]
    assert optimizer.grad_norm == math.sqrt(reference.squared_norm(grads))


def test_learning_rate_may_be_a_tensor() -> None:
    params, other = parameters(), parameters()
    ours, theirs = optim.AdamW(params, lr=torch.tensor(0.125)), optim.AdamW(other, lr=0.125)
    for optimizer, its in ((ours, params), (theirs, other)):
        give_gradients(its, 1)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, other, strict=True))
