"""Which tensors of a model folder get packed: weights of Linear layers and experts, as transformers' classes say.

Nothing is guessed from shapes: transformers builds the model from config.json without memory (on the meta
device), and its names for parameters are matched with the names in the files. The user's patterns come
on top.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from qlora_rs.checkpoint.claims import bounded_parameters, require_believable
from qlora_rs.checkpoint.expert_names import expert_tensors, odd_experts
from qlora_rs.checkpoint.renaming import Renamer
from qlora_rs.checkpoint.source import CONFIG, Source, StoredTensor
from qlora_rs.errors import FormatError, UnsupportedError, first_line, require_extra
from qlora_rs.experts import GATE_UP, logical_shape, why_not_packed
from qlora_rs.selection import matches, select_linear

FLOAT_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Choice:
    """What happens to each tensor of the files.

    Attributes:
        packed: names of tensors to quantize, in file order.
        reasons: of every other tensor, why it stays.
        not_converted: names of Linear modules that stay, for ``modules_to_not_convert``.
        notes: for the report.
        transposed: those of ``packed`` that the files hold as (experts, in, out), and that are packed as (experts, out,
            in).
    """

    packed: tuple[str, ...]
    reasons: dict[str, str]
    not_converted: tuple[str, ...]
    notes: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()

    def packed_shape(self, tensor: StoredTensor) -> tuple[int, ...]:
        """Logical shape, (..., out, in), of what is packed of a tensor."""
        if tensor.name not in self.transposed:
            return tensor.shape
        return (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2])


@dataclass
class _Draft:
    packed: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)
    not_converted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    experts: dict[str, str] = field(default_factory=dict)  # the module of each tensor of fused experts
    transposed: set[str] = field(default_factory=set)


def choose_tensors(
    source: Source, skip_modules: Sequence[str] | None = None, include: Sequence[str] | None = None
) -> Choice:
    """Decide for every tensor of ``source``.

    Args:
        source: the opened folder.
        skip_modules: patterns (full name, last component, glob) of what stays besides the defaults.
        include: patterns of what is packed although the defaults would leave it.

    Raises:
        UnsupportedError: the Linear layers cannot be found out, and no ``include`` names them.
        ValueError: a pattern matches nothing, or nothing that can be packed.
        FormatError: the files lack the weight of a Linear layer.
    """
    skip, wanted = tuple(skip_modules or ()), tuple(include or ())
    draft = _Draft()
    linear: list[str] = []
    try:
        model = meta_model(source)
    except UnsupportedError as error:
        if not wanted:
            raise UnsupportedError(
                f"{error}. Name the weights to pack: --include PATTERN (full name, last part or glob, "
                "e.g. --include '*_proj')"
            ) from None
        draft.notes.append(f"only what --include names is packed: {error}")
        draft.reasons = dict.fromkeys(source.tensors, "not named by --include")
    else:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        _choose_by_model(source, model, _of_modules(skip, linear), _of_modules(wanted, linear), draft)
    _add_included(source, wanted, linear, draft)
    _remove_skipped(source, skip, linear, draft)
    _note_split_experts(draft)
    if not linear:
        # The modules are unknown: by their names all matrices that stay might be Linear.
        matrices = (t for t in source.tensors.values() if len(t.shape) == 2 and t.name not in draft.packed)
        draft.not_converted = [t.name.removesuffix(".weight") for t in matrices if t.name.endswith(".weight")]
    packed = tuple(name for name in source.tensors if name in draft.packed)
    if not packed:
        raise UnsupportedError(
            f"{source.path}: nothing to pack: no Linear weight is left; --include PATTERN adds others"
        )
    reasons = {name: draft.reasons[name] for name in source.tensors if name not in draft.packed}
    transposed = tuple(name for name in packed if name in draft.transposed)
    return Choice(packed, reasons, tuple(draft.not_converted), tuple(draft.notes), transposed)


def meta_model(source: Source) -> nn.Module:
    """The model that config.json describes, without memory for its parameters.

    Raises:
        UnsupportedError: transformers is not installed, or does not know the model.
        FormatError: it is far larger than what the files hold.
    """
    transformers = require_extra("transformers", "transformers", "telling which tensors are Linear weights")
    path = source.path / CONFIG
    require_believable(path, source.config, len(source.tensors))
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(source.config_folder()), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever its checks of a model's settings raise
        raise UnsupportedError(
            f"{path}: transformers {transformers.__version__} does not know this architecture "
            f"(model_type {source.config.get('model_type')!r}): {first_line(error)}"
        ) from None
    architectures = source.config.get("architectures")
    architectures = architectures if isinstance(architectures, list) else []
    named: list[Any] = [getattr(transformers, str(name), None) for name in architectures]
    builders: list[Callable[[Any], nn.Module]] = [cls._from_config for cls in named if hasattr(cls, "_from_config")]
    builders += [transformers.AutoModelForCausalLM.from_config, transformers.AutoModel.from_config]
    failure: Exception | None = None
    for build in builders:
        try:
            with bounded_parameters(path, len(source.tensors)), torch.device("meta"):
                return build(config)
        except FormatError:
            raise
        except Exception as error:  # whatever a model's constructor raises: the next builder may do
            failure = failure or error
    raise UnsupportedError(
        f"{path}: transformers {transformers.__version__} cannot build this model: "
        f"{first_line(failure) if failure else 'it names no class'}"
    )


def _choose_by_model(
    source: Source, model: nn.Module, skip: Sequence[str], include: Sequence[str], draft: _Draft
) -> None:
    selection = select_linear(model, skip_modules=skip or None, include=include or None)
    linear_reasons = dict(selection.skipped)
    draft.not_converted = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name in linear_reasons
    ]
    parameter_of, fused = parameter_names(source, model)
    experts = expert_tensors(source.tensors, model)
    odd, example = odd_experts(experts, model)
    if odd:
        raise FormatError(
            f"{source.path}: the files hold other experts than {CONFIG} asks for: {odd} weights are missing or too "
            f"many, e.g. {example}: it is of another model, or a file is missing"
        )
    file_name_of = {parameter: tensor for tensor, parameter in parameter_of.items()}
    owners = {
        f"{module_name}.{name}" if module_name else name: (module_name, module)
        for module_name, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    for name, tensor in source.tensors.items():
        owner = owners.get(parameter_of.get(name, ""))
        if name in experts:
            module = model.get_submodule(experts[name].module)
            expert = experts[name].as_stored(tensor.shape, module)
            _check_shape(source, expert.float_shape(module), tensor)
            if expert.transposed:
                draft.transposed.add(name)
            draft.packed.add(name)
            draft.experts[name] = experts[name].module
            reason = ""
        elif name in fused:
            reason = "transformers fuses it with others while loading: no Linear layer; --include packs it"
        elif owner is None:
            reason = f"no parameter of {type(model).__name__}"
        else:
            reason = linear_reasons.get(owner[0], "") if name.endswith("weight") else ""
            reason = reason or _reason(parameter_of[name], tensor, owner[1])
        draft.reasons[name] = reason
    tied = _tied(model)
    missing = []
    for module_name in selection.packed:
        stored = file_name_of.get(f"{module_name}.weight")
        if stored is not None:
            expected = tuple(model.get_parameter(f"{module_name}.weight").shape)
            _check_shape(source, expected, source.tensors[stored])
            draft.packed.add(stored)
        elif f"{module_name}.weight" in tied:
            draft.notes.append(f"{module_name}.weight is tied to {tied[f'{module_name}.weight']}: it stays")
            draft.not_converted.append(module_name)
        elif fused:
            draft.notes.append(f"{module_name}.weight is made from other tensors while loading: it stays")
            draft.not_converted.append(module_name)
        else:
            missing.append(f"{module_name}.weight")
    if missing:
        raise FormatError(
            f"{source.path}: {len(missing)} Linear weights of {type(model).__name__} are in none of its "
            f"files, e.g. {missing[0]!r}: config.json is of another model, or a file is missing"
        )


def parameter_names(source: Source, model: nn.Module) -> tuple[dict[str, str], set[str]]:
    """The model's name of each tensor that has one, and the tensors that transformers fuses while loading."""
    state = model.state_dict()
    renamer = Renamer(model)
    names: dict[str, str] = {}
    fused: set[str] = set()
    for name in source.tensors:
        new, pattern = renamer.rename(name)
        if pattern is not None:
            fused.add(name)
        elif new in state:
            names[name] = new
    return names, fused


