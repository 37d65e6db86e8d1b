"""Reports of an analysis: whole, readable by their parser, and in need of nothing else."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from qlora_rs import QuantSpec
from qlora_rs.checkpoint import Analysis, analyze, quantize
from qlora_rs.pictures.analysis import draw_analysis
from qlora_rs.pictures.page import render_page, write_page


@pytest.fixture(scope="module")
def analysis(tiny_llama, tmp_path_factory) -> Analysis:
    packed = tmp_path_factory.mktemp("packed") / "tiny"
    quantize(tiny_llama, packed, QuantSpec("fp4"))
    return analyze(packed, tiny_llama)


@pytest.fixture(scope="module")
def page(analysis) -> str:
    return render_page(analysis)


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta",):
            self.open.append(tag)
        for name, value in attrs:
            # What a browser would fetch: nothing but what the page itself holds.
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                assert value is not None
                assert value.startswith("#"), (tag, name, value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_the_page_is_well_formed_and_fetches_nothing(page) -> None:
    parser = Cells()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert "<script" not in page
    assert not re.search(r"@import|url\((?!#)", page)


def test_every_weight_and_part_is_in_its_tables(analysis, page) -> None:
    parser = Cells()
    parser.feed(page)
    assert {weight.name for weight in analysis.weights} <= set(parser.cells)
    assert {part.name for part in analysis.parts} <= set(parser.cells)
    worst = max(analysis.weights, key=lambda weight: weight.error.relative)
    assert f"{worst.error.relative:.4f}" in parser.cells


def test_the_pictures_are_valid_svg(page) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 3
    for picture in pictures:
        assert ET.fromstring(picture).tag.endswith("svg")


def test_names_are_text_not_markup(analysis) -> None:
    weight = replace(analysis.weights[0], name="<b>&amp</b>")
    text = render_page(replace(analysis, weights=(weight,), path="/models/<i>x</i>"))
    assert "&lt;b&gt;&amp;amp&lt;/b&gt;" in text
    assert "<i>x" not in text


def test_a_report_without_a_source_says_so(analysis) -> None:
    weights = tuple(replace(weight, error=None) for weight in analysis.weights)
    text = render_page(replace(analysis, weights=weights, source=None, step_counts=()))
    assert "No 16-bit source was given" in text
    assert "relative error" not in text
    assert len(re.findall("<svg", text)) == 1


@pytest.mark.parametrize("with_source", [True, False])
def test_a_picture_is_drawn_with_and_without_errors(analysis, tmp_path, with_source) -> None:
    from matplotlib.image import imread

    found = analysis
    if not with_source:
        weights = tuple(replace(weight, error=None) for weight in analysis.weights)
        found = replace(analysis, weights=weights, source=None, step_counts=())
    draw_analysis(found, tmp_path / "report.png")
    picture = imread(tmp_path / "report.png")
    assert picture.shape[1] == 1920
    assert picture.shape[0] > (1000 if with_source else 400)
    assert picture[..., :3].min() < 0.3  # not blank


def test_an_earlier_page_stays_where_the_new_one_fails(analysis, tmp_path, monkeypatch) -> None:
    from qlora_rs.pictures import page as module

    path = tmp_path / "report.html"
    path.write_text("earlier")

    def fail(*arguments: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "render_page", fail)
    with pytest.raises(OSError, match="No space left"):
        write_page(analysis, path)
    assert path.read_text() == "earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
