"""The packed format as a transformers quantizer: `quant_method: qlora_rs` loads, saves, and quantizes on the way in.

NOTE: transformers imports its quantizers while it is itself being imported, and this module with them: only what is
loaded by then may be imported here at the top.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_rs import ops
from qlora_rs.checkpoint.expert_names import StoredExperts, stored_experts
from qlora_rs.checkpoint.inspection import PackedLayout, packed_layouts
from qlora_rs.checkpoint.source import FORMAT_VERSION, Source, StoredTensor, check_format_version, read_file
from qlora_rs.errors import FormatError, QloraError, UnsupportedError
from qlora_rs.experts import BIASES, DOWN, PackedExperts, has_biases, split_experts
from qlora_rs.integrations.saving import SavedStacks, conversions_of, replace_conversions
from qlora_rs.linear import Linear4bit
from qlora_rs.lora import replace_module
from qlora_rs.packed import PackedTensor
from qlora_rs.quantization import quantize
from qlora_rs.selection import HEADS, select_linear
from qlora_rs.spec import QuantSpec

METHOD = "qlora_rs"


@register_quantization_config(METHOD)
class QloraRsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of a packed model.

    Args:
        quant_type, block_size, double_quant, codebook: see `QuantSpec`.
        modules_to_not_convert: patterns of Linear layers that stay besides the defaults.
        format_version: of the files.
        files: where to see what is packed, for a model that is not loaded from a folder: its packed layers are left
            out, to be filled by `fill_awaited`.
        awaited: the same as names and layouts, where no file holds the weights packed.

    Attributes:
        failures: errors of quantizing while loading, which transformers itself reports as text only.
        device: where weights are quantized while loading, one at a time; None: where transformers puts them.

    Raises:
        FormatError: a field holds what no version of the format allows.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        codebook: Sequence[float] | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        format_version: int = FORMAT_VERSION,
        files: Sequence[str] = (),
        awaited: Mapping[str, PackedLayout] | None = None,
        **kwargs: Any,
    ) -> None:
        check_format_version(format_version, "quantization_config")
        self.quant_method = METHOD
        self.quant_type = quant_type
        self.block_size = block_size
        self.double_quant = double_quant
        self.codebook = None if codebook is None else list(codebook)
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.format_version = format_version
        self.files = list(files)
        self.awaited = dict(awaited or {})
        self.failures: list[Exception] = []
        self.device: torch.device | None = None
        self.spec()

    @classmethod
    def of(cls, spec: QuantSpec, modules_to_not_convert: Sequence[str] = ()) -> QloraRsConfig:
        """The configuration of models that are packed as ``spec`` says."""
        return cls(**spec.to_config(), modules_to_not_convert=modules_to_not_convert)

    def spec(self) -> QuantSpec:
        """How the weights are quantized."""
        return QuantSpec.from_config(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it."""
        fields = {**self.spec().to_config(), "modules_to_not_convert": list(self.modules_to_not_convert)}
        return {"quant_method": METHOD, **fields, "format_version": self.format_version}


