"""Packed experts and flat weights on a CUDA device: loaded with the CPU's bytes, and computed as their floats are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qlora_rs
from qlora_rs import Linear4bit, PackedTensor, QuantSpec, checkpoint
from qlora_rs.experts import PackedExperts

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "bitsandbytes"
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        num_local_experts=5,
        max_position_embeddings=256,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("packed", [False, True])
def test_a_mixture_on_the_device_has_the_bytes_of_the_cpu_and_computes_the_same(source, tmp_path, packed) -> None:
    folder = source
    if packed:
        folder = tmp_path / "packed"
        checkpoint.quantize(source, folder)
    ours = qlora_rs.from_pretrained(folder, dtype="float32", device="cuda")
    cpu = qlora_rs.from_pretrained(folder, dtype="float32")
    assert sum(isinstance(module, PackedExperts) for module in ours.modules()) == 2
    for (name, mine), (other, theirs) in zip(ours.named_parameters(), cpu.named_parameters(), strict=True):
        assert name == other
        assert mine.device == DEVICE
        assert torch.equal(mine.cpu(), theirs), name
    with torch.no_grad():
        for length in (1, 67):
            tokens = torch.arange(length)[None]
            torch.testing.assert_close(ours(tokens.to(DEVICE)).logits.cpu(), cpu(tokens).logits, rtol=2e-3, atol=2e-3)


def test_adapters_over_a_mixture_train_on_the_device_and_repeat_bit_for_bit(source, descend) -> None:
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        model = qlora_rs.from_pretrained(source, dtype="bfloat16", device="cuda")
        qlora_rs.attach_lora(model, r=4, seed=0, target_modules=["q_proj", "v_proj", "w1", "w2"])
        optimizer = torch.optim.AdamW(qlora_rs.lora_parameters(model), lr=0.02)
        tokens = torch.arange(67, device=DEVICE)[None]
        losses.append(descend(model, optimizer, tokens, 4))
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 33])
def test_a_flat_layer_multiplies_with_its_values(dtype, tokens) -> None:
    rows, columns = 37, 131
    packed = qlora_rs.quantize(torch.randn(1, rows * columns), QuantSpec())
    parts = {name: getattr(packed, name) for name in ("codes", "absmax", "absmax_scale", "absmax_offset")}
    layer = Linear4bit.from_packed(
        PackedTensor(**parts, spec=QuantSpec(), shape=(rows, columns), dtype=dtype, flat=True)
    )
    expected = layer.dequantize(dtype)
    layer.to(DEVICE)
    weight = layer.dequantize(dtype)
    assert torch.equal(weight.cpu(), expected)
    x = torch.randn(tokens, columns, device=DEVICE, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, torch.nn.functional.linear(x, weight))
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, torch.ones_like(y) @ weight)


def test_a_folder_of_flat_weights_loads_onto_the_device(tmp_path) -> None:
    checkpoint.convert(GOLDEN / "nf4-crossing-double", tmp_path / "native", "native")
    for folder in (GOLDEN / "nf4-crossing-double", tmp_path / "native"):
        ours = qlora_rs.from_pretrained(folder, dtype="float32", device="cuda")
        cpu = qlora_rs.from_pretrained(folder, dtype="float32")
        for (name, mine), (_, theirs) in zip(ours.named_parameters(), cpu.named_parameters(), strict=True):
            assert torch.equal(mine.cpu(), theirs), name
        tokens = torch.arange(9)[None]
        with torch.no_grad():
            torch.testing.assert_close(ours(tokens.to(DEVICE)).logits.cpu(), cpu(tokens).logits, rtol=2e-3, atol=2e-3)
