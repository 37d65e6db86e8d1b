"""Adapters in PEFT's file format (`adapter_config.json`, `adapter_model.safetensors`): save, read, load."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from qlora_rs.checkpoint.folder import naming, replacing
from qlora_rs.checkpoint.source import read_json
from qlora_rs.errors import FormatError, UnsupportedError
from qlora_rs.lora import AttachReport, LoraLinear, attach_to, lora_modules

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LARGEST = 3.4e38  # of float32, in which the adapter is scaled

# Fields of PEFT's LoraConfig that do not change what a stored adapter computes.
# fmt: off
_INERT_FIELDS = frozenset((
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "megatron_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
))
# fmt: on
_READ_FIELDS = frozenset(("bias", "init_lora_weights", "lora_alpha", "lora_dropout", "peft_type", "r", "use_rslora"))
# Ways to start that leave the base as it is. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it too: the stored A
# and B belong to that changed base.
_BASE_KEEPING = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def save_adapter(model: nn.Module, path: str | os.PathLike[str], *, base_model_name_or_path: str | None = None) -> None:
    """Write the model's adapters as PEFT's two files into the folder ``path`` (made if it is not there).

    Args:
        model: a model that went through `attach_lora` or `load_adapter`.
        path: folder; the two files in it are replaced once both new ones are whole.
        base_model_name_or_path: recorded for PEFT; by default what the model says of itself.

    Raises:
        ValueError: the model has no adapters, or they differ in their settings.
        OSError: the system failed; files that were there before stay.
    """
    layers = lora_modules(model)
    if not layers:
        raise ValueError("the model has no adapters to save; call attach_lora first")
    settings = {(layer.r, layer.lora_alpha, layer.lora_dropout, layer.use_rslora) for layer in layers.values()}
    if len(settings) > 1:
        raise ValueError(
            "the adapters differ in (r, lora_alpha, lora_dropout, use_rslora), which one file cannot hold: "
            f"{', '.join(map(str, sorted(settings)))}"
        )
    r, lora_alpha, lora_dropout, use_rslora = settings.pop()
    if base_model_name_or_path is None:
        base_model_name_or_path = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    config = {
        "base_model_name_or_path": base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "target_modules": _target_modules(model, list(layers)),
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "use_dora": False,
        "use_rslora": use_rslora,
    }
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS_FILE, folder / CONFIG_FILE) as (weights, settings_file):
        with naming(weights):
            # Not by save_file, whose files only their owner may read.
            weights.write_bytes(save(tensors, metadata={"format": "pt"}))
        with naming(settings_file):
            settings_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapter(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """Read an adapter folder without a model.

    Returns:
        The configuration as stored (defaults filled in), and per layer its float32 A (r, in) and B (out, r).

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        FormatError: a file is damaged, or its tensors do not fit the configuration.
        UnsupportedError: the adapter uses a feature that plain LoRA does not have (DoRA, trained biases, ...).
    """
    folder = Path(path)
    if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise UnsupportedError(
            f"{folder / 'adapter_model.bin'}: a pickle, which can run any code, is not read; load it with PEFT and "
            "save it again as safetensors"
        )
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(errno.ENOENT, "is missing: not an adapter folder", str(folder / file))
    config = _read_config(folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise FormatError(f"{weights}: not a whole safetensors file: {error}") from None
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, part = _split_key(key, weights)
        if not tensor.is_floating_point():
            raise FormatError(f"{weights}: {key}: expected a float tensor, got {tensor.dtype}")
        halves.setdefault(name, {})[part] = tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise FormatError(f"{weights}: {key} holds NaN or infinite values")
    pairs = {}
    for name, parts in sorted(halves.items()):
        if len(parts) != 2:
            raise FormatError(f"{weights}: {name} has lora_{next(iter(parts))} but not its other half")
        a, b = parts["A"], parts["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != config["r"] or b.shape[1] != config["r"]:
            raise FormatError(
                f"{weights}: {name}: expected A [r, in] and B [out, r] with r = {config['r']}, "
                f"got {list(a.shape)} and {list(b.shape)}"
            )
        pairs[name] = (a, b)
    if not pairs:
        raise FormatError(f"{weights} holds no adapter tensors")
    return config, pairs


def adapter_delta(config: Mapping[str, Any], pair: tuple[Tensor, Tensor]) -> Tensor:
    """``(alpha / r) B A`` in float32, shape (out, in), of what `read_adapter` returned: see `LoraLinear.delta`."""
    a, b = pair
    r = config["r"]
    scaling: float = config["lora_alpha"] / (math.sqrt(r) if config["use_rslora"] else r)
    return (b @ a) * scaling


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> AttachReport:
    """Put a stored adapter on a model, ready for inference or further training.

    A model without adapters gets them on exactly the layers that the file names. One that has them must have them on
    the same layers with the same rank and scaling, and takes over the values; it keeps its own ``lora_dropout``,
    which says how to train on, not what the adapter computes. On an error the model is as it was before.

    Raises:
        FileNotFoundError, FormatError, UnsupportedError: see `read_adapter`; also where the file names a layer that
            the model does not have as a Linear of that shape.
        ValueError: the model's existing adapters have another rank or scaling, or sit on other layers.
    """
    config, pairs = read_adapter(path)
    existing = lora_modules(model)
    _check_existing(existing, config, pairs, path)
    modules = dict(model.named_modules())
    for name, (a, b) in pairs.items():
        target = modules.get(name)
        if not isinstance(target, nn.Linear | LoraLinear):
            what = "has none" if target is None else f"has a {type(target).__name__}"
            raise FormatError(
                f"{path}: {name} should be a Linear layer, but the model {what}; is this adapter for another model?"
            )
        if (b.shape[0], a.shape[1]) != (target.out_features, target.in_features):
            raise FormatError(
                f"{path}: {name}: the adapter is for a weight of [{b.shape[0]}, {a.shape[1]}], "
                f"the model's is [{target.out_features}, {target.in_features}]; is this adapter for another model?"
            )
    if existing:
        report = AttachReport.of(model)
    else:
        report = attach_to(
            model,
            list(pairs),
            config["r"],
            config["lora_alpha"],
            config["lora_dropout"],
            config["use_rslora"],
            # First values are drawn only to be replaced: torch's own random state stays as it is.
            generator=torch.Generator(),
        )
    with torch.no_grad():
        for name, layer in lora_modules(model).items():
            layer.lora_A.copy_(pairs[name][0])
            layer.lora_B.copy_(pairs[name][1])
    return report


def _check_existing(
    existing: Mapping[str, LoraLinear],
    config: Mapping[str, Any],
    pairs: Mapping[str, Any],
    path: str | os.PathLike[str],
) -> None:
    for name, layer in existing.items():
        for key in ("r", "lora_alpha", "use_rslora"):
            if getattr(layer, key) != config[key]:
                raise ValueError(
                    f"{path}: {key} is {config[key]}, but the model's adapter on {name} has {getattr(layer, key)}; "
                    "load it onto a model without adapters"
                )
    if existing and set(existing) != set(pairs):
        only_file, only_model = sorted(set(pairs) - set(existing)), sorted(set(existing) - set(pairs))
        raise ValueError(
            f"{path}: adapters of other layers than the model's: only in the file {only_file[:3]}, "
            f"only in the model {only_model[:3]}; load it onto a model without adapters"
        )


def _target_modules(model: nn.Module, attached: list[str]) -> list[str]:
    """Last components where they select exactly the attached layers (PEFT matches suffixes), else full names."""
    suffixes = {name.rpartition(".")[2] for name in attached}
    # Of modules of any type: PEFT refuses to load where a name selects one that takes no adapter.
    selected = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in suffixes}
    return sorted(suffixes if selected == set(attached) else attached)


def _read_config(file: Path) -> dict[str, Any]:
    config = read_json(file)
    if not isinstance(config, dict):
        raise FormatError(f"{file}: expected a JSON object, got {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"{file}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be read")
    config = {"use_rslora": False, "lora_dropout": 0.0, "bias": "none", **config}
    _check_features(config, file)
    r, alpha, dropout = config.get("r"), config.get("lora_alpha"), config["lora_dropout"]
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise FormatError(f"{file}: r is a positive integer; got {r!r}")
    if not _is_number(alpha) or not 0 < alpha < _LARGEST:
        raise FormatError(f"{file}: lora_alpha is a positive, finite number; got {alpha!r}")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise FormatError(f"{file}: lora_dropout is a number in [0, 1); got {dropout!r}")
    if not isinstance(config["use_rslora"], bool):
        raise FormatError(f"{file}: use_rslora is true or false; got {config['use_rslora']!r}")
    return config


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_features(config: Mapping[str, Any], file: Path) -> None:
    if config["bias"] != "none":
        raise UnsupportedError(f"{file}: bias is {config['bias']!r}; adapters with trained biases cannot be read")
    start = config.get("init_lora_weights")
    if start not in _BASE_KEEPING:
        raise UnsupportedError(
            f"{file}: init_lora_weights is {start!r}, which may have changed the base too; convert the adapter to "
            "plain LoRA in PEFT (path_initial_model_for_weight_conversion) first"
        )
    used = [
        f"{key}={value!r}"
        for key, value in config.items()
        if value and key not in _INERT_FIELDS and key not in _READ_FIELDS
    ]
    if used:
        raise UnsupportedError(f"{file}: only plain LoRA can be read; this adapter also uses {', '.join(used)}")


def _split_key(key: str, file: Path) -> tuple[str, str]:
    for part in ("A", "B"):
        suffix = f".lora_{part}.weight"
        if key.startswith(_PREFIX) and key.endswith(suffix):
            return key[len(_PREFIX) : -len(suffix)], part
    raise UnsupportedError(f"{file}: cannot use the tensor {key!r}; expected {_PREFIX}<layer>.lora_A.weight or lora_B")