class ExpertPlace(NamedTuple):
    """Where the files hold a single expert's weight.

    Attributes:
        name: of the tensor.
        number: which of its matrices; None: it is one.
        transposed: in floats its matrices are (in, out).
    """

    name: str
    number: int | None = None
    transposed: bool = False


def expert_places(source: Source) -> Callable[[str], ExpertPlace | None]:
    """Finds the weights of single experts by the names that `qlora_rs.experts.PackedExperts` gives them."""
    try:
        model = meta_model(source)
        tensors = expert_tensors(source.tensors, model)
    except UnsupportedError:
        return lambda name: None
    places: dict[tuple[str, int | None, str], tuple[str, int, bool]] = {}
    for name, each in tensors.items():
        fused, tensor = model.get_submodule(each.module), source.tensors[name]
        if f"{name}_absmax" in source.tensors:
            mark = source.metadata.get(tensor.file, {}).get(f"{name}.transposed")
            transposed = mark is not None if each.either else each.transposed
        else:
            transposed = each.as_stored(tensor.shape, fused).transposed
        places[each.module, each.expert, each.child] = name, logical_shape(fused, each.parameter)[0], transposed

    def find(name: str) -> ExpertPlace | None:
        parts = re.fullmatch(r"(.*)\.(\d+)\.([^.]+)\.weight", name)
        if parts is None:
            return None
        module, number, child = parts[1], int(parts[2]), parts[3]
        if (module, number, child) in places:
            return ExpertPlace(places[module, number, child][0])
        stacked, count, transposed = places.get((module, None, child), ("", 0, False))
        return ExpertPlace(stacked, number, transposed) if number < count else None

    return find


