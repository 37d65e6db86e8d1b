"""What a run needs to go on as if it had not stopped: one file, so that its parts always belong together.

Order of samples and dropout need no record: both are drawn anew from the seed and the number of the step.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from qlora_rs.checkpoint.folder import replacing
from qlora_rs.checkpoint.gguf_source import is_gguf_file
from qlora_rs.checkpoint.source import CONFIG
from qlora_rs.errors import FormatError, UnsupportedError
from qlora_rs.lora import lora_modules
from qlora_rs.train.optimizer import state_shapes

STATE_FILE = "training_state.safetensors"
_FORMAT = 1
_SAMPLED, _SAMPLE_BYTES = 64, 1 << 14


@dataclass(frozen=True)
class TrainingState:
    """A run after some step.

    Attributes:
        step: steps done.
        settings: everything that the numbers of the run depend on, by the name that the user knows it by.
        log_bytes: length of the log.
        evaluated: the step after which the held-out loss was last measured; -1 for none.
        tensors: A and B of every layer, and the optimizer's state.
    """

    step: int
    settings: dict[str, Any]
    log_bytes: int
    evaluated: int
    tensors: dict[str, Tensor]


def save_state(path: Path, state: TrainingState) -> None:
    """Write the file; an earlier one stays until the new one is whole."""
    about = {
        "step": state.step,
        "settings": state.settings,
        "log_bytes": state.log_bytes,
        "evaluated": state.evaluated,
    }
    metadata = {"qlora_rs_training_state": str(_FORMAT), "run": json.dumps(about)}
    with replacing(path) as (partial,):
        # Not by save_file: where the disk is full it raises what does not look like the system's error.
        partial.write_bytes(save(state.tensors, metadata=metadata))


def read_state(path: Path) -> TrainingState:
    """Read the file.

    Raises:
        FormatError: it is damaged, or of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise FormatError(f"{path}: not a whole safetensors file ({error}): start anew with --overwrite") from None
    version = metadata.get("qlora_rs_training_state")
    if version != str(_FORMAT):
        raise FormatError(
            f"{path}: expected the state of a run, version {_FORMAT}; got version {version!r}: start anew with "
            "--overwrite"
        )
    try:
        about = json.loads(metadata["run"])
        step, log_bytes, evaluated = (int(about[key]) for key in ("step", "log_bytes", "evaluated"))
        settings = dict(about["settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: its metadata is damaged ({error}): start anew with --overwrite") from None
    return TrainingState(step, settings, log_bytes, evaluated, tensors)


def check_same_run(saved: Mapping[str, Any], asked: Mapping[str, Any], path: Path) -> None:
    """Refuse to resume what was another run.

    Raises:
        UnsupportedError: settings differ; each is named.
    """
    # As the file holds them: a tuple comes back as a list.
    asked = json.loads(json.dumps(asked))
    differing = [key for key in {**saved, **asked} if saved.get(key) != asked.get(key)]
    if differing:
        parts = [_difference(key, saved.get(key), asked.get(key)) for key in differing]
        raise UnsupportedError(
            f"{path} is of another run, so going on would not give what either would have given: {'; '.join(parts)}. "
            "Give the same settings, or start anew with --overwrite or another --output"
        )


def capture(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adapters and optimizer as named tensors."""
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_modules(model).items():
        tensors[f"lora.{name}.A"] = layer.lora_A.detach()
        tensors[f"lora.{name}.B"] = layer.lora_B.detach()
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            tensors[f"optimizer.{index}.{key}"] = value
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put captured tensors back.

    Raises:
        FormatError: they are of other layers or shapes, or some are missing.
    """
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in lora_modules(model).items():
        parameters |= {f"lora.{name}.A": layer.lora_A, f"lora.{name}.B": layer.lora_B}
    expected = {name: parameter.shape for name, parameter in parameters.items()}
    if any(name.startswith("optimizer.") for name in tensors):  # there is none before the first step
        for index, parameter in enumerate(parameters.values()):
            shapes = state_shapes(optimizer, parameter)
            expected |= {f"optimizer.{index}.{key}": shape for key, shape in shapes.items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = sorted(name for name in {**expected, **found} if expected.get(name) != found.get(name))
    if wrong:
        raise FormatError(
            f"{path}: is not the state of this model's adapters: {wrong[0]} should be "
            f"{_shape(expected.get(wrong[0]))}, is {_shape(found.get(wrong[0]))}: start anew with --overwrite"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def model_digest(model: Path) -> str:
    """Tells models apart: of config.json, and of each weight file its name, size, start and places in it. A GGUF file
    is all of that.

    Not of every byte, as that would take longer than loading; another model differs at each place that is read.
    """
    folder = not is_gguf_file(model)
    digest = hashlib.sha256((model / CONFIG).read_bytes() if folder else b"")
    for path in sorted(model.glob("*.safetensors")) if folder else [model]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            for part in range(_SAMPLED):
                file.seek(size * part // _SAMPLED, os.SEEK_SET)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _difference(key: str, saved: Any, asked: Any) -> str:
    if key.startswith("--"):
        return f"{key} was {saved}, now {asked}"
    return f"{key} has changed"
