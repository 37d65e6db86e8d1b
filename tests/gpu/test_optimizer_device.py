"""Optimizers on the device: the CPU's bits, which are the reference's; one launch, no waiting, graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_rs import optim
from qlora_rs.errors import UnsupportedError
from qlora_rs.paging import PagedPool

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One element, none, short last blocks, whole blocks only, more than a CTA takes at once.
SHAPES = ((), (0,), (1,), (255,), (256,), (257,), (64, 65), (3, 5, 7), (4099,), (257, 129), (16, 4096), (70_003,))
RULES: dict[type, tuple[type, dict[str, Any]]] = {
    optim.AdamW: (optim.AdamW8bit, {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}),
    optim.Lion: (optim.Lion8bit, {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.3}),
    optim.AdEMAMix: (
        optim.AdEMAMix8bit,
        {"lr": 0.1, "betas": (0.8, 0.95, 0.999), "alpha": 3.0, "t_alpha": 4, "t_beta3": 5, "weight_decay": 0.3},
    ),
    optim.SGD: (optim.SGD8bit, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.3}),
}
CLASSES = [(cls, options) for full, (eight, options) in RULES.items() for cls in (full, eight)]
MORE = [
    (optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    (optim.AdamW8bit, {"lr": 0.1, "maximize": True, "min_8bit_size": 1}),
]


def pair(
    dtype: torch.dtype = torch.float32, shapes: tuple[tuple[int, ...], ...] = SHAPES, seed: int = 0
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The same parameters on the CPU and on the device."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [nn.Parameter(value.clone()) for value in values], [nn.Parameter(value.cuda()) for value in values]


def give_gradients(lists: tuple[list[nn.Parameter], ...], step: int, missing: int = 0) -> None:
    """Of many magnitudes, with zeros; each ``missing``-th parameter has none."""
    generator = torch.Generator().manual_seed(1000 + step)
    for index, twins in enumerate(zip(*lists, strict=True)):
        scale = 10.0 ** float(torch.randint(-6, 3, (), generator=generator))
        grad = torch.randn(twins[0].shape, generator=generator) * scale
        grad = (grad * (torch.rand(grad.shape, generator=generator) > 0.2)).to(twins[0].dtype)
        for param in twins:
            absent = missing and (index + step) % missing == 0
            param.grad = None if absent else grad.to(param.device)


def same(left: Tensor, right: Tensor) -> bool:
    """Bit for bit; NaN may have any bits in float32."""
    left, right = left.detach().cpu(), right.detach().cpu()
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    bits = {4: torch.int32, 2: torch.int16}[left.element_size()]
    return bool(((left.view(bits) == right.view(bits)) | (left.isnan() & right.isnan())).all())


def assert_same(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, what: object = None) -> None:
    """Parameters and states of the device and of the CPU."""
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for index, (param, twin) in enumerate(zip(mine["params"], other["params"], strict=True)):
            assert same(param, twin), (what, index)
    left, right = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert left.keys() == right.keys()
    for number, state in left.items():
        assert state.keys() == right[number].keys()
        for name, value in state.items():
            assert same(value, right[number][name]), (what, number, name)


@pytest.mark.parametrize(("cls", "options"), [*CLASSES, *MORE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_equal_the_cpus(cls: type, options: dict[str, Any], dtype: torch.dtype) -> None:
    cpu, device = pair(dtype)
    theirs, ours = cls(cpu, **options), cls(device, **options)
    for step in range(6):
        give_gradients((cpu, device), step)
        theirs.step()
        ours.step()
        assert_same(ours, theirs, step)
    assert all(state.device.type == "cuda" for name, state in ours.state[device[-1]].items() if name != "step")


@pytest.mark.parametrize(("cls", "options"), CLASSES)
def test_nonfinite_tiny_and_huge_values_give_the_cpus_bits(cls: type, options: dict[str, Any]) -> None:
    cpu, device = pair(shapes=((5000,), (4096,), (6145,)))
    theirs, ours = cls(cpu, **options), cls(device, **options)
    for step in range(4):
        give_gradients((cpu, device), step)
        special = torch.zeros(5000)
        special[:2048] = torch.arange(2048, dtype=torch.int32).view(torch.float32)  # subnormal
        special[2048:2304] = 1e-38
        special[2304:2560] = 3e19
        special[3000], special[3500], special[4000], special[4999] = float("nan"), float("inf"), -float("inf"), -0.0
        for params in (cpu, device):
            params[0].grad = special.to(params[0].device)
            params[1].grad = torch.full_like(params[1], 1e-42)
        theirs.step()
        ours.step()
        assert_same(ours, theirs, step)


@pytest.mark.parametrize("cls", [optim.AdamW, optim.AdamW8bit])
def test_many_parameters_of_all_types_and_many_groups_are_updated_together(cls: type) -> None:
    cpu: list[nn.Parameter] = []
    device: list[nn.Parameter] = []
    for index in range(400):
        dtype = DTYPES[index % 3]
        for own, other in zip((cpu, device), pair(dtype, ((index % 7 + 1, 37 * (index % 61)),), index), strict=True):
            own += other
    # More sets of factors than a launch takes with it.
    groups = [[{"params": [param], "lr": 1e-3 * (i + 1)} for i, param in enumerate(params)] for params in (cpu, device)]
    theirs, ours = (cls(group, min_8bit_size=500) if cls is optim.AdamW8bit else cls(group) for group in groups)
    for step in range(3):
        give_gradients((cpu, device), step, missing=5)
        theirs.step()
        ours.step()
        assert_same(ours, theirs, step)


def test_missing_gradients_schedulers_and_closures_follow_the_cpu() -> None:
    cpu, device = pair()
    optimizers = []
    for params in (cpu, device):
        groups = [{"params": params[:4], "lr": 0.02}, {"params": params[4:], "weight_decay": 0.0}]
        optimizers.append(optim.AdamW8bit(groups, lr=0.01, max_grad_norm=0.7))
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(one, T_max=7) for one in optimizers]
    for step in range(10):
        give_gradients((cpu, device), step, missing=3)
        for one, scheduler in zip(optimizers, schedulers, strict=True):
            assert one.step(lambda step=step: torch.tensor(float(step))) == step
            scheduler.step()
        assert_same(optimizers[1], optimizers[0], step)


@pytest.mark.parametrize("limit", [1e-3, 1e6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clipping_has_the_cpus_bits(limit: float, dtype: torch.dtype) -> None:
    cpu, device = pair(dtype, (*SHAPES, (300_001,)))
    theirs, ours = (optim.AdamW(params, max_grad_norm=limit) for params in (cpu, device))
    for step in range(3):
        give_gradients((cpu, device), step)
        before = [param.grad.clone() for param in device if param.grad is not None]
        theirs.step()
        ours.step()
        assert ours.grad_norm == theirs.grad_norm
        assert all(torch.equal(a, param.grad) for a, param in zip(before, device, strict=True))  # type: ignore[arg-type]
        assert_same(ours, theirs, step)


def test_gradient_norm_that_is_not_a_number_spreads_as_on_the_cpu() -> None:
    cpu, device = pair(shapes=((33,), (5000,)))
    for params in (cpu, device):
        for param in params:
            param.grad = torch.ones_like(param)
        params[1].grad[17] = float("nan")  # type: ignore[index]
    theirs, ours = (optim.AdamW(params, max_grad_norm=1.0) for params in (cpu, device))
    theirs.step()
    ours.step()
    assert_same(ours, theirs)
    assert bool(device[0].isnan().all())


def test_strided_and_unaligned_parameters_and_gradients_are_updated_in_place() -> None:
    results = []
    for where in ("cpu", "cuda"):
        base = torch.arange(40_000.0).sin().to(where)
        params = [
            nn.Parameter(base[:12_000].view(100, 120).t()),
            nn.Parameter(base[12_001:17_001]),  # at a multiple of 4 bytes
            nn.Parameter(base[20_000:40_000:4]),
        ]
        optimizer = optim.AdamW8bit(params, lr=0.1, max_grad_norm=1.0)
        for step in range(3):
            for param in params:
                grad = torch.linspace(-1, 1 + step, 2 * param.numel()).to(where)
                param.grad = grad[::2].view(param.t().shape).t() if param.ndim == 2 else grad[1 : 1 + len(param)]
            optimizer.step()
        assert not params[0].is_contiguous()
        results.append((base, [copy.deepcopy(optimizer.state[param]) for param in params]))
    assert same(*(base for base, _ in results))
    for ours, theirs in zip(*(states for _, states in results), strict=True):
        assert all(same(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("cls", [cls for cls, _ in CLASSES])
@pytest.mark.parametrize("to_device", [True, False])
def test_state_moves_between_devices(cls: type, to_device: bool) -> None:
    cpu, device = pair()
    first, second = (cpu, device) if to_device else (device, cpu)
    start = cls(first, lr=0.01)
    for step in range(3):
        give_gradients((first,), step)
        start.step()
    for target, source in zip(second, first, strict=True):
        target.data.copy_(source.data)
    other = cls(second, lr=7.0)
    other.load_state_dict(copy.deepcopy(start.state_dict()))
    for step in range(3, 6):
        give_gradients((cpu, device), step)
        start.step()
        other.step()
    assert_same(other, start)


def test_cpu_and_device_parameters_share_an_optimizer_and_a_norm() -> None:
    cpu, device = pair()
    mixed = [nn.Parameter(param.detach().clone()) for param in (*cpu[:6], *device[6:])]
    theirs, ours = (optim.AdamW(params, lr=0.1, max_grad_norm=0.5) for params in (cpu, mixed))
    for step in range(3):
        give_gradients((cpu, mixed), step)
        theirs.step()
        ours.step()
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-12)
    for param, expected in zip(mixed, cpu, strict=True):
        torch.testing.assert_close(param.cpu(), expected, rtol=1e-6, atol=1e-6)


def test_parameters_on_several_devices_share_an_optimizer() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    cpu, device = pair()
    spread = [nn.Parameter(param.detach().to(f"cuda:{index % 2}")) for index, param in enumerate(device)]
    theirs, ours = (optim.AdamW8bit(params, lr=0.1, max_grad_norm=0.5) for params in (cpu, spread))
    for step in range(3):
        give_gradients((cpu, spread), step)
        theirs.step()
        ours.step()
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-12)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_steps_neither_wait_nor_allocate() -> None:
    _, device = pair()
    optimizer = optim.AdamW8bit(device, max_grad_norm=1.0)
    give_gradients((device,), 0)
    optimizer.step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)
        for _ in range(3):
            optimizer.step()
        busy = not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert busy
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_steps_run_on_the_callers_stream() -> None:
    cpu, device = pair()
    theirs, ours = optim.AdamW8bit(cpu, lr=0.1), optim.AdamW8bit(device, lr=0.1)
    side = torch.cuda.Stream()
    for step in range(3):
        give_gradients((cpu, device), step)
        grads = [param.grad for param in device]
        slow = [torch.full_like(grad, float("nan")) for grad in grads]  # type: ignore[arg-type]
        for param, grad in zip(device, slow, strict=True):
            param.grad = grad
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            for grad, value in zip(slow, grads, strict=True):
                grad.copy_(value)  # type: ignore[arg-type]
            ours.step()
        side.synchronize()
        theirs.step()
        assert_same(ours, theirs, step)


@pytest.mark.parametrize(("cls", "options"), CLASSES)
def test_captured_steps_are_replayed_with_the_right_corrections(cls: type, options: dict[str, Any]) -> None:
    cpu, device = pair()
    options = {**options, "max_grad_norm": 0.9}
    rate = torch.tensor(0.1, device="cuda")
    theirs, ours = cls(cpu, **options), cls(device, **{**options, "lr": rate}, capturable=True)
    give_gradients((cpu, device), 0)
    buffers = [param.grad for param in device]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ours.step()
    torch.cuda.current_stream().wait_stream(side)
    theirs.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    assert int(ours.state[device[-1]]["step"]) == 1  # captured, not made
    for step in range(1, 6):
        lr = 0.1 / step
        rate.fill_(lr)
        theirs.param_groups[0]["lr"] = float(torch.tensor(lr))
        give_gradients((cpu,), step)
        for buffer, param in zip(buffers, cpu, strict=True):
            buffer.copy_(param.grad)  # type: ignore[arg-type, union-attr]
        graph.replay()
        theirs.step()
        assert ours.grad_norm == theirs.grad_norm
        for param, expected in zip(device, cpu, strict=True):
            # Powers in float64 may differ in their last place; 8-bit codes and signs may then flip now and then.
            close = torch.isclose(param.detach().cpu(), expected.detach(), rtol=1e-5, atol=1e-6)
            assert close.float().mean() > 0.999 or param.numel() == 0, step
    assert int(ours.state[device[-1]]["step"]) == 6
    # An eager step, with gradients elsewhere, takes its own way and leaves the graph's alone.
    give_gradients((cpu, device), 6)
    ours.step()
    for buffer in buffers:
        buffer.zero_()  # type: ignore[union-attr]
    graph.replay()
    assert int(ours.state[device[-1]]["step"]) == 8


@pytest.mark.parametrize("cls", [optim.AdamW, optim.AdEMAMix, optim.Lion, optim.SGD])
def test_steps_counted_on_the_device_give_the_values_of_those_counted_by_the_host(cls: type) -> None:
    options = RULES[cls][1]
    (_, device), (_, other) = pair(), pair()
    ours, theirs = cls(device, **options, capturable=True), cls(other, **options)
    for step in range(12):
        give_gradients((device, other), step, missing=4)
        ours.step()
        theirs.step()
    for param, expected in zip(device, other, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)
    saved = ours.state_dict()
    theirs.load_state_dict(saved)
    assert theirs.state_dict()["state"][0]["step"] == saved["state"][0]["step"].cpu()


def test_captures_that_cannot_be_replayed_are_refused() -> None:
    _, device = pair(shapes=((5000,),))
    for cls, options, message in (
        (optim.AdamW, {}, "capturable=True"),
        (optim.AdamW, {"capturable": True}, "make a step before"),
    ):
        optimizer = cls(device, **options)
        give_gradients((device,), 0)
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            device[0].detach().add(1)  # torch warns of an empty graph
            with pytest.raises(RuntimeError, match=message):
                optimizer.step()
    with pytest.raises(UnsupportedError, match="capture the optimizer without paging"):
        optim.PagedAdamW8bit(device, capturable=True)


def test_state_that_is_elsewhere_is_named() -> None:
    _, device = pair(shapes=((5000,),))
    optimizer = optim.AdamW(device)
    give_gradients((device,), 0)
    optimizer.step()
    optimizer.state[device[0]]["exp_avg"] = optimizer.state[device[0]]["exp_avg"].cpu()
    with pytest.raises(ValueError, match=r"'exp_avg' of a parameter of shape \[5000\] on cuda:0 is .* on cpu"):
        optimizer.step()


def test_more_than_2_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free device memory")
    count = (1 << 31) + 1031
    param = nn.Parameter(torch.empty(count, dtype=torch.bfloat16, device="cuda"))
    grad = torch.empty_like(param)
    for part in (*param.detach().split(1 << 28), *grad.split(1 << 28)):
        part.normal_()
    param.grad = grad
    ends = [
        slice(0, 1024),
        slice(count // 512 * 256, count // 512 * 256 + 1024),
        slice(count // 256 * 256 - 256, count),
    ]
    twins = [nn.Parameter(param.detach()[end].cpu()) for end in ends]
    ours, theirs = optim.Lion8bit([param], lr=0.1), optim.Lion8bit(twins, lr=0.1, min_8bit_size=1)
    for _ in range(2):
        for twin, end in zip(twins, ends, strict=True):
            twin.grad = grad[end].cpu()
        ours.step()
        theirs.step()
    for twin, end in zip(twins, ends, strict=True):
        assert same(param.detach()[end], twin)
        assert same(ours.state[param]["exp_avg"][end], theirs.state[twin]["exp_avg"])


PAGED = [
    (optim.PagedAdamW32bit, optim.AdamW),
    (optim.PagedAdamW8bit, optim.AdamW8bit),
    (optim.PagedLion32bit, optim.Lion),
    (optim.PagedAdEMAMix8bit, optim.AdEMAMix8bit),
]


def give_device_gradients(lists: tuple[list[nn.Parameter], ...], step: int, missing: int = 0) -> None:
    for index, twins in enumerate(zip(*lists, strict=True)):
        grad = twins[0].detach().float().add(step).sin().mul(10.0 ** -(index % 5)).to(twins[0].dtype)
        for param in twins:
            param.grad = None if missing and (index + step) % missing == 0 else grad.clone()


@pytest.mark.parametrize("frames", [3, 100])
@pytest.mark.parametrize(("paged", "plain"), PAGED)
def test_paged_steps_have_the_bits_of_unpaged_ones_after_100_steps(paged: type, plain: type, frames: int) -> None:
    page = 2 << 20
    shapes = (*SHAPES, (1501, 2003), (513, 1031))
    (_, device), (_, other) = pair(shapes=shapes), pair(shapes=shapes)
    pool = PagedPool(frames * page, "cuda", page_size=page)
    ours, theirs = paged(device, pool=pool, max_grad_norm=3.0), plain(other, max_grad_norm=3.0)
    for step in range(100):
        give_device_gradients((device, other), step, missing=5)
        ours.step()
        theirs.step()
    assert_same(ours, theirs)
    stats = pool.stats()
    assert stats.resident_bytes <= pool.budget
    assert (stats.evicted_pages > 0) == (frames == 3)
    again = paged(device, pool=PagedPool(frames * page, "cuda", page_size=page), max_grad_norm=3.0)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    for step in range(100, 105):
        give_device_gradients((device, other), step)
        again.step()
        theirs.step()
    assert_same(again, theirs)


def test_optimizers_that_share_a_small_pool_on_the_device_keep_their_bits() -> None:
    page = 2 << 20
    shapes = ((1501, 1003), (257, 129))
    lists = [pair(shapes=shapes, seed=seed)[1] for seed in (0, 0, 1, 1)]
    pool = PagedPool(4 * page, "cuda", page_size=page)
    held = pool.zeros(page, torch.uint8)
    optimizers = [
        optim.PagedAdamW32bit(lists[0], pool=pool), optim.AdamW(lists[1]),
        optim.PagedLion8bit(lists[2], pool=pool), optim.Lion8bit(lists[3]),
    ]  # fmt: skip
    with held.acquired():
        for step in range(10):
            give_device_gradients((lists[0], lists[1]), step)
            give_device_gradients((lists[2], lists[3]), step)
            for optimizer in optimizers:
                optimizer.step()
    assert_same(optimizers[0], optimizers[1])
    assert_same(optimizers[2], optimizers[3])


def test_paged_optimizers_own_a_pool_on_the_device() -> None:
    _, device = pair()
    optimizer = optim.PagedAdamW8bit(device, budget="64MiB")
    give_gradients((device,), 0)
    optimizer.step()
    assert optimizer.pool.device == device[0].device
    assert optimizer.pool.budget == 64 << 20
    cpu, _ = pair()
    give_gradients((cpu,), 0)
    with pytest.raises(UnsupportedError, match="is on cpu, the pool on cuda:0"):
        optim.PagedAdamW8bit(cpu, pool=optimizer.pool).step()
