"""``qlora-rs convert``: results, messages and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from qlora_rs import QuantSpec, checkpoint

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "bitsandbytes"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The golden source, packed natively; read-only."""
    folder = tmp_path_factory.mktemp("packed") / "nf4"
    checkpoint.quantize(GOLDEN / "source", folder, QuantSpec("nf4", 64, False))
    return folder


def test_results_go_to_stdout_and_messages_to_stderr(command, packed, tmp_path):
    outcome = command("convert", packed, tmp_path / "out", "--to", "bitsandbytes")
    assert outcome.code == 0, outcome.err
    assert "7 weights (nf4, block_size=64, double_quant=False) from qlora_rs to bitsandbytes" in outcome.out_words
    assert outcome.err == f"written to {tmp_path / 'out'}\n"
    for name in os.listdir(GOLDEN / "nf4"):
        assert (tmp_path / "out" / name).read_bytes() == (GOLDEN / "nf4" / name).read_bytes(), name


@pytest.mark.parametrize("to", ["native", "bitsandbytes", "bf16", "fp16"])
def test_json_is_one_document(command, tmp_path, to):
    outcome = command("convert", GOLDEN / "nf4-double-sharded", tmp_path / "out", "--to", to, "--json")
    report = json.loads(outcome.out)
    assert (report["source"], report["target"], report["weights"], report["kept"]) == ("bitsandbytes", to, 7, 9)
    assert report["files"] == ["model.safetensors"]
    assert report["bytes_after"] == checkpoint.inspect(tmp_path / "out").total_bytes
    expected = {"native": "qlora_rs", "bitsandbytes": "bitsandbytes"}.get(to, "float")
    assert checkpoint.inspect(tmp_path / "out").format == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{packed}", "out", "--to", "exl2"], "native, bitsandbytes, bf16, fp16, compressed-tensors, gguf"),
        (["{packed}", "out", "--to", "gguf", "--type", "q4_k"], "f16, q8_0, bf16"),
        (["{packed}", "out", "--to", "bf16", "--type", "f16"], "for gguf alone"),
        (["{packed}", "out", "--to", "bf16", "--block-size", "32"], "goes with compressed-tensors alone"),
        (["{packed}", "out", "--to", "bf16", "--double-quant"], "--double-quant goes with --to native"),
        (["{packed}", "out", "--to", "native", "--type", "int8"], "a data type goes with what GPTQ, AWQ or"),
        (["{packed}", "out", "--to", "compressed-tensors", "--block-size", "64"], "a group size, 32 or 128"),
        (["{packed}", "out", "--to", "compressed-tensors", "--type", "nf4"], "is written as int4 with plain scales"),
        (["{packed}", "out"], "--to"),
        (["{packed}", "out", "--to", "native"], "is in the native format already"),
        (["{packed}", "taken", "--to", "bf16"], "--overwrite"),
        (["{packed}", "{packed}/inside", "--to", "bf16"], "lies in the source"),
        (["{packed}", "{packed}", "--to", "bf16", "--overwrite"], "lies in the source"),
        (["nowhere", "out", "--to", "bf16"], "no such model folder"),
        (["{packed}/model.safetensors", "out", "--to", "bf16"], "not a model folder"),
        (["{golden}/source", "out", "--to", "bf16"], "is not packed"),
    ],
)
def test_wrong_use_is_exit_code_2_and_makes_nothing(command, packed, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    before = sorted(os.listdir(packed))
    outcome = command("convert", *(argument.format(packed=packed, golden=GOLDEN) for argument in arguments))
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err_words
    assert os.listdir(tmp_path) == ["taken"]
    assert sorted(os.listdir(packed)) == before


def test_overwrite_replaces_a_model(command, packed, tmp_path):
    shutil.copytree(GOLDEN / "fp4", tmp_path / "out")
    (tmp_path / "out" / "old").write_text("")
    assert command("convert", packed, tmp_path / "out", "--to", "bitsandbytes", "--overwrite").code == 0
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(GOLDEN / "nf4"))
    assert os.listdir(tmp_path) == ["out"]


