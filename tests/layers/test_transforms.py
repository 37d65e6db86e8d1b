"""The layers under `torch.func`'s transforms, against the float layer of the same values."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import qlora_rs
from qlora_rs import Linear4bit, LoraLinear, PackedTensor

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch.func's own import
close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)
OUT, IN = 35, 66


def by_rows() -> Linear4bit:
    return Linear4bit.from_float(nn.Linear(IN, OUT))


def flat() -> Linear4bit:
    row = qlora_rs.quantize(torch.randn(1, OUT * IN))
    parts = {name: getattr(row, name) for name in ("codes", "absmax", "absmax_scale", "absmax_offset")}
    packed = PackedTensor(**parts, spec=row.spec, shape=(OUT, IN), dtype=torch.float32, flat=True)
    return Linear4bit.from_packed(packed, torch.randn(OUT))


@pytest.fixture(params=[by_rows, flat], ids=["by rows", "flat"])
def pair(request: pytest.FixtureRequest) -> tuple[Linear4bit, nn.Linear]:
    layer = request.param()
    twin = nn.Linear(IN, OUT)
    twin.weight, twin.bias = nn.Parameter(layer.dequantize(torch.float32)), nn.Parameter(layer.bias.detach().clone())
    return layer, twin.requires_grad_(False)


TRANSFORMS = {
    "vmap": lambda layer, x: vmap(layer)(x),
    "vmap over the last but one": lambda layer, x: vmap(layer, in_dims=1, out_dims=1)(x),
    "vmap of vmap": lambda layer, x: vmap(vmap(layer))(x),
    "grad": lambda layer, x: grad(lambda v: layer(v).square().sum())(x),
    "vmap of grad": lambda layer, x: vmap(grad(lambda v: layer(v).square().sum()))(x),
    "grad of vmap": lambda layer, x: grad(lambda v: vmap(layer)(v).square().sum())(x),
    "vjp": lambda layer, x: vjp(layer, x)[1](torch.ones(*x.shape[:-1], OUT))[0],
    "jvp": lambda layer, x: jvp(layer, (x,), (x.cos(),)),
    "jacrev": lambda layer, x: jacrev(layer)(x[0, 0]),
    "jacfwd": lambda layer, x: jacfwd(layer)(x[0, 0]),
    "hessian": lambda layer, x: hessian(lambda v: layer(v).square().sum())(x[0, 0]),
    "jacrev of jacfwd": lambda layer, x: jacrev(jacfwd(lambda v: layer(v).square().sum()))(x[0, 0]),
    "jacrev of jacrev": lambda layer, x: jacrev(jacrev(lambda v: layer(v).square().sum()))(x[0, 0]),
    "functionalize": lambda layer, x: functionalize(layer)(x),
    "of the bias": lambda layer, x: grad(lambda b: functional_call(layer, {"bias": b}, (x,)).square().sum())(
        layer.bias.detach()
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_of_the_layer_is_that_of_its_floats(pair, transform) -> None:
    layer, twin = pair
    x = torch.randn(4, 3, IN)
    close(transform(layer, x), transform(twin, x))


def test_what_a_transform_gives_can_be_differentiated_by_autograd(pair) -> None:
    x = torch.randn(4, IN, requires_grad=True)
    gradients = []
    for module in pair:
        y = vmap(module)(x).square().sum() + grad(lambda v, m=module: m(v).square().sum())(x).sum()
        gradients.append(torch.autograd.grad(y, x)[0])
    close(*gradients)


class FloatLora(nn.Module):
    """A layer with an adapter in torch's own operations."""

    def __init__(self, layer: LoraLinear) -> None:
        super().__init__()
        self.base = nn.Linear(IN, OUT)
        self.base.weight.data, self.base.bias.data = layer.base_layer.dequantize(torch.float32), layer.bias.detach()
        self.lora_A, self.lora_B, self.scaling = layer.lora_A, layer.lora_B, layer.scaling

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.scaling * (x @ self.lora_A.T) @ self.lora_B.T
        return y


@pytest.mark.parametrize(
    "transform", [rule for name, rule in TRANSFORMS.items() if name not in ("of the bias", "functionalize")]
)
def test_a_transform_of_a_layer_with_an_adapter_is_that_of_its_floats(transform) -> None:
    layer = LoraLinear(by_rows(), r=3)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 3, IN)
    close(transform(layer, x), transform(FloatLora(layer), x))


def test_forward_mode_gradients_of_a_layer_with_an_adapter() -> None:
    layer, x = LoraLinear(by_rows(), r=3), torch.randn(2, IN)
    nn.init.normal_(layer.lora_B)
    with forward_ad.dual_level():
        ours, theirs = (forward_ad.unpack_dual(m(forward_ad.make_dual(x, x.cos()))) for m in (layer, FloatLora(layer)))
        close(ours.primal, theirs.primal)
        close(ours.tangent, theirs.tangent)


def test_slopes_along_an_adapters_matrices() -> None:
    layer, x = LoraLinear(by_rows(), r=3), torch.randn(2, IN)
    nn.init.normal_(layer.lora_B)
    matrices = {name: p.detach() for name, p in layer.named_parameters() if "lora" in name}
    slopes = {name: torch.randn_like(p) for name, p in matrices.items()}
    for names in (["lora_A"], ["lora_B"], ["lora_A", "lora_B"]):
        ours, theirs = (
            jvp(
                lambda chosen, m=module: functional_call(m, chosen, (x,)),
                ({name: matrices[name] for name in names},),
                ({name: slopes[name] for name in names},),
            )
            for module in (layer, FloatLora(layer))
        )
        close(ours, theirs)


def test_gradients_of_adapters_sample_by_sample() -> None:
    model = nn.Sequential(
        LoraLinear(by_rows(), r=3), nn.Tanh(), LoraLinear(Linear4bit.from_float(nn.Linear(OUT, 5)), r=2)
    )
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B)
    trained = {name: p for name, p in model.named_parameters() if "lora" in name}
    x = torch.randn(4, 3, IN)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample,)).square().sum()

    got = vmap(grad(loss), (None, 0))({name: p.detach() for name, p in trained.items()}, x)
    for i, sample in enumerate(x):
        want = torch.autograd.grad(model(sample).square().sum(), list(trained.values()))
        for name, gradient in zip(trained, want, strict=True):
            close(got[name][i], gradient)


def test_an_ensemble_is_computed_as_its_members_are() -> None:
    members = [by_rows() for _ in range(3)]
    parameters, _ = stack_module_state(members)
    skeleton, x = Linear4bit(IN, OUT, device="meta"), torch.randn(2, IN)
    y = vmap(lambda p: functional_call(skeleton, p, (x,)))(parameters)
    close(y, torch.stack([member(x) for member in members]))


def test_autocast_holds_under_transforms() -> None:
    layer, x = by_rows(), torch.randn(2, IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert vmap(layer)(x).dtype == torch.bfloat16
        assert grad(lambda v: layer(v).float().sum())(x).dtype == torch.float32
