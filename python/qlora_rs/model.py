"""Whole models from folders: load a packed one, or quantize one on the way in."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qlora_rs.checkpoint.choice import FLOAT_DTYPES as FLOAT_DTYPE_NAMES
from qlora_rs.checkpoint.choice import choose_tensors
from qlora_rs.checkpoint.claims import require_believable
from qlora_rs.checkpoint.dequantized import open_float_source
from qlora_rs.checkpoint.flat import METHOD as FLAT_METHOD
from qlora_rs.checkpoint.gguf_source import round_kept
from qlora_rs.checkpoint.inspection import PackedLayout, inspect
from qlora_rs.checkpoint.placing import DeviceFolder, packed_parts
from qlora_rs.checkpoint.source import (
    CONFIG,
    Source,
    find_quantization_config,
    open_source,
    read_config,
    require_folder,
    require_model,
)
from qlora_rs.checkpoint.weights import TensorReader
from qlora_rs.devices import resolve_device
from qlora_rs.errors import NonFiniteError, UnsupportedError, require_extra
from qlora_rs.experts import quantize_transposed
from qlora_rs.model_building import (
    build,
    cast_stored,
    check_whole,
    concrete_class,
    errors_as_ours,
    generation_config,
    model_class,
    name_after,
    quiet,
)
from qlora_rs.packed import FLOAT_DTYPES, PackedTensor
from qlora_rs.quantization import quantize
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
    if folder.is_dir():
        require_believable(folder / CONFIG, read_config(folder), len(info.tensors))
    transformers = require_extra("transformers", "transformers", "loading a model")
    from qlora_rs.integrations.transformers import QloraRsConfig

    # transformers fuses experts while it loads them: what is packed has to be placed past it. Some files call stacks of
    # them by other names (Granite's).
    has_experts = any(".experts." in row.name or len(row.shape) == 3 for row in info.tensors)
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
    cast_stored(model, target)
    return model


def load_float(
    path: str | os.PathLike[str], dtype: torch.dtype | str = "auto", device: torch.device | str | None = None
) -> Any:
    """Load a folder in 16 or 32 bits as it is, in evaluation mode; arguments and errors as `from_pretrained`."""
    folder = Path(path)
    require_folder(folder)
    place = resolve_device(device)
    target = resolve_dtype(dtype, place)
    source = open_source(folder)  # headers and index are checked before transformers sees them
    require_believable(folder / CONFIG, source.config, len(source.tensors))
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

    cls = model_class(transformers, folder)
    method = (find_quantization_config(read_config(folder)) or {}).get("quant_method", METHOD)
    if method == METHOD and _is_placed_from_files(transformers, folder, device):
        return _load_onto(transformers, cls, folder, dtype, quantization, device)
    options = {} if quantization is None else {"quantization_config": quantization}
    with errors_as_ours(transformers, folder, quantization):
        model, info = build(cls, str(folder), dtype, use_safetensors=True, **options)
    check_whole(folder, model, info)
    return model.to(device)


def _is_placed_from_files(transformers: Any, folder: Path, device: torch.device) -> bool:
    """Whether the tensors of the files go straight to their places on a device, past transformers' loader."""
    return device.type != "cpu" and getattr(model_class(transformers, folder), "config_class", None) is not None


def _load_packed(transformers: Any, folder: Path, dtype: torch.dtype, spec: QuantSpec, device: torch.device) -> Any:
    """A packed model, bitsandbytes' as a native one: transformers builds it, and gets only what is not packed."""
    from qlora_rs.integrations.transformers import QloraRsConfig, fill_awaited

    source = open_source(folder)
    reader = TensorReader(source)
    info = inspect(folder)
    for row in info.packed:
        reader.require_packed(row.name)  # what cannot be taken over is told before the model is built
    kept = {row.name: reader.stored(row.name) for row in info.tensors if row.kind == "kept"}
    with errors_as_ours(transformers, folder, None):
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        files = [str(folder / file) for file in source.files]
        config.quantization_config = {**QloraRsConfig.of(spec).to_dict(), "files": files}
        generation = generation_config(transformers, str(folder))
        cls = concrete_class(model_class(transformers, folder), config)
        model, loading = build(cls, None, dtype, config=config, state_dict=kept, generation_config=generation)
    check_whole(folder, model, loading)
    fill_awaited(model, lambda name, shape, float_dtype: reader.packed(name, shape, spec, float_dtype))
    name_after(model, str(folder))
    return model.to(device)


def _load_quantizing(transformers: Any, folder: Path, dtype: torch.dtype, spec: QuantSpec, device: torch.device) -> Any:
    """A model whose weights are quantized each when its layer is filled: from values of another library's codes, or
    stored ones.
    """
    from qlora_rs.integrations.transformers import QloraRsConfig, fill_awaited

    source = open_float_source(folder)
    config_folder = source.config_folder()
    with quiet(transformers):
        choice = choose_tensors(source)
    source, _ = round_kept(source, choice.packed)
    reader = TensorReader(source)
    awaited = set(choice.packed)
    kept = {name: reader.stored(name) for name in source.tensors if name not in awaited}
    with errors_as_ours(transformers, folder, None):
        config = transformers.AutoConfig.from_pretrained(
            str(config_folder), local_files_only=True, trust_remote_code=False
        )
        transposed = set(choice.transposed)
        layouts = {
            name: PackedLayout(choice.packed_shape(source.tensors[name]), flat=False, transposed=name in transposed)
            for name in choice.packed
        }
        config.quantization_config = {**QloraRsConfig.of(spec).to_dict(), "awaited": layouts}
        generation = generation_config(transformers, str(config_folder))
        cls = concrete_class(model_class(transformers, config_folder), config)
        model, loading = build(cls, None, dtype, config=config, state_dict=kept, generation_config=generation)
    check_whole(folder, model, loading)

    def packed(name: str, shape: tuple[int, ...], float_dtype: torch.dtype) -> PackedTensor:
        try:
            pack = quantize_transposed if name in transposed else quantize
            return replace(pack(reader.stored(name).to(device), spec), dtype=float_dtype)
        except NonFiniteError as error:
            raise NonFiniteError(f"{folder / source.tensors[name].file}: {name}: {error}") from None

    fill_awaited(model, packed)
    name_after(model, str(folder))
    return model.to(device)


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
        with errors_as_ours(transformers, folder, quantization):
            config = cls.config_class.from_pretrained(path, **local)
            options: dict[str, Any] = {}
            if quantization is not None:
                quantization.device = device
                options["quantization_config"] = quantization
            elif packed is not None:
                config.quantization_config = {**packed, "files": [str(folder / file) for file in source.files]}
            options["generation_config"] = generation_config(transformers, path)
            try:
                model, info = build(cls, None, dtype, config=config, state_dict=tensors.mapped, **options)
            finally:
                if quantization is not None:
                    quantization.device = None
        check_whole(folder, model, info)
        if packed is not None:
            spec = QuantSpec.from_config(packed)
            fill_awaited(model, lambda name, shape, float_dtype: tensors.packed(name, shape, spec, float_dtype))
        tensors.place(model)
    name_after(model, path)
    return model


def _stored_as(source: Source, dtype: torch.dtype) -> list[str]:
    """Names of the float tensors that the files hold in ``dtype``."""
    return [
        tensor.name
        for tensor in source.tensors.values()
        if tensor.dtype in FLOAT_DTYPE_NAMES and getattr(torch, FLOAT_DTYPE_NAMES[tensor.dtype]) == dtype
    ]
