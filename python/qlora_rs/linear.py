"""`Linear4bit`: a Linear layer whose weight is packed and frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from qlora_rs import direct
from qlora_rs.operator_product import OperatorProduct
from qlora_rs.packed import FLOAT_DTYPES, PackedShapes, PackedTensor
from qlora_rs.paged_product import PagedBlock, PagedProduct
from qlora_rs.quantization import dequantize, quantize
from qlora_rs.spec import QuantSpec

_PACKED = ("weight", "weight_absmax", "weight_absmax_scale", "weight_absmax_offset")


class Linear4bit(nn.Linear):
    """``y = x W^T + b`` over a quantized, frozen W of shape (out, in).

    All tensors of the weight are ordinary parameters of integer dtype with ``requires_grad=False``: ``weight`` uint8
    ``[out, ceil(in/2)]`` (8-bit types ``[out, in]``), ``weight_absmax`` uint8 codes when doubly quantized, else the
    float32 bits as int32, ``[out, ceil(in/block)]``; doubly quantized also ``weight_absmax_scale`` int32
    ``[ceil(blocks/256)]`` and ``weight_absmax_offset`` int32 ``[1]``. Being integers they survive ``.to(dtype)``,
    ``state_dict``, ``deepcopy`` and sharding unchanged, and the packed file holds exactly these names.

    Gradients reach x and the bias, never the weight; the backward pass dequantizes again, so only packed tensors
    are kept between forward and backward.

    While it is paged (`qlora_rs.paging.page_weights`), the packed parameters are CPU tensors in the memory of the pool,
    which brings them to the device for each product. Moving the module moves its bias only; a copy is an ordinary layer
    in ordinary memory; loading a state dict replaces what the pool holds. They must not be written to in place.

    A ``flat`` weight, whose blocks run over the ends of rows as bitsandbytes has them, is held as one row of all its
    elements: ``weight`` is ``[1, ceil(out * in / 2)]``, ``weight_absmax`` ``[1, blocks]``. It is dequantized for every
    product, and cannot be cut by rows.

    Args:
        in_features: length of a row of W.
        out_features: number of rows of W.
        bias: whether there is a bias (a float parameter of ``float_dtype``).
        spec: how the weight is quantized.
        float_dtype: what was quantized, and the default of `dequantize`.
        device: where the (uninitialised) parameters are made; ``"meta"`` makes shapes only.
        flat: whether W is packed as one row.
    """

    paged: PagedProduct | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        spec: QuantSpec | None = None,
        *,
        float_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        flat: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate and initialise a float weight
        if float_dtype not in FLOAT_DTYPES:
            raise ValueError(f"float_dtype is float32, bfloat16 or float16; got {float_dtype}")
        self.in_features = in_features
        self.out_features = out_features
        self.spec = QuantSpec() if spec is None else spec
        self.float_dtype = float_dtype
        self._product = direct.FrozenProduct(in_features, self.spec)
        self._operator_product = OperatorProduct((out_features, in_features), self.spec, flat=flat)

        shapes = PackedShapes.of((out_features, in_features), self.spec, flat=flat)
        nested = self.spec.double_quant
        self.weight = _frozen(torch.empty(shapes.codes, dtype=torch.uint8, device=device))
        absmax_dtype = torch.uint8 if nested else torch.int32
        self.weight_absmax = _frozen(torch.empty(shapes.absmax, dtype=absmax_dtype, device=device))
        self.weight_absmax_scale: nn.Parameter | None
        self.weight_absmax_offset: nn.Parameter | None
        for name, shape in (
            ("weight_absmax_scale", shapes.absmax_scale),
            ("weight_absmax_offset", shapes.absmax_offset),
        ):
            bits = _frozen(torch.empty(shape, dtype=torch.int32, device=device)) if nested else None
            self.register_parameter(name, bits)
        bias_parameter = _frozen(torch.zeros(out_features, dtype=float_dtype, device=device)) if bias else None
        self.register_parameter("bias", bias_parameter)

    @classmethod
    def from_float(cls, linear: nn.Linear, spec: QuantSpec | None = None, *, nonfinite: str = "raise") -> Linear4bit:
        """Quantize a float Linear layer; the bias parameter is taken over as it is.

        Raises:
            NonFiniteError: the weight holds NaN or Inf.
            TypeError: the layer's weight is not float32, bfloat16 or float16.
        """
        return cls.from_packed(quantize(linear.weight, spec, nonfinite=nonfinite), linear.bias)

    @classmethod
    def from_packed(cls, packed: PackedTensor, bias: nn.Parameter | Tensor | None = None) -> Linear4bit:
        """A layer over an existing packed 2-D weight, sharing its memory."""
        if len(packed.shape) != 2:
            raise ValueError(f"a Linear weight has two dimensions; got shape {list(packed.shape)}")
        rows, columns = packed.shape
        layer = cls(columns, rows, False, packed.spec, float_dtype=packed.dtype, device="meta", flat=packed.flat)
        layer.weight = _frozen(packed.codes)
        layer.weight_absmax = _frozen(_as_bits(packed.absmax))
        if packed.absmax_scale is not None and packed.absmax_offset is not None:
            layer.weight_absmax_scale = _frozen(_as_bits(packed.absmax_scale))
            layer.weight_absmax_offset = _frozen(_as_bits(packed.absmax_offset))
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else _frozen(bias)
        return layer

    def packed(self) -> PackedTensor:
        """The weight as a value, sharing this layer's memory."""
        scale, offset = self.weight_absmax_scale, self.weight_absmax_offset
        return PackedTensor(
            codes=self.weight.detach(),
            absmax=_as_float(self.weight_absmax),
            absmax_scale=None if scale is None else _as_float(scale),
            absmax_offset=None if offset is None else _as_float(offset),
            spec=self.spec,
            shape=(self.out_features, self.in_features),
            dtype=self.float_dtype,
            flat=self.flat,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a float tensor (out, in), in ``float_dtype`` unless another is asked for."""
        return dequantize(self.packed(), dtype)

    @property
    def flat(self) -> bool:
        """Whether the blocks of the weight run over the ends of its rows."""
        return self._operator_product.flat

    @property
    def W_q(self) -> Tensor:
        """The packed codes, under the name that PEFT's DoRA path looks for."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """x of shape (..., in), float32, bfloat16 or float16 (under autocast its type) -> (..., out) in that type."""
        if torch.compiler.is_compiling():
            return self._multiply(x, self.bias)
        known = self._product.known
        if known is not None and self.paged is None:
            # Few tokens on a device, all as it was at the last call. The names are looked up there: nn.Module's own way
            # to attributes takes as long as a launch.
            plain: Tensor | None = known.plain_linear(x, self._parameters)
            if plain is not None:
                return plain
        if forward_ad._current_level >= 0:
            primal, tangent = forward_ad.unpack_dual(x)
            if tangent is not None:  # which operators would drop without a word
                y, slope = self._multiply(primal, self.bias), self._multiply(tangent, None)
                dual: Tensor = forward_ad.make_dual(y, slope)
                return dual
        return self._multiply(x, self.bias)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        parts = self.parts()
        paged = self.paged
        if paged is not None and paged.holds(parts):
            return paged(x, bias)
        if not self.flat and direct.applies(x):
            product = self._product(x, parts, bias)
            if product is not None:
                return product
        return self._operator_product(x, parts, bias)

    def fused_with_adapter(self, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor | None:
        """``x W^T + b + scaling x A^T B^T``, the sum rounded once, or None where no kernel does both at once.

        That is on a CUDA device, for few tokens in bfloat16 or float16, where no gradient is wanted.
        """
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cuda") or not direct.applies(x):
            return None
        parts, paged = self.parts(), self.paged
        if paged is not None and paged.holds(parts):
            return paged.with_adapter(x, self.bias, a, b, scaling)
        if self.flat:
            return None
        return self._product.with_adapter(x, parts, self.bias, a, b, scaling)

    @property
    def compute_device(self) -> torch.device:
        """Where products are made: a paged weight comes to the pool's device, any other one stays where it is."""
        return self.weight.device if self.paged is None else self.paged.device

    def paged_in(self, block: PagedBlock, number: int) -> PagedProduct:
        """This layer's product over the weight of that number in a block, for `page`."""
        return PagedProduct(block, number, self.in_features, self.spec, self._operator_product)

    def page(self, paged: PagedProduct | None, device: torch.device | None = None) -> None:
        """Let the weight live in a pool, which holds a copy of it; None: copy it out into memory of ``device``."""
        for name, part in zip(_PACKED, self.parts() if paged is None else paged.parts, strict=True):
            if part is not None and paged is None:
                part = _frozen(part.detach().to(device or part.device, copy=True))
            assert part is None or isinstance(part, nn.Parameter)
            self._parameters[name] = part
        self.paged = paged

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        """Moves and casts leave what is paged where it is."""
        if self.paged is None:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        bias = self._parameters["bias"]
        packed = self._parameters
        self._parameters = {"bias": bias}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            bias, self._parameters = self._parameters["bias"], packed
            self._parameters["bias"] = bias
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loading writes to parameters in place: copies take it, and then the pool what is new."""
        paged = self.paged
        if paged is None:
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        self.page(None)
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
            loaded = self.parts()
            pairs = zip(loaded, paged.parts, strict=True)
            if any(new is not None and old is not None and not torch.equal(new.cpu(), old) for new, old in pairs):
                paged.write(loaded)
        finally:
            self.page(paged)

    def parts(self) -> direct.Parts:
        """The packed parameters: codes, absmax, and of a doubly quantized weight its scales and offset."""
        return self.weight, self.weight_absmax, self.weight_absmax_scale, self.weight_absmax_offset

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles look their memory up anew, and are not paged."""
        return {**self.__dict__, "_product": direct.FrozenProduct(self.in_features, self.spec), "paged": None}

    def reset_parameters(self) -> None:
        """Nothing to draw: a packed weight is loaded or quantized, never initialised."""

    def extra_repr(self) -> str:
        """``in_features=..., out_features=..., bias=..., nf4, block_size=64, double_quant=True``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.spec.describe()}{', flat' if self.flat else ''}"
        )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _as_bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor


def _as_float(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.view(torch.float32) if detached.dtype == torch.int32 else detached