@register_quantizer(METHOD)
class QloraRsQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps Linear layers for `Linear4bit`, and quantizes float weights while they are loaded."""

    requires_calibration = False

    def __init__(self, quantization_config: QloraRsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.spec = quantization_config.spec()
        self.has_adapters = False
        # Undoes what `get_state_dict_and_metadata` changed in the model.
        self._restore: Callable[[nn.Module], None] | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse devices that have no kernels, before anything is loaded."""
        device_map = kwargs.get("device_map")
        if device_map is None or isinstance(device_map, str):
            return  # "auto" and the like: torch knows of no device here that it could pick in vain
        for device in device_map.values():
            require_device(device)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """The tensors of the modules are those of the file."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Through adapters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """What Trainer asks of models without PEFT's own classes; `attach_lora` makes it true."""
        return self.has_adapters

    @property
    def is_compileable(self) -> bool:
        """The ops have fake implementations."""
        return True

    @property
    def quantized_element_size(self) -> float:
        """Bytes of a code."""
        return self.spec.bits / 8

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes of an element once it is loaded, for placing layers on devices."""
        if self.param_needs_quantization(model, param_name):
            return self.quantized_element_size
        return param.element_size()

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Is this the float weight of a layer that is to be packed?"""
        module_name, _, leaf = param_name.rpartition(".")
        return not self.pre_quantized and leaf == "weight" and isinstance(model.get_submodule(module_name), Linear4bit)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        files = kwargs.get("checkpoint_files")
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        asked = self.quantization_config
        if self.pre_quantized and not files and (asked.files or asked.awaited):
            layouts = asked.awaited or _layouts_in_files(asked.files, self.spec)
            folder = Path(asked.files[0]).parent if asked.files else Path()
            experts = _packed_experts(model, layouts, folder)
            awaited = _packed_layers(model, layouts, folder, experts)
            for name, weight in awaited.items():
                replace_module(model, name, AwaitedLayer(model.get_submodule(name), weight))
            for name, held in experts.items():
                replace_module(model, name, AwaitedExperts(model.get_submodule(name), held))
            packed = list(awaited)
        else:
            flat: set[str] = set()
            if self.pre_quantized and files:
                layouts = _layouts_in_files(files, self.spec)
                folder = Path(files[0]).parent
                experts = _packed_experts(model, layouts, folder)
                if experts:
                    raise UnsupportedError(
                        f"{folder}: the experts of {next(iter(experts))} are packed; transformers' own from_pretrained "
                        "cannot place them: load the folder with qlora_rs.from_pretrained"
                    )
                stored = _packed_layers(model, layouts, folder)
                packed = list(stored)
                flat = {name for name in packed if layouts[stored[name]].flat}
            else:
                skip = self.quantization_config.modules_to_not_convert
                packed = list(select_linear(model, skip_modules=skip or None).packed)
            for name in packed:
                linear = model.get_submodule(name)
                replace_module(model, name, _empty_layer(linear, self.spec, self.pre_quantized, name in flat))
        stays = [name for name in linears if name not in set(packed)]
        self.quantization_config.modules_to_not_convert = stays
        return model

    def get_quantize_ops(self) -> Any:
        """What turns a float weight into codes and scales."""
        return _pack_operation()(self)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors where they are not saved as the model has them, and what a file has to say of packed weights."""
        if self.has_adapters:
            raise UnsupportedError(
                "the model has adapters, which save_pretrained would mix into the base's files: save them with "
                "qlora_rs.save_adapter (and give Trainer save_strategy='no'), or merge them first"
            )
        self.restore_conversions(model)
        stacks = SavedStacks(model)
        if not stacks:
            return None, stacks.remarks()
        state, remarks = stacks.state(), stacks.remarks()
        self._restore = replace_conversions(model, stacks.conversions)
        return state, remarks

    def restore_conversions(self, model: Any) -> None:
        """Let transformers take fused weights apart again when it saves the model, as it does for those in floats."""
        if self._restore is not None:
            self._restore(model)
            self._restore = None

    def give_back(self, model: Any, stacks: Sequence[str]) -> None:
        """Let transformers save a model that is in floats again, and ``stacks`` that it has not loaded itself."""
        self.restore_conversions(model)
        if stacks:
            replace_conversions(model, conversions_of(model, stacks))

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # What save_pretrained leaves in the config is the type's name.
        target: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.restore_conversions(model)
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedExperts):
                replace_module(model, name, module.fused(methodcaller("dequantize", target)))
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear4bit):
                linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(module.dequantize(target), requires_grad=False)
                linear.bias = module.bias
                replace_module(model, name, linear.train(module.training))
        return model


def adopt(model: nn.Module, spec: QuantSpec, stays: Sequence[str]) -> None:
    """Tell a transformers model whose layers were packed in memory, so that it can be saved and loaded again."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        return
    quantization = QloraRsConfig.of(spec, stays)
    quantizer = QloraRsQuantizer(quantization, pre_quantized=True)
    config.quantization_config = quantization
    attributes = {"hf_quantizer": quantizer, "is_quantized": True, "quantization_method": METHOD}
    for name, value in attributes.items():
        setattr(model, name, value)


