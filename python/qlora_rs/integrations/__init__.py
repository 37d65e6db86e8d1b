"""Other libraries' extension points. Each module here imports its library, so nothing imports them at start-up.

`register_when_imported` puts the packed format into transformers whichever of the two packages is imported first.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, cast

# Once this module of transformers has run, quantizers can be registered.
_REGISTRY = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Register the packed format with transformers: now if it is loaded, else right after it is."""
    if _REGISTRY in sys.modules:
        importlib.import_module("qlora_rs.integrations.transformers")
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport:
    """Finds the registry as Python would, and registers when it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = cast(Any, _Registering(spec.loader, self))
        return spec


class _Registering:
    def __init__(self, loader: Any, finder: _AfterImport) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        importlib.import_module("qlora_rs.integrations.transformers")
