"""How large a model ``config.json`` claims, held against what its files hold before transformers builds it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any

from qlora_rs.errors import FormatError

# More than any known model has, and few enough to build in seconds.
_MANY_LAYERS = 1000
_MANY_PARAMETERS = 20_000
# A name is made for each while the config is read; ImageNet has 21,843.
_MANY_LABELS = 100_000

# num_hidden_layers, num_decoder_layers, encoder_layers, n_layer
_LAYERS = re.compile(r".*layers|n_layer")


def require_believable(where: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Raise FormatError where ``config`` counts more layers or labels than any model whose files hold ``tensors``.

    transformers makes all of them, some while it reads the config, and a file of a few bytes would keep it at that for
    hours.

    Args:
        where: the file, for messages.
        config: what it holds.
        tensors: how many the model's files hold.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            require_believable(where, value, tensors)
        elif isinstance(value, int):
            layers = _LAYERS.fullmatch(name) and value > max(_MANY_LAYERS, tensors)
            if layers or (name == "num_labels" and value > _MANY_LABELS):
                raise FormatError(f"{where}: {name} is {value}, but the files hold {tensors} tensors")


@contextmanager
def bounded_parameters(where: Path, tensors: int) -> Iterator[None]:
    """Raise FormatError as soon as a model that is built meanwhile has far more parameters than files hold tensors.

    Whatever a config calls its layers, blocks and experts.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    most, found, builder = max(_MANY_PARAMETERS, 4 * tensors), 0, get_ident()

    def count(*registered: object) -> None:
        nonlocal found
        found += get_ident() == builder  # torch calls it for what other threads build, too
        if found > most:
            raise FormatError(f"{where}: asks for more than {most} parameters, but the files hold {tensors} tensors")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
