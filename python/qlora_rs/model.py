"""Whole models: load a packed one, quantize one on the way in, or in memory."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from qlora_rs import ops
from qlora_rs.checkpoint.choice import FLOAT_DTYPES as FLOAT_DTYPE_NAMES
from qlora_rs.checkpoint.choice import choose_tensors
from qlora_rs.checkpoint.dequantized import open_float_source
from qlora_rs.checkpoint.flat import METHOD as FLAT_METHOD
from qlora_rs.checkpoint.gguf_source import round_kept
from qlora_rs.checkpoint.inspection import PackedLayout, inspect
from qlora_rs.checkpoint.placing import DeviceFolder, packed_parts
from qlora_rs.checkpoint.source import (
    Source,
    find_quantization_config,
    open_source,
    read_config,
    require_folder,
    require_model,
)
from qlora_rs.checkpoint.weights import TensorReader
from qlora_rs.devices import resolve_device
from qlora_rs.errors import FormatError, NonFiniteError, UnsupportedError, first_line, require_extra
from qlora_rs.experts import (
    BIASES,
    FUSED,
    PackedExperts,
    has_biases,
    is_experts,
    logical_shape,
    quantize_transposed,
    why_not_packed,
)
from qlora_rs.linear import Linear4bit
from qlora_rs.lora import replace_module
from qlora_rs.packed import FLOAT_DTYPES, PackedTensor
from qlora_rs.quantization import quantize
from qlora_rs.report import PackedEntry, QuantizeReport, SkippedEntry
from qlora_rs.selection import matches, select_linear
from qlora_rs.spec import QuantSpec


def from_pretrained(
    path: str | os.PathLike[str],
    spec: QuantSpec | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
) -> Any:
    """Load a model folder with its Linear layers packed, in evaluation mode.

    A packed folder, of this library or of bitsandbytes in 4 bits, is loaded as it is, byte for byte. A folder in 16 or
    32 bits is quantized on the way in, weight by weight, to the bytes that `checkpoint.quantize` writes: memory never
    holds more than one float weight beside them. So are the values of one that GPTQ, AWQ or compressed-tensors (packed
    integers) quantized, and of a GGUF file; the errors of both add up.

    Args:
        path: a model folder (``config.json``, safetensors), or a GGUF file of a Llama, Qwen2 or Qwen3 model.
        spec: how to quantize; NF4 in doubly quantized blocks of 64 by default. For a packed folder None, or what it
            was packed with.
        dtype: of everything that stays in floats, and of the arithmetic. ``"auto"``: bfloat16 where the device
            computes it fast, else float32 (a CUDA device: float16).
        device: the CPU, or one CUDA device (``"cuda"`` is torch's current one; ``"auto"`` that, or the CPU where there
            is none). There a packed file's bytes go straight to the device, and float weights are quantized on it, one
            at a time.

    Returns:
        The transformers model that ``config.json`` names.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        FormatError: a file is damaged, or weights are missing or have other shapes than the model.
        NonFiniteError: a weight that has to be quantized holds NaN or Inf.
        UnsupportedError: transformers is not installed or does not know the model, the folder is quantized by another
            library, or the device has no kernels.
        DeviceError: there is no such device, or its driver fails.
        ValueError: ``spec`` is not what the folder was packed with, or ``dtype`` is no float type.

    >>> model = from_pretrained("SmolLM2-135M-nf4")  # doctest: +SKIP
    """
    folder = Path(path)
    require_model(folder)
    place = resolve_device(device)
    target = resolve_dtype(dtype, place)
    info = inspect(folder)
    transformers = require_extra("transformers", "transformers", "loading a model")
    from qlora_rs.integrations.transformers import QloraRsConfig

    # transformers fuses experts while it loads them: what is packed has to be placed past it.
    has_experts = any(".experts." in row.name for row in info.tensors)
    if info.spec is not None:
        if spec is not None and spec != info.spec:
            raise ValueError(f"{folder} is packed as {info.spec.describe()}; it cannot be loaded as {spec.describe()}")
        if info.format == FLAT_METHOD or (has_experts and not _is_placed_from_files(transformers, folder, place)):
            return _load_packed(transformers, folder, target, info.spec, place)
        return _load(transformers, folder, target, None, place)
    if info.seen_in_floats or (has_experts and info.config is None):
        return _load_quantizing(transformers, folder, target, QuantSpec() if spec is None else spec, place)
    if info.config is not None:
        known = f"{folder}: is quantized by {info.format!r}; start from the 16-bit model"
        raise UnsupportedError(info.unread or known)
    asked = QloraRsConfig.of(QuantSpec() if spec is None else spec)
    # In the type of the files (or float32, which holds all of them), so that exactly their values are quantized; what
    # stays in floats is cast afterwards.
    stored = {FLOAT_DTYPE_NAMES[row.dtype] for row in info.tensors if row.dtype in FLOAT_DTYPE_NAMES}
    loaded = getattr(torch, stored.pop() if len(stored) == 1 else "float32")
    model = _load(transformers, folder, loaded, asked, place)
    _cast(model, target)
    return model


def quantize_model(
    model: nn.Module,
    spec: QuantSpec | None = None,
    skip_modules: Sequence[str] | None = None,
    *,
    include: Sequence[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> QuantizeReport:
    """Replace the Linear layers of a model in memory by packed ones, in place, and transformers' fused experts by
    `qlora_rs.experts.PackedExperts`, which hold a packed layer for each.

    Args:
        model: any module; what is neither, is packed already, or shares its weight with another module stays.
        spec: NF4 in doubly quantized blocks of 64 by default.
        skip_modules: patterns (full name, last component or glob) of layers, and modules of experts, that stay besides
            output heads and routers.
        include: patterns of layers that are packed although the defaults would leave them.
        progress: called with (bytes done, bytes in all) of the float weights.

    Raises:
        ValueError: a pattern matches no layer, or nothing is left to pack.
        NonFiniteError: a weight holds NaN or Inf (named); the model is then as it was before.
        UnsupportedError: a layer's weight has a type or device that cannot be quantized.
    """
    spec = QuantSpec() if spec is None else spec
    fused, skipped_experts, skip_linear = _fused_experts(model, skip_modules or ())
    selection = select_linear(model, skip_modules=skip_linear, include=include)
    reasons = {**dict(selection.skipped), **skipped_experts}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    layers: dict[str, nn.Linear] = {}
    for name in selection.packed:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        others = [other for other in owners[id(layer.weight)] if other != f"{name}.weight"]
        if isinstance(layer, Linear4bit):
            reasons[name] = "packed already"
        elif others:
            reasons[name] = f"shares its weight with {others[0]}"
        else:
            layers[name] = layer
    if not layers and not fused:
        raise ValueError("nothing to pack: the model has no Linear layer that could be")
    weights = {f"{name}.weight": layer.weight for name, layer in layers.items()}
    weights |= {f"{name}.{part}": each.get_parameter(part) for name, each in fused.items() for part in FUSED}
    _check_weights(weights)
    chosen = (*layers, *fused)
    before = _bytes(model)
    entries, biases = [], []
    done, total = 0, sum(weight.nbytes for weight in weights.values())
    weights.clear()
    for name in tuple(layers):
        layer = layers.pop(name)  # so that its float weight is freed before the next is packed
        packed = Linear4bit.from_float(layer, spec).train(layer.training)
        replace_module(model, name, packed)
        size, dtype = layer.weight.nbytes, str(layer.weight.dtype).removeprefix("torch.")
        shape = tuple(layer.weight.shape)
        after = packed.packed().nbytes
        entries.append(PackedEntry(f"{name}.weight", shape, dtype, spec.describe(), size, after))
        done += size
        if progress is not None:
            progress(done, total)
    for name in tuple(fused):
        module = fused.pop(name)
        experts = PackedExperts.from_float(module, spec)
        replace_module(model, name, experts)
        for part in FUSED:
            weight = module.get_parameter(part)
            after = sum(cast(Linear4bit, cast(nn.ModuleDict, each)[part]).packed().nbytes for each in experts)
            dtype, shape = str(weight.dtype).removeprefix("torch."), logical_shape(module, part)
            entries.append(PackedEntry(f"{name}.{part}", shape, dtype, spec.describe(), weight.nbytes, after))
            if has_biases(module):
                bias = BIASES[part]
                biases.append(SkippedEntry(f"{name}.{bias}", "bias", module.get_parameter(bias).nbytes))
            done += weight.nbytes
        if progress is not None:
            progress(done, total)
    if "transformers" in sys.modules:
        from qlora_rs.integrations.transformers import adopt

        adopt(model, spec, [name for name in reasons if name not in skipped_experts])
    kept = (*_kept(model, chosen, reasons), *biases)
    return QuantizeReport(tuple(entries), kept, before, _bytes(model))


def _fused_experts(
    model: nn.Module, skip: Sequence[str]
) -> tuple[dict[str, nn.Module], dict[str, str], list[str] | None]:
    """The modules of experts to pack, why the others stay, and the patterns of ``skip`` that mean Linear layers."""
    fused: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    used: set[str] = set()
    for name, module in model.named_modules():
        if is_experts(module):
            by = next((pattern for pattern in skip if matches(name, pattern)), None)
            reason = why_not_packed(module) if by is None else f"matches the skip pattern {by!r}"
            used.update(pattern for pattern in skip if matches(name, pattern))
            if reason is None:
                fused[name] = module
            else:
                reasons[name] = reason
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    left = [pattern for pattern in skip if pattern not in used or any(matches(name, pattern) for name in linears)]
    return fused, reasons, left or None


def _check_weights(weights: Mapping[str, torch.Tensor]) -> None:
    """Everything that could fail, before the first layer is replaced."""
    for name, weight in weights.items():
        if weight.dtype not in FLOAT_DTYPES or weight.device.type not in ops.DEVICES:
            raise UnsupportedError(
                f"{name} is {weight.dtype} on {weight.device}; float32, bfloat16 and float16 on "
                f"{', '.join(ops.DEVICES)} can be quantized: move or cast the model, or skip the layer"
            )
        # The extremes are NaN where one value is, and take no memory as a mask would.
        if not weight.is_meta and weight.numel() and not torch.isfinite(torch.stack(torch.aminmax(weight))).all():
            bad = (~torch.isfinite(weight)).flatten()
            raise NonFiniteError(
                f"{name} holds {int(bad.sum())} NaN or infinite value(s), the first at flat index "
                f"{int(bad.int().argmax())}; mend the weight, or skip the layer"
            )


def _kept(model: nn.Module, packed: Sequence[str], reasons: dict[str, str]) -> tuple[SkippedEntry, ...]:
    entries = []
    experts = tuple(f"{name}." for name in packed if isinstance(model.get_submodule(name), PackedExperts))
    for name, parameter in model.named_parameters():
        module_name, _, leaf = name.rpartition(".")
        if (module_name in packed and leaf != "bias") or name.startswith(experts):
            continue
        kind = "bias" if leaf == "bias" else f"{type(model.get_submodule(module_name)).__name__}: not a Linear layer"
        reason = reasons.get(module_name) if leaf != "bias" else None
        entries.append(SkippedEntry(name, reason or kind, parameter.nbytes))
    return tuple(entries)


def _bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def load_float(
    path: str | os.PathLike[str], dtype: torch.dtype | str = "auto", device: torch.device | str | None = None
) -> Any:
    """Load a folder in 16 or 32 bits as it is, in evaluation mode; arguments and errors as `from_pretrained`."""
    folder = Path(path)
    require_folder(folder)
    place = resolve_device(device)
    target = resolve_dtype(dtype, place)
    open_source(folder)  # headers and index are checked before transformers sees them
    return _load(require_extra("transformers", "transformers", "loading a model"), folder, target, None, place)


def resolve_dtype(dtype: torch.dtype | str, device: torch.device | None = None) -> torch.dtype:
    """The type that ``dtype`` stands for; ``"auto"`` is the one that ``device`` (this machine) computes fast in."""
    if dtype == "auto":
        if device is not None and device.type == "cuda":
            return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        return torch.bfloat16 if fast else torch.float32
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if named not in FLOAT_DTYPES:
        raise ValueError(f"dtype is 'auto', float32, bfloat16 or float16; got {dtype!r}")
    assert isinstance(named, torch.dtype)
    return named


def _load(transformers: Any, folder: Path, dtype: torch.dtype, quantization: Any | None, device: torch.device) -> Any:
    """Through transformers, with its silences turned into errors."""
    from qlora_rs.integrations.transformers import METHOD

    cls = _model_class(transformers, folder)
    method = (find_quantization_config(read_config(folder)) or {}).get("quant_method", METHOD)
    if method == METHOD and _is_placed_from_files(transformers, folder, device):
        return _load_onto(transformers, cls, folder, dtype, quantization, device)
    options = {} if quantization is None else {"quantization_config": quantization}
    with _errors(transformers, folder, quantization):
        model, info = _build(cls, str(folder), dtype, use_safetensors=True, **options)
    _check_whole(folder, model, info)
    return model.to(device)


def _model_class(transformers: Any, folder: Path) -> Any:
    """The class that ``config.json`` names, or that of causal language models."""
    named: list[Any] = [
        getattr(transformers, str(name), None) for name in read_config(folder).get("architectures") or ()
    ]
    return next((cls for cls in named if hasattr(cls, "from_pretrained")), transformers.AutoModelForCausalLM)


def _is_placed_from_files(transformers: Any, folder: Path, device: torch.device) -> bool:
    """Whether the tensors of the files go straight to their places on a device, past transformers' loader."""
    return device.type != "cpu" and getattr(_model_class(transformers, folder), "config_class", None) is not None


