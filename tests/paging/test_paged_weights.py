"""Packed weights in a pool: the same bits under any budget, and a model that is as ordinary as before."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qlora_rs
from qlora_rs import Linear4bit, QuantSpec, attach_lora, quantize_model
from qlora_rs.errors import PageError
from qlora_rs.paging import PagedPool, PagedWeights, page_weights

PAGE = 4096
WIDTH, INNER = 67, 131  # rows end in short blocks


class Block(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER, bias)
        self.down = nn.Linear(INNER, WIDTH, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.tanh(self.up(x)))
        return y


class Model(nn.Module):
    def __init__(self, layers: int = 4, *, bias: bool = True, checkpointing: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, WIDTH)
        self.layers = nn.ModuleList(Block(bias) for _ in range(layers))
        self.out_proj = nn.Linear(WIDTH, 19, bias=False)
        self.checkpointing = checkpointing

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        y: Tensor = self.out_proj(x)
        return y


def packed_model(spec: QuantSpec | None = None, *, lora: bool = True, seed: int = 3, **options: Any) -> Model:
    torch.manual_seed(seed)
    model = Model(**options)
    quantize_model(model, spec)
    if lora:
        attach_lora(model, r=3, lora_alpha=5)
        with torch.no_grad():
            for parameter in qlora_rs.lora_parameters(model):
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def small_pool(frames: int = 5) -> PagedPool:
    """A block of the default model takes three pages."""
    return PagedPool(frames * PAGE, page_size=PAGE)


def train(model: nn.Module, steps: int, *, tokens: int = 9, accumulate: int = 1) -> list[Tensor]:
    """Losses and, at the end, trained parameters of a few steps."""
    generator = torch.Generator().manual_seed(11)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    found: list[Tensor] = []
    for _ in range(steps):
        for _ in range(accumulate):
            ids = torch.randint(19, (3, tokens), generator=generator)
            loss = nn.functional.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:])
            loss.backward()
            found.append(loss.detach())
        found += [parameter.grad.clone() for parameter in trained if parameter.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return found + [parameter.detach().clone() for parameter in trained]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    spec=st.builds(
        QuantSpec,
        st.sampled_from(["nf4", "fp4", "int4", "int8"]),
        st.sampled_from([32, 64, 128]),
        st.booleans(),
    ),
    frames=st.integers(7, 40),
    layers=st.integers(1, 5),
    bias=st.booleans(),
    checkpointing=st.booleans(),
    tokens=st.sampled_from([2, 5, 40]),  # products from the codes, and over dequantized weights
    accumulate=st.integers(1, 3),
)
def test_losses_and_gradients_have_the_bits_of_the_resident_run(
    spec: QuantSpec, frames: int, layers: int, bias: bool, checkpointing: bool, tokens: int, accumulate: int
) -> None:
    options: dict[str, Any] = {"layers": layers, "bias": bias, "checkpointing": checkpointing}
    expected = train(packed_model(spec, **options), 3, tokens=tokens, accumulate=accumulate)
    model, pool = packed_model(spec, **options), small_pool(frames)
    weights = page_weights(model, pool)
    assert list(weights.blocks) == [*(f"layers.{number}" for number in range(layers)), "out_proj.base_layer"]
    assert_same(train(model, 3, tokens=tokens, accumulate=accumulate), expected)
    stats = pool.stats()
    assert stats.resident_bytes <= pool.budget
    assert stats.bytes_out == 0
    assert (stats.evicted_pages > 0) == (stats.paged_bytes > 0)


def test_a_step_fetches_ahead_once_its_order_is_known() -> None:
    model, pool = packed_model(layers=7, checkpointing=True), small_pool(9)
    page_weights(model, pool)
    train(model, 2)
    before = pool.stats()
    train(model, 2)
    after = pool.stats()
    assert after.misses == before.misses
    assert after.bytes_in > before.bytes_in
    assert after.trace_period == 2 * 8 - 2  # forward and back; the ends, of which one is the head, count once


def test_bfloat16_and_autocast_have_the_bits_of_the_resident_run() -> None:
    ids = torch.randint(19, (2, 30))
    for cast in (True, False):
        results = []
        for paged in (False, True):
            model = packed_model()
            if not cast:
                model.bfloat16()
            if paged:
                page_weights(model, small_pool())
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                loss = model(ids).float().square().mean()
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert_same(results[1], results[0])


def test_gradient_of_a_gradient_is_that_of_the_resident_layer() -> None:
    layer = Linear4bit.from_float(nn.Linear(WIDTH, 31).double().float())
    x = torch.randn(5, WIDTH, requires_grad=True)

    def second() -> Tensor:
        (grad,) = torch.autograd.grad((layer(x) ** 3).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    expected = second()
    page_weights(layer, small_pool())
    assert torch.equal(second(), expected)


def test_a_trained_bias_gets_its_gradient() -> None:
    layer = Linear4bit.from_float(nn.Linear(WIDTH, 31))
    layer.bias.requires_grad_()
    x = torch.randn(4, 5, WIDTH)
    layer(x).sum().backward()
    expected, layer.bias.grad = layer.bias.grad, None
    page_weights(layer, small_pool())
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, expected)


def test_parameters_are_views_of_the_pool_with_storages_of_their_own() -> None:
    model = packed_model(lora=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pool = small_pool()
    page_weights(model, pool)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)
    packed = {name: p for name, p in model.named_parameters() if not p.is_floating_point()}
    assert len({p.untyped_storage().data_ptr() for p in packed.values()}) == len(packed)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in packed.values())
    assert all(p.data_ptr() % 256 == 0 for p in packed.values())
    assert pool.stats().host_bytes >= sum(p.nbytes for p in packed.values())


def test_former_tensors_are_freed_block_by_block() -> None:
    model = packed_model(layers=5)
    former = [weakref.ref(layer.up.base_layer.weight) for layer in model.layers]
    alive: list[int] = []

    def count(done: int, total: int) -> None:
        alive.append(sum(reference() is not None for reference in former))

    page_weights(model, small_pool(), progress=count)
    assert alive == [4, 3, 2, 1, 0, 0]  # the head comes last


def test_moves_and_casts_leave_packed_tensors_and_take_everything_else() -> None:
    model = packed_model()
    page_weights(model, small_pool())
    layer = model.layers[1].up.base_layer
    parts = layer.parts()
    model.to(torch.float64)
    model.to("meta")
    assert all(one is other for one, other in zip(layer.parts(), parts, strict=True))
    assert {p.device.type for p in model.parameters() if p.is_floating_point()} == {"meta"}
    assert layer.bias.dtype == torch.float64
    assert list(layer._parameters) == list(packed_model().layers[1].up.base_layer._parameters)


def test_values_and_merging_are_those_of_the_resident_model() -> None:
    resident, model = packed_model(), packed_model()
    page_weights(model, small_pool())
    for one, other in zip(resident.layers, model.layers, strict=True):
        assert torch.equal(one.up.base_layer.dequantize(), other.up.base_layer.dequantize())
        assert torch.equal(one.down.base_layer.packed().codes, other.down.base_layer.packed().codes)
    ids = torch.randint(19, (2, 7))
    expected, found = qlora_rs.merge_adapter(resident), qlora_rs.merge_adapter(model)
    assert found == expected
    assert torch.equal(model(ids), resident(ids))


def test_a_copy_and_a_pickle_are_ordinary_models_that_outlive_the_pool() -> None:
    model = packed_model()
    ids = torch.randint(19, (2, 7))
    expected = model(ids)
    page_weights(model, small_pool())
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)]
    host = {p.data_ptr() for p in model.parameters() if not p.is_floating_point()}
    del model
    gc.collect()
    for made in copies:
        assert not {p.data_ptr() for p in made.parameters()} & host
        assert all(module.paged is None for module in made.modules() if isinstance(module, Linear4bit))
        assert torch.equal(made(ids), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_dict_replaces_what_the_pool_holds(assign: bool) -> None:
    model, other = packed_model(), packed_model(seed=4)
    ids = torch.randint(19, (2, 7))
    pool = small_pool(40)
    page_weights(model, pool)
    model(ids)  # now the device has the old values
    evicted = pool.stats().bytes_in
    assert model.load_state_dict(other.state_dict(), assign=assign).missing_keys == []
    assert torch.equal(model(ids), other(ids))
    assert model.layers[0].up.base_layer.paged is not None
    model.load_state_dict(other.state_dict())  # the same again: nothing has to move
    moved = pool.stats().bytes_in
    model(ids)
    assert pool.stats().bytes_in == moved > evicted


def test_loading_what_does_not_fit_leaves_the_weights_as_they_were() -> None:
    model = packed_model(lora=False)
    ids = torch.randint(19, (2, 7))
    expected = model(ids)
    page_weights(model, small_pool())
    state = {**model.state_dict(), "layers.1.up.weight": torch.zeros(3, 3, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match=r"size mismatch for layers\.1\.up\.weight"):
        model.load_state_dict(state)
    assert torch.equal(model(ids), expected)


def test_saved_files_are_those_of_the_resident_model(tmp_path: Any, make_tiny_llama: Any) -> None:
    packed = tmp_path / "packed"
    qlora_rs.checkpoint.quantize(make_tiny_llama(tmp_path / "float"), packed)
    model = qlora_rs.from_pretrained(packed)
    model.save_pretrained(tmp_path / "resident")
    page_weights(model, small_pool(32))
    model.save_pretrained(tmp_path / "paged")
    resident, paged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("resident", "paged"))
    assert resident.keys() == paged.keys()
    assert all(torch.equal(tensor, resident[name]) for name, tensor in paged.items())
    again = qlora_rs.from_pretrained(tmp_path / "paged")
    ids = torch.randint(3, 200, (1, 11))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_parameters_that_somebody_replaced_count() -> None:
    layer, other = (Linear4bit.from_float(nn.Linear(WIDTH, 31, bias=False)) for _ in range(2))
    page_weights(layer, small_pool())
    for name, parameter in other.named_parameters():
        setattr(layer, name, parameter)
    x = torch.randn(2, WIDTH)
    assert torch.equal(layer(x), other(x))


def test_unpaging_gives_the_memory_up_and_changes_no_value() -> None:
    model, pool = packed_model(), small_pool()
    expected = train(packed_model(), 1)
    weights = page_weights(model, pool)
    weights.unpage()
    gc.collect()
    assert (pool.stats().buffers, pool.stats().resident_bytes, weights.nbytes) == (0, 0, 0)
    assert_same(train(model, 1), expected)


def test_adapters_attached_to_a_paged_model_train() -> None:
    expected = packed_model(lora=False)
    attach_lora(expected, r=2, seed=5)
    model = packed_model(lora=False)
    page_weights(model, small_pool())
    attach_lora(model, r=2, seed=5)
    assert_same(train(model, 2), train(expected, 2))


def test_peft_adapters_have_the_bits_of_the_resident_run() -> None:
    peft = pytest.importorskip("peft")
    found = []
    for paged in (False, True):
        model = packed_model(lora=False)
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up", "down"]))
        if paged:
            page_weights(wrapped, small_pool())
        found.append(train(wrapped, 2))
    assert_same(found[1], found[0])


def test_threads_share_a_paged_model() -> None:
    model = packed_model()
    ids = torch.randint(19, (2, 7))
    expected = model(ids)
    page_weights(model, small_pool(12))
    wrong: list[int] = []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(model(ids), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own look at it
def test_compiled_it_gives_the_same() -> None:
    model = packed_model()
    ids = torch.randint(19, (2, 7))
    expected = model(ids)
    page_weights(model, small_pool())
    found = torch.compile(model, backend="eager")(ids)
    assert torch.equal(found, expected)


def test_what_cannot_be_paged_is_told() -> None:
    with pytest.raises(ValueError, match="no packed layers"):
        page_weights(nn.Linear(3, 3), small_pool())
    model = packed_model(lora=False)
    with pytest.raises(PageError, match=r"layers\.0.*budget"):
        page_weights(model, small_pool(1))
    page_weights(model, small_pool())
    with pytest.raises(ValueError, match=r"layers\.0\.up is paged already"):
        page_weights(model, small_pool())
    with pytest.raises(ValueError, match="meta device"):
        PagedWeights(small_pool()).add("x", {"x": Linear4bit(8, 8, device="meta")})
    layer = model.layers[0].up
    with pytest.raises(ValueError, match=r"x is on meta.*paged to cpu"):
        layer(torch.empty(1, WIDTH, device="meta"))


def test_a_failing_product_releases_its_weight() -> None:
    layer = Linear4bit.from_float(nn.Linear(WIDTH, 31))
    pool = small_pool()
    page_weights(layer, pool)
    for _ in range(3):
        with pytest.raises(ValueError, match="in_features"):
            layer(torch.randn(2, WIDTH + 1))
    assert layer.paged is not None
    layer.paged.buffer.discard()  # refused while it is acquired
