"""LoRA: the layer against float64, what attach_lora picks, training in every setting."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_rs import (
    Linear4bit,
    LoraLinear,
    QuantSpec,
    adapters_disabled,
    attach_lora,
    lora_modules,
    lora_parameters,
)
from qlora_rs.paged_product import PagedProduct
from qlora_rs.paging import PagedPool, page_weights


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(33, 65, bias=False)
        self.down_proj = nn.Linear(65, 33)
        self.norm = nn.LayerNorm(33)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down_proj(nn.functional.silu(self.up_proj(self.norm(x))))


class Model(nn.Module):
    def __init__(self, packed: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(33, 11, bias=False)
        if packed:
            for block in self.layers:
                block.up_proj = Linear4bit.from_float(block.up_proj, QuantSpec(block_size=32))
                block.down_proj = Linear4bit.from_float(block.down_proj, QuantSpec(block_size=32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            x = block(x)
        return self.lm_head(x)


def model_with_adapters(**settings) -> Model:
    torch.manual_seed(0)
    model = Model()
    attach_lora(model, **{"r": 3, "lora_alpha": 5, "seed": 1, **settings})
    torch.manual_seed(1)
    for layer in lora_modules(model).values():
        nn.init.normal_(layer.lora_B)
    return model


@pytest.mark.parametrize("use_rslora", [False, True])
def test_output_and_gradients_follow_the_equation(use_rslora: bool) -> None:
    torch.manual_seed(3)
    layer = LoraLinear(Linear4bit.from_float(nn.Linear(65, 33)), 3, 5, use_rslora=use_rslora)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 7, 65, requires_grad=True)
    upstream = torch.randn(2, 7, 33)
    y = layer(x)
    y.backward(upstream)

    x64, a, b = (t.detach().double().requires_grad_(True) for t in (x, layer.lora_A, layer.lora_B))
    scaling = 5 / 3**0.5 if use_rslora else 5 / 3
    weight = layer.base_layer.dequantize(torch.float32).double()
    y64 = x64 @ weight.T + layer.bias.double() + scaling * (x64 @ a.T @ b.T)
    y64.backward(upstream.double())
    for got, expected in ((y, y64), (x.grad, x64.grad), (layer.lora_A.grad, a.grad), (layer.lora_B.grad, b.grad)):
        assert float((got.detach().double() - expected.detach()).norm() / expected.detach().norm()) < 1e-5
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    assert torch.allclose(layer.delta().double(), scaling * b.detach() @ a.detach(), atol=1e-5)


def test_a_fresh_adapter_changes_nothing_and_can_be_switched_off() -> None:
    torch.manual_seed(0)
    model = Model()
    x = torch.randn(5, 33)
    before = model(x)
    attach_lora(model, r=3)
    assert torch.equal(model(x), before)
    for layer in lora_modules(model).values():
        nn.init.normal_(layer.lora_B)
    assert not torch.allclose(model(x), before)
    with adapters_disabled(model):
        assert torch.equal(model(x), before)
    assert not torch.allclose(model(x), before)


def test_all_linear_takes_every_layer_but_the_head_and_says_so() -> None:
    model = Model()
    report = attach_lora(model, r=3)
    assert len(report.attached) == 4
    assert [name for name, _ in report.skipped] == ["lm_head"]
    assert "lm_head" in str(report)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.lora_{part}" for name in report.attached for part in "AB"}
    assert report.trainable_parameters == sum(p.numel() for p in lora_parameters(model)) == 4 * 3 * (33 + 65)
    assert report.total_parameters == 4 * 33 * 65 + 2 * 33 + 4 * 33 + 33 * 11 + report.trainable_parameters


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["up_proj"], ["layers.0.up_proj", "layers.1.up_proj"]),
        (["layers.1.up_proj"], ["layers.1.up_proj"]),
        (["layers.0.*"], ["layers.0.up_proj", "layers.0.down_proj"]),
        (r".*\.1\.(up|down)_proj", ["layers.1.up_proj", "layers.1.down_proj"]),
        (["lm_head"], ["lm_head"]),
    ],
)
def test_target_patterns_pick_names_suffixes_globs_and_expressions(targets, expected: list[str]) -> None:
    assert list(attach_lora(Model(), target_modules=targets).attached) == expected


@pytest.mark.parametrize("targets", [["up_proj", "q_proj"], "nothing", []])
def test_a_target_that_matches_nothing_is_an_error_and_changes_nothing(targets) -> None:
    model = Model()
    with pytest.raises(ValueError, match="target_modules"):
        attach_lora(model, target_modules=targets)
    assert not lora_modules(model)


@pytest.mark.parametrize("settings", [{"r": 0}, {"r": 2.0}, {"lora_alpha": 0}, {"lora_dropout": 1.0}])
def test_settings_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        attach_lora(Model(), **settings)


def test_attaching_twice_is_refused() -> None:
    model = model_with_adapters()
    with pytest.raises(ValueError, match="already has adapters"):
        attach_lora(model)


def test_the_seed_alone_decides_the_start() -> None:
    torch.manual_seed(7)
    first = model_with_adapters(seed=4)
    torch.manual_seed(8)
    second = model_with_adapters(seed=4)
    for a, b in zip(lora_modules(first).values(), lora_modules(second).values(), strict=True):
        assert torch.equal(a.lora_A, b.lora_A)


def gradients(model: nn.Module, run) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(11)
    run(model).square().mean().backward()
    return [p.grad.clone() for p in lora_parameters(model)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_dropout_gives_the_same_gradients(reentrant: bool) -> None:
    model = model_with_adapters(lora_dropout=0.3).train()
    x = torch.randn(5, 33, requires_grad=True)

    def checkpointed(m: Model) -> torch.Tensor:
        h = x
        for block in m.layers:
            h = checkpoint(block, h, use_reentrant=reentrant)
        return m.lm_head(h)

    for a, b in zip(gradients(model, lambda m: m(x)), gradients(model, checkpointed), strict=True):
        assert torch.equal(a, b)


def test_shapes_are_inferred_on_the_meta_device() -> None:
    model = model_with_adapters().to("meta")
    assert model(torch.empty(5, 33, device="meta")).shape == (5, 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_type_is_that_of_the_base(packed: bool, autocast: bool, dtype: torch.dtype) -> None:
    base = nn.Linear(33, 65, dtype=dtype)
    if packed:
        base = Linear4bit.from_float(base.float())
    layer = LoraLinear(base, r=2)
    x = torch.randn(5, 33, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert layer(x).dtype == base(x).dtype


def test_a_recomputation_ends_before_the_last_product_of_a_block_where_the_base_saves_nothing(monkeypatch) -> None:
    model = model_with_adapters()
    page_weights(model, PagedPool(64 * 4096, page_size=4096))  # as on a CUDA device, where a test of its own counts
    called: list[str] = []
    product = PagedProduct.product
    monkeypatch.setattr(
        PagedProduct, "product", lambda self, *rest: called.append(self.buffer.name) or product(self, *rest)
    )
    x = torch.randn(5, 33, requires_grad=True)
    y = checkpoint(model.layers[0], x, use_reentrant=False)
    assert len(called) == 2
    y.sum().backward()
    assert len(called) == 3


def test_dropout_acts_in_training_only() -> None:
    model = model_with_adapters(lora_dropout=0.5)
    x = torch.randn(5, 33)
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


def test_autocast_trains_float32_adapters() -> None:
    model = model_with_adapters()
    x = torch.randn(5, 33)
    exact = gradients(model, lambda m: m(x))

    def autocasted(m: Model) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(x).float()

    for a, b in zip(gradients(model, autocasted), exact, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 0.05


def test_gradient_accumulation_equals_one_large_batch() -> None:
    model = model_with_adapters()
    x = torch.randn(8, 33)
    whole = gradients(model, lambda m: m(x))
    model.zero_grad()
    for part in x.split(2):
        (model(part).square().mean() / 4).backward()
    for p, expected in zip(lora_parameters(model), whole, strict=True):
        assert torch.allclose(p.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch 2.11's own, as it traces
def test_a_model_with_adapters_compiles_to_one_graph() -> None:
    model = model_with_adapters()
    x = torch.randn(5, 33)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = gradients(model, lambda m: m(x))
    model.zero_grad()
    compiled(x).square().mean().backward()
    for p, grad in zip(lora_parameters(model), expected, strict=True):
        assert torch.allclose(p.grad, grad, rtol=1e-5, atol=2e-6)  # sums of terms up to 10 in another order


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch 2.11's own, as it traces
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own
@pytest.mark.filterwarnings("ignore:Skipping serialization")  # that of torch 2.6
def test_inductor_compiles_forward_and_backward() -> None:
    model = model_with_adapters()
    x = torch.randn(5, 33)
    torch._dynamo.reset()
    expected = gradients(model, lambda m: m(x))
    model.zero_grad()
    torch.compile(model, fullgraph=True)(x).square().mean().backward()
    for p, grad in zip(lora_parameters(model), expected, strict=True):
        assert torch.allclose(p.grad, grad, rtol=1e-4, atol=1e-6)


def test_training_moves_the_loss_down_and_leaves_the_base_alone() -> None:
    model = copy.deepcopy(model_with_adapters())
    base = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    x, target = torch.randn(64, 33), torch.randint(0, 11, (64,))
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, value in base.items():
        assert torch.equal(model.get_parameter(name), value)


def _ddp_worker(rank: int, path: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        model = nn.parallel.DistributedDataParallel(model_with_adapters())
        torch.manual_seed(5)
        x = torch.randn(8, 33).chunk(2)[rank]
        model(x).square().mean().backward()
        results[rank] = [p.grad.tolist() for p in lora_parameters(model.module)]
    finally:
        dist.destroy_process_group()


def test_ddp_averages_the_adapters_gradients(tmp_path) -> None:
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(_ddp_worker, (str(tmp_path / "rendezvous"), results), nprocs=2, start_method="spawn")
        shared = dict(results)
    torch.manual_seed(5)
    x = torch.randn(8, 33)
    model = model_with_adapters()
    torch.manual_seed(5)
    model(x).square().mean().backward()
    for first, second, p in zip(shared[0], shared[1], lora_parameters(model), strict=True):
        assert first == second
        assert torch.allclose(torch.tensor(first), p.grad, rtol=1e-4, atol=1e-6)
