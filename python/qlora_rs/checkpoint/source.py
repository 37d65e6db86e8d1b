"""A Hugging Face model folder as input: config, safetensors files and the tensors in them, all checked."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from qlora_rs import _core
from qlora_rs.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from qlora_rs.checkpoint.foreign import ForeignWeight
    from qlora_rs.checkpoint.gguf_beside import Beside

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
GGUF_SUFFIX = ".gguf"

# Of the packed format; docs/format.md describes it.
FORMAT_VERSION = 1

# A JSON file beside the weights is read whole; the index of the largest models known takes some MB.
MAX_JSON_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it; ``dtype`` is safetensors' name, e.g. ``"BF16"``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str


@dataclass(frozen=True)
class Source:
    """An opened model folder. Only headers were read.

    Attributes:
        path: the folder.
        config: ``config.json``, keys in their order.
        files: names of the safetensors files, in reading order.
        tensors: by name, in the order of files and data.
        metadata: ``__metadata__`` of each file.
        foreign: those of the tensors that no file holds so, because another library quantized them (`as_float`).
        original: the folder as it is stored, where that differs.
        beside: of a GGUF file, what stands beside the weights in a folder.
    """

    path: Path
    config: dict[str, Any]
    files: tuple[str, ...]
    tensors: dict[str, StoredTensor]
    metadata: dict[str, dict[str, str]]
    foreign: Mapping[str, ForeignWeight] = field(default_factory=dict)
    original: Source | None = None
    beside: Beside | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the safetensors files."""
        return sum((self.path / file).stat().st_size for file in self.files)

    def config_folder(self) -> Path:
        """Where ``config.json`` is, for other libraries: `path`, or what a GGUF file's fields were written to."""
        return self.path if self.beside is None else self.beside.folder()

    def companions_folder(self) -> Path:
        """The same, with the tokenizer and all other files that go along with the weights."""
        return self.path if self.beside is None else self.beside.with_tokenizer()


def open_source(path: Path) -> Source:
    """Open a model folder.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder, or a file of it is missing.
        FormatError: a file is not what it says, or index and files disagree.
        UnsupportedError: the folder holds weights in another format only.
    """
    require_folder(path)
    config = read_config(path)
    files, weight_map = _find_files(path)
    tensors: dict[str, StoredTensor] = {}
    metadata = {}
    for file in files:
        stored, metadata[file] = read_file(path, file)
        for tensor in stored:
            if tensor.name in tensors:
                raise FormatError(
                    f"{path / file}: tensor {tensor.name!r} is also in {tensors[tensor.name].file}; "
                    "each tensor belongs in one file"
                )
            tensors[tensor.name] = tensor
    if weight_map is not None:
        _check_index(path, weight_map, tensors)
    return Source(path, config, files, tensors, metadata)


def require_folder(path: Path) -> None:
    """Raise unless ``path`` is an existing folder."""
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such model folder", str(path))
    if not path.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, "not a model folder (give the folder that holds config.json)", str(path)
        )


def require_model(path: Path) -> None:
    """Raise unless ``path`` is an existing folder, or a GGUF file."""
    if path.suffix != GGUF_SUFFIX or not path.is_file():
        require_folder(path)


def read_file(folder: Path, file: str) -> tuple[list[StoredTensor], dict[str, str]]:
    """Tensors (in the order of their data) and metadata of one safetensors file, from its header alone."""
    header = _core.read_header(str(folder / file))
    tensors = [
        StoredTensor(name, dtype, tuple(shape), end - start, file)
        for name, dtype, shape, start, end in header["tensors"]
    ]
    return tensors, header["metadata"]


def read_json(path: Path, *, unique: bool = False) -> Any:
    """A JSON file of bounded size; ``unique``: no name may occur twice in an object.

    Raises:
        FormatError: it is too large or no JSON; OSError from the system.
    """
    if not path.is_file():
        raise FormatError(f"{path}: not a regular file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise FormatError(f"{path}: {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read")
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=unique_names if unique else None)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON: {error}") from None


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``object_pairs_hook``: readers would disagree about which of two equal names counts.

    Raises:
        ValueError: a name occurs twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} occurs twice")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder."""
    path = folder / CONFIG
    if not path.is_file():
        raise FormatError(f"{folder}: there is no {CONFIG}, so this is not a Hugging Face model folder")
    config = read_json(path)
    if not isinstance(config, dict):
        raise FormatError(f"{path}: expected an object, got {type(config).__name__}")
    return config


