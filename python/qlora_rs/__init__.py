"""QLoRA: quantize a model's weights to 4 bits, pack them, and fine-tune through LoRA adapters.

>>> import torch, qlora_rs
>>> packed = qlora_rs.quantize(torch.ones(2, 64))
>>> qlora_rs.dequantize(packed).shape
torch.Size([2, 64])

The public names are those of `_exports`. They are loaded when first asked for: torch takes seconds to import, for which
`qlora-rs --help` need not wait, and a Ctrl-C meanwhile has to find code that answers it.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from qlora_rs._core import __version__ as __version__
from qlora_rs.integrations import register_when_imported

if TYPE_CHECKING:
    from qlora_rs._exports import *  # noqa: F403
    from qlora_rs._exports import __all__ as __all__
else:  # unseen by type checkers, for which a module's __getattr__ would make every name valid

    def __getattr__(name):
        public = not name.startswith("_")
        # NOTE: modules first. Python asks here too when one of ours imports another from the package, and the exports
        # may be what it is loading.
        if public and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        if public or name == "__all__":
            exports = importlib.import_module(f"{__name__}._exports")
            if name in (*exports.__all__, "__all__"):
                value = globals()[name] = getattr(exports, name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})


register_when_imported()