def _concrete(cls: Any, config: Any) -> Any:
    """The class that an automatic one stands for, which finds it by a folder alone."""
    mapping = getattr(cls, "_model_mapping", None)
    return mapping[type(config)] if mapping is not None and type(config) in mapping else cls


def _load_packed(transformers: Any, folder: Path, dtype: torch.dtype, spec: QuantSpec, device: torch.device) -> Any:
    """A packed model, bitsandbytes' as a native one: transformers builds it, and gets only what is not packed."""
    from qlora_rs.integrations.transformers import QloraRsConfig, fill_awaited

    source = open_source(folder)
    reader = TensorReader(source)
    info = inspect(folder)
    for row in info.packed:
        reader.require_packed(row.name)  # what cannot be taken over is told before the model is built
    kept = {row.name: reader.stored(row.name) for row in info.tensors if row.kind == "kept"}
    with _errors(transformers, folder, None):
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        files = [str(folder / file) for file in source.files]
        config.quantization_config = {**QloraRsConfig.of(spec).to_dict(), "files": files}
        generation = _generation_config(transformers, str(folder))
        cls = _concrete(_model_class(transformers, folder), config)
        model, loading = _build(cls, None, dtype, config=config, state_dict=kept, generation_config=generation)
    _check_whole(folder, model, loading)
    fill_awaited(model, lambda name, shape, float_dtype: reader.packed(name, shape, spec, float_dtype))
    _name_after(model, str(folder))
    return model.to(device)


