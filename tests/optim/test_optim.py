"""Optimizers on the CPU: the reference's bits, torch's values, torch's habits."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_rs import optim, reference
from qlora_rs.errors import UnsupportedError

SHAPES = ((), (1,), (64, 65), (4099,), (3, 5, 7), (257, 129))  # three of them are above the least size for 8 bits


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        scale = 10.0 ** float(torch.randint(-5, 1, (), generator=generator))
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)


def play(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        give_gradients(params, step)
        optimizer.step()


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


Update = Callable[..., tuple[Tensor, ...]]
BITS: dict[type, tuple[dict[str, Any], Update, tuple[bool, ...]]] = {
    optim.AdamW: (
        {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3},
        lambda step, *t: reference.adamw_update(*t, step=step, lr=0.1, betas=(0.8, 0.95), eps=1e-6, wd=0.3),
        (True, False),
    ),
    optim.Lion: (
        {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.3},
        lambda step, *t: reference.lion_update(*t, lr=0.1, betas=(0.8, 0.95), wd=0.3),
        (True,),
    ),
    optim.AdEMAMix: (
        {"lr": 0.1, "betas": (0.8, 0.95, 0.999), "alpha": 3.0, "weight_decay": 0.3},
        lambda step, *t: reference.ademamix_update(
            *t, step=step, lr=0.1, betas=(0.8, 0.95, 0.999), alpha=3.0, eps=1e-8, wd=0.3
        ),
        (True, False, True),
    ),
    optim.SGD: (
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.3},
        lambda step, *t: reference.sgd_update(
            *t, first=step == 1, lr=0.1, momentum=0.9, dampening=0.2, wd=0.3, nesterov=False
        ),
        (True,),
    ),
}
EIGHT_BIT = {
    optim.AdamW: optim.AdamW8bit,
    optim.Lion: optim.Lion8bit,
    optim.AdEMAMix: optim.AdEMAMix8bit,
    optim.SGD: optim.SGD8bit,
}


@pytest.mark.parametrize("cls", BITS)
@pytest.mark.parametrize("eight", [False, True])
def test_bits_are_those_of_the_reference(cls: type, eight: bool) -> None:
    options, update, signs = BITS[cls]
    params = parameters()
    optimizer = (EIGHT_BIT[cls] if eight else cls)(params, **options)
    expected = values(params)
    states = [[torch.zeros_like(value) for _ in signs] for value in expected]
    for step in range(1, 7):
        give_gradients(params, step)
        optimizer.step()
        for i, param in enumerate(params):
            assert param.grad is not None
            expected[i], *states[i] = update(step, expected[i], param.grad, *states[i])
            if eight and param.numel() >= 4096:
                for k, signed in enumerate(signs):
                    codes, absmax = reference.quantize_state(states[i][k].flatten(), signed)
                    states[i][k] = reference.dequantize_state(codes, absmax, signed).view(param.shape)
        assert equal(values(params), expected), step


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (optim.AdamW, torch.optim.AdamW, {"lr": 3e-3}),
        (optim.AdamW, torch.optim.AdamW, {"betas": (0.7, 0.9), "eps": 1e-4, "weight_decay": 0.5, "maximize": True}),
        (optim.SGD, torch.optim.SGD, {"lr": 0.1}),
        (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
        (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    ],
)
def test_values_are_those_of_torch(ours: type, theirs: type, options: dict[str, Any]) -> None:
    params, other = parameters(), parameters()
    play(ours(params, **options), params, 30)
    play(theirs(other, **options), other, 30)
    for param, expected in zip(params, other, strict=True):
        torch.testing.assert_close(param, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_are_rounded_once_a_step_and_keep_float32_state(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = optim.AdamW(params, lr=0.1, weight_decay=0.0)
    before = values(params)
    give_gradients(params, 0)
    optimizer.step()
    for param, start in zip(params, before, strict=True):
        assert param.grad is not None
        zeros = torch.zeros(param.shape)
        update = reference.adamw_update
        wide, *_ = update(
            start.float(), param.grad.float(), zeros, zeros, step=1, lr=0.1, betas=(0.9, 0.999), eps=1e-8, wd=0.0
        )
        assert torch.equal(param, wide.to(dtype))
        assert optimizer.state[param]["exp_avg"].dtype == torch.float32


def test_groups_schedulers_closures_and_missing_gradients_work_as_in_torch() -> None:
    def build(cls: type) -> tuple[list[nn.Parameter], torch.optim.Optimizer, Any]:
        params = parameters()
        groups = [{"params": params[:3], "lr": 0.02}, {"params": params[3:5], "weight_decay": 0.0}]
        optimizer = cls(groups, lr=0.01, weight_decay=0.1)
        optimizer.add_param_group({"params": params[5:], "betas": (0.5, 0.6)})
        return params, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7)

    results = []
    for cls in (optim.AdamW, torch.optim.AdamW):
        params, optimizer, scheduler = build(cls)
        for step in range(9):

            def closure(step: int = step, params: list[nn.Parameter] = params) -> Tensor:
                assert torch.is_grad_enabled()
                give_gradients(params, step)
                params[step % 3].grad = None
                return torch.tensor(float(step))

            assert optimizer.step(closure) == step
            scheduler.step()
        results.append(values(params))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (optim.AdamW, torch.optim.AdamW, {"weight_decay": 0.3}),
        (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    ],
)
@pytest.mark.parametrize("ours_first", [True, False])
def test_state_dicts_go_both_ways_between_torch_and_here(
    ours: type, theirs: type, options: dict[str, Any], ours_first: bool
) -> None:
    first, second = (ours, theirs) if ours_first else (theirs, ours)
    params = parameters()
    start = first(params, **options)
    play(start, params, 5)
    saved = copy.deepcopy(start.state_dict())
    moved = [nn.Parameter(value) for value in values(params)]
    other = second(moved, lr=77.0)
    other.load_state_dict(saved)
    play(start, params, 5, start=5)
    play(other, moved, 5, start=5)
    for param, expected in zip(moved, params, strict=True):
        torch.testing.assert_close(param, expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("cls", [*BITS, *EIGHT_BIT.values()])
def test_saved_state_goes_on_with_the_same_bits(cls: type) -> None:
    options = BITS.get(cls, BITS[next(base for base in BITS if issubclass(cls, base))])[0]
    params = parameters(torch.bfloat16)  # torch itself would cast the state to this
    optimizer = cls(params, **options)
    play(optimizer, params, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed_params = [nn.Parameter(value) for value in values(params)]
    resumed = cls(resumed_params)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    copied_params, copied = copy.deepcopy((params, optimizer))
    for one, its in ((optimizer, params), (resumed, resumed_params), (copied, copied_params)):
        play(one, its, 3, start=3)
    assert equal(values(params), values(resumed_params))
    assert equal(values(params), values(copied_params))


def test_state_converts_between_8_and_32_bits() -> None:
    params = parameters()
    eight = optim.AdamW8bit(params)
    play(eight, params, 3)
    state = eight.state[params[2]]
    assert (state["exp_avg"].dtype, state["exp_avg"].shape) == (torch.uint8, params[2].shape)
    assert state["exp_avg_sq_absmax"].shape == (17,)
    full = optim.AdamW(params)
    full.load_state_dict(eight.state_dict())
    expected = reference.dequantize_state(state["exp_avg"].flatten(), state["exp_avg_absmax"], True)
    assert torch.equal(full.state[params[2]]["exp_avg"].flatten(), expected)
    back = optim.AdamW8bit(params)
    back.load_state_dict(full.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(back.state[params[2]][name], state[name])


def test_8_bits_train_about_as_well_as_32() -> None:
    def loss_after(cls: type) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        target = nn.Linear(64, 64)
        optimizer = cls(model.parameters(), lr=3e-3)
        for _ in range(150):
            x = torch.randn(128, 64)
            loss = (model(x) - target(x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    for full, eight in ((optim.AdamW, optim.AdamW8bit), (optim.AdEMAMix, optim.AdEMAMix8bit)):
        assert loss_after(eight) < 1.1 * loss_after(full) < 0.11


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_clipping_is_that_of_torch_and_leaves_gradients_alone(limit: float) -> None:
    params, other = parameters(), parameters()
    ours = optim.AdamW([{"params": params[:2]}, {"params": params[2:]}], max_grad_norm=limit)
    theirs = torch.optim.AdamW(other)
    for step in range(5):
        give_gradients(params, step)
        give_gradients(other, step)
        before = [param.grad.clone() for param in params if param.grad is not None]
        norm = nn.utils.clip_grad_norm_(other, limit)
        ours.step()
        theirs.step()
        assert equal(before, [param.grad for param in params if param.grad is not None])
        assert ours.grad_norm == pytest.approx(float(norm), rel=1e-5)
    for param, expected in zip(params, other, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)


def test_strided_parameters_are_updated_in_place() -> None:
    base = torch.randn(8, 6)
    strided, plain = nn.Parameter(base.clone().t()), nn.Parameter(base.t().contiguous())
    gradient = torch.randn(8, 6).t()
    for param in (strided, plain):
        param.grad = gradient.clone()
        optim.AdamW([param], lr=0.1).step()
    assert not strided.is_contiguous()
    assert torch.equal(strided, plain)


def test_ademamix_schedule_begins_at_adam_and_ends_at_its_own_values() -> None:
    from qlora_rs.optim.rules import ademamix_schedule

    group = {"betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "t_alpha": 100, "t_beta3": 100}
    alpha, beta3 = ademamix_schedule(group, 50)
    assert alpha == 2.5
    half_life = math.log(0.5) / math.log(beta3)
    ends = math.log(0.5) / math.log(0.9), math.log(0.5) / math.log(0.9999)
    assert half_life == pytest.approx(sum(ends) / 2, rel=1e-9)
    assert ademamix_schedule(group, 100) == ademamix_schedule(group, 900) == (5.0, 0.9999)
    assert ademamix_schedule({**group, "t_alpha": None, "t_beta3": None}, 1) == (5.0, 0.9999)


@pytest.fixture
def mesh() -> Iterator[Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls", [optim.AdamW, optim.AdamW8bit])
def test_sharded_parameters_are_updated_where_they_are(mesh: Any, cls: type) -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    plain = nn.Parameter(torch.randn(128, 65))
    sharded = nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(0)]))
    gradient = torch.randn(128, 65)
    plain.grad, sharded.grad = gradient, distribute_tensor(gradient, mesh, [Shard(0)])
    optimizer = cls([sharded], lr=0.1)
    for one in (cls([plain], lr=0.1), optimizer):
        one.step()
        one.step()
    assert torch.equal(sharded.full_tensor(), plain)  # type: ignore[attr-defined]
    if cls is optim.AdamW:
        assert isinstance(optimizer.state[sharded]["exp_avg"], DTensor)
    with pytest.raises(UnsupportedError, match="clip_grad_norm_"):
        cls([sharded], max_grad_norm=1.0).step()


def test_what_cannot_be_done_is_refused() -> None:
    params = parameters()
    for options in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"weight_decay": -1.0}, {"max_grad_norm": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            optim.AdamW(params, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nesterov"):
        optim.SGD(params, nesterov=True)
    with pytest.raises(TypeError, match="min_8bit_size"):
        optim.AdamW(params, min_8bit_size=1)
    with pytest.raises(TypeError, match="AdamW has no option 'fused'"):
        optim.AdamW(params, fused=True)
    for cls, betas in ((optim.AdamW, (0.9,)), (optim.AdEMAMix, (0.9, 0.99))):
        with pytest.raises(ValueError, match=r"betas are \d numbers"):
            cls(params, betas=betas)  # type: ignore[arg-type]
    double = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    double.grad = torch.ones_like(double)
    with pytest.raises(UnsupportedError, match=r"\[3\] is torch.float64 on cpu"):
        optim.AdamW([double]).step()
    with pytest.raises(UnsupportedError, match="AMSGrad"):
        optim.AdamW(params).load_state_dict(torch.optim.AdamW(params, amsgrad=True).state_dict())
    with pytest.raises(ValueError, match="number of parameter groups"):
        optim.AdamW([{"params": params[:1]}, {"params": params[1:]}]).load_state_dict(optim.AdamW(params).state_dict())


@pytest.mark.parametrize("cls", [optim.AdamW, optim.AdamW8bit, optim.PagedAdamW32bit, optim.PagedAdamW8bit])
def test_saved_states_that_do_not_fit_are_refused(cls: type) -> None:
    params = parameters()
    start = cls(params)
    play(start, params, 1)
    saved = start.state_dict()
    for name, given in saved["state"][2].items():
        if name == "step":
            continue
        wrong = copy.deepcopy(saved)
        wrong["state"][2][name] = given.reshape(-1)[:1]  # torch would broadcast it
        with pytest.raises(ValueError, match=r"shape \[64, 65\] cannot take a saved state"):
            cls(params).load_state_dict(wrong)
    for other in (optim.Lion(params), torch.optim.SGD(params, momentum=0.9)):
        play(other, params, 1)
        states = {**saved, "state": other.state_dict()["state"]}
        with pytest.raises(ValueError, match=r"'exp_avg(_sq)?' .* is not of a"):
            cls(params).load_state_dict(states)


def test_8_bit_state_reaches_torch_by_way_of_32_bits() -> None:
    params = parameters()
    start, middle, end = optim.AdamW8bit(params), optim.AdamW(params), torch.optim.AdamW(params)
    play(start, params, 3)
    middle.load_state_dict(start.state_dict())
    end.load_state_dict(middle.state_dict())
    moved = [nn.Parameter(value) for value in values(params)]
    same = optim.AdamW(moved)
    same.load_state_dict(start.state_dict())
    play(end, params, 3, start=3)
    play(same, moved, 3, start=3)
    for param, expected in zip(moved, params, strict=True):
        torch.testing.assert_close(param, expected, rtol=3e-6, atol=3e-6)
