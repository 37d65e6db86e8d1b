"""Models as transformers builds them, with its silences turned into errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from qlora_rs.checkpoint.source import read_config
from qlora_rs.errors import FormatError, first_line


def model_class(transformers: Any, folder: Path) -> Any:
    """The class that ``config.json`` names, or that of causal language models."""
    named: list[Any] = [
        getattr(transformers, str(name), None) for name in read_config(folder).get("architectures") or ()
    ]
    return next((cls for cls in named if hasattr(cls, "from_pretrained")), transformers.AutoModelForCausalLM)


def concrete_class(cls: Any, config: Any) -> Any:
    """The class that an automatic one stands for, which finds it by a folder alone."""
    mapping = getattr(cls, "_model_mapping", None)
    return mapping[type(config)] if mapping is not None and type(config) in mapping else cls


def generation_config(transformers: Any, path: str) -> Any:
    """How a folder's model generates text, by the file for it or by ``config.json``."""
    try:
        return transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
    except OSError:  # some folders have it in config.json
        return transformers.GenerationConfig.from_pretrained(
            path, config_file_name="config.json", local_files_only=True
        )


def build(cls: Any, path: str | None, dtype: torch.dtype, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model of ``dtype`` and what transformers says of its loading; without a path from what the options hold."""
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
def errors_as_ours(transformers: Any, folder: Path, quantization: Any | None) -> Iterator[None]:
    """transformers quiet, and its errors as ours: FormatError, or what failed in the quantizer."""
    try:
        with quiet(transformers):
            yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        failures = getattr(quantization, "failures", None)
        if failures:
            raise failures[0] from None
        raise FormatError(
            f"{folder}: transformers {transformers.__version__} cannot load it: {first_line(error)}"
        ) from error


def check_whole(folder: Path, model: nn.Module, info: dict[str, Any]) -> None:
    """Raise FormatError for weights that no file holds as the model wants them; warn of those that it does not want.

    ``info`` is what `build` said.
    """
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


def cast_stored(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what the files hold.

    NOTE: not ``model.to(dtype)``: what a model computes for itself, as rotary embeddings do their frequencies, has the
    type that it needs, and loading leaves it in.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
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


def name_after(model: Any, path: str) -> None:
    """Tell a model its folder, which transformers was not told."""
    for module in model.modules():
        if hasattr(module, "name_or_path"):
            module.name_or_path = module.config.name_or_path = path