def _load_quantizing(transformers: Any, folder: Path, dtype: torch.dtype, spec: QuantSpec, device: torch.device) -> Any:
    """A model whose weights are quantized each when its layer is filled: from values of another library's codes, or
    stored ones.
    """
    from qlora_rs.integrations.transformers import QloraRsConfig, fill_awaited

    source = open_float_source(folder)
    config_folder = source.config_folder()
    with _quiet(transformers):
        choice = choose_tensors(source)
    source, _ = round_kept(source, choice.packed)
    reader = TensorReader(source)
    awaited = set(choice.packed)
    kept = {name: reader.stored(name) for name in source.tensors if name not in awaited}
    with _errors(transformers, folder, None):
        config = transformers.AutoConfig.from_pretrained(
            str(config_folder), local_files_only=True, trust_remote_code=False
        )
        transposed = set(choice.transposed)
        layouts = {
            name: PackedLayout(choice.packed_shape(source.tensors[name]), flat=False, transposed=name in transposed)
            for name in choice.packed
        }
        config.quantization_config = {**QloraRsConfig.of(spec).to_dict(), "awaited": layouts}
        generation = _generation_config(transformers, str(config_folder))
        cls = _concrete(_model_class(transformers, config_folder), config)
        model, loading = _build(cls, None, dtype, config=config, state_dict=kept, generation_config=generation)
    _check_whole(folder, model, loading)

    def packed(name: str, shape: tuple[int, ...], float_dtype: torch.dtype) -> PackedTensor:
        try:
            pack = quantize_transposed if name in transposed else quantize
            return replace(pack(reader.stored(name).to(device), spec), dtype=float_dtype)
        except NonFiniteError as error:
            raise NonFiniteError(f"{folder / source.tensors[name].file}: {name}: {error}") from None

    fill_awaited(model, packed)
    _name_after(model, str(folder))
    return model.to(device)


