"""Paged weights, saved activations and `fit` on a CUDA device: the bits of the resident run, within the budget."""

from __future__ import annotations

import copy
import gc
import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import qlora_rs
from qlora_rs import Linear4bit
from qlora_rs.chunked_loss import causal_lm_loss
from qlora_rs.paging import PagedPool, fit, page_weights, saved_activations
from qlora_rs.train.reproducible import reproducible

PAGE = 2 << 20
LAYERS = 7
LENGTH = 300
BLOCK_PAGES = 4  # of the model below: 6.6 MB a layer


@pytest.fixture(autouse=True)
def _same_bits() -> Iterator[None]:
    torch.cuda.init()
    with reproducible(torch.device("cuda", 0)):
        torch.use_deterministic_algorithms(True)  # with a warning alone cuDNN's attention is not
        yield


def llama(
    device: str = "cuda", *, checkpointing: bool = True, dtype: torch.dtype = torch.bfloat16, lora: bool = True
) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=1009,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).to(dtype)
    qlora_rs.quantize_model(model)
    if lora:
        qlora_rs.attach_lora(model, r=4)
        for parameter in qlora_rs.lora_parameters(model):
            parameter.data.normal_(0, 0.02)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model.to(device).train()


def batch(step: int) -> Tensor:
    return torch.randint(3, 1009, (2, LENGTH), generator=torch.Generator().manual_seed(step)).cuda()


