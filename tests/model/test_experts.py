"""Mixtures of experts: quantized, loaded and computed with single packed experts, in every way that files have them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import noop_context_fn

import qlora_rs
from mixtures import EXPERTS, INNER, SHARED, TOKENS, eager, experts_of
from qlora_rs import FormatError, Linear4bit, QuantSpec, UnsupportedError, _bridge, checkpoint
from qlora_rs.experts import split_experts
from qlora_rs.merge import merge

FAMILIES = ["mixtral", "qwen3_moe"]
IN_FILES = {
    "mixtral": ("model.layers.{}.block_sparse_moe.experts.{}.{}.weight", ("w1", "w3", "w2")),
    "qwen3_moe": ("model.layers.{}.mlp.experts.{}.{}.weight", ("gate_proj", "up_proj", "down_proj")),
}


def moe(family: str, **changes: object):
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(3)
    if family == "mixtral":
        return MixtralForCausalLM(
            MixtralConfig(**SHARED, intermediate_size=INNER, num_local_experts=EXPERTS, **changes)
        )
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHARED, intermediate_size=INNER, moe_intermediate_size=INNER, num_experts=EXPERTS, **changes)
    )


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def source(family, tmp_path) -> Path:
    """A folder as transformers saves one, and as the hub has them: a matrix for each expert."""
    moe(family).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def stacked(tmp_path) -> Path:
    """A folder whose experts are fused in the files too."""
    model = moe("qwen3_moe")
    folder = tmp_path / "stacked"
    folder.mkdir()
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(model.config.to_json_string())
    return folder


@pytest.mark.parametrize("claimed", [None, EXPERTS - 1, EXPERTS + 2, 10**9])
def test_files_that_lack_an_expert_or_hold_others_are_refused_before_hours_of_work(
    family, source, tmp_path, claimed
) -> None:
    if claimed is None:  # one weight is missing
        tensors = load_file(source / "model.safetensors")
        pattern, (_, second, _) = IN_FILES[family]
        del tensors[pattern.format(1, 2, second)]
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        match = f"1 weights are missing or too many, e.g. {second} of expert 2 of model.layers.1.mlp.experts"
    else:
        path = source / "config.json"
        config = json.loads(path.read_text())
        key = next(name for name in ("num_local_experts", "num_experts") if config.get(name) == EXPERTS)
        path.write_text(json.dumps({**config, key: claimed}))
        number, weights = min(claimed, EXPERTS), abs(claimed - EXPERTS) * 3 * 2
        match = rf"{weights} weights .* of expert {number} of model\.layers\.0\.mlp\.experts"
    with pytest.raises(FormatError, match=match):
        checkpoint.quantize(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_every_expert_is_packed_and_the_router_stays(family, source, tmp_path) -> None:
    report = checkpoint.quantize(source, tmp_path / "packed")
    pattern, names = IN_FILES[family]
    packed = {entry.name for entry in report.packed}
    assert {pattern.format(n, e, name) for n in range(2) for e in range(EXPERTS) for name in names} <= packed
    assert len(packed) == 2 * (4 + 3 * EXPERTS)
    assert "gate.weight" in " ".join(entry.name for entry in report.skipped)


def test_a_packed_folder_and_quantizing_on_the_way_in_give_the_same_bytes(source, tmp_path) -> None:
    checkpoint.quantize(source, tmp_path / "packed")
    files, memory = qlora_rs.from_pretrained(tmp_path / "packed"), qlora_rs.from_pretrained(source)
    for (name, a), (other, b) in zip(files.named_parameters(), memory.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    assert [len(experts) for experts in experts_of(files)] == [EXPERTS, EXPERTS]
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    layer = experts_of(files)[1][3]
    *_, down = layer
    name = next(key for key in stored if "layers.1" in key and f"experts.3.{down}.weight" in key)
    assert torch.equal(layer[down].weight, stored[name.partition("_absmax")[0]])
    assert not files.training


def test_it_computes_what_transformers_computes_of_the_dequantized_model(source, tmp_path) -> None:
    checkpoint.quantize(source, tmp_path / "packed")
    ours = qlora_rs.from_pretrained(tmp_path / "packed", dtype="float32")
    merged = qlora_rs.from_pretrained(tmp_path / "packed", dtype="float32")
    qlora_rs.merge_adapter(merged, dtype=torch.float32)
    assert not experts_of(merged)
    merged.set_experts_implementation("eager")
    with torch.no_grad():
        for tokens in (TOKENS, TOKENS[:, :1]):
            torch.testing.assert_close(ours(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [QuantSpec("int8", 32), QuantSpec("fp4", 64, False)], ids=QuantSpec.describe)
def test_other_types_load_and_compute(source, tmp_path, spec) -> None:
    checkpoint.quantize(source, tmp_path / "packed", spec)
    model = qlora_rs.from_pretrained(tmp_path / "packed", dtype="float32")
    checkpoint.convert(tmp_path / "packed", tmp_path / "plain", "bf16")
    with torch.no_grad():
        assert torch.allclose(model(TOKENS).logits, eager(tmp_path / "plain")(TOKENS).logits, atol=0.02)


def test_gradients_reach_what_is_below_and_the_router(source) -> None:
    ours = qlora_rs.from_pretrained(source, dtype="float32")
    plain = copy.deepcopy(ours)
    qlora_rs.merge_adapter(plain, dtype=torch.float32)
    plain.set_experts_implementation("eager")
    grads = []
    for model in (ours, plain):
        model.requires_grad_(False)
        inputs = [model.get_input_embeddings().weight, model.model.layers[0].mlp.gate.weight]
        for parameter in inputs:
            parameter.requires_grad_(True)
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        grads.append([parameter.grad for parameter in inputs])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_no_more_than_one_matrix_is_dequantized_and_none_is_kept(source) -> None:
    model = qlora_rs.from_pretrained(source, dtype="float32")
    experts, largest, kept = experts_of(model)[0], 0, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                largest = max(largest, result.numel())
            return result

    x = torch.randn(7, 72, requires_grad=True)
    index = torch.tensor([[0, 1], [1, 2], [4, 0], [2, 4], [0, 4], [1, 0], [2, 0]])
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with Watch(), hooks:
        experts(x, index, torch.full((7, 2), 0.5))
    assert largest <= 2 * 43 * 72
    assert max(t.numel() for t in kept if t.is_floating_point()) <= 7 * 2 * 86


def test_only_chosen_experts_are_computed() -> None:
    model = moe("mixtral")
    qlora_rs.quantize_model(model)
    experts = experts_of(model)[0]
    used = []
    for number, expert in enumerate(experts):
        for layer in expert.values():
            layer.register_forward_pre_hook(lambda *_, number=number: used.append(number))
    experts(torch.randn(3, 72), torch.tensor([[3, 1], [1, 3], [3, 1]]), torch.rand(3, 2))
    assert used == [1, 1, 3, 3]
    assert experts(torch.randn(0, 72), torch.zeros(0, 2, dtype=torch.int64), torch.rand(0, 2)).shape == (0, 72)


def test_a_model_is_packed_in_memory_with_its_experts() -> None:
    model = moe("mixtral")
    expected = qlora_rs.quantize(model.model.layers[1].mlp.experts.down_proj.detach().clone())
    report = qlora_rs.quantize_model(model)
    names = {entry.name: entry for entry in report.packed}
    assert names["model.layers.1.mlp.experts.down_proj"].shape == (EXPERTS, 72, 43)
    assert not any("experts" in entry.name for entry in report.skipped)
    for number, packed in enumerate(split_experts(expected)):
        layer = experts_of(model)[1][number]["down_proj"]
        for part in ("codes", "absmax", "absmax_scale", "absmax_offset"):
            assert torch.equal(getattr(layer.packed(), part), getattr(packed, part)), part


def test_experts_can_be_skipped_in_memory_and_in_files(source, tmp_path) -> None:
    model = moe("mixtral")
    report = qlora_rs.quantize_model(model, skip_modules=["experts"])
    assert not experts_of(model)
    assert any("matches the skip pattern" in entry.reason for entry in report.skipped if "experts" in entry.name)
    checkpoint.quantize(source, tmp_path / "packed", skip_modules=["*.experts.*"])
    loaded = qlora_rs.from_pretrained(tmp_path / "packed")
    assert not experts_of(loaded)
    assert sum(isinstance(module, Linear4bit) for module in loaded.modules()) == 8


def test_nan_in_an_expert_leaves_the_model_as_it_was() -> None:
    model = moe("mixtral")
    model.model.layers[1].mlp.experts.gate_up_proj.data[2, 5, 7] = float("nan")
    before = dict(model.named_modules())
    with pytest.raises(qlora_rs.NonFiniteError, match=r"layers\.1\.mlp\.experts\.gate_up_proj holds 1 NaN"):
        qlora_rs.quantize_model(model)
    assert dict(model.named_modules()) == before


def test_fused_files_are_packed_by_expert_and_load(stacked, tmp_path) -> None:
    checkpoint.quantize(stacked, tmp_path / "packed")
    row = next(
        r for r in checkpoint.inspect(tmp_path / "packed").packed if r.name.endswith("1.mlp.experts.gate_up_proj")
    )
    assert row.shape == (EXPERTS, 86, 72)
    model = qlora_rs.from_pretrained(tmp_path / "packed", dtype="float32")
    memory = moe("qwen3_moe")
    qlora_rs.quantize_model(memory)
    for (name, a), (other, b) in zip(model.named_parameters(), memory.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    assert checkpoint.verify(tmp_path / "packed", stacked).same


@pytest.mark.parametrize("layout", ["single", "stacked"])
def test_what_save_pretrained_writes_loads_again(layout, stacked, tmp_path) -> None:
    folder = stacked
    if layout == "single":
        folder = tmp_path / "single"
        moe("mixtral").save_pretrained(folder)
    checkpoint.quantize(folder, tmp_path / "packed")
    model = qlora_rs.from_pretrained(tmp_path / "packed", dtype="float32")
    model.save_pretrained(tmp_path / "saved")
    if layout == "single":
        assert checkpoint.diff(tmp_path / "packed", tmp_path / "saved").same
    again = qlora_rs.from_pretrained(tmp_path / "saved", dtype="float32")
    for (name, a), (other, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


def test_adapters_of_attention_and_of_experts_train_save_and_merge(family, source, tmp_path, descend) -> None:
    checkpoint.quantize(source, tmp_path / "packed")
    model = qlora_rs.from_pretrained(tmp_path / "packed", dtype="float32")
    report = qlora_rs.attach_lora(copy.deepcopy(model), r=2, seed=0)
    assert len(report.attached) == 8
    assert any("expert" in reason for _, reason in report.skipped)
    report = qlora_rs.attach_lora(model, r=2, seed=0, target_modules=["q_proj", IN_FILES[family][1][0]])
    assert len(report.attached) == 2 + 2 * EXPERTS
    optimizer = torch.optim.AdamW(qlora_rs.lora_parameters(model), lr=0.02)
    losses = descend(model, optimizer, TOKENS, 4)
    assert losses[-1] < losses[0]
    qlora_rs.save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        trained = model(TOKENS).logits
        again = qlora_rs.from_pretrained(tmp_path / "packed", dtype="float32")
        qlora_rs.load_adapter(again, tmp_path / "adapter")
        assert torch.equal(again(TOKENS).logits, trained)
        merge(tmp_path / "packed", tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(eager(tmp_path / "merged")(TOKENS).logits, trained, rtol=1e-3, atol=1e-4)
        qlora_rs.merge_adapter(again, dtype=torch.float32)
        again.set_experts_implementation("eager")
        torch.testing.assert_close(again(TOKENS).logits, trained, rtol=1e-3, atol=1e-4)


def test_merging_takes_the_weights_of_the_16_bit_model(source, tmp_path) -> None:
    model = qlora_rs.from_pretrained(source, dtype="float32")
    qlora_rs.merge_adapter(model, dtype=torch.float32, base=source)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, eager(source)(TOKENS).logits, rtol=1e-3, atol=1e-4)


def test_paged_each_expert_is_a_block() -> None:
    model = moe("mixtral")
    qlora_rs.quantize_model(model)
    with torch.no_grad():
        expected = model(TOKENS).logits
        weights = qlora_rs.paging.page_weights(model, qlora_rs.paging.PagedPool("64KiB", page_size=4096))
        assert "model.layers.1.mlp.experts.4" in weights.blocks
        assert torch.equal(model(TOKENS).logits, expected)


def test_checkpointed_experts_may_keep_their_dequantized_weights(monkeypatch) -> None:
    model = moe("mixtral").train()
    qlora_rs.quantize_model(model)
    qlora_rs.attach_lora(model, r=2, seed=0, target_modules=["q_proj", "down_proj"])
    for parameter in qlora_rs.lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    made: list[int] = []
    dequantize = _bridge.dequantize
    monkeypatch.setattr(_bridge, "dequantize", lambda *arguments: made.append(1) or dequantize(*arguments))
    tokens = torch.randint(101, (3, 113))  # so that every expert gets more than are multiplied without dequantizing
    grads, counts = [], []
    for context_fn in (noop_context_fn, qlora_rs.keep_dequantized):
        settings = {"use_reentrant": False, "context_fn": context_fn}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
        model.zero_grad()
        made.clear()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        counts.append(len(made))
        grads.append([parameter.grad.clone() for parameter in qlora_rs.lora_parameters(model)])
    products = 2 * (4 + 2 * EXPERTS)
    assert counts == [3 * products, 2 * products]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_transformers_own_loader_refuses_and_says_what_loads_it(source, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint.quantize(source, tmp_path / "packed")
    with pytest.raises(UnsupportedError, match=r"experts.*qlora_rs\.from_pretrained"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_experts_packed_in_part_are_told_and_refused(source, family, tmp_path) -> None:
    name = IN_FILES[family][1][2]
    report = checkpoint.quantize(source, tmp_path / "packed", skip_modules=[f"*.experts.2.{name}"])
    assert any("only some weights of" in note for note in report.notes)
    with pytest.raises(UnsupportedError, match=r"experts are packed and others are not"):
        qlora_rs.from_pretrained(tmp_path / "packed")


def test_experts_of_another_size_than_config_json_says_are_a_format_error(source, family, tmp_path) -> None:
    checkpoint.quantize(source, tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    config["intermediate_size" if family == "mixtral" else "moe_intermediate_size"] = 45
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"config\.json asks for"):
        qlora_rs.from_pretrained(tmp_path / "packed")


def test_experts_that_are_computed_in_another_way_stay_with_the_reason() -> None:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    sizes = {"n_routed_experts": 2, "hidden_size": 64, "moe_intermediate_size": 33, "moe_latent_size": None}
    config = type("Config", (), {**sizes, "mlp_hidden_act": "relu2"})()
    model = torch.nn.ModuleDict({"experts": NemotronHExperts(config), "o_proj": torch.nn.Linear(64, 5)})
    report = qlora_rs.quantize_model(model)
    assert not experts_of(model)
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert "no code for such experts (has_gate False" in reasons["experts.up_proj"]
