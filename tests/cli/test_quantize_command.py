"""``qlora-rs quantize``: results, messages and exit codes."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 13,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"}
        found |= {f"{prefix}mlp.{name}_proj.weight": (13, 8) for name in ("gate", "up")}
        found |= {f"{prefix}mlp.down_proj.weight": (8, 13)}
        found |= {f"{prefix}{name}_layernorm.weight": (8,) for name in ("input", "post_attention")}
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({name: torch.ones(shape) for name, shape in shapes().items()}, folder / "model.safetensors")
    return folder


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_results_go_to_stdout_and_messages_to_stderr(command, source, tmp_path):
    outcome = command("quantize", source, tmp_path / "packed")
    assert outcome.code == 0, outcome.err
    assert "packed 14 weights" in outcome.out
    assert "model.embed_tokens.weight" in outcome.out
    assert str(tmp_path / "packed") in outcome.err_words
    assert sorted(os.listdir(tmp_path / "packed")) == ["config.json", "model.safetensors"]


def test_options_reach_the_output(command, source, tmp_path):
    options = (
        "--type",
        "int8",
        "--block-size",
        "32",
        "--no-double-quant",
        "--skip",
        "v_proj",
        "--skip",
        "*.0.mlp.*",
    )
    assert command("quantize", source, tmp_path / "packed", *options, "--jobs", 1).code == 0
    config = config_of(tmp_path / "packed")
    assert (config["quant_type"], config["block_size"], config["double_quant"]) == ("int8", 32, False)
    assert "model.layers.1.self_attn.v_proj" in config["modules_to_not_convert"]
    assert "model.layers.0.mlp.up_proj" in config["modules_to_not_convert"]
    assert "model.layers.1.mlp.up_proj" not in config["modules_to_not_convert"]


@pytest.mark.parametrize(("quant_type", "zero"), [("dynamic8", 127), ("udynamic8", 0)])
def test_dynamic_maps_are_types_of_a_byte_a_weight(command, source, tmp_path, quant_type, zero):
    path = "model.layers.0.mlp.down_proj.weight"
    tensors = {name: torch.zeros(shape) for name, shape in shapes().items()}
    tensors[path][3, 5] = 0.5
    save_file(tensors, source / "model.safetensors")
    assert command("quantize", source, tmp_path / "packed", "--type", quant_type).code == 0
    assert config_of(tmp_path / "packed")["quant_type"] == quant_type
    codes = load_file(tmp_path / "packed" / "model.safetensors")[path]
    assert codes.shape == (8, 13)
    assert (int(codes[3, 5]), codes[3, :5].unique().tolist()) == (255, [zero])


def test_a_codebook_is_given_as_values_or_as_a_file(command, source, tmp_path):
    values = [-1.0, -0.25, 0.0, 0.5]
    (tmp_path / "book.json").write_text(json.dumps(values))
    listed = ("--codebook", "-1,-0.25,0,0.5")
    for name, options in (
        ("listed", listed),
        ("file", ("--codebook", tmp_path / "book.json")),
        ("typed", ("--type", "codebook", *listed)),
    ):
        assert command("quantize", source, tmp_path / name, *options).code == 0
        config = config_of(tmp_path / name)
        assert (config["quant_type"], config["codebook"]) == ("codebook", values)
    stored = {(tmp_path / name / "model.safetensors").read_bytes() for name in ("listed", "file", "typed")}
    assert len(stored) == 1


def test_json_is_one_document_and_dry_run_writes_nothing(command, source, tmp_path):
    outcome = command("quantize", source, tmp_path / "packed", "--json", "--dry-run", "--include", "embed_tokens")
    report = json.loads(outcome.out)
    assert len(report["packed"]) == 15
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent", "packed"], "no such model folder"),
        (["source", "packed", "--type", "nf5"], "nf4, fp4, int4, int8"),
        (["source", "packed", "--block-size", "63"], "32, 64"),
        (["source", "packed", "--codebook", "-1,zero,1"], "numbers separated by commas"),
        (["source", "packed", "--codebook", "1,-1"], "ascending"),
        (["source", "packed", "--codebook", "0"], "2 to 256 values"),
        (["source", "packed", "--codebook", "absent.json"], "absent.json: No such file"),
        (["source", "packed", "--codebook", "source/config.json"], "JSON list of numbers"),
        (["source", "packed", "--codebook", "source/model.safetensors"], "numbers separated by commas"),
        (["source", "packed", "--codebook", "-1,0,1", "--type", "int8"], "cannot go with quant_type='int8'"),
        (["source", "packed", "--type", "codebook"], "needs codebook"),
        (["source", "packed", "--skip", "q_porj"], "q_proj"),
        (["source", "source/packed"], "choose another"),
        (["source", "taken"], "--overwrite"),
        (["source"], "DST"),
        (["source", "packed", "--jobs", "-1"], "--jobs"),
    ],
)
def test_wrong_use_is_exit_code_2_with_a_message_that_helps(command, source, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    outcome = command("quantize", *arguments)
    assert outcome.code == 2
    assert message in outcome.err_words
    assert outcome.out == ""
    assert sorted(os.listdir(tmp_path)) == ["source", "taken"]


def test_bad_input_is_exit_code_2_and_names_file_and_tensor(command, source, tmp_path):
    weights = {name: torch.ones(shape) for name, shape in shapes().items()}
    weights["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(weights, source / "model.safetensors")
    outcome = command("quantize", source, tmp_path / "packed", "--json")
    assert (outcome.code, outcome.out) == (2, "")
    for part in ("model.safetensors", "model.layers.1.mlp.up_proj.weight", "1 NaN", "index 19"):
        assert part in outcome.err_words


def test_a_full_disk_is_exit_code_3(command, source, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    outcome = command("quantize", source, tmp_path / "packed")
    assert outcome.code == 3
    assert "0 B are free" in outcome.err_words


def test_ctrl_c_is_exit_code_130_and_says_what_is_left(command, source, tmp_path, monkeypatch):
    @contextmanager
    def interrupting(label):
        yield lambda done, total: signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("qlora_rs.cli.output.progress_bytes", interrupting)
    outcome = command("quantize", source, tmp_path / "packed")
    assert outcome.code == 130
    assert "packed.partial" in outcome.err_words
    assert sorted(os.listdir(tmp_path)) == ["packed.partial", "source"]


def test_a_real_ctrl_c_ends_the_real_process(source, tmp_path):
    # 4 GB of zeros that take no space, so that the signal surely comes in the middle.
    config = CONFIG | {"hidden_size": 16384, "intermediate_size": 20_000, "num_hidden_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    sizes = {8: 16384, 13: 20_000}
    for name, shape in shapes().items():
        if ".layers.1." not in name:
            full = [sizes.get(size, size) for size in shape]
            end = offset + 4 * torch.Size(full).numel()
            header[name], offset = {"dtype": "F32", "shape": full, "data_offsets": [offset, end]}, end
    text = json.dumps(header).encode()
    with open(source / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from qlora_rs.cli import main; main()",
            "quantize",
            source,
            tmp_path / "packed",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not (tmp_path / "packed.partial" / "model.safetensors").exists():
            assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert "packed.partial" in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "packed").exists()


def test_help_teaches_with_an_example(command):
    outcome = command("quantize", "--help")
    assert outcome.code == 0
    assert "qlora-rs quantize Llama-3.2-1B" in outcome.out
    for option in ("--type", "--codebook", "--block-size", "--skip", "--include", "--overwrite", "--dry-run", "--json"):
        assert option in outcome.out
