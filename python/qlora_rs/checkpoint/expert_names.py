"""What the files call the weights of experts that transformers holds fused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from qlora_rs.checkpoint.renaming import Renamer
from qlora_rs.errors import FormatError, UnsupportedError
from qlora_rs.experts import DOWN, FUSED, GATE_UP, has_biases, is_transposed, logical_shape, packable_experts

if TYPE_CHECKING:
    from qlora_rs.checkpoint.inspection import PackedLayout

# Operations of transformers' loader that stack experts, and set gate and up one above the other.
_STACK, _ABOVE = "MergeModulelist", "Concatenate"


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor of the files that is all or part of a fused weight.

    Attributes:
        module: the model's name of the experts.
        parameter: ``"gate_up_proj"`` or ``"down_proj"``.
        expert: which expert's; None: of all, stacked.
        child: what the files call this matrix of an expert, e.g. ``"w1"``.
        place: which part of the parameter's rows, from above; ``places`` of them make it up.
        transposed: a file of floats holds it as (experts, in, out); packed it is (experts, out, in) all the same.
        either: a file of floats may hold it so or so, as its shape tells.
    """

    module: str
    parameter: str
    expert: int | None
    child: str
    place: int = 0
    places: int = 1
    transposed: bool = False
    either: bool = False

    def as_stored(self, shape: tuple[int, ...], fused: nn.Module) -> ExpertTensor:
        """The same with ``transposed`` as the ``shape`` in a file of floats tells, where it may be either."""
        turned = replace(self, transposed=True)
        return turned if self.either and shape == turned.float_shape(fused) != self.float_shape(fused) else self

    def shape(self, fused: nn.Module) -> tuple[int, ...]:
        """The shape that the tensor has to have: a packed one's logical shape."""
        experts, rows, columns = logical_shape(fused, self.parameter)
        return (experts, rows, columns) if self.expert is None else (rows // self.places, columns)

    def float_shape(self, fused: nn.Module) -> tuple[int, ...]:
        """The shape that it has to have in a file of floats."""
        *lead, rows, columns = self.shape(fused)
        return (*lead, columns, rows) if self.transposed else (*lead, rows, columns)


def expert_tensors(names: Iterable[str], model: nn.Module) -> dict[str, ExpertTensor]:
    """Those of the files' tensors that belong to experts which can be computed from packed weights."""
    modules = packable_experts(model)
    if not modules:
        return {}
    renamer = Renamer(model)
    # Nobody's files hold matrices of single experts of these.
    stacked_only = {name for name, fused in modules.items() if is_transposed(fused) or has_biases(fused)}
    parameters = {f"{module}.{name}": (module, name) for module in modules for name in FUSED}
    found = {}
    for name in names:
        new, pattern = renamer.rename(name)
        module, parameter = parameters.get(new, ("", ""))
        if module and pattern is None:
            transposed = is_transposed(modules[module])
            either = not transposed and renamer.may_be_turned(new)
            found[name] = ExpertTensor(module, parameter, None, parameter, transposed=transposed, either=either)
        elif module in stacked_only:
            continue
        elif module:
            part = _part(renamer.converters, str(pattern), parameter)
            number = re.search(r"\.(\d+)\.[^.]+\.weight$", name)
            if part is not None and number is not None:
                child, place, places = part
                found[name] = ExpertTensor(module, parameter, int(number[1]), child, place, places)
        else:
            own = re.fullmatch(rf"(.*)\.(\d+)\.({GATE_UP}|{DOWN})\.weight", new)
            if own is not None and own[1] in modules and own[1] not in stacked_only:
                found[name] = ExpertTensor(own[1], own[3], int(own[2]), own[3])
    return found


def odd_experts(tensors: Mapping[str, ExpertTensor], model: nn.Module) -> tuple[int, str]:
    """How many weights of single experts are in no file although other experts' are, or belong to experts that the
    model does not have, and one of them, e.g. ``"w1 of expert 3 of model.layers.0.mlp.experts"``.
    """
    found: dict[tuple[str, str, int], set[int | None]] = {}
    children: dict[tuple[str, str, int], str] = {}
    places: dict[tuple[str, str], int] = {}
    for tensor in tensors.values():
        part = tensor.module, tensor.parameter, tensor.place
        found.setdefault(part, set()).add(tensor.expert)
        children[part] = tensor.child
        places[part[:2]] = tensor.places
    total, example = 0, ""
    for module in dict.fromkeys(module for module, *_ in found):
        count = model.get_submodule(module).get_parameter(DOWN).shape[0]
        parts = [
            (module, parameter, place) for parameter in FUSED for place in range(places.get((module, parameter), 1))
        ]
        for part in parts:
            there = found.get(part, set())
            if None in there:
                continue
            beyond = sorted(number for number in there if number is not None and number >= count)
            lacking = count - (len(there) - len(beyond))
            total += len(beyond) + lacking
            if not example and (beyond or lacking):
                # The config may claim any number of experts: the first that is absent comes soon.
                number = beyond[0] if beyond else next(number for number in range(count) if number not in there)
                example = f"{children.get(part, part[1])} of expert {number} of {module}"
    return total, example


def _part(converters: Iterable[Any], pattern: str, parameter: str) -> tuple[str, int, int] | None:
    """Child, place and number of places of what ``pattern`` matches, where its converter only stacks."""
    for converter in converters:
        patterns = list(converter.source_patterns)
        if pattern not in patterns:
            continue
        operations = [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations]
        expected = [(_STACK, 0)] if parameter == DOWN else [(_STACK, 0), (_ABOVE, 1)]
        child = re.search(r"\.\*\.([A-Za-z0-9_]+)\.weight\$?$", pattern.replace("\\", ""))
        if operations == expected and child is not None:
            return child[1], patterns.index(pattern), len(patterns)
    return None


@dataclass(frozen=True)
class StoredExperts:
    """What the files hold of one module of experts.

    Attributes:
        names: by the layer's name in an expert, in the order of `qlora_rs.experts.PackedExperts`: the tensor of each
            expert, or one for all, stacked.
        shapes: of the matrices of these layers.
        count: of experts.
    """

    names: Mapping[str, tuple[str, ...] | str]
    shapes: Mapping[str, tuple[int, int]]
    count: int

    def all_names(self) -> set[str]:
        """The names of all tensors."""
        return {name for names in self.names.values() for name in ((names,) if isinstance(names, str) else names)}


def stored_experts(layouts: Mapping[str, PackedLayout], model: nn.Module, where: str) -> dict[str, StoredExperts]:
    """The modules of experts whose weights are among the packed ones, by the modules' names.

    Args:
        layouts: of all packed weights.
        model: of transformers, its experts still fused.
        where: the folder, for messages.

    Raises:
        UnsupportedError: some of a module's weights are packed, and others are not, or they are packed along the other
            dimension than experts are computed with.
        FormatError: one has another shape than the model asks for.
    """
    tensors = expert_tensors(layouts, model)
    by_module: dict[str, dict[str, ExpertTensor]] = {}
    for name, tensor in tensors.items():
        by_module.setdefault(tensor.module, {})[name] = tensor
    result = {}
    for module_name, parts in by_module.items():
        fused = model.get_submodule(module_name)
        for name, tensor in parts.items():
            shape, _, transposed = layouts[name]
            if transposed != tensor.transposed and not tensor.either:
                packed, computed = ("transposed", "as it is") if transposed else ("as it is", "transposed")
                raise UnsupportedError(
                    f"{where}: {name!r} is packed {packed}, but {type(fused).__name__} is computed from experts that "
                    f"are packed {computed}: quantize the 16-bit model again, or `qlora-rs convert --to bf16` "
                    "dequantizes it"
                )
            if shape != tensor.shape(fused):
                raise FormatError(
                    f"{where}: the packed weight {name!r} has shape {list(shape)}, but config.json asks for "
                    f"{list(tensor.shape(fused))}: it is of another model"
                )
        result[module_name] = _whole(module_name, fused, parts, where)
    return result


def _whole(module_name: str, fused: nn.Module, parts: Mapping[str, ExpertTensor], where: str) -> StoredExperts:
    count = fused.get_parameter(DOWN).shape[0]
    places: dict[tuple[str, int], dict[int | None, tuple[str, ExpertTensor]]] = {}
    for name, tensor in parts.items():
        places.setdefault((tensor.parameter, tensor.place), {})[tensor.expert] = name, tensor
    names: dict[str, tuple[str, ...] | str] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for parameter in FUSED:
        here = [found for (owner, _), found in sorted(places.items()) if owner == parameter]
        wanted = next(iter(here[0].values()))[1].places if here else 1
        if len(here) != wanted or any(set(found) not in ({None}, set(range(count))) for found in here):
            raise UnsupportedError(
                f"{where}: some weights of {module_name} are packed and others are not: experts are packed as a whole "
                "or not at all; quantize the model again without --skip for a part of them"
            )
        for found in here:
            child, (*_, rows, columns) = next(iter(found.values()))[1].child, next(iter(found.values()))[1].shape(fused)
            stacked = found.get(None)
            names[child] = stacked[0] if stacked is not None else tuple(found[number][0] for number in range(count))
            shapes[child] = rows, columns
    return StoredExperts(names, shapes, count)
