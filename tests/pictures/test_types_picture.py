"""The picture of a comparison of data types: names that can be told apart, whatever they are."""

from __future__ import annotations

import itertools

import pytest

from qlora_rs import QuantSpec
from qlora_rs.eval.types import TypeComparison, TypeResult
from qlora_rs.pictures import types


def result(name: str, bits: float, perplexity: float) -> TypeResult:
    return TypeResult(name, QuantSpec(), 1, bits, bits, 1000, perplexity, 3.0, 0.1, 1.0)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figure that is drawn of these results."""
    figures = []
    monkeypatch.setattr(types, "save_png", lambda figure, path: figures.append(figure))

    def draw(*results: TypeResult, model: str = "model"):
        types.draw_types(TypeComparison(model, 1, 1, 2, "float32", "cpu", results), tmp_path / "types.png")
        figures[-1].draw_without_rendering()
        return figures[-1]

    return draw


@pytest.mark.parametrize("apart", [0.0, 0.01, 0.3, 1.0])
def test_names_of_points_that_nearly_coincide_do_not_overlap(drawn, apart) -> None:
    figure = drawn(
        result("bf16", 16, 36.7),
        result("fp4", 6.9, 51.4 + apart),
        result("int4", 6.9, 51.4),
        result("codebook", 6.95, 51.4 - apart),
        result("nf4", 6.9, 44.9),
        result("nf4+dq", 6.6, 45.0),
    )
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    inside = figure.axes[0].get_window_extent()
    assert all(inside.y0 <= box.y0 and box.y1 <= inside.y1 for box in boxes)


def test_a_folders_name_is_no_formula_and_need_not_be_text(drawn) -> None:
    figure = drawn(result("bf16", 16, 36.7), result("nf4", 6.9, 44.9), model="/a/$x^\udce9\x1b")
    assert figure.get_suptitle().startswith(r"\$x^\xe9\x1b: ")