def _name_after(model: Any, path: str) -> None:
    """Tell a model its folder, which transformers was not told."""
    for module in model.modules():
        if hasattr(module, "name_or_path"):
            module.name_or_path = module.config.name_or_path = path


def _load_onto(
    transformers: Any, cls: Any, folder: Path, dtype: torch.dtype, quantization: Any | None, device: torch.device
) -> Any:
    """A model on a CUDA device: transformers gives the tensors of the files their places, and reads few of them.

    Packed weights, and floats that stay as they are, are fetched while it builds the model; what has to be quantized it
    hands to the quantizer, which works on the device.
    """
    from qlora_rs.integrations.transformers import fill_awaited

    source, path, local = open_source(folder), str(folder), {"local_files_only": True}
    packed = find_quantization_config(source.config)
    same = [] if quantization is not None else _stored_as(source, dtype)
    with DeviceFolder(source, device, [*packed_parts(source), *same]) as tensors:
        with _errors(transformers, folder, quantization):
            config = cls.config_class.from_pretrained(path, **local)
            options: dict[str, Any] = {}
            if quantization is not None:
                quantization.device = device
                options["quantization_config"] = quantization
            elif packed is not None:
                config.quantization_config = {**packed, "files": [str(folder / file) for file in source.files]}
            options["generation_config"] = _generation_config(transformers, path)
            try:
                model, info = _build(cls, None, dtype, config=config, state_dict=tensors.mapped, **options)
            finally:
                if quantization is not None:
                    quantization.device = None
        _check_whole(folder, model, info)
        if packed is not None:
            spec = QuantSpec.from_config(packed)
            fill_awaited(model, lambda name, shape, float_dtype: tensors.packed(name, shape, spec, float_dtype))
        tensors.place(model)
    _name_after(model, path)
    return model