def read_quantization_config(path: str | Path) -> dict[str, Any] | None:
    """The ``quantization_config`` in a model folder's ``config.json``; None where there is none.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        FormatError: ``config.json`` is missing or damaged.
    """
    folder = Path(path)
    require_folder(folder)
    return find_quantization_config(read_config(folder))


def expect_tensor(source: Source, file: str, name: str, dtype: str, shape: tuple[int, ...], what: str) -> StoredTensor:
    """The tensor ``name``, which has to be ``dtype`` of ``shape`` for ``what``, part of a weight in ``file``.

    Raises:
        FormatError: it is missing, or something else.
    """
    found = source.tensors.get(name)
    if found is None or (found.dtype, found.shape) != (dtype, shape):
        got = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise FormatError(
            f"{source.path / (file if found is None else found.file)}: tensor {name!r}: expected {dtype} "
            f"{list(shape)} for {what}, got {got}"
        )
    return found


def find_quantization_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ``quantization_config`` of a model, or of one of its parts (``text_config`` and the like)."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        found = part.get("quantization_config")
        if isinstance(found, dict):
            return found
    return None


def unquantized_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` without the quantization, its own keys in their order."""

    def kept(part: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in part.items() if key != "quantization_config"}

    return {key: kept(value) if isinstance(value, dict) else value for key, value in kept(config).items()}


def check_format_version(version: object, where: str) -> None:
    """Raise FormatError for a packed format that this version cannot read."""
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise FormatError(
            f"{where}: format_version is {version!r}, but this qlora_rs reads {FORMAT_VERSION}: update it"
        )


def _find_files(folder: Path) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """Names of the weight files, and the index if that is where they come from."""
    if (folder / SINGLE).exists():
        return (SINGLE,), None
    if (folder / INDEX).exists():
        weight_map = _read_weight_map(folder / INDEX)
        files = tuple(sorted(set(weight_map.values())))
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise FormatError(
                f"{folder / INDEX}: names {len(files)} files, of which {len(missing)} are missing: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; fetch the whole model"
            )
        return files, weight_map
    others = sorted(entry.name for entry in folder.iterdir() if entry.suffix == ".safetensors")
    if others:
        raise FormatError(
            f"{folder}: holds {', '.join(others[:5])}, but neither {SINGLE} nor {INDEX}: "
            "the index is missing, or this is an adapter"
        )
    foreign = sorted(e.name for e in folder.iterdir() if e.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5"))
    if foreign:
        raise UnsupportedError(
            f"{folder}: holds {', '.join(foreign[:5])} and no safetensors file: convert it first, "
            "e.g. by loading it with transformers and calling save_pretrained"
        )
    raise FormatError(f"{folder}: there is no {SINGLE} and no {INDEX}")


def _read_weight_map(path: Path) -> dict[str, str]:
    index = read_json(path, unique=True)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: there is no 'weight_map' of tensor names to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_inside(file):
            raise FormatError(f"{path}: tensor {name!r} is said to be in {file!r}, outside this folder")
        if not file.endswith(".safetensors"):
            raise UnsupportedError(f"{path}: tensor {name!r} is in {file!r}; only safetensors files are read")
    return weight_map


def _is_inside(file: str) -> bool:
    path = PurePosixPath(file)
    return bool(file) and "\0" not in file and not path.is_absolute() and ".." not in path.parts


def _check_index(folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    for name, file in weight_map.items():
        found = tensors.get(name)
        if found is None or found.file != file:
            where = "nowhere" if found is None else f"in {found.file}"
            raise FormatError(f"{folder / INDEX}: tensor {name!r} is said to be in {file}, but is {where}")
    extra = [tensor for tensor in tensors.values() if tensor.name not in weight_map]
    if extra:
        raise FormatError(
            f"{folder / INDEX}: {len(extra)} tensors of its files are not in it, "
            f"e.g. {extra[0].name!r} of {extra[0].file}: index and files belong to different models"
        )
