"""`keep_dequantized`: a weight is dequantized twice a step, nothing else changes, and nothing stays."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, noop_context_fn

import qlora_rs
from qlora_rs import Linear4bit, LoraLinear, PackedTensor, QuantSpec, _bridge, _core, keep_dequantized
from qlora_rs.paging import PagedPool, page_weights
from qlora_rs.recomputation import kept_weights

pytestmark = pytest.mark.usefixtures("device")

WIDTH, INNER = 67, 133
TOKENS = 300  # more than any kernel multiplies with packed weights
PRODUCTS = 2  # of a block


def packed(out: int, columns: int, kind: str) -> nn.Module:
    if kind == "flat":
        row = qlora_rs.quantize(torch.randn(1, out * columns) / columns**0.5)
        parts = {name: getattr(row, name) for name in ("codes", "absmax", "absmax_scale", "absmax_offset")}
        shaped = PackedTensor(**parts, spec=row.spec, shape=(out, columns), dtype=torch.float32, flat=True)
        return Linear4bit.from_packed(shaped)
    layer = Linear4bit.from_float(nn.Linear(columns, out), QuantSpec(double_quant=kind != "plain scales"))
    if not kind.startswith("adapter"):
        return layer
    adapted = LoraLinear(layer, r=3, lora_dropout=0.3 if kind == "adapter, dropout" else 0.0)
    nn.init.normal_(adapted.lora_B, std=0.01)
    return adapted


class Block(nn.Module):
    def __init__(self, kind: str = "rows") -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.up, self.down = packed(INNER, WIDTH, kind), packed(WIDTH, INNER, kind)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, width). The last operation saves something: otherwise no product before it is computed again."""
        return (x + self.down(torch.relu(self.up(x)))) * self.scale.to(x.dtype)


class Stack(nn.ModuleList):
    def __init__(self, kind: str = "rows", blocks: int = 3) -> None:
        torch.manual_seed(1)
        super().__init__(Block(kind) for _ in range(blocks))

    def forward(self, x: Tensor, context_fn: Callable[[], Any] = noop_context_fn) -> Tensor:
        """Each block checkpointed."""
        for block in self:
            x = checkpoint(block, x, use_reentrant=False, context_fn=context_fn)
        return x


