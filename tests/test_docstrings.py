"""The examples in public docstrings print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import qlora_rs

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(qlora_rs.__path__, "qlora_rs.")
    if not module.name.startswith("qlora_rs._core")
)


@pytest.mark.parametrize("name", ["qlora_rs", *MODULES])
def test_examples_in_docstrings_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_examples_to_hold() -> None:
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in ("qlora_rs", *MODULES)]
    assert sum(len(test.examples) for module in modules for test in finder.find(module)) > 15
