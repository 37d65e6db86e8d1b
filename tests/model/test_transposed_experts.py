"""Experts whose matrices transformers holds as (in, out), with biases (GPT-OSS) or inputs of their own (Llama 4)."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qlora_rs
from mixtures import EXPERTS, HIDDEN, INNER, SHARED, TOKENS, eager, experts_of
from qlora_rs import FormatError, Linear4bit, QuantSpec, UnsupportedError, checkpoint, reference
from qlora_rs.experts import OwnInputExperts, PackedExperts, quantize_transposed
from qlora_rs.merge import merge
from qlora_rs.model import load_float
from qlora_rs.quantization import dequantize, quantize

LOCAL = {**SHARED, "intermediate_size": INNER, "head_dim": 18, "num_local_experts": EXPERTS}
WHERE = {"gpt_oss": "model.layers.{}.mlp.experts", "llama4": "model.layers.{}.feed_forward.experts"}
FUSED = ("gate_up_proj", "down_proj")


def moe(family: str, **changes: object):
    from transformers import GptOssConfig, GptOssForCausalLM, Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(5)
    if family == "gpt_oss":
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        config = GptOssConfig(**{**LOCAL, "rope_parameters": rope, **changes})
        model = GptOssForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("_bias"):
                torch.nn.init.normal_(parameter)
        return model
    options = {"intermediate_size_mlp": 50, "interleave_moe_layer_step": 1, "pad_token_id": 0}
    return Llama4ForCausalLM(Llama4TextConfig(**{**LOCAL, **options, **changes}))


@pytest.fixture(params=list(WHERE))
def family(request) -> str:
    return request.param


@pytest.fixture
def source(family, tmp_path) -> Path:
    """A folder as transformers saves one, and as the hub has them: experts fused and transposed."""
    moe(family).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def packed(source, tmp_path) -> Path:
    checkpoint.quantize(source, tmp_path / "packed")
    return tmp_path / "packed"


def metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return file.metadata()


def test_each_experts_matrix_is_packed_transposed_with_the_bits_of_the_reference(family, source, packed) -> None:
    weights, stored = load_file(source / "model.safetensors"), load_file(packed / "model.safetensors")
    loaded = qlora_rs.from_pretrained(packed)
    assert [len(experts) for experts in experts_of(loaded)] == [EXPERTS, EXPERTS]
    zero = reference.zero_code(reference.codebook_of("nf4"))
    for name, shape in zip(FUSED, [(2 * INNER, HIDDEN), (HIDDEN, INNER)], strict=True):
        full = f"{WHERE[family].format(1)}.{name}"
        for number in range(EXPERTS):
            codes, absmax = reference.quantize_blocks(weights[full][number].T.contiguous(), 64)
            assert codes.shape == shape
            assert torch.equal(stored[full][number], reference.pack(codes, zero))
            scales, groups, offset = reference.double_quantize(absmax)
            assert torch.equal(stored[f"{full}_absmax"][number], scales)
            assert torch.equal(stored[f"{full}_absmax_scale"][number].view(torch.float32), groups)
            assert torch.equal(stored[f"{full}_absmax_offset"][number : number + 1].view(torch.float32), offset)
            layer = experts_of(loaded)[1][number][name]
            assert torch.equal(layer.weight, stored[full][number])
            assert tuple(layer.packed().shape) == shape


def test_the_folder_says_what_is_transposed_and_inspect_and_the_report_tell_the_shape(family, source, tmp_path) -> None:
    report = checkpoint.quantize(source, tmp_path / "packed")
    name = f"{WHERE[family].format(0)}.down_proj"
    assert metadata(tmp_path / "packed")[f"{name}.transposed"] == "true"
    assert metadata(tmp_path / "packed")[f"{name}.shape"] == json.dumps([EXPERTS, HIDDEN, INNER])
    row = next(row for row in checkpoint.inspect(tmp_path / "packed").tensors if row.name == name)
    assert (row.shape, row.float_shape, row.transposed) == ((EXPERTS, HIDDEN, INNER), (EXPERTS, INNER, HIDDEN), True)
    assert next(entry for entry in report.packed if entry.name == name).shape == row.shape
    assert not any(row.transposed for row in checkpoint.inspect(tmp_path / "packed").tensors if "attn" in row.name)


def test_loading_quantizing_on_the_way_in_and_packing_in_memory_give_the_same_bytes(family, source, packed) -> None:
    models = [qlora_rs.from_pretrained(packed), qlora_rs.from_pretrained(source), moe(family)]
    report = qlora_rs.quantize_model(models[2])
    entry = next(each for each in report.packed if each.name == f"{WHERE[family].format(0)}.gate_up_proj")
    assert entry.shape == (EXPERTS, 2 * INNER, HIDDEN)
    assert report.bytes_after == sum(parameter.nbytes for parameter in models[2].parameters())
    listed = sum(each.bytes_after for each in report.packed) + sum(each.bytes for each in report.skipped)
    assert listed == report.bytes_after
    for other in models[1:]:
        for (name, a), (same, b) in zip(models[0].named_parameters(), other.named_parameters(), strict=True):
            assert name == same
            assert torch.equal(a, b.to(a.dtype)), name
    kinds = {type(module) for module in experts_of(models[0])}
    assert kinds == {OwnInputExperts if family == "llama4" else PackedExperts}


def test_it_computes_what_transformers_computes_of_the_dequantized_model(packed) -> None:
    ours = qlora_rs.from_pretrained(packed, dtype="float32")
    merged = copy.deepcopy(ours)
    qlora_rs.merge_adapter(merged, dtype=torch.float32)
    assert not experts_of(merged)
    merged.set_experts_implementation("eager")
    with torch.no_grad():
        for tokens in (TOKENS, TOKENS[:, 7:8], TOKENS.view(1, -1).repeat(3, 1)):
            torch.testing.assert_close(ours(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-5)


def test_gradients_of_embedding_router_and_biases_are_those_of_the_dequantized_model(family, packed) -> None:
    ours = qlora_rs.from_pretrained(packed, dtype="float32").train()
    plain = copy.deepcopy(ours)
    qlora_rs.merge_adapter(plain, dtype=torch.float32)
    plain.set_experts_implementation("eager")
    grads = []
    for model in (ours, plain):
        model.requires_grad_(False)
        block = model.model.layers[0].mlp if family == "gpt_oss" else model.model.layers[0].feed_forward
        inputs = [model.get_input_embeddings().weight, block.router.weight]
        for parameter in inputs:
            parameter.requires_grad_(True)
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        grads.append([parameter.grad for parameter in inputs])
    for mine, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("path", "config"),
    [
        ("gpt_oss.modeling_gpt_oss.GptOssExperts", {"swiglu_alpha": 1.7, "swiglu_limit": 7.0}),
        ("openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts", {}),
        ("aria.modeling_aria.AriaExperts", {"moe_num_experts": 3}),
    ],
)
def test_every_transposed_module_of_the_interface_computes_as_eager_and_comes_back_as_it_was(path, config) -> None:
    module, _, cls = path.rpartition(".")
    sizes = {"hidden_size": 65, "intermediate_size": 33, "num_local_experts": 3}
    limits = {"swiglu_alpha": 1.5, "swiglu_limit": 3.0, "_experts_implementation": "eager"}
    settings = type("Config", (), {**sizes, **limits, **config})()
    fused = getattr(importlib.import_module(f"transformers.models.{module}"), cls)(settings)
    torch.manual_seed(1)
    for parameter in fused.parameters():
        torch.nn.init.normal_(parameter)
    spec = QuantSpec(block_size=32)
    ours = PackedExperts.from_float(fused, spec)
    plain = ours.fused(lambda layer: layer.dequantize(torch.float32))
    for (name, a), (same, b) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        assert name == same
        expected = b if name.endswith("_bias") else dequantize(quantize(b.mT, spec)).mT
        assert torch.equal(a, expected), name
    x, index, weights = torch.randn(7, 65), torch.randint(3, (7, 2)), torch.rand(7, 2)
    torch.testing.assert_close(ours(x, index, weights), plain(x, index, weights), rtol=1e-4, atol=1e-4)
    assert ours(x[:0], index[:0], weights[:0]).shape == (0, 65)


def test_of_own_inputs_only_the_rows_that_are_given_are_computed() -> None:
    model = moe("llama4")
    qlora_rs.quantize_model(model)
    experts, seen = experts_of(model)[0], []
    for number, expert in enumerate(experts):
        expert["down_proj"].register_forward_pre_hook(lambda _, args, n=number: seen.append((n, len(args[0]))))
    x = torch.zeros(EXPERTS, 4, HIDDEN)
    x[1, 2], x[4, 0], x[4, 3] = torch.randn(3, HIDDEN)
    y = experts(x.view(-1, HIDDEN)).view(x.shape)
    assert seen == [(1, 1), (4, 2)]
    assert bool((y.abs().sum(-1) > 0).equal(x.abs().sum(-1) > 0))


@pytest.mark.parametrize("shape", [(3, 65, 7), (1, 64, 1), (2, 3, 129), (0, 5, 9), (4, 0, 9), (131, 33)])
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec("int8", 32, False)], ids=QuantSpec.describe)
def test_quantizing_transposed_one_by_one_is_quantizing_the_transposed(shape, spec) -> None:
    stack = torch.randn(shape)
    ours, whole = quantize_transposed(stack, spec), quantize(stack.mT.contiguous(), spec)
    assert ours.shape == whole.shape == (*shape[:-2], shape[-1], shape[-2])
    for part in ("codes", "absmax", "absmax_scale", "absmax_offset"):
        mine, theirs = getattr(ours, part), getattr(whole, part)
        assert mine is theirs is None or torch.equal(mine, theirs), part


def test_any_slices_threads_and_shards_give_the_same_bytes(source, packed, tmp_path) -> None:
    checkpoint.quantize(source, tmp_path / "other", slice_bytes=777, num_threads=1)
    assert (tmp_path / "other/model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()
    checkpoint.quantize(source, tmp_path / "cut", max_shard_size=20_000)
    assert len(checkpoint.inspect(tmp_path / "cut").files) > 3
    assert checkpoint.diff(packed, tmp_path / "cut").same
    assert checkpoint.verify(tmp_path / "cut", source).same


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_an_interrupted_quantize_is_resumed_to_the_same_bytes(source, packed, tmp_path, share) -> None:
    def stop(done: int, total: int) -> None:
        if done > share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="the same command resumes it"):
        checkpoint.quantize(source, tmp_path / "resumed", slice_bytes=500, progress=stop)
    assert not (tmp_path / "resumed").exists()
    assert (tmp_path / "resumed.partial").exists()
    checkpoint.quantize(source, tmp_path / "resumed")
    names = sorted(path.name for path in packed.iterdir())
    assert sorted(path.name for path in (tmp_path / "resumed").iterdir()) == names
    for name in names:
        assert (tmp_path / "resumed" / name).read_bytes() == (packed / name).read_bytes(), name


def test_in_sixteen_bits_again_it_has_the_layout_and_names_that_transformers_wrote(source, packed, tmp_path) -> None:
    checkpoint.convert(packed, tmp_path / "plain", "bf16")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "plain/model.safetensors")
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    for name, weight in before.items():
        if ".experts." in name and not name.endswith("_bias"):
            expected = dequantize(quantize(weight.mT), torch.bfloat16).mT
            assert torch.equal(after[name], expected), name
    ours = qlora_rs.from_pretrained(packed, dtype="float32")
    with torch.no_grad():
        assert torch.allclose(eager(tmp_path / "plain")(TOKENS).logits, ours(TOKENS).logits, atol=0.02)


def test_verify_and_diff_see_one_changed_value_of_an_expert(family, source, packed, tmp_path) -> None:
    assert checkpoint.verify(packed, source).same
    changed = tmp_path / "changed"
    changed.mkdir()
    weights = load_file(source / "model.safetensors")
    name = f"{WHERE[family].format(1)}.gate_up_proj"
    weights[name][3, 5, 7] += 1
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    (changed / "config.json").write_text((source / "config.json").read_text())
    verdicts = {each.name: each for each in checkpoint.verify(packed, changed, check="tensors").tensors}
    assert [each.name for each in verdicts.values() if each.status != "same"] == [name]
    pair = next(each for each in checkpoint.diff(source, changed).tensors if each.status != "same")
    assert (pair.name, pair.differing_values) == (name, 1)


def test_diff_measures_a_packed_weight_against_its_transposed_source(family, source, packed) -> None:
    report = checkpoint.diff(source, packed)
    weights = load_file(source / "model.safetensors")
    for name in FUSED:
        full = f"{WHERE[family].format(0)}.{name}"
        found = next(each for each in report.tensors if each.name == full)
        error = dequantize(quantize(weights[full].mT)).mT.double() - weights[full].double()
        assert found.norm_difference == pytest.approx(float(error.norm()), rel=1e-6)
        assert found.max_abs_difference == pytest.approx(float(error.abs().max()), rel=1e-6)
    measured = {each.name: each.error for each in checkpoint.analyze(packed, source).weights}
    assert measured[full].relative == pytest.approx(float(error.norm() / weights[full].double().norm()), rel=1e-5)


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec("int8", 32, False)], ids=QuantSpec.describe)
def test_save_pretrained_writes_what_quantize_does(source, tmp_path, spec) -> None:
    checkpoint.quantize(source, tmp_path / "packed", spec)
    model = qlora_rs.from_pretrained(source, spec, dtype="float32")
    model.save_pretrained(tmp_path / "saved")
    assert checkpoint.diff(tmp_path / "packed", tmp_path / "saved").same
    assert checkpoint.verify(tmp_path / "saved", source).same
    marks = [{k: v for k, v in metadata(tmp_path / each).items() if ".experts." in k} for each in ("packed", "saved")]
    assert marks[0] == marks[1]
    again = qlora_rs.from_pretrained(tmp_path / "saved", dtype="float32")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)


def test_adapters_of_experts_train_save_and_merge(family, source, packed, tmp_path, descend) -> None:
    model = qlora_rs.from_pretrained(packed, dtype="float32")
    report = qlora_rs.attach_lora(copy.deepcopy(model), r=2, seed=0)
    assert not any(".experts." in name for name in report.attached)
    targets = ["q_proj", "*.experts.1.down_proj", "gate_up_proj"]
    report = qlora_rs.attach_lora(model, r=2, seed=0, target_modules=targets)
    assert sum(".experts." in name for name in report.attached) == 2 * EXPERTS + 2
    optimizer = torch.optim.AdamW(qlora_rs.lora_parameters(model), lr=0.02)
    losses = descend(model, optimizer, TOKENS, 4)
    assert losses[-1] < losses[0]
    qlora_rs.save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        trained = model(TOKENS).logits
        again = qlora_rs.from_pretrained(packed, dtype="float32")
        qlora_rs.load_adapter(again, tmp_path / "adapter")
        assert torch.equal(again(TOKENS).logits, trained)
        merge(packed, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(eager(tmp_path / "merged")(TOKENS).logits, trained, rtol=1e-3, atol=1e-4)
        qlora_rs.merge_adapter(again, dtype=torch.float32)
        again.set_experts_implementation("eager")
        torch.testing.assert_close(again(TOKENS).logits, trained, rtol=1e-3, atol=1e-4)
        # Over the 16-bit weights files and memory give one model too.
        merge(packed, tmp_path / "adapter", tmp_path / "over", dtype=torch.float32, base=source)
        memory = qlora_rs.from_pretrained(packed, dtype="float32")
        qlora_rs.load_adapter(memory, tmp_path / "adapter")
        qlora_rs.merge_adapter(memory, dtype=torch.float32, base=source)
        over = load_float(tmp_path / "over", dtype="float32").state_dict()
        for name, tensor in memory.state_dict().items():
            torch.testing.assert_close(tensor, over[name], rtol=0, atol=1e-6)
        merge(source, tmp_path / "adapter", tmp_path / "plain", dtype=torch.float32)
        plain = load_file(tmp_path / "plain/model.safetensors")
        for name, tensor in load_file(tmp_path / "over/model.safetensors").items():
            assert torch.equal(tensor, plain[name]), name


def test_merging_takes_the_weights_of_the_16_bit_model(source) -> None:
    model = qlora_rs.from_pretrained(source, dtype="float32")
    qlora_rs.merge_adapter(model, dtype=torch.float32, base=source)
    expected = load_float(source, dtype="float32").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_paged_each_expert_is_a_block(family) -> None:
    model = moe(family)
    qlora_rs.quantize_model(model)
    with torch.no_grad():
        expected = model(TOKENS).logits
        weights = qlora_rs.paging.page_weights(model, qlora_rs.paging.PagedPool("64KiB", page_size=4096))
        assert f"{WHERE[family].format(1)}.4" in weights.blocks
        assert torch.equal(model(TOKENS).logits, expected)


def test_nan_in_an_expert_is_refused_with_its_place_in_the_file(family, source, tmp_path) -> None:
    weights = load_file(source / "model.safetensors")
    name = f"{WHERE[family].format(1)}.down_proj"
    weights[name][2, 3, 70] = float("inf")
    weights[name][2, 5, 1] = float("nan")
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    first = (2 * INNER + 3) * HIDDEN + 70
    with pytest.raises(qlora_rs.NonFiniteError, match=rf"{name}.*\b2\b.*{first}"):
        checkpoint.quantize(source, tmp_path / "packed", slice_bytes=1000)
    assert list(tmp_path.iterdir()) == [source]
    with pytest.raises(qlora_rs.NonFiniteError, match="down_proj"):
        qlora_rs.from_pretrained(source)


def test_what_was_packed_as_the_file_holds_it_converts_and_is_refused_by_the_loader(family, source, tmp_path) -> None:
    """Folders of versions that packed such weights only where --include named them, along the other dimension."""
    include, weights = ["*_proj"], load_file(source / "model.safetensors")
    folder = tmp_path / "old"
    config = json.loads((source / "config.json").read_text())
    source_of_unknown = tmp_path / "unknown"
    source_of_unknown.mkdir()
    (source_of_unknown / "config.json").write_text(json.dumps({**config, "model_type": "unknown", "architectures": []}))
    save_file(weights, source_of_unknown / "model.safetensors", {"format": "pt"})
    checkpoint.quantize(source_of_unknown, folder, include=[*include, "q_proj.weight"][:1])
    packed_config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": packed_config["quantization_config"]})
    )
    name = f"{WHERE[family].format(0)}.gate_up_proj"
    row = next(row for row in checkpoint.inspect(folder).packed if row.name == name)
    assert (row.shape, row.transposed) == ((EXPERTS, HIDDEN, 2 * INNER), False)
    with pytest.raises(UnsupportedError, match=r"packed as it is, but .* quantize the 16-bit model again"):
        qlora_rs.from_pretrained(folder)
    checkpoint.convert(folder, tmp_path / "plain", "bf16")
    plain = load_file(tmp_path / "plain/model.safetensors")
    assert torch.equal(plain[name], dequantize(quantize(weights[name]), torch.bfloat16))
    checkpoint.quantize(source, tmp_path / "new")
    found = next(each for each in checkpoint.diff(folder, tmp_path / "new").tensors if each.name == name)
    assert "packed as it is / transposed" in found.reasons
    values = dequantize(quantize(weights[name])).double() - dequantize(quantize(weights[name].mT)).mT.double()
    assert found.norm_difference == pytest.approx(float(values.norm()), rel=1e-6)


def test_targets_that_cannot_hold_them_say_so(source, packed, tmp_path) -> None:
    with pytest.raises(UnsupportedError, match=r"packed transposed.*--to bf16"):
        checkpoint.convert(packed, tmp_path / "bnb", "bitsandbytes")
    with pytest.raises(UnsupportedError, match="no Linear layer's weight"):
        checkpoint.convert(packed, tmp_path / "ct", "compressed-tensors")
    with pytest.raises(UnsupportedError):
        checkpoint.convert(packed, tmp_path / "model.gguf", "gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "packed"}


def test_compressed_tensors_of_the_16_bit_model_leaves_the_experts_in_floats(family, tmp_path) -> None:
    moe(family, hidden_size=64, head_dim=16).save_pretrained(tmp_path / "source")
    report = checkpoint.convert(tmp_path / "source", tmp_path / "ct", "compressed-tensors")
    assert any("4 stacks of experts stay as they are" in note for note in report.notes)
    stored = load_file(tmp_path / "ct/model.safetensors")
    name = f"{WHERE[family].format(0)}.gate_up_proj"
    assert torch.equal(stored[name], load_file(tmp_path / "source/model.safetensors")[name])


@pytest.mark.parametrize("value", ["yes", ""])
def test_a_mark_that_is_none_is_a_format_error(family, packed, value) -> None:
    name = f"{WHERE[family].format(0)}.down_proj"
    tensors, known = load_file(packed / "model.safetensors"), metadata(packed)
    save_file(tensors, packed / "model.safetensors", {**known, f"{name}.transposed": value})
    with pytest.raises(FormatError, match=r"down_proj\.transposed.*expected 'true'"):
        checkpoint.inspect(packed)


def test_experts_packed_in_part_are_told_and_refused(source, tmp_path) -> None:
    report = checkpoint.quantize(source, tmp_path / "packed", skip_modules=["*.experts.down_proj"])
    assert any("only some weights of" in note for note in report.notes)
    with pytest.raises(UnsupportedError, match=r"experts are packed and others are not"):
        qlora_rs.from_pretrained(tmp_path / "packed")


def test_skipped_experts_stay_as_transformers_has_them(source, tmp_path) -> None:
    checkpoint.quantize(source, tmp_path / "packed", skip_modules=["*.experts.*"])
    model = qlora_rs.from_pretrained(tmp_path / "packed", dtype="float32")
    assert not experts_of(model)
    assert any(isinstance(module, Linear4bit) for module in model.modules())
    kept = load_file(source / "model.safetensors")
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            assert torch.equal(parameter, kept[name]), name


@pytest.mark.parametrize(
    "work",
    [
        lambda packed, source, out: checkpoint.quantize(source, out),
        lambda packed, source, out: checkpoint.convert(source, out, "bf16"),
        lambda packed, source, out: checkpoint.verify(packed, source),
        lambda packed, source, out: qlora_rs.from_pretrained(source),
    ],
    ids=["quantize", "convert", "verify", "load"],
)
def test_mxfp4_folders_are_refused_with_the_way_out(work, source, packed, tmp_path) -> None:
    path = source / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(UnsupportedError, match=r"MXFP4.*Mxfp4Config\(dequantize=True\)"):
        work(packed, source, tmp_path / "out")
    assert checkpoint.inspect(source).unread is not None


def test_experts_of_the_text_part_of_a_larger_model_are_packed_too(tmp_path) -> None:
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    images = {"image_size": 28, "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32}
    vision = {**sizes, **images, "projector_output_dim": 32}
    text = moe("llama4").config.to_dict()
    model = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision, pad_token_id=0))
    model.save_pretrained(tmp_path / "source")
    checkpoint.quantize(tmp_path / "source", tmp_path / "packed")
    loaded = qlora_rs.from_pretrained(tmp_path / "packed", dtype="float32")
    assert len(experts_of(loaded.language_model)) == 2
    loaded.save_pretrained(tmp_path / "saved")
    assert checkpoint.diff(tmp_path / "packed", tmp_path / "saved").same
    checkpoint.convert(tmp_path / "packed", tmp_path / "plain", "bf16")
    with torch.no_grad():
        expected = eager(tmp_path / "plain").language_model(TOKENS).logits
        assert torch.allclose(loaded.language_model(TOKENS).logits, expected, atol=0.02)