def require_known_experts(source: Source) -> None:
    """Raise UnsupportedError where a packed folder names experts as no plain model folder does, which transformers
    would fill at random: save_pretrained once wrote those that were fused so.
    """
    names = [name for name in source.tensors if re.search(rf"\.\d+\.{GATE_UP}\.weight$", name)]
    if not names:
        return
    try:
        tensors = expert_tensors(names, meta_model(source))
    except UnsupportedError:
        return
    if any(tensor.child == GATE_UP for tensor in tensors.values()):
        raise UnsupportedError(
            f"{source.path}: {names[0]!r} is a single expert's gate and up in one, which transformers knows in no "
            "file: load the folder with qlora_rs.from_pretrained and save_pretrained it again, which stacks the experts"
        )


def _reason(name: str, tensor: StoredTensor, module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embedding"
    if name.endswith((".bias", "_bias")):
        return "bias"
    if len(tensor.shape) < 2:
        return f"{kind}: not a matrix"
    if len(tensor.shape) == 3:
        return why_not_packed(module) or f"{kind}: not a Linear layer"
    return f"{kind}: not a Linear layer"


def _check_shape(source: Source, expected: tuple[int, ...], tensor: StoredTensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise UnsupportedError(
            f"{source.path / tensor.file}: tensor {tensor.name!r} is {tensor.dtype}; only F32, BF16 and F16 "
            f"weights can be quantized. Leave it with --skip {_module_name(tensor.name)!r}, or start from "
            "16-bit weights"
        )
    if tensor.shape != expected:
        raise FormatError(
            f"{source.path / tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}, but "
            f"{CONFIG} asks for {list(expected)}"
        )


def _tied(model: nn.Module) -> dict[str, str]:
    """Parameters that share another's memory, which files hold once."""
    tied = getattr(model, "all_tied_weights_keys", None)
    return {str(k): str(v) for k, v in tied.items()} if isinstance(tied, dict) else {}


def _module_name(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _matches(tensor: str, pattern: str) -> bool:
    return matches(tensor, pattern) or matches(_module_name(tensor), pattern)


def _of_modules(patterns: Iterable[str], linear: Sequence[str]) -> tuple[str, ...]:
    return tuple(pattern for pattern in patterns if any(matches(name, pattern) for name in linear))


def _add_included(source: Source, include: Sequence[str], linear: Sequence[str], draft: _Draft) -> None:
    for pattern in include:
        named = [tensor for tensor in source.tensors.values() if _matches(tensor.name, pattern)]
        usable = [t for t in named if len(t.shape) in (2, 3) and t.dtype in FLOAT_DTYPES]
        if not usable and not _of_modules([pattern], linear):
            if named:
                raise ValueError(
                    f"--include {pattern!r} names only tensors that cannot be packed, e.g. {named[0].name!r} "
                    f"({named[0].dtype} {list(named[0].shape)}); float matrices can, and stacks of them"
                )
            raise ValueError(_no_match("--include", pattern, source, linear))
        for tensor in usable:
            if tensor.name not in draft.packed and linear:
                draft.notes.append(
                    f"{tensor.name} is packed as --include asks, but is not the weight of a Linear layer"
                )
            draft.packed.add(tensor.name)


def _remove_skipped(source: Source, skip: Sequence[str], linear: Sequence[str], draft: _Draft) -> None:
    for pattern in skip:
        named = [name for name in source.tensors if _matches(name, pattern)]
        if not named and not _of_modules([pattern], linear):
            raise ValueError(_no_match("--skip", pattern, source, linear))
        for name in named:
            if name in draft.packed:
                draft.packed.discard(name)
                draft.reasons[name] = f"matches the skip pattern {pattern!r}"


def _note_split_experts(draft: _Draft) -> None:
    kept = {module for name, module in draft.experts.items() if name not in draft.packed}
    split = kept.intersection(module for name, module in draft.experts.items() if name in draft.packed)
    if split:
        draft.notes.append(
            f"only some weights of {min(split)} are packed: experts are computed with where all of them are, or none"
        )


def _no_match(option: str, pattern: str, source: Source, linear: Sequence[str]) -> str:
    names = {*linear, *map(_module_name, source.tensors)}
    names |= {name.rsplit(".", 1)[-1] for name in names}
    close = difflib.get_close_matches(pattern, sorted(names), n=3)
    hint = f"close to it: {', '.join(close)}" if close else f"there are, e.g., {', '.join(sorted(names)[:3])}"
    return f"{option} {json.dumps(pattern)} matches nothing in {source.path}; {hint}"