def _stored_as(source: Source, dtype: torch.dtype) -> list[str]:
    """Names of the float tensors that the files hold in ``dtype``."""
    return [
        tensor.name
        for tensor in source.tensors.values()
        if tensor.dtype in FLOAT_DTYPE_NAMES and getattr(torch, FLOAT_DTYPE_NAMES[tensor.dtype]) == dtype
    ]


def _generation_config(transformers: Any, path: str) -> Any:
    try:
        return transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
    except OSError:  # some folders have it in config.json
        return transformers.GenerationConfig.from_pretrained(
            path, config_file_name="config.json", local_files_only=True
        )


def _build(cls: Any, path: str | None, dtype: torch.dtype, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model and what transformers says of its loading; without a path from what the options hold."""
    model, info = cls.from_pretrained(
        path,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they are told to us; they are no more welcome
        **options,
    )
    _cast_renamed(model, dtype)
    return model, info


def _cast_renamed(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what some versions of transformers forget where a file calls it otherwise, as routers of Mixtral."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    in_float32 = {*(getattr(model, "_keep_in_fp32_modules", None) or ()), *strict}
    for name, parameter in model.named_parameters():
        other = parameter.is_floating_point() and parameter.dtype != dtype
        if other and not in_float32.intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)


@contextmanager
def _errors(transformers: Any, folder: Path, quantization: Any | None) -> Iterator[None]:
    """transformers quiet, and its errors as ours."""
    try:
        with _quiet(transformers):
            yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        failures = getattr(quantization, "failures", None)
        if failures:
            raise failures[0] from None
        raise FormatError(
            f"{folder}: transformers {transformers.__version__} cannot load it: {first_line(error)}"
        ) from error


def _check_whole(folder: Path, model: nn.Module, info: dict[str, Any]) -> None:
    """Raise for weights that no file holds as the model wants them, and warn of those that it does not want."""
    missing = sorted(set(info["missing_keys"]))
    mismatched = {
        name: f"{name} is {list(stored)} in the files and {list(expected)} in the model"
        for name, stored, expected in info["mismatched_keys"]
    }
    absent = [name for name in missing if name not in mismatched]
    if absent or mismatched:
        first = absent[0] if absent else next(iter(mismatched.values()))
        raise FormatError(
            f"{folder}: {len(absent)} weights of {type(model).__name__} are in none of its files, {len(mismatched)} "
            f"have another shape ({first}): config.json is of another model, or a file is missing"
        )
    unexpected = sorted(set(info["unexpected_keys"]))
    if unexpected:
        warnings.warn(
            f"{folder}: {len(unexpected)} tensors are no parameters of {type(model).__name__} and were left out, "
            f"e.g. {unexpected[0]}",
            stacklevel=4,
        )


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what the files hold.

    NOTE: not ``model.to(dtype)``: what a model computes for itself, as rotary embeddings do their frequencies, has the
    type that it needs, and loading leaves it in.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' progress bars and its table of what did not fit, which becomes an error of ours."""
    logging = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
