"""What save_pretrained writes of a packed model: experts whose gate and up are one matrix as stacks.

NOTE: imported with qlora_rs.integrations.transformers, while transformers is itself being imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qlora_rs.errors import UnsupportedError
from qlora_rs.experts import BIASES, FUSED, GATE_UP, PackedExperts
from qlora_rs.linear import Linear4bit

# Where transformers keeps how it made a model's tensors of those in files; saving goes the other way.
_CONVERSIONS = "_weight_conversions"


class SavedStacks:
    """The experts of a model that are saved as stacks.

    transformers splits their weights where files have a matrix for each of gate and up. Of packed ones it cannot: both
    share the scales of scales. What it loads without a change are the fused weights under its own names; single
    experts that are fused it knows in no file.

    Attributes:
        modules: those experts, by the model's names.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        found = ((name, module) for name, module in model.named_modules() if isinstance(module, PackedExperts))
        self.modules = {name: module for name, module in found if module.transposed or GATE_UP in module.inner}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.modules)

    @cached_property
    def conversions(self) -> list[Any]:
        """By what transformers is to name the model's tensors in files: without what would take stacks apart."""
        from transformers.core_model_loading import WeightConverter

        weights = self._weights()
        known = conversions_of(self._model, weights)
        return [each for each in known if not (isinstance(each, WeightConverter) and _makes(each, weights))]

    def state(self) -> dict[str, Tensor]:
        """The model's tensors, with a weight of all experts, and its bias, for those of single ones."""
        state: dict[str, Tensor] = self._model.state_dict()
        names = self._part_names()
        for name, experts in self.modules.items():
            for child, layer in _layers(experts).items():
                for part in [part for part, _ in layer.named_parameters()]:
                    stack = torch.stack([state.pop(f"{name}.{n}.{child}.{part}") for n in range(len(experts))])
                    if part == "bias":
                        state[f"{name}.{BIASES[child]}"] = stack
                    else:
                        end = part.removeprefix("weight")
                        state[names[f"{name}.{child}{end}"]] = stack.flatten() if end == "_absmax_offset" else stack
        return state

    def remarks(self) -> dict[str, str]:
        """Metadata of packed weights: ``NAME.shape`` where codes cannot tell it (odd numbers of columns, flat ones),
        and ``NAME.transposed`` of experts that the model in floats holds so.
        """
        shapes: dict[str, str] = {}
        transposed: set[str] = set()
        stacked = {
            f"{name}.{number}.{child}"
            for name, experts in self.modules.items()
            for number in range(len(experts))
            for child in _layers(experts)
        }
        for name, module in self._model.named_modules():
            if isinstance(module, Linear4bit) and _is_odd(module) and name not in stacked:
                shapes[f"{name}.weight"] = json.dumps([module.out_features, module.in_features])
        for name, experts in self.modules.items():
            for child, layer in _layers(experts).items():
                if experts.transposed:
                    transposed.add(f"{name}.{child}")
                if _is_odd(layer):
                    shapes[f"{name}.{child}"] = json.dumps([len(experts), layer.out_features, layer.in_features])
        names = {*shapes, *transposed}
        renamed = self.modules or any(".experts." in name for name in names)
        saved = self._saved_names(names) if renamed else {}
        found = {f"{saved.get(name, name)}.shape": shape for name, shape in shapes.items()}
        return found | {f"{saved.get(name, name)}.transposed": "true" for name in sorted(transposed)}

    def _weights(self) -> list[str]:
        return [f"{name}.{child}" for name, experts in self.modules.items() for child in _layers(experts)]

    def _part_names(self) -> dict[str, str]:
        """What to call codes and scales, by the weight's name and their ending, for transformers to name them alike."""
        weights = self._weights()
        saved = self._saved_names(weights)
        ends = ("_absmax", "_absmax_scale", "_absmax_offset")
        given = {f"{name}{end}": f"{saved[name]}{end}" for name in weights for end in ends}
        by_own, by_wanted = self._saved_names(given), self._saved_names(given.values())
        names = {name: name for name in weights}
        for own, wanted in given.items():
            # A pattern that ends with the weight's name leaves the names of its scales as they are.
            if by_own[own] == wanted:
                names[own] = own
            elif by_wanted[wanted] == wanted:
                names[own] = wanted
            else:
                raise UnsupportedError(f"transformers would save {own!r} as {by_own[own]!r}, apart from its weight")
        return names

    def _saved_names(self, names: Iterable[str]) -> dict[str, str]:
        """What transformers calls tensors in the files that it saves, which for some models is not their name."""
        from transformers.core_model_loading import revert_weight_conversion

        marks = {name: torch.empty(0, device="meta") for name in names}
        restore = replace_conversions(self._model, self.conversions)
        try:
            saved = {id(mark): name for name, mark in revert_weight_conversion(self._model, marks).items()}
        finally:
            restore(self._model)
        return {name: saved[id(mark)] for name, mark in marks.items() if id(mark) in saved}


def replace_conversions(model: nn.Module, conversions: list[Any]) -> Callable[[nn.Module], None]:
    """Let transformers save ``model`` by other ``conversions``; returns what undoes that, of the model or a copy."""
    before = {key: value for key, value in vars(model).items() if key == _CONVERSIONS}

    def restore(changed: nn.Module) -> None:
        vars(changed).pop(_CONVERSIONS, None)
        vars(changed).update(before)

    vars(model)[_CONVERSIONS] = conversions
    return restore


def conversions_of(model: nn.Module, weights: Collection[str]) -> list[Any]:
    """Those of the files that the model was loaded from; of a model that was not, those that transformers saves by.

    Loading past transformers leaves it with conversions of the other tensors alone: those of ``weights``, which were
    packed or are, are added.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    known = [
        each for each in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(each, PrefixChange)
    ]
    loaded_by = vars(model).get(_CONVERSIONS)
    if loaded_by is None:
        return known
    used = {_patterns(each) for each in loaded_by}
    return [*loaded_by, *(each for each in known if _patterns(each) not in used and _makes(each, weights))]


def _patterns(transform: Any) -> tuple[tuple[str, ...], tuple[str, ...], str | None]:
    return tuple(transform.source_patterns), tuple(transform.target_patterns), transform.scope_prefix


def _makes(transform: Any, weights: Collection[str]) -> bool:
    """Whether some of the model's ``weights`` go by this name in files, or are made of others there."""
    reverse = transform.reverse_transform()
    return any(reverse.rename_source_key(name)[1] is not None for name in weights)


def _layers(experts: PackedExperts) -> dict[str, Linear4bit]:
    """The first expert's layers that stacks are made of, as which all are."""
    first: Any = experts[0]
    return {child: layer for child, layer in first.items() if child in FUSED}


def _is_odd(layer: Linear4bit) -> bool:
    """Whether the shape of its codes cannot tell the layer's."""
    return layer.flat or (layer.spec.bits == 4 and layer.in_features % 2 == 1)
