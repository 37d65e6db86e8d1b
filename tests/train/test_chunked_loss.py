"""`qlora_rs.chunked_loss`: the loss over all logits, without all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import qlora_rs
from qlora_rs import Linear4bit, LoraLinear
from qlora_rs.chunked_loss import causal_lm_loss, chunk_tokens, chunked_cross_entropy
from qlora_rs.paging import PagedPool, page_weights, saved_activations

WIDTH, VOCABULARY = 37, 101


def head(kind: str, dtype: torch.dtype) -> nn.Module:
    plain = nn.Linear(WIDTH, VOCABULARY, bias=kind != "packed").to(dtype)
    if kind == "plain":
        return plain
    packed = Linear4bit.from_float(plain)
    if kind == "packed":
        return packed
    adapted = LoraLinear(packed, r=3)
    with torch.no_grad():
        adapted.lora_B.normal_()
    return adapted


def watched(module: nn.Module) -> list[int]:
    """How many rows each call of the module has."""
    rows: list[int] = []
    module.register_forward_hook(lambda module, inputs, output: rows.append(output.numel() // VOCABULARY))
    return rows


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(1, 1), (1, 67), (3, 29), (2, 64)]),
    share=st.floats(0.05, 1.0),
    chunk=st.sampled_from([1, 7, 63, 64, 65, 1000]),
    kind=st.sampled_from(["plain", "packed", "adapted"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_are_those_over_all_logits(
    shape: tuple[int, int], share: float, chunk: int, kind: str, dtype: torch.dtype, reduction: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    module = head(kind, dtype)
    hidden = torch.randn(*shape, WIDTH, dtype=dtype, requires_grad=True)
    targets = torch.where(torch.rand(shape) <= share, torch.randint(VOCABULARY, shape), -100)
    targets[0, 0] = 5
    trained = [hidden, *(p for p in module.parameters() if p.requires_grad)]

    logits = module(hidden).float().view(-1, VOCABULARY)
    expected = cross_entropy(logits, targets.view(-1), reduction=reduction)
    expected_grads = torch.autograd.grad(expected * 3, trained)
    calls = watched(module)
    size = 4 * VOCABULARY * chunk
    found = chunked_cross_entropy(hidden, module, targets, reduction=reduction, chunk_bytes=size)
    grads = torch.autograd.grad(found * 3, trained)

    assert found.dtype == torch.float32
    assert max(calls) <= chunk_tokens(VOCABULARY, size) <= chunk
    exact = dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5 if exact else 1e-2, atol=1e-5)
    for one, other in zip(grads, expected_grads, strict=True):
        # A parameter in bfloat16 collects its gradient chunk by chunk, each sum rounded to 8 bits.
        bound = 1e-4 if exact else (4 + len(calls)) * 2**-9
        assert float((one - other).abs().max()) <= bound * (float(other.abs().max()) + 1e-6)


def test_one_chunk_has_the_bits_of_the_plain_loss() -> None:
    module = head("adapted", torch.float32)
    hidden = torch.randn(40, WIDTH, requires_grad=True)
    targets = torch.randint(VOCABULARY, (40,))
    found = chunked_cross_entropy(hidden, module, targets)
    expected = cross_entropy(module(hidden[None])[0], targets)
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found, hidden)[0], torch.autograd.grad(expected, hidden)[0])


def test_no_gradient_is_recorded_where_none_is_wanted() -> None:
    module, hidden = head("plain", torch.float32), torch.randn(40, WIDTH)
    calls = watched(module)
    with torch.no_grad():
        found = chunked_cross_entropy(hidden, module, torch.arange(40), chunk_bytes=4 * VOCABULARY * 9)
    assert not found.requires_grad
    assert calls == [9, 9, 9, 9, 4]


def test_dropout_in_the_head_is_drawn_again_as_it_was() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, VOCABULARY))
    hidden, targets = torch.randn(40, WIDTH, requires_grad=True), torch.arange(40)
    size = 4 * VOCABULARY * 9

    def loss(weight: Tensor) -> Tensor:
        torch.manual_seed(7)
        parameters = {"1.weight": weight, "1.bias": module[1].bias}
        call = lambda rows: torch.func.functional_call(module, parameters, (rows,))  # noqa: E731
        return chunked_cross_entropy(hidden, call, targets, chunk_bytes=size, vocabulary=VOCABULARY)

    weight = module[1].weight.detach().double().float().requires_grad_()
    (grad,) = torch.autograd.grad(loss(weight), weight)
    direction = torch.randn_like(weight)
    step = 1e-2
    with torch.no_grad():
        slope = (loss(weight + step * direction) - loss(weight - step * direction)) / (2 * step)
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-2, atol=1e-3)


def test_wrong_arguments_are_told() -> None:
    module = head("plain", torch.float32)
    with pytest.raises(ValueError, match="no targets of shape"):
        chunked_cross_entropy(torch.randn(2, 3, WIDTH), module, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="'none'"):
        chunked_cross_entropy(torch.randn(2, WIDTH), module, torch.zeros(2, dtype=torch.int64), reduction="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels have shape"):
        causal_lm_loss(module, torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64))
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="'avg'"):
        causal_lm_loss(module, ids, ids, reduction="avg")  # type: ignore[arg-type]


def causal_lm(name: str, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    settings_ = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    settings_ |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0, **changes}
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**settings_)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that a soft cap shows
    return model


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Gemma2", {"final_logit_softcapping": 0.5}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 3.0}),
    ],
)
def test_it_is_the_loss_that_the_model_gives(name: str, changes: dict[str, Any]) -> None:
    model = causal_lm(name, **changes)
    ids = torch.randint(1, VOCABULARY, (3, 31))
    labels = torch.where(torch.rand(ids.shape) < 0.7, ids, -100)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    labels[1, 20:] = -100
    expected = model(ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    for _ in range(2):  # the second time it is known whether the model does more to its logits
        model.zero_grad()
        found = causal_lm_loss(model, ids, labels, attention_mask=mask, chunk_bytes=4 * VOCABULARY * 10)
        found.backward()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, grads[parameter_name], rtol=1e-4, atol=1e-5)


def test_inputs_that_the_loss_decides_are_told_or_change_nothing() -> None:
    model, ids = causal_lm("Llama"), torch.arange(12).view(2, 6) % 50 + 1
    expected = causal_lm_loss(model, ids, ids)
    harmless = {"use_cache": False, "logits_to_keep": 0, "return_dict": True}
    assert torch.equal(causal_lm_loss(model, ids, ids, **harmless), expected)
    assert torch.equal(causal_lm_loss(model, ids, ids, **dict.fromkeys(harmless)), expected)
    for name, value in (
        ("use_cache", True),
        ("logits_to_keep", 3),
        ("logits_to_keep", torch.tensor([1, 2])),
        ("num_logits_to_keep", 1),
        ("return_dict", False),
    ):
        with pytest.raises(ValueError, match=f"^{name} is always"):
            causal_lm_loss(model, ids, ids, **{name: value})


def test_logits_that_are_scaled_in_place_are_found_out() -> None:
    model = causal_lm("Llama")

    def scale(module: Any, inputs: Any, output: Any) -> None:
        output.logits.mul_(0.125)

    model.register_forward_hook(scale)
    ids = torch.randint(1, VOCABULARY, (2, 31))
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            model(ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        )
        found = causal_lm_loss(model, ids, ids, chunk_bytes=4 * VOCABULARY * 10)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Llama", "Cohere"])
def test_inference_mode_gives_the_same_loss(name: str) -> None:
    model = causal_lm(name)
    ids = torch.randint(1, VOCABULARY, (2, 31))
    expected = causal_lm_loss(model, ids, ids, chunk_bytes=4 * VOCABULARY * 10)
    with torch.inference_mode():
        found = causal_lm_loss(model, ids, ids, chunk_bytes=4 * VOCABULARY * 10)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_head_never_gives_more_rows_than_a_chunk_has() -> None:
    model = causal_lm("Llama")
    calls = watched(model.lm_head)
    ids = torch.randint(1, VOCABULARY, (2, 50))
    causal_lm_loss(model, ids, ids, chunk_bytes=4 * VOCABULARY * 10).backward()
    assert calls == [1, *[10] * 9, 8, 8, *[10] * 9]  # a look at one row, the forward pass, the backward pass
    assert len(model.lm_head._forward_hooks) == 1  # this test's own
    assert not model.lm_head._forward_pre_hooks


def test_a_packed_and_paged_model_gives_its_gradients() -> None:
    def run(paged: bool) -> list[Tensor]:
        model = causal_lm("Llama")
        qlora_rs.quantize_model(model, include=["lm_head"])
        qlora_rs.attach_lora(model, r=2, seed=3, target_modules=["q_proj", "lm_head"])
        pool = PagedPool("64KiB", page_size=4096)
        if paged:
            page_weights(model, pool)
        ids = torch.randint(1, VOCABULARY, (2, 50), generator=torch.Generator().manual_seed(5))
        with saved_activations(pool, min_bytes=4096 if paged else 1 << 40):
            loss = causal_lm_loss(model, ids, ids, chunk_bytes=4 * VOCABULARY * 10)
        loss.backward()
        return [loss.detach(), *(p.grad for p in qlora_rs.lora_parameters(model) if p.grad is not None)]

    expected, found = run(False), run(True)
    assert len(expected) == len(found) == 7
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