def require_device(device: object) -> None:
    """Raise unless there are kernels for ``device``; parts may also be offloaded to the disk."""
    name = "cuda" if isinstance(device, int) else str(device)
    if name != "disk" and torch.device(name).type not in ops.DEVICES:
        raise UnsupportedError(f"no kernels for {device!r}: this version computes on {', '.join(ops.DEVICES)}")


def _layouts_in_files(files: Sequence[str], spec: QuantSpec) -> dict[str, PackedLayout]:
    """Names and shapes of the weights that the files hold packed; they are the truth, not config.json."""
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, dict[str, str]] = {}
    for file in map(Path, files):
        stored, metadata[file.name] = read_file(file.parent, file.name)
        tensors |= {tensor.name: tensor for tensor in stored}
    return packed_layouts(Source(Path(files[0]).parent, {}, tuple(metadata), tensors, metadata), spec)


def _packed_experts(model: Any, layouts: Mapping[str, PackedLayout], folder: Path) -> dict[str, StoredExperts]:
    """The model's modules of experts whose weights are among those with ``layouts``."""
    found = stored_experts(layouts, model, str(folder))
    for held in found.values():
        for names in held.names.values():
            if isinstance(names, str) and layouts[names].flat:
                raise UnsupportedError(
                    f"{folder}: the experts in {names!r} share blocks or scales, as bitsandbytes packs them: no code "
                    "computes with single ones; `qlora-rs convert --to bf16` dequantizes them"
                )
    return found


def _packed_layers(
    model: Any,
    layouts: Mapping[str, PackedLayout],
    folder: Path,
    experts: Mapping[str, StoredExperts] | None = None,
) -> dict[str, str]:
    """The model's Linear layers whose weights are among those with ``layouts``, and the weights' names there.

    Those of ``experts`` are not looked for.
    """
    of_experts = {name for held in (experts or {}).values() for name in held.all_names()}
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    parameters = dict(model.named_parameters())
    packed = {}
    for name in sorted(set(layouts) - of_experts):
        candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        found = next((candidate for candidate in candidates if candidate in parameters), None)
        if found is None:
            if HEADS.intersection(name.split(".")):
                continue  # this class has another head, or none
            raise FormatError(
                f"{folder}: {type(model).__name__} has no parameter for the packed weight {name!r}: "
                "config.json is of another model, or this class needs other weights"
            )
        module_name, _, leaf = found.rpartition(".")
        owner = model.get_submodule(module_name)
        if leaf != "weight" or not isinstance(owner, nn.Linear):
            raise UnsupportedError(
                f"{name} is packed, but belongs to a {type(owner).__name__}: only Linear layers compute in 4 bits; "
                "quantize the model again without --include for it"
            )
        shape = layouts[name].shape
        if shape != tuple(owner.weight.shape):
            raise FormatError(
                f"{folder}: the packed weight {name!r} has shape {list(shape)}, but config.json asks for "
                f"{list(owner.weight.shape)}: it is of another model"
            )
        packed[module_name] = name
    return packed


class AwaitedLayer(nn.Module):
    """Stands for a packed layer, and holds its bias, while transformers loads everything else.

    Attributes:
        stored: the name of the weight in the files.
        shape: of the weight.
        float_dtype: what the layer computes in.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, stored: str) -> None:
        super().__init__()
        self.stored = stored
        self.shape = (linear.out_features, linear.in_features)
        self.float_dtype = linear.weight.dtype
        self.register_parameter("bias", linear.bias)


class AwaitedExperts(nn.Module):
    """Stands for a module of packed experts, and holds their biases, while transformers loads everything else.

    Attributes:
        stored: what the files hold of it.
        float_dtype: what its layers compute in.
    """

    def __init__(self, fused: nn.Module, stored: StoredExperts) -> None:
        super().__init__()
        self.__dict__["_fused"] = fused
        self.stored = stored
        self.float_dtype = fused.get_parameter(DOWN).dtype
        for bias in BIASES.values() if has_biases(fused) else ():
            self.register_parameter(bias, fused.get_parameter(bias))

    def bias(self, child: str, number: int) -> Tensor | None:
        """The bias of one layer, in memory of its own."""
        if not has_biases(self.fused):
            return None
        return self.get_parameter(BIASES[child])[number].detach().clone()

    @property
    def fused(self) -> nn.Module:
        """The module itself; it is no member, since its weights are not to be loaded."""
        fused: nn.Module = self.__dict__["_fused"]
        return fused


def fill_awaited(model: nn.Module, packed: Callable[[str, tuple[int, ...], torch.dtype], PackedTensor]) -> None:
    """Put `Linear4bit` where layers are awaited; ``packed`` gives the weights by name, shape and float type."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AwaitedExperts):
            replace_module(model, name, _filled_experts(module, packed))
        if isinstance(module, AwaitedLayer):
            layer = Linear4bit.from_packed(packed(module.stored, module.shape, module.float_dtype), module.bias)
            replace_module(model, name, layer.train(module.training))


