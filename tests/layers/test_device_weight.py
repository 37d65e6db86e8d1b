"""What `_core.DeviceWeight` asks of tensors before it names their memory to a kernel: told on the CPU."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from qlora_rs import Linear4bit, QuantSpec, _core, direct


def layer_and_weight(spec: QuantSpec | None = None) -> tuple[Linear4bit, _core.DeviceWeight]:
    layer = Linear4bit.from_float(nn.Linear(192, 33), spec)
    return layer, _core.DeviceWeight(layer.spec.core(), layer.parts(), 192, False)


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(double_quant=False), QuantSpec("int8", 32)])
def test_it_holds_the_tensors_that_it_was_made_of(spec: QuantSpec) -> None:
    layer, weight = layer_and_weight(spec)
    assert weight.shape == (33, 192)
    assert weight.device == torch.device("cpu")
    assert weight.holds(*layer.parts())
    codes, *rest = layer.parts()
    assert not weight.holds(codes.detach(), *rest)
    assert not weight.holds(codes, rest[0], None if spec.double_quant else codes, rest[2])


@pytest.mark.parametrize("number", range(4))
def test_a_tensor_that_moved_is_another(number: int) -> None:
    layer, weight = layer_and_weight()
    part = layer.parts()[number]
    old = part.data
    part.data = part.data.clone()
    assert not weight.holds(*layer.parts())
    part.data = old
    assert weight.holds(*layer.parts())


def test_a_tensor_restrided_in_place_is_another() -> None:
    layer, weight = layer_and_weight()
    layer.weight.data = layer.weight.data.t()
    assert not weight.holds(*layer.parts())
    layer.weight.data = layer.weight.data.t()
    layer.weight.data = layer.weight.data[:32]
    assert not weight.holds(*layer.parts())


def test_writing_in_place_is_counted() -> None:
    layer, weight = layer_and_weight()
    before = weight.versions
    assert before is not None
    layer.weight_absmax.add_(1)
    assert weight.versions == before
    assert weight.holds(*layer.parts())
    assert weight.versions == (before[0], before[1] + 1, *before[2:])


def test_tensors_of_inference_mode_are_not_counted() -> None:
    with torch.inference_mode():
        layer, weight = layer_and_weight()
        assert weight.versions is None
        assert weight.holds(*layer.parts())


def test_it_keeps_no_tensor_alive_but_copies_of_strided_ones() -> None:
    layer, weight = layer_and_weight()
    parts = [weakref.ref(part) for part in layer.parts()]
    strided = torch.empty(33, 2 * 96, dtype=torch.uint8)[:, ::2]
    copied = _core.DeviceWeight(layer.spec.core(), (strided, *layer.parts()[1:]), 192, False)
    assert not copied.holds(strided, *layer.parts()[1:])
    del layer
    gc.collect()
    assert [part() for part in parts] == [None] * 4
    del weight, copied


@pytest.mark.parametrize("number", range(4))
def test_parts_of_another_size_are_refused(number: int) -> None:
    layer, _ = layer_and_weight()
    parts = list(layer.parts())
    parts[number] = torch.zeros(parts[number].numel() + 3, dtype=parts[number].dtype)
    if number == 0:
        parts[0] = torch.zeros(34, 96, dtype=torch.uint8)
    with pytest.raises(ValueError, match="expected"):
        _core.DeviceWeight(layer.spec.core(), tuple(parts), 192, False)


def test_freed_memory_is_told() -> None:
    layer, _ = layer_and_weight()
    layer.weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="no memory"):
        _core.DeviceWeight(layer.spec.core(), layer.parts(), 192, False)


@pytest.mark.parametrize("name", ["x", "bias", "xa", "B"])
def test_an_operand_whose_memory_was_freed_is_told_before_it_comes_to_a_kernel(name: str) -> None:
    _, weight = layer_and_weight()
    sizes = {"x": (2, 192), "bias": (33,), "xa": (2, 3), "B": (33, 3)}
    operands = {each: torch.ones(size, dtype=torch.bfloat16) for each, size in sizes.items()}
    operands[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{list(sizes[name])!r} has no memory".replace("[", r"\[")):
        weight.linear(operands["x"], operands["bias"], (operands["xa"], operands["B"], 1.0))


def test_on_the_cpu_no_product_is_plain() -> None:
    layer, weight = layer_and_weight()
    x = torch.randn(2, 192, dtype=torch.bfloat16)
    assert not weight.fuses(1, torch.bfloat16)
    assert weight.plain_linear(x, layer._parameters) is None
    layer._product.known = weight  # as after a call on a device, from which the layer came back
    with torch.no_grad():
        assert torch.equal(layer(x), torch.ops.qlora_rs.linear(x, *layer.parts(), 192, "nf4", 64, None, layer.bias))


def test_a_compiler_that_traces_the_layer_sees_the_operator() -> None:
    layer, weight = layer_and_weight()
    layer._product.known = weight
    x = torch.randn(2, 192)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
    assert not direct.applies(x)
