"""Perplexity: against float64, at the edges of windows, and errors that help."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qlora_rs import NonFiniteError
from qlora_rs.eval import Perplexity, evaluating, perplexity


@pytest.fixture(scope="module")
def model(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def tokens(count: int) -> list[int]:
    return torch.randint(3, 259, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def directly(model: nn.Module, ids: list[int], window: int) -> tuple[float, int]:
    """Sum of losses and their number, window by window and token by token in float64."""
    total, count = 0.0, 0
    for start in range(0, len(ids), window):
        piece = ids[start : start + window]
        if len(piece) < 2:
            continue
        with torch.no_grad():
            logits = model(torch.tensor([piece])).logits[0].double()
        for position, token in enumerate(piece[1:]):
            total -= float(logits[position].log_softmax(-1)[token])
            count += 1
    return total, count


# One token is left over, none is, two windows of 64 rows and a part, longer than the text, the shortest of all.
@pytest.mark.parametrize(
    ("count", "window", "windows"), [(65, 16, 4), (64, 16, 4), (66, 16, 5), (200, 131, 2), (31, 512, 1), (2, 2, 1)]
)
def test_equals_a_direct_computation_in_float64(model, count, window, windows) -> None:
    ids = tokens(count)
    result = perplexity(model, ids, window=window)
    total, scored = directly(model, ids, window)
    assert (result.tokens, result.windows) == (scored, windows)
    assert result.nll == pytest.approx(total / scored, rel=1e-6)
    assert result.ppl == pytest.approx(math.exp(total / scored), rel=1e-6)


def test_windows_share_nothing(model) -> None:
    ids = tokens(40)
    whole = perplexity(model, ids, window=20)
    halves = [perplexity(model, half, window=20) for half in (ids[:20], ids[20:])]
    assert whole.nll == pytest.approx(sum(half.nll for half in halves) / 2, rel=1e-6)
    assert whole.nll != pytest.approx(perplexity(model, ids, window=40).nll, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_tensors_of_any_integer_type_are_taken(model, dtype) -> None:
    ids = [token % 251 for token in tokens(23)]
    assert perplexity(model, torch.tensor(ids, dtype=dtype)) == perplexity(model, ids)


def test_bfloat16_is_scored_in_float32(tiny_llama, model) -> None:
    from transformers import AutoModelForCausalLM

    low = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    ids = tokens(100)
    total, scored = directly(low.eval(), ids, 50)
    assert perplexity(low, ids, window=50).nll == pytest.approx(total / scored, rel=1e-6)


def test_dropout_is_off_and_every_module_keeps_its_mode_and_its_gradients(model) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.dropout, self.config = model, nn.Dropout(0.9), model.config

        def forward(self, **inputs):
            assert not torch.is_grad_enabled()
            return SimpleNamespace(logits=self.dropout(self.inner(**inputs).logits))

    wrapped = Dropping().train()
    wrapped.inner.lm_head.eval()
    modes = {name: module.training for name, module in wrapped.named_modules()}
    ids = tokens(31)
    assert perplexity(wrapped, ids) == perplexity(model.eval(), ids)
    wrapped.train()
    wrapped.inner.lm_head.eval()
    perplexity(wrapped, ids)
    assert {name: module.training for name, module in wrapped.named_modules()} == modes
    assert torch.is_grad_enabled()
    model.eval()


def test_the_mode_comes_back_after_an_error() -> None:
    layer = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    seen = []

    def fail() -> None:
        with evaluating(layer):
            seen.append(layer[0].training)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [False]
    assert layer.training
    assert layer[0].training


def test_progress_ends_at_the_number_of_tokens(model) -> None:
    seen: list[tuple[int, int]] = []
    perplexity(model, tokens(50), window=16, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(16, 50), (32, 50), (48, 50), (50, 50)]


@pytest.mark.parametrize(
    ("ids", "window", "error", "match"),
    [
        ([], 16, ValueError, "at least 2 tokens .* got 0"),
        ([5], 16, ValueError, "at least 2 tokens .* got 1"),
        ([[5, 6]], 16, ValueError, r"1-D .* \[1, 2\]"),
        ([0.5, 0.25], 16, TypeError, "integers; got torch.float32"),
        ([True, False], 16, TypeError, "integers; got torch.bool"),
        ([5, 259], 16, ValueError, "token id 259 is outside the model's vocabulary of 259"),
        ([5, -1], 16, ValueError, "token id -1 is outside"),
        ([5, 6], 1, ValueError, "at least 2; got 1"),
        ([5, 6], 16.0, ValueError, "window is an integer"),
        ([5, 6], True, ValueError, "window is an integer"),
        ([5, 6], 513, ValueError, "window is 513, but the model takes 512"),
    ],
)
def test_wrong_arguments_are_refused(model, ids, window, error, match) -> None:
    with pytest.raises(error, match=match):
        perplexity(model, ids, window=window)


def test_a_damaged_model_is_an_error_that_names_the_tokens(make_tiny_llama, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_tiny_llama(tmp_path), dtype=torch.float32).train()
    model.model.embed_tokens.weight.data[77] = float("nan")
    ids = [5] * 32 + [77, 5, 5]
    with pytest.raises(NonFiniteError, match="tokens 32 to 34 is nan"):
        perplexity(model, ids, window=16)
    assert model.training


def test_a_loss_too_large_to_exponentiate_is_infinite() -> None:
    assert Perplexity(nll=800.0, tokens=3, windows=1).ppl == math.inf
