"""Experts that were packed fused: what save_pretrained writes loads, converts and merges as any packed folder does."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qlora_rs
from mixtures import EXPERTS, INNER, SHARED, experts_of, logits, plain
from qlora_rs import QuantSpec, UnsupportedError, checkpoint
from qlora_rs.merge import merge

QWEN = {**SHARED, "intermediate_size": 45, "moe_intermediate_size": INNER, "num_experts": EXPERTS}
LOCAL = {**SHARED, "intermediate_size": INNER, "num_local_experts": EXPERTS}
# In the files of Granite experts are stacked, under names of their own; in those of the others a matrix for each.
FAMILIES = {
    "Mixtral": LOCAL,
    "Qwen2Moe": {**QWEN, "shared_expert_intermediate_size": 33},
    "Qwen3Moe": QWEN,
    "GraniteMoe": {**LOCAL, "pad_token_id": 0},
}


@pytest.fixture(params=list(FAMILIES))
def family(request) -> str:
    return request.param


def moe(family: str):
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def packed(family: str, spec: QuantSpec | None = None):
    model = moe(family)
    qlora_rs.quantize_model(model, spec)
    return model


def assert_same_state(model, other) -> None:
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec("int8", 32, False)], ids=QuantSpec.describe)
def test_it_loads_again_to_the_same_bits(family, spec, tmp_path) -> None:
    model = packed(family, spec)
    model.save_pretrained(tmp_path / "saved")
    again = qlora_rs.from_pretrained(tmp_path / "saved", dtype="float32")
    assert_same_state(again, model)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "twice")
    assert checkpoint.diff(tmp_path / "saved", tmp_path / "twice").same
    shapes = {row.shape for row in checkpoint.inspect(tmp_path / "saved").packed if len(row.shape) == 3}
    assert shapes == {(EXPERTS, 86, 72), (EXPERTS, 72, 43)}


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec("int8", 32, False)], ids=QuantSpec.describe)
def test_in_sixteen_bits_transformers_loads_what_the_packed_model_stands_for(family, spec, tmp_path) -> None:
    model = packed(family, spec)
    model.save_pretrained(tmp_path / "saved")
    checkpoint.convert(tmp_path / "saved", tmp_path / "plain", "bf16")
    model.dequantize(torch.bfloat16)
    loaded, expected = plain(tmp_path / "plain"), model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name].bfloat16().float()), name


def test_adapters_of_its_experts_merge(family, tmp_path) -> None:
    model = packed(family)
    model.save_pretrained(tmp_path / "saved")
    qlora_rs.attach_lora(model, r=2, seed=0, target_modules=["q_proj", "gate_up_proj", "*.experts.3.down_proj"])
    for parameter in qlora_rs.lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    qlora_rs.save_adapter(model, tmp_path / "adapter")
    merge(tmp_path / "saved", tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    merged = plain(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-3, atol=1e-4)
    again = qlora_rs.from_pretrained(tmp_path / "saved", dtype="float32")
    qlora_rs.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("unpack", ["dequantize", "merge_adapter"])
@pytest.mark.parametrize("origin", ["memory", "saved", "before"])
def test_once_it_is_in_floats_it_is_saved_as_it_was_before(family, origin, unpack, tmp_path) -> None:
    moe(family).save_pretrained(tmp_path / "before")
    model = packed(family)
    model.save_pretrained(tmp_path / "saved")
    if origin != "memory":
        model = qlora_rs.from_pretrained(tmp_path / origin, dtype="float32")
    if unpack == "dequantize":
        model.dequantize()
    else:
        qlora_rs.merge_adapter(model, dtype=torch.float32)
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("before", "after"))
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    assert_same_state(plain(tmp_path / "after"), model)


def test_stacks_that_the_source_has_are_saved_as_quantize_writes_them(tmp_path) -> None:
    moe("GraniteMoe").save_pretrained(tmp_path / "source")
    checkpoint.quantize(tmp_path / "source", tmp_path / "packed")
    memory = packed("GraniteMoe")
    for name in ("source", "packed"):
        model = qlora_rs.from_pretrained(tmp_path / name, dtype="float32")
        assert len(experts_of(model)) == 2
        assert_same_state(model, memory)
        model.save_pretrained(tmp_path / "saved")
        assert checkpoint.diff(tmp_path / "packed", tmp_path / "saved").same
        assert checkpoint.verify(tmp_path / "saved", tmp_path / "source").same


def test_experts_that_were_skipped_stay_in_floats_beside_those_that_were_packed(tmp_path) -> None:
    model = moe("Qwen3Moe")
    kept = copy.deepcopy(model.model.layers[0].mlp.experts)
    qlora_rs.quantize_model(model, skip_modules=["model.layers.0.mlp.experts"])
    model.save_pretrained(tmp_path / "saved")
    again = qlora_rs.from_pretrained(tmp_path / "saved", dtype="float32")
    assert torch.equal(again.model.layers[0].mlp.experts.gate_up_proj, kept.gate_up_proj)
    for each in (model, again):
        each.set_experts_implementation("eager")
    assert torch.equal(logits(again), logits(model))
    checkpoint.convert(tmp_path / "saved", tmp_path / "plain", "bf16")
    plain(tmp_path / "plain")


@pytest.fixture
def single(tmp_path) -> Path:
    """A folder as save_pretrained once wrote it: experts fused, a matrix for each."""
    folder = tmp_path / "single"
    packed("Qwen3Moe").save_pretrained(folder)
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    state = load_file(file)
    for name in [name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        stem, _, child = name.rpartition(".")
        shape = metadata.pop(f"{name}.shape", None)
        for end in ("", "_absmax", "_absmax_scale", "_absmax_offset"):
            for number, part in enumerate(state.pop(name + end)):
                state[f"{stem}.{number}.{child}.weight{end}"] = part.reshape(-1) if end == "_absmax_offset" else part
        for number in range(EXPERTS) if shape is not None else ():
            metadata[f"{stem}.{number}.{child}.weight.shape"] = str(json.loads(shape)[1:])
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, metadata)
    return folder


def test_a_folder_of_single_fused_experts_loads_and_saves_but_is_never_made_one_that_transformers_fills_at_random(
    single, tmp_path
) -> None:
    model = qlora_rs.from_pretrained(single, dtype="float32")
    assert torch.equal(logits(model), logits(packed("Qwen3Moe")))
    adapted = qlora_rs.from_pretrained(single, dtype="float32")
    qlora_rs.attach_lora(adapted, r=2, seed=0)
    qlora_rs.save_adapter(adapted, tmp_path / "adapter")
    for to in ("bf16", "fp16", "compressed-tensors"):
        with pytest.raises(UnsupportedError, match=r"experts\.0\.gate_up_proj.*save_pretrained it again"):
            checkpoint.convert(single, tmp_path / "out", to)
    with pytest.raises(UnsupportedError, match=r"experts\.0\.gate_up_proj.*save_pretrained it again"):
        merge(single, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "saved")
    checkpoint.convert(tmp_path / "saved", tmp_path / "plain", "bf16")
    plain(tmp_path / "plain")
