"""`qlora_rs.paging.fit`: a budget, split; the bits of the resident run; a table that adds up."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qlora_rs
from qlora_rs import Linear4bit
from qlora_rs.chunked_loss import causal_lm_loss
from qlora_rs.paging import Fitted, fit, page_weights
from qlora_rs.paging.plan import OPTIMIZER_BYTES, PAGED, Request, plan
from qlora_rs.paging.weights import packed_blocks
from qlora_rs.report import parse_bytes

TOKENS = 2 * 24


def llama(layers: int = 5, *, checkpointing: bool = True, pack_head: bool = False) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=1511,
        hidden_size=72,
        intermediate_size=131,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    qlora_rs.quantize_model(model, include=["lm_head"] if pack_head else None)
    qlora_rs.attach_lora(model, r=2, seed=4)
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def batch(step: int) -> Tensor:
    return torch.randint(3, 1511, (2, 24), generator=torch.Generator().manual_seed(step))


def train(model: Any, fitted: Fitted | None, optimizer: str = "adamw8bit", steps: int = 4) -> list[Tensor]:
    trained = qlora_rs.lora_parameters(model)
    if optimizer.startswith(PAGED):
        pool = None if fitted is None else fitted.pool
        made: Any = qlora_rs.optim.PagedAdamW8bit(trained, lr=1e-2, min_8bit_size=0, pool=pool)
    else:
        made = qlora_rs.optim.AdamW8bit(trained, lr=1e-2, min_8bit_size=0)
    found = []
    for step in range(steps):
        ids = batch(step)
        if fitted is None:
            loss = causal_lm_loss(model, ids, ids)
        else:
            with fitted.step():
                loss = causal_lm_loss(model, ids, ids)
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in trained if p.grad is not None)]
        made.step()
        made.zero_grad()
    return [*found, *(p.detach().clone() for p in trained)]


def least_budget(model: Any, **options: Any) -> int:
    """Said by the error for a budget that is too small."""
    with pytest.raises(ValueError, match="is too small") as caught:
        fit(model, 4096, "cpu", **{"tokens": TOKENS, **options})
    found = re.search(r"at least (\d+) bytes", str(caught.value))
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit"])
@pytest.mark.parametrize("page_activations", [True, False])
def test_losses_gradients_and_parameters_have_the_bits_of_the_resident_run(
    checkpointing: bool, optimizer: str, page_activations: bool
) -> None:
    expected = train(llama(checkpointing=checkpointing), None, optimizer)
    model = llama(checkpointing=checkpointing)
    options: dict[str, Any] = {"tokens": TOKENS, "optimizer": optimizer, "page_activations": page_activations}
    fitted = fit(model, least_budget(model, **options) + 8192, "cpu", **options)
    assert fitted.pool is not None
    found = train(model, fitted, optimizer)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert fitted.pool.stats().evicted_pages > 0
    assert fitted.stall_seconds >= 0


def test_the_budget_of_the_error_does_and_less_does_not() -> None:
    least = least_budget(llama())
    with pytest.raises(ValueError, match="is too small"):
        fit(llama(), least - 1, "cpu", tokens=TOKENS)
    fitted = fit(llama(), least, "cpu", tokens=TOKENS)
    assert fitted.pool is not None


def test_a_pool_of_large_pages_is_given_room_for_them() -> None:
    model = llama()
    least = least_budget(model, page_size="1MiB")
    assert least > least_budget(model) + (3 << 20)
    fitted = fit(model, least, "cpu", tokens=TOKENS, page_size="1MiB")
    if fitted.pool is not None:
        assert fitted.pool.budget >= 4 << 20
    assert len(train(model, fitted, steps=1)) > 1


def test_nothing_is_paged_where_everything_fits() -> None:
    model = llama()
    fitted = fit(model, "1GiB", "cpu", tokens=TOKENS)
    assert fitted.pool is None
    assert fitted.weights is None
    assert all(module.paged is None for module in model.modules() if isinstance(module, Linear4bit))
    assert "no paging" in str(fitted)
    with fitted.step():
        assert torch.autograd.graph.saved_tensors_hooks is not None
    assert fitted.stall_seconds == 0


def test_parts_are_what_the_model_holds_and_the_budget_is_used_up() -> None:
    model = llama(pack_head=True)
    packed = sum(p.nbytes for p in model.parameters() if not p.is_floating_point())
    trained = sum(p.nbytes for p in qlora_rs.lora_parameters(model))
    floats = {*model.parameters(), *model.buffers()}
    frozen = sum(t.nbytes for t in floats if t.is_floating_point() and not t.requires_grad)
    budget = least_budget(model, optimizer="adamw") + 30_000
    fitted = fit(model, budget, "cpu", tokens=TOKENS, optimizer="adamw")
    parts = {part.name: part for part in fitted.plan.parts}
    assert parts["packed weights"].nbytes == packed
    assert parts["trained parameters"].nbytes == parts["their gradients"].nbytes == trained
    assert parts["optimizer state"].nbytes == 2 * trained
    assert parts["embeddings and head"].nbytes == model.get_input_embeddings().weight.nbytes
    assert parts["embeddings and head"].nbytes + parts["norms, biases, buffers"].nbytes == frozen
    assert parts["saved activations"].nbytes >= 5 * TOKENS * 72 * 4
    pool, weights = fitted.pool, fitted.weights
    assert pool is not None
    assert weights is not None
    assert weights.nbytes >= packed
    assert [*weights.blocks][-1] == "lm_head.base_layer" or [*weights.blocks][-1] == "lm_head"
    assert fitted.plan.frames is not None
    assert pool.budget <= fitted.plan.frames == budget - fitted.plan.total("device", "step")
    assert f"{'together':<10}" in str(fitted)
    assert len(str(fitted).splitlines()) >= 8


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"tokens": 2 * TOKENS}, {"tokens": TOKENS}),
        ({"optimizer": "adamw"}, {"optimizer": "adamw8bit"}),
        ({"optimizer": "adamw8bit"}, {"optimizer": "paged_adamw8bit"}),
        ({"checkpointing": False}, {"checkpointing": True}),
        ({"page_activations": False, "tokens": 500}, {"page_activations": True, "tokens": 500}),
        ({"whole_logits": True, "tokens": 100_000}, {"whole_logits": False, "tokens": 100_000}),
    ],
)
def test_what_takes_more_memory_leaves_less_for_the_pool(more: dict[str, Any], less: dict[str, Any]) -> None:
    budget = parse_bytes("20MB")
    frames = []
    for options in (more, less):
        with pytest.raises(ValueError, match=r".*") as caught:
            fit(llama(), 4096, "cpu", **{"tokens": TOKENS, **options})
        found = re.search(r"([\d.]+ .B) are needed beside the pool", str(caught.value))
        assert found is not None
        frames.append(budget - parse_bytes(found[1].replace(" ", "")))
    assert frames[0] < frames[1]


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ValueError, match=r"optimizer is one of adamw.*'adam'"):
        fit(llama(), "1GiB", "cpu", optimizer="adam")
    with pytest.raises(ValueError, match="tokens is at least 1"):
        fit(llama(), "1GiB", "cpu", tokens=0)
    model = llama()
    budget = least_budget(model)
    fit(model, budget, "cpu", tokens=TOKENS)
    with pytest.raises(ValueError, match="paged already"):
        fit(model, budget, "cpu", tokens=TOKENS)


def test_a_model_without_packed_layers_is_only_moved() -> None:
    model = torch.nn.Linear(5, 3)
    fitted = fit(model, "1GiB", "cpu")
    assert fitted.pool is None
    with pytest.raises(ValueError, match="no packed layers"):
        page_weights(model, object())  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"too small, and the model has no packed layers.* at least (\d+) bytes"
    ) as caught:
        fit(torch.nn.Linear(500, 300), "1MB", "cpu")
    needed = re.search(r"at least (\d+) bytes", str(caught.value))
    assert needed is not None
    assert fit(torch.nn.Linear(500, 300), int(needed[1]), "cpu").pool is None


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_budget_that_is_too_small_names_the_ways_out(checkpointing: bool) -> None:
    with pytest.raises(ValueError, match="is too small") as caught:
        fit(llama(checkpointing=checkpointing), 4096, "cpu", tokens=TOKENS)
    assert ("or gradient checkpointing, or fewer tokens" in str(caught.value)) is not checkpointing
    with pytest.raises(ValueError, match="or keep no dequantized weights, or fewer tokens"):
        fit(llama(), 4096, "cpu", tokens=TOKENS, keep_dequantized=True)


@pytest.mark.parametrize(
    "kind", ["AdamW", "AdamW8bit", "Lion", "Lion8bit", "AdEMAMix", "AdEMAMix8bit", "SGD", "SGD8bit"]
)
def test_the_state_of_each_optimizer_has_the_planned_bytes(kind: str) -> None:
    parameter = nn.Parameter(torch.randn(77, 256))
    options = {"momentum": 0.9} if kind.startswith("SGD") else {}
    optimizer = getattr(qlora_rs.optim, kind)([parameter], lr=1e-3, **options)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    held = sum(state.nbytes for name, state in optimizer.state[parameter].items() if name != "step")
    assert OPTIMIZER_BYTES[kind.lower()] * parameter.numel() == held


class Mixture(nn.Module):
    """A decoder layer of one Linear layer and some experts."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 64, bias=False)
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(64, 192, bias=False)}) for _ in range(experts))


@pytest.mark.parametrize("keep_dequantized", [False, True])
@pytest.mark.parametrize("experts", [3, 8])
def test_experts_are_blocks_of_their_own_but_leave_no_activations_of_their_own(
    experts: int, keep_dequantized: bool
) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(Mixture(experts) for _ in range(5))
    qlora_rs.quantize_model(model)
    assert len(packed_blocks(model)) == 5 * (1 + experts)
    request = Request(
        budget=1 << 30,
        device=torch.device("cpu"),
        tokens=100,
        optimizer="adamw",
        page_activations=None,
        checkpointing=True,
        keep_dequantized=keep_dequantized,
        whole_logits=False,
        page_bytes=4096,
    )
    parts = {part.name: part.nbytes for part in plan(model, request).parts}
    assert parts["saved activations"] == 5 * 100 * 64 * element_size(model)
    # A token meets two experts, however many there are.
    weights = 64 * 64 + experts * 64 * 192 if keep_dequantized else 64 * 192
    assert parts["working set"] == round(2.2 * (128 + 2 * 256) * 100 * element_size(model)) + weights * 4


def element_size(model: nn.Module) -> int:
    return next(m.float_dtype.itemsize for m in model.modules() if isinstance(m, Linear4bit))
