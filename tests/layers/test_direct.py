"""When a call may go past torch's dispatcher: told on the CPU, where the same questions are asked."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_rs import Linear4bit, LoraLinear, direct
from qlora_rs.lora import _is_bare


def test_a_plain_tensor_that_nobody_watches_may() -> None:
    assert direct.unwatched(torch.ones(2))
    assert direct.unwatched(nn.Parameter(torch.ones(2)))
    with torch.device("cpu"):
        assert direct.unwatched(torch.ones(2))
    with torch.inference_mode():
        assert direct.unwatched(torch.ones(2))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func's own import
def test_subclasses_modes_transforms_and_tracers_see_the_operator() -> None:
    class Subclass(torch.Tensor):
        pass

    assert not direct.unwatched(torch.ones(2).as_subclass(Subclass))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    answers = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        answers.append(direct.unwatched(x))
        return x * 2

    with Watch():
        ask(torch.ones(2))
    torch.vmap(ask)(torch.ones(3, 2))
    torch.func.grad(lambda x: ask(x).sum())(torch.ones(2))
    with forward_ad.dual_level():
        ask(forward_ad.make_dual(torch.ones(2), torch.ones(2)))
    assert answers == [False] * 4
    assert direct.unwatched(torch.ones(2))


@pytest.mark.parametrize("what", ["forward hook", "pre-hook", "own forward", "subclass"])
def test_a_layer_whose_call_does_more_than_its_forward_is_called(what: str) -> None:
    base = Linear4bit.from_float(nn.Linear(64, 8))
    assert _is_bare(LoraLinear(base, r=2).base_layer)
    if what == "forward hook":
        base.register_forward_hook(lambda *_: None)
    elif what == "pre-hook":
        base.register_forward_pre_hook(lambda *_: None)
    elif what == "own forward":
        base.forward = base.forward  # type: ignore[method-assign]
    else:
        base.__class__ = type("Other", (Linear4bit,), {})
    assert not _is_bare(base)


def test_a_layer_on_the_cpu_meets_a_cuda_input_with_words() -> None:
    layer = Linear4bit.from_float(nn.Linear(64, 8))
    parts = (layer.weight, layer.weight_absmax, layer.weight_absmax_scale, layer.weight_absmax_offset)
    with pytest.raises(ValueError, match="the packed weight is on cpu"):
        layer._product.weight(parts)