def inputs(dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(tokens, WIDTH).to(dtype).requires_grad_(True)


def loss_and_gradients(model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Of one step from the same state of the generators."""
    torch.manual_seed(3)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    loss = run(x).float().square().mean()
    return [loss, *torch.autograd.grad(loss, wanted)]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Made:
    """What has been dequantized."""

    def __init__(self) -> None:
        self.weights: list[weakref.ref[Tensor]] = []
        self.most_alive = 0

    def add(self, weight: Tensor) -> Tensor:
        self.weights.append(weakref.ref(weight))
        self.most_alive = max(self.most_alive, self.alive())
        return weight

    def alive(self) -> int:
        return sum(weight() is not None for weight in self.weights)

    def __len__(self) -> int:
        return len(self.weights)


@pytest.fixture
def made(device: str, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Watches from now on."""
    found = Made()
    if device == "cpu":
        real = _bridge.dequantize
        monkeypatch.setattr(_bridge, "dequantize", lambda *arguments: found.add(real(*arguments)))
    else:
        of_device = _core.DeviceWeight.dequantize
        monkeypatch.setattr(_core.DeviceWeight, "dequantize", lambda self, dtype: found.add(of_device(self, dtype)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["rows", "plain scales", "flat", "paged", "adapter", "adapter, dropout"])
def test_each_weight_is_dequantized_twice_and_all_bits_are_the_same(kind, dtype, device, made) -> None:
    model = Stack("rows" if kind == "paged" else kind)
    if kind == "paged":
        page = 4096 if device == "cpu" else 2 << 20
        page_weights(model, PagedPool(12 * page, device, page_size=page))
    x = inputs(dtype)
    want = loss_and_gradients(model, x, model)
    assert len(made) == 3 * PRODUCTS * len(model)
    before = len(made)
    got = loss_and_gradients(model, x, lambda x: model(x, keep_dequantized))
    assert len(made) - before == 2 * PRODUCTS * len(model)
    assert equal(got, want)
    assert equal(got, loss_and_gradients(model, x, lambda x: nn.Sequential(*model)(x)))


def test_no_more_than_one_block_is_kept_and_nothing_when_the_step_is_over(made) -> None:
    model, x = Stack(blocks=5), inputs()
    loss = model(x, keep_dequantized).square().sum()
    assert made.most_alive == 1
    assert made.alive() == 0
    loss.backward()
    assert made.most_alive == PRODUCTS
    assert made.alive() == 0  # while the graph is still there


def test_another_backward_pass_over_the_same_graph_gives_the_same(made) -> None:
    model, x = Stack(), inputs()
    loss = model(x, keep_dequantized).square().sum()
    forward = len(made)
    first = torch.autograd.grad(loss, [x, model[0].scale], retain_graph=True)
    second = torch.autograd.grad(loss, [x, model[0].scale])
    assert equal(list(first), list(second))
    assert len(made) - forward == 2 * PRODUCTS * len(model)
    assert made.alive() == 0


def test_what_no_backward_pass_uses_goes_with_the_graph(made) -> None:
    block = Block()
    x = inputs()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return block(x), block.up(x).square()  # something is saved behind it, so that it is computed again

    used, unused = checkpoint(run, x, use_reentrant=False, context_fn=keep_dequantized)
    used.sum().backward(retain_graph=True)
    assert made.alive() == 1
    made.most_alive = 0
    used.sum().backward(retain_graph=True)
    assert made.most_alive == PRODUCTS  # the one that was left went first
    del used, unused
    gc.collect()
    assert made.alive() == 0


def test_a_graph_that_is_dropped_without_a_backward_pass_holds_nothing(made) -> None:
    model = Stack()
    y = model(inputs(), keep_dequantized)
    assert made.alive() == 0
    del y
    model(inputs().detach(), keep_dequantized)
    with torch.no_grad():
        model(inputs(), keep_dequantized)
    assert made.alive() == 0


def test_products_of_few_tokens_keep_nothing_where_nothing_is_dequantized_for_them(device, made) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, x = Stack(), inputs(dtype, tokens=5)
    if device == "cuda":  # a shape that has a fused kernel
        model = nn.ModuleList([Linear4bit.from_float(nn.Linear(64, 64))])
        x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]

    def run(context_fn: Any) -> Tensor:
        y = x
        for block in model:
            y = checkpoint(block, y, use_reentrant=False, context_fn=context_fn)
        return y

    want = loss_and_gradients(model, x, lambda x: run(noop_context_fn))
    once = len(layers) if device == "cpu" else 0  # for the backward pass, for which a device has a fused kernel, too
    assert len(made) == once
    got = loss_and_gradients(model, x, lambda x: run(keep_dequantized))
    assert len(made) == 2 * once
    assert made.most_alive == min(1, once)
    assert equal(got, want)


def test_a_layer_that_is_called_twice_shares_its_weight(made) -> None:
    block, x = Block(), inputs()

    def run(context_fn: Any) -> list[Tensor]:
        return loss_and_gradients(
            block, x, lambda x: checkpoint(lambda x: block(block(x)), x, use_reentrant=False, context_fn=context_fn)
        )

    want = run(noop_context_fn)
    before = len(made)
    assert equal(run(keep_dequantized), want)
    assert len(made) - before == (2 + 1) * PRODUCTS
    assert made.alive() == 0


@pytest.mark.parametrize("outer", [noop_context_fn, keep_dequantized])
@pytest.mark.parametrize("inner", [noop_context_fn, keep_dequantized])
def test_checkpointed_calls_may_lie_in_each_other(inner, outer, made) -> None:
    model, x = Stack("adapter"), inputs()

    def nested(x: Tensor) -> Tensor:
        for block in model:
            x = checkpoint(lambda x, block=block: model(block(x), inner), x, use_reentrant=False, context_fn=outer)
        return x

    def plain(x: Tensor) -> Tensor:
        for block in model:
            x = checkpoint(lambda x, block=block: model(block(x)), x, use_reentrant=False)
        return x

    assert equal(loss_and_gradients(model, x, nested), loss_and_gradients(model, x, plain))
    assert made.alive() == 0


def test_gradients_of_gradients_are_the_same_and_nothing_stays(made) -> None:
    model = Stack()

    def second(context_fn: Any) -> list[Tensor]:
        x = inputs()
        (grad,) = torch.autograd.grad(model(x, context_fn).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(grad.square().sum(), [x, model[0].scale]))

    assert equal(second(keep_dequantized), second(noop_context_fn))
    gc.collect()
    assert made.alive() == 0


def test_autocast_decides_the_type(device, made) -> None:
    model, x = Stack("adapter"), inputs()

    def run(context_fn: Any) -> list[Tensor]:
        def casted(x: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                return model(x, context_fn)

        return loss_and_gradients(model, x, casted)

    want = run(noop_context_fn)
    before = len(made)
    assert equal(run(keep_dequantized), want)
    assert len(made) - before == 2 * PRODUCTS * len(model)


def test_a_trained_bias_below_which_nothing_is_trained_keeps_nothing(made) -> None:
    layer, x = Linear4bit.from_float(nn.Linear(WIDTH, INNER)), inputs().detach()
    layer.bias.requires_grad_(True)

    def run(context_fn: Any) -> list[Tensor]:
        y = checkpoint(lambda x: layer(x).sin(), x, use_reentrant=False, context_fn=context_fn)
        return list(torch.autograd.grad(y.sum(), [layer.bias]))

    assert equal(run(keep_dequantized), run(noop_context_fn))
    assert len(made) == 2 + 2
    assert made.alive() == 0


def test_calls_that_somebody_watches_keep_nothing_and_give_the_same() -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    model, x = Stack("adapter"), inputs()

    def watched(x: Tensor) -> Tensor:
        with Watch():
            return model(x, keep_dequantized)

    assert equal(loss_and_gradients(model, x, watched), loss_and_gradients(model, x, model))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch 2.11's own, as it traces
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # the compiler's own import
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which it looks at
@pytest.mark.parametrize("what", ["whole", "block"])
def test_compiled_it_gives_the_same(what: str) -> None:
    torch._dynamo.reset()
    model, x = Stack("adapter", blocks=2), inputs()
    want = loss_and_gradients(model, x, model)
    if what == "whole":
        compiled = torch.compile(lambda x: model(x, keep_dequantized), backend="aot_eager", fullgraph=True)
        got = loss_and_gradients(model, x, compiled)
    else:
        compiled = nn.ModuleList(torch.compile(block, backend="aot_eager", fullgraph=True) for block in model)
        got = loss_and_gradients(model, x, lambda x: Stack.forward(compiled, x, keep_dequantized))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, want, strict=True))


def test_a_forward_pass_that_fails_leaves_nothing_behind_it(made) -> None:
    model, x = Stack(), inputs()

    def failing(x: Tensor) -> Tensor:
        raise RuntimeError("a forward pass")

    want = loss_and_gradients(model, x, model)
    with pytest.raises(RuntimeError, match="a forward pass") as caught:
        checkpoint(failing, x, use_reentrant=False, context_fn=keep_dequantized)
    before = len(made)
    forward, _ = keep_dequantized()
    with forward:
        late = caught.value.__traceback__  # torch may leave the failed call's context only when this is dropped
        caught.value.__traceback__ = None
        del late, caught
        gc.collect()
        assert kept_weights() is not None
    assert kept_weights() is None
    assert equal(loss_and_gradients(model, x, lambda x: model(x, keep_dequantized)), want)
    assert len(made) - before == 2 * PRODUCTS * len(model)


def test_the_reentrant_kind_refuses_it_in_words() -> None:
    with pytest.raises(ValueError, match="only supported when use_reentrant=False"):
        checkpoint(Block(), inputs(), use_reentrant=True, context_fn=keep_dequantized)