def _filled_experts(
    awaited: AwaitedExperts, packed: Callable[[str, tuple[int, ...], torch.dtype], PackedTensor]
) -> PackedExperts:
    stored, dtype = awaited.stored, awaited.float_dtype
    columns: dict[str, list[PackedTensor]] = {}
    for child, names in stored.names.items():
        shape = stored.shapes[child]
        if isinstance(names, str):
            columns[child] = split_experts(packed(names, (stored.count, *shape), dtype))
        else:
            columns[child] = [packed(name, shape, dtype) for name in names]
    experts = [
        {
            child: Linear4bit.from_packed(weights[number], awaited.bias(child, number))
            for child, weights in columns.items()
        }
        for number in range(stored.count)
    ]
    return PackedExperts.of(awaited.fused, experts).train(awaited.training)


def _empty_layer(linear: nn.Linear, spec: QuantSpec, pre_quantized: bool, flat: bool) -> Linear4bit:
    """A layer on the meta device, to be filled from the file."""
    dtype = linear.weight.dtype
    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        spec,
        float_dtype=dtype,
        device="meta",
        flat=flat,
    )
    if not pre_quantized:
        # Loaders cast to the type and compare the shape of what stands here: it has to look like the file's tensor.
        layer.weight = nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)
    return layer


@cache
def _pack_operation() -> type:
    from transformers.core_model_loading import ConversionOps

    class PackWeight(ConversionOps):  # type: ignore[misc]
        """Quantizes one weight; transformers' loader finds the quantizer under the name ``hf_quantizer``."""

        def __init__(self, hf_quantizer: QloraRsQuantizer) -> None:
            self.hf_quantizer = hf_quantizer

        def convert(
            self, input_dict: dict[str, Any], *, model: Any = None, missing_keys: Any = None, **kwargs: Any
        ) -> dict[str, nn.Parameter]:
            result: dict[str, nn.Parameter] = {}
            for name, value in input_dict.items():
                weight = value[0] if isinstance(value, list) else value
                owner = model.get_submodule(name.rpartition(".")[0])
                try:
                    if tuple(weight.shape) != (owner.out_features, owner.in_features):
                        expected = [owner.out_features, owner.in_features]
                        raise FormatError(f"the file has shape {list(weight.shape)}, the model {expected}")
                    # The float weight is dropped at once: the device never holds two.
                    weight = weight.to(self.hf_quantizer.quantization_config.device or weight.device)
                    layer = Linear4bit.from_packed(quantize(weight, self.hf_quantizer.spec))
                    del weight
                except (QloraError, ValueError, TypeError, torch.OutOfMemoryError) as error:
                    self.hf_quantizer.quantization_config.failures.append(type(error)(f"{name}: {error}"))
                    raise
                owner.float_dtype = layer.float_dtype
                for part, parameter in layer.named_parameters():
                    full = name.removesuffix("weight") + part
                    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
                    result[full] = parameter
                    if missing_keys is not None:
                        missing_keys.discard(full)
            return result

        @property
        def reverse_op(self) -> ConversionOps:
            """Saving keeps what is packed."""
            return _Unchanged()

    class _Unchanged(ConversionOps):  # type: ignore[misc]
        def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            return input_dict

        @property
        def reverse_op(self) -> ConversionOps:
            return self

    return PackWeight
