"""Adapter files that cannot be used: refused by name, and the model stays as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

import qlora_rs
from qlora_rs import FormatError, UnsupportedError
from qlora_rs.adapters import CONFIG_FILE, WEIGHTS_FILE, read_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


Q_PROJ = "model.layers.0.self_attn.q_proj"


KEY = f"base_model.model.{Q_PROJ}.lora_A.weight"


@pytest.fixture
def damaged(adapter: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of `adapter` with changed settings and tensors."""

    def make(change: Callable[[dict], object] | None = None, **settings: object) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(adapter, folder)
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps({**config, **settings}))
        if change is not None:
            tensors = load_file(folder / WEIGHTS_FILE)
            change(tensors)
            save_file(tensors, folder / WEIGHTS_FILE)
        return folder

    return make


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": 4}, "r is 3, but .* has 4"),
        ({"lora_alpha": 6}, "lora_alpha is 5, but .* has 6"),
        ({"use_rslora": True}, "use_rslora is False"),
        ({"target_modules": ["q_proj"]}, "other layers than the model's"),
    ],
    ids=str,
)
def test_other_adapters_on_the_model_are_refused_and_stay(adapted_model, adapter, settings, match) -> None:
    model = adapted_model(**settings)
    before = state(model)
    with pytest.raises(ValueError, match=match):
        qlora_rs.load_adapter(model, adapter)
    assert same_state(model, before)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"layer_replication": [[0, 1]]},
        {"trainable_token_indices": [1]},
        {"a_feature_of_tomorrow": 1},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "a start of tomorrow"},
        {"peft_type": "IA3"},
    ],
    ids=str,
)
def test_what_plain_lora_does_not_have_is_refused_by_name(packed, damaged, settings) -> None:
    folder = damaged(**settings)
    model = qlora_rs.from_pretrained(packed)
    before = state(model)
    with pytest.raises(UnsupportedError, match=rf"{CONFIG_FILE}: .*{next(iter(settings))}"):
        qlora_rs.load_adapter(model, folder)
    assert same_state(model, before)


def test_peft_itself_writes_what_is_refused(plain_model, tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "target_modules": ["q_proj"]}
    for number, change in enumerate(({"use_dora": True}, {"rank_pattern": {"q_proj": 2}}, {"bias": "lora_only"})):
        model = get_peft_model(plain_model(), LoraConfig(**settings, **change))
        model.save_pretrained(tmp_path / str(number))
        with pytest.raises(UnsupportedError, match=next(iter(change))):
            read_adapter(tmp_path / str(number))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(KEY), "q_proj has lora_B but not its other half"),
        (lambda t: t[KEY].view(-1)[4:5].fill_(float("nan")), "q_proj.lora_A.weight holds NaN"),
        (lambda t: t[KEY].view(-1)[4:5].fill_(float("inf")), "q_proj.lora_A.weight holds NaN or inf"),
        (lambda t: t.update({KEY: torch.ones(2, 72)}), r"q_proj: expected A \[r, in\].* r = 3, got \[2, 72\]"),
        (lambda t: t.update({KEY: torch.ones(3 * 72)}), r"q_proj: expected A .*got \[216\]"),
        (lambda t: t.update({KEY: torch.ones(3, 71)}), r"q_proj: .* \[72, 71\].* \[72, 72\].*another model"),
        (lambda t: t.update({KEY: torch.ones(3, 72, dtype=torch.int32)}), "expected a float tensor, got torch.int32"),
        (lambda t: t.clear(), "no adapter tensors"),
        (lambda t: t.update({"lm_head.weight": torch.ones(2)}), "cannot use the tensor 'lm_head.weight'"),
        (
            lambda t: t.update({f"base_model.model.model.norm.lora_{x}.weight": torch.ones(3, 3) for x in "AB"}),
            "model.norm should be a Linear layer, but the model has a LlamaRMSNorm",
        ),
        (
            lambda t: t.update({f"base_model.model.model.layers.7.lora_{x}.weight": torch.ones(3, 3) for x in "AB"}),
            r"model.layers.7 should be a Linear layer, but the model has none",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_an_error_and_change_nothing(packed, damaged, change, match) -> None:
    folder = damaged(change)
    model = qlora_rs.from_pretrained(packed)
    before = state(model)
    with pytest.raises(qlora_rs.QloraError, match=match):
        qlora_rs.load_adapter(model, folder)
    assert same_state(model, before)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 0},
        {"r": True},
        {"r": "3"},
        {"r": None},
        {"lora_alpha": float("inf")},
        {"lora_alpha": -1},
        {"lora_alpha": None},
        {"lora_dropout": 1},
        {"lora_dropout": "x"},
        {"use_rslora": 1},
    ],
    ids=str,
)
def test_settings_out_of_range_name_file_and_setting(damaged, settings) -> None:
    with pytest.raises(FormatError, match=rf"{CONFIG_FILE}: {next(iter(settings))} is"):
        read_adapter(damaged(**settings))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"peft_type"'])
def test_a_config_that_is_no_json_object_is_an_error(damaged, content) -> None:
    folder = damaged()
    (folder / CONFIG_FILE).write_bytes(content)
    with pytest.raises(FormatError, match=CONFIG_FILE):
        read_adapter(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_an_error(damaged, keep) -> None:
    folder = damaged()
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=rf"{WEIGHTS_FILE}: not a whole safetensors file"):
        read_adapter(folder)


def test_files_that_are_missing_are_named(damaged, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent/adapter_config\.json"):
        read_adapter(tmp_path / "absent")
    folder = damaged()
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UnsupportedError, match="pickle"):
        read_adapter(folder)


def test_halves_in_16_bits_are_read_into_float32(damaged) -> None:
    folder = damaged()
    tensors = {name: value.bfloat16() for name, value in load_file(folder / WEIGHTS_FILE).items()}
    (folder / WEIGHTS_FILE).write_bytes(save(tensors))
    _, pairs = read_adapter(folder)
    assert {half.dtype for pair in pairs.values() for half in pair} == {torch.float32}
    assert torch.equal(pairs[Q_PROJ][0], tensors[KEY].float())