def train(model: Any, pool: PagedPool | None = None, steps: int = 4, accumulate: int = 1) -> list[Tensor]:
    """Losses, gradients and at the end trained parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    found = []
    for step in range(steps):
        for part in range(accumulate):
            ids = batch(10 * step + part)
            if pool is None:
                loss = causal_lm_loss(model, ids, ids, chunk_bytes=4 * 1009 * 128)
            else:
                with saved_activations(pool, min_bytes="256KiB"):
                    loss = causal_lm_loss(model, ids, ids, chunk_bytes=4 * 1009 * 128)
            loss.backward()
            found.append(loss.detach())
        found += [p.grad.clone() for p in trained if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return [*found, *(p.detach().clone() for p in trained)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 1
    assert all(torch.isfinite(tensor).all() for tensor in expected)
    differing = [index for index, (a, b) in enumerate(zip(found, expected, strict=True)) if not torch.equal(a, b)]
    assert not differing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("activations", [True, False])
def test_losses_and_gradients_have_the_bits_of_the_resident_run(
    checkpointing: bool, activations: bool, dtype: torch.dtype
) -> None:
    expected = train(llama(checkpointing=checkpointing, dtype=dtype), accumulate=2)
    model = llama(checkpointing=checkpointing, dtype=dtype)
    pool = PagedPool((2 * BLOCK_PAGES + 5) * PAGE, "cuda", page_size=PAGE)
    page_weights(model, pool)
    assert_same(train(model, pool if activations else None, accumulate=2), expected)
    stats = pool.stats()
    assert stats.evicted_pages > 0
    assert stats.committed_bytes <= pool.budget
    assert stats.trace_period is not None
    if not activations:
        assert stats.bytes_out == 0


def test_side_streams_and_a_late_device_do_not_matter() -> None:
    expected = train(llama(), steps=3)
    model, pool = llama(), PagedPool((BLOCK_PAGES + 3) * PAGE, "cuda", page_size=PAGE)
    page_weights(model, pool)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        found = train(model, pool, steps=3)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(found, expected)


def test_few_tokens_meet_the_fused_kernels_with_adapters() -> None:
    model = llama(checkpointing=False).eval()
    ids = batch(1)[:, :5]
    with torch.no_grad():
        expected = [model(ids[:, : count + 1]).logits for count in range(5)]
        page_weights(model, PagedPool((BLOCK_PAGES + 1) * PAGE, "cuda", page_size=PAGE))
        found = [model(ids[:, : count + 1]).logits for count in range(5)]
    assert_same(found, expected)


def test_placing_saving_copying_and_loading_a_paged_model() -> None:
    model = llama(checkpointing=False).eval()
    ids = batch(1)
    with torch.no_grad():
        expected = model(ids).logits
        state = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
        pool = PagedPool((2 * BLOCK_PAGES + 1) * PAGE, "cuda", page_size=PAGE)
        page_weights(model, pool)
        packed = [p for p in model.parameters() if not p.is_floating_point()]
        assert {p.device.type for p in packed} == {"cpu"}
        assert all(p.is_pinned() for p in packed)
        model.to("cuda").cuda()
        assert {p.device.type for p in packed} == {"cpu"}
        assert {p.device.type for p in model.parameters() if p.is_floating_point()} == {"cuda"}
        assert torch.equal(model(ids).logits, expected)

        after = model.state_dict()
        assert list(after) == list(state)
        assert all(torch.equal(after[name].cpu(), state[name]) for name in state)
        stream = io.BytesIO()
        torch.save(after, stream)
        model.load_state_dict(torch.load(io.BytesIO(stream.getvalue()), weights_only=True))
        assert torch.equal(model(ids).logits, expected)

        ordinary = copy.deepcopy(model)
        assert all(m.paged is None for m in ordinary.modules() if isinstance(m, Linear4bit))
        assert torch.equal(ordinary.to("cuda")(ids).logits, expected)

        other = {
            name: value.flip(0) if name.endswith("mlp.up_proj.base_layer.weight") else value
            for name, value in state.items()
        }
        model.load_state_dict(other)
        ordinary.load_state_dict(other)
        assert torch.equal(model(ids).logits, ordinary(ids).logits)
        assert not torch.equal(model(ids).logits, expected)


def test_unpaging_to_the_device_gives_the_resident_model_and_the_memory_back() -> None:
    model = llama(checkpointing=False).eval()
    ids = batch(1)
    with torch.no_grad():
        expected = model(ids).logits
        pool = PagedPool((2 * BLOCK_PAGES + 1) * PAGE, "cuda", page_size=PAGE)
        weights = page_weights(model, pool)
        model(ids)
        weights.unpage("cuda")
        gc.collect()
        pool.give_back(pool.budget)
        assert (pool.stats().buffers, pool.stats().committed_bytes) == (0, 0)
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("start", ["cpu", "cuda"])
def test_fit_keeps_a_step_within_its_budget(start: str) -> None:
    expected = train(llama())
    model = llama(start)
    torch.cuda.empty_cache()
    options: dict[str, Any] = {"tokens": 2 * LENGTH, "page_size": PAGE, "optimizer": "adamw"}
    with pytest.raises(ValueError, match="is too small") as caught:
        fit(model, PAGE, "cuda", **options)
    least = re.search(r"at least (\d+) bytes", str(caught.value))
    assert least is not None
    budget = int(least[1]) + 4 * PAGE
    fitted = fit(model, budget, "cuda", **options)
    assert fitted.pool is not None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert_same(train(model, fitted.pool), expected)
    step = torch.cuda.max_memory_allocated() - before
    parts = {part.name: part.nbytes for part in fitted.plan.parts}
    kept = parts["their gradients"] + parts["optimizer state"]
    # What train() itself collects (gradients of each step) is no part of the plan.
    assert step <= parts["working set"] + kept + 4 * parts["their gradients"] + parts["trained parameters"]
    assert fitted.pool.stats().committed_bytes <= fitted.pool.budget <= budget


def test_a_loop_of_accelerate_leaves_the_weights_where_they_are() -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = train(llama(), steps=2)
    model = llama()
    pool = PagedPool((2 * BLOCK_PAGES + 1) * PAGE, "cuda", page_size=PAGE)
    page_weights(model, pool)
    prepared = accelerate.Accelerator().prepare(model)
    assert {p.device.type for p in prepared.parameters() if not p.is_floating_point()} == {"cpu"}
    assert_same(train(prepared, pool, steps=2), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own look at it
def test_peft_adapters_have_the_bits_of_the_resident_run() -> None:
    peft = pytest.importorskip("peft")
    found = []
    for paged in (False, True):
        model = llama(checkpointing=False, lora=False)
        torch.manual_seed(3)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        if paged:
            page_weights(wrapped, PagedPool((2 * BLOCK_PAGES + 1) * PAGE, "cuda", page_size=PAGE))
        found.append(train(wrapped, steps=2))
    assert_same(found[1], found[0])


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # as the first one is
def test_a_captured_graph_is_refused_unless_the_weights_are_held() -> None:
    layer = Linear4bit.from_float(torch.nn.Linear(1024, 1024, bias=False).bfloat16().cuda())
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    pool = PagedPool(2 * PAGE, "cuda", page_size=PAGE)
    page_weights(layer, pool)
    with torch.no_grad():
        expected = layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(qlora_rs.PageError, match="captured"), torch.cuda.graph(graph):
            layer(x)
        assert layer.paged is not None
        with layer.paged.buffer.acquired():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)
            graph.replay()
            assert torch.equal(y, expected)


def test_an_input_elsewhere_is_told() -> None:
    layer = Linear4bit.from_float(torch.nn.Linear(64, 64).cuda())
    page_weights(layer, PagedPool(2 * PAGE, "cuda", page_size=PAGE))
    with pytest.raises(ValueError, match=r"x is on cpu.*paged to cuda:0"):
        layer(torch.randn(2, 64))
