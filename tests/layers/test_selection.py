"""Which Linear layers are packed by default, and how patterns change that."""

from __future__ import annotations

import pytest
from torch import nn

from qlora_rs.selection import matches, select_linear


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(5, 3, bias=False)
        self.up_proj = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(5)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Expert(), Expert()])
        self.classifier = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))


def test_heads_and_routers_stay_and_each_says_why() -> None:
    selection = select_linear(Classifier())
    assert selection.packed == ("layers.0.up_proj", "layers.1.up_proj")
    assert dict(selection.skipped) == {
        "layers.0.gate": "router of a mixture of experts",
        "layers.1.gate": "router of a mixture of experts",
        "classifier.0": "output head",
        "classifier.2": "output head",
    }


def test_the_output_layer_that_a_model_names_is_a_head_whatever_it_is_called() -> None:
    model = Classifier()
    model.get_output_embeddings = lambda: model.layers[1].up_proj
    assert dict(select_linear(model).skipped)["layers.1.up_proj"] == "output head"


def test_layers_that_their_model_keeps_in_float32_stay() -> None:
    model = Classifier()
    model._keep_in_fp32_modules = ["up_proj"]
    reasons = dict(select_linear(model).skipped)
    assert "float32" in reasons["layers.0.up_proj"]


def test_include_adds_what_the_defaults_leave_and_skip_wins() -> None:
    selection = select_linear(Classifier(), include=["classifier.*", "gate"], skip_modules=["classifier.2", "*.0.*"])
    assert selection.packed == ("layers.1.gate", "layers.1.up_proj", "classifier.0")
    assert dict(selection.skipped)["classifier.2"] == "matches the skip pattern 'classifier.2'"


@pytest.mark.parametrize("option", ["skip_modules", "include"])
def test_a_pattern_that_matches_no_linear_layer_is_an_error(option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option}: 'norm' matches no Linear layer.*up_proj"):
        select_linear(Classifier(), **{option: ["norm"]})


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("model.layers.10.mlp.up_proj", True),
        ("up_proj", True),
        ("*.10.*", True),
        ("*.mlp.*", True),
        ("model.layers.1.mlp.up_proj", False),
        ("mlp", False),
        ("proj", False),
        ("", False),
    ],
)
def test_a_pattern_is_a_full_name_a_last_component_or_a_glob(pattern: str, expected: bool) -> None:
    assert matches("model.layers.10.mlp.up_proj", pattern) is expected