def test_ctrl_c_is_exit_code_130_and_a_rerun_works(command, packed, tmp_path, monkeypatch):
    @contextmanager
    def interrupting(label):
        yield lambda done, total: signal.raise_signal(signal.SIGINT)

    arguments = ("convert", packed, tmp_path / "out", "--to", "bitsandbytes")
    with monkeypatch.context() as patch:
        patch.setattr("qlora_rs.cli.output.progress_bytes", interrupting)
        outcome = command(*arguments)
    assert outcome.code == 130
    assert "out.partial" in outcome.err
    assert os.listdir(tmp_path) == ["out.partial"]
    assert command(*arguments).code == 0
    assert os.listdir(tmp_path) == ["out"]


def test_a_dry_run_writes_nothing_and_says_what_the_run_will(command, packed, tmp_path):
    arguments = ("convert", packed, tmp_path / "out", "--to", "bf16", "--jobs", "1")
    planned = command(*arguments, "--dry-run")
    assert "would be written to" in planned.err_words
    assert os.listdir(tmp_path) == []
    assert command(*arguments).out == planned.out
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    report = json.loads(command("convert", packed, tmp_path / "other", "--to", "bf16", "--dry-run", "--json").out)
    assert 0 < size - report["bytes_after"] < 10_000  # the header


def test_a_dry_run_of_gguf_writes_nothing_and_says_the_same_size(command, tiny_llama, tmp_path):
    arguments = ("convert", tiny_llama, tmp_path / "model.gguf", "--to", "gguf", "--json")
    planned = json.loads(command(*arguments, "--dry-run").out)
    assert os.listdir(tmp_path) == []
    assert json.loads(command(*arguments).out)["bytes_after"] == planned["bytes_after"]


def test_inspect_shows_a_bitsandbytes_folder(command):
    outcome = command("inspect", GOLDEN / "nf4-double")
    assert "bitsandbytes: nf4, block_size=64, double_quant=True" in outcome.out
    assert "7 weights" in outcome.out_words
    report = json.loads(command("inspect", GOLDEN / "nf4-double", "--json").out)
    assert report["spec"] == {"quant_type": "nf4", "block_size": 64, "double_quant": True}


def test_help_teaches_with_an_example(command):
    outcome = command("convert", "--help")
    assert "qlora-rs convert Llama-3.2-1B-nf4 Llama-3.2-1B-bnb --to bitsandbytes" in outcome.out
    for option in ("--to", "--jobs", "--overwrite", "--dry-run", "--json"):
        assert option in outcome.out


def test_gguf_is_one_file(command, tiny_llama, tmp_path):
    outcome = command("convert", tiny_llama, tmp_path / "model.gguf", "--to", "gguf", "--type", "q8_0", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert (report["source"], report["target"], report["files"]) == ("float", "gguf q8_0", ["model.gguf"])
    assert (tmp_path / "model.gguf").read_bytes().startswith(b"GGUF")


def test_compressed_tensors_are_written_from_16_bits_and_say_what_that_cost(command, tmp_path):
    outcome = command(
        "convert", GOLDEN / "source", tmp_path / "out", "--to", "compressed-tensors", "--block-size", "32"
    )
    assert outcome.code == 0, outcome.err
    assert "7 weights (not packed) from float to compressed-tensors, 9 other tensors" in outcome.out_words
    assert "note: rounding to packed INT4 changed the weights by 0.09" in outcome.out_words
    assert checkpoint.inspect(tmp_path / "out").schemes == ("4 bits, groups of 32, symmetric",)


def test_weights_of_gptq_become_native_of_the_type_asked(command, tmp_path):
    gptq = GOLDEN.parent / "foreign" / "gptq-4bit-g32-sym"
    outcome = command(
        "convert", gptq, tmp_path / "out", "--to", "native", "--type", "int8", "--no-double-quant", "--json"
    )
    assert outcome.code == 0, outcome.err
    assert "quantized anew" in json.loads(outcome.out)["notes"][0]
    assert checkpoint.inspect(tmp_path / "out").spec == QuantSpec("int8", 64, False)
