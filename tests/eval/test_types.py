"""`compare_types`: its figures are those of the parts that it is made of."""

from __future__ import annotations

import math

import pytest
import torch

import qlora_rs
from qlora_rs import QuantSpec, UnsupportedError
from qlora_rs.eval import compare_types, perplexity
from qlora_rs.eval.types import parse_type

TOKENS = torch.randint(3, 259, (65,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def comparison(tiny_llama):
    return compare_types(tiny_llama, TOKENS, ["nf4+dq", "int8"], block_size=32, window=31, dtype=torch.float32)


def test_perplexities_are_those_of_the_models_loaded_one_by_one(tiny_llama, comparison) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    expected = [perplexity(plain, TOKENS, window=31)]
    for spec in (QuantSpec("nf4", 32), QuantSpec("int8", 32, False)):
        expected.append(perplexity(qlora_rs.from_pretrained(tiny_llama, spec, torch.float32), TOKENS, window=31))
    assert [row.name for row in comparison.results] == ["bf16", "nf4+dq", "int8"]
    assert [row.nats_per_token for row in comparison.results] == [each.nll for each in expected]
    assert [row.perplexity for row in comparison.results] == [each.ppl for each in expected]
    assert [row.nats_over_stored for row in comparison.results] == [each.nll - expected[0].nll for each in expected]
    assert (comparison.tokens, comparison.window, comparison.dtype) == (expected[0].tokens, 31, "float32")


@pytest.mark.parametrize(("index", "spec"), [(1, QuantSpec("nf4", 32)), (2, QuantSpec("int8", 32, False))])
def test_sizes_are_those_of_the_packed_folder(tiny_llama, comparison, tmp_path, index, spec) -> None:
    qlora_rs.checkpoint.quantize(tiny_llama, tmp_path / "packed", spec)
    info = qlora_rs.checkpoint.inspect(tmp_path / "packed")
    row = comparison.results[index]
    packed_bits = 8 * sum(each.bytes for each in info.packed) / sum(each.elements for each in info.packed)
    assert (row.bytes, row.weights, row.spec) == (info.total_bytes, len(info.packed), spec)
    assert row.bits_per_weight == pytest.approx(packed_bits)
    assert row.bits_per_parameter == pytest.approx(8 * info.total_bytes / info.parameters)


def test_the_model_as_it_is_has_its_own_bits(comparison) -> None:
    base = comparison.results[0]
    assert (base.spec, base.weights, base.bits_per_weight, base.bits_per_parameter) == (None, 0, 16.0, 16.0)


def test_progress_counts_all_types_together(tiny_llama) -> None:
    seen: list[tuple[int, int]] = []
    compare_types(tiny_llama, TOKENS, ["nf4"], window=40, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(40, 130), (65, 130), (105, 130), (130, 130)]


def test_a_packed_folder_is_refused(tiny_llama, tmp_path) -> None:
    qlora_rs.checkpoint.quantize(tiny_llama, tmp_path / "packed")
    with pytest.raises(UnsupportedError, match=r"packed.*16-bit"):
        compare_types(tmp_path / "packed", TOKENS)


@pytest.mark.parametrize("name", ["nf5", "dq", "nf4+", ""])
def test_names_of_no_type_are_refused(name) -> None:
    with pytest.raises(ValueError, match="nf4"):
        parse_type(name)


def test_json_holds_every_figure(comparison) -> None:
    rows = comparison.to_dict()["results"]
    assert rows[1]["spec"] == {"quant_type": "nf4", "block_size": 32, "double_quant": True}
    assert rows[0]["spec"] is None
    assert math.isclose(rows[2]["perplexity"], comparison.results[2].perplexity)
