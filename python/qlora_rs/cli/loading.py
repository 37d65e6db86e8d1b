"""What commands work with, loaded: a model folder, packed or not, its tokenizer, an adapter; texts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from qlora_rs.cli import output


@dataclass(frozen=True)
class LoadedModel:
    """What a command works with.

    Attributes:
        model: a transformers causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        description: how its weights are held, for people.
    """

    model: Any
    tokenizer: Any
    description: str


def load_model(path: Path, adapter: Path | None = None, dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """Load a packed folder, or one in 16 bits as it is (not quantized), and say on stderr which.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder, or no adapter in ``adapter``.
        FormatError: a file is damaged, or weights are missing.
        UnsupportedError: transformers is not installed or does not know the model; no causal language model; no
            tokenizer.
        ValueError: ``dtype`` is no float type.
        DeviceError: there is no such device.
    """
    from qlora_rs.adapters import load_adapter, read_adapter
    from qlora_rs.checkpoint import inspect
    from qlora_rs.checkpoint.source import require_model
    from qlora_rs.devices import resolve_device
    from qlora_rs.errors import UnsupportedError
    from qlora_rs.model import from_pretrained, load_float
    from qlora_rs.spec import QuantSpec

    require_model(path)
    place = resolve_device(device)
    info = inspect(path)
    if adapter is not None:
        read_adapter(adapter)  # what is wrong with it should be said before a large model is loaded, not after
    transformers = quiet_transformers("running a model")
    with warnings_as_messages():
        tokenizer = load_tokenizer(transformers, path)
        if info.format == "float":
            model, held = load_float(path, dtype, place), "not packed: used as it is, without quantizing"
        else:
            model = from_pretrained(path, dtype=dtype, device=place)
            held = f"packed as {info.spec.describe()}" if info.spec is not None else info.format
            if info.seen_in_floats:
                held = (
                    f"{info.format} ({'; '.join(info.schemes) or 'floats'}), quantized anew as {QuantSpec().describe()}"
                )
        if getattr(model, "get_output_embeddings", lambda: None)() is None or not hasattr(model, "generate"):
            raise UnsupportedError(f"{path}: {type(model).__name__} is no causal language model")
        if adapter is not None:
            load_adapter(model, adapter)
    model.eval()
    arithmetic = str(model.dtype).removeprefix("torch.")
    with_adapter = "" if adapter is None else f", with the adapter {adapter}"
    output.message(f"{path}: {held}{with_adapter}; arithmetic in {arithmetic} on {place}")
    return LoadedModel(model, tokenizer, held)


def read_text(path: Path) -> str:
    """A text file in UTF-8 that is not empty.

    Raises:
        FormatError: it is something else.
    """
    from qlora_rs.errors import FormatError

    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path}: is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); convert it first, "
            "e.g. with iconv"
        ) from None
    if not content.strip():
        raise FormatError(f"{path}: is empty")
    return content


def text_tokens(tokenizer: Any, content: str, path: Path, most: int | None) -> list[int]:
    """The first tokens of a text that was read from ``path``, at least two.

    Raises:
        ValueError: there are fewer.
    """
    tokens: list[int] = tokenizer(content).input_ids[:most]
    if len(tokens) < 2:
        raise ValueError(f"{path}: gives {len(tokens)} token(s); at least 2 are needed")
    return tokens


def quiet_transformers(purpose: str) -> ModuleType:
    """The package, without its own progress bars and log lines: a command's stderr is for what the user should know.

    Raises:
        UnsupportedError: it is not installed.
    """
    from qlora_rs.errors import require_extra

    # Models are folders here; without this some versions ask the hub for optional files.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = require_extra("transformers", "transformers", purpose)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@contextmanager
def warnings_as_messages() -> Iterator[None]:
    """Print warnings for the user as plain messages, and drop those for developers of other libraries."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield
    for text in dict.fromkeys(str(each.message) for each in caught if issubclass(each.category, UserWarning)):
        output.message(f"note: {text}")


def load_tokenizer(transformers: ModuleType, path: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        UnsupportedError: it has none that transformers can load.
    """
    from qlora_rs.checkpoint.gguf_source import is_gguf_file, open_gguf
    from qlora_rs.errors import UnsupportedError, first_line

    source = open_gguf(path) if is_gguf_file(path) else None  # what it makes is there as long as it lives
    folder = path if source is None else source.companions_folder()
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer's own code raises for files that it cannot use
        raise UnsupportedError(f"{path}: has no tokenizer that transformers can load: {first_line(error)}") from None
