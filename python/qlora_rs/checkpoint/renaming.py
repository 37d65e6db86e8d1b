"""From the names in files to those in a transformers model, as its loader goes."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn


class Renamer:
    """Renames tensors of a folder to parameters of ``model``.

    Attributes:
        converters: transformers' objects that make parameters of several tensors, or of parts of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._state = model.state_dict()
        self._prefix = str(getattr(model, "base_model_prefix", "") or "")
        self.converters: list[Any] = []
        self._rename: Any = None
        try:
            loading = importlib.import_module("transformers.core_model_loading")
            mapping = importlib.import_module("transformers.conversion_mapping")
            transforms = mapping.get_model_conversion_mapping(model)
            self._renamings = [each for each in transforms if isinstance(each, loading.WeightRenaming)]
            self.converters = [each for each in transforms if isinstance(each, loading.WeightConverter)]
            self._rename = loading.rename_source_key
        except (ImportError, AttributeError, TypeError):
            self.converters = []  # older or newer than these internals: plain names still match

    def may_be_turned(self, name: str) -> bool:
        """Whether transformers takes a stack of matrices as (in, out), too, telling by its shape (Qwen3-VL's)."""
        turning = (
            each for each in self.converters if [*map(_operation, each.operations)] == [("Transpose", {1, 2}, True)]
        )
        return any(each.rename_source_key(name)[1] is not None for each in turning)

    def rename(self, name: str) -> tuple[str, str | None]:
        """The model's name for it, and the pattern by which transformers makes a parameter of it and others, if so."""
        candidates = (name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}."))
        plain = next((candidate for candidate in candidates if candidate in self._state), None)
        if plain is not None or self._rename is None:
            return plain or name, None
        new, pattern = self._rename(name, self._renamings, self.converters, self._prefix, self._state)
        return str(new), None if pattern is None else str(pattern)


def _operation(operation: Any) -> tuple[str, set[int | None], bool]:
    dimensions = {getattr(operation, "dim0", None), getattr(operation, "dim1", None)}
    return type(operation).__name__, dimensions, bool(getattr(operation, "check_dims", False))
