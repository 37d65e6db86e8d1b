"""``qlora-rs verify``: what it says, and its exit code."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def damaged(packed_llama: Path, tmp_path: Path, flip_bit) -> Path:
    """The packed tiny Llama with one bit flipped in its codes."""
    shutil.copytree(packed_llama, tmp_path / "damaged")
    flip_bit(tmp_path / "damaged" / "model.safetensors", UP)
    return tmp_path / "damaged"


def test_an_untouched_pair_is_exit_code_0(command, packed_llama, tiny_llama):
    outcome = command("verify", packed_llama, "--source", tiny_llama)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines() == [
        "source model.safetensors: the recorded SHA-256",
        "compared 14 weights quantized again as nf4, block_size=64, double_quant=True, and 7 tensors as they are",
        f"verified: the tensors of {packed_llama} are what quantizing {tiny_llama} gives, to the last bit",
    ]


@pytest.mark.parametrize("options", [[], ["--requantize"]])
def test_a_flipped_bit_is_exit_code_1_with_tensor_and_count(command, damaged, tiny_llama, options):
    outcome = command("verify", damaged, "--source", tiny_llama, *options)
    assert (outcome.code, outcome.err) == (1, "")
    assert f"different {UP}: codes 1 of 9,432\n" in outcome.out


def test_layers_that_differ_alike_are_told_of_in_one_line(command, packed_llama, make_tiny_llama, tmp_path):
    other = make_tiny_llama(tmp_path / "other", seed=1)
    outcome = command("verify", packed_llama, "--source", other)
    assert outcome.code == 1
    (line,) = [line for line in outcome.out.splitlines() if "q_proj" in line]
    assert line.startswith("different model.layers.0-1.self_attn.q_proj.weight (2): codes ")
    assert "source model.safetensors: SHA-256 " in outcome.out
    assert f"{other} is not what {packed_llama} was made from" in outcome.out


def test_hashes_alone_do_not_see_the_flipped_bit_and_say_so(command, damaged, tiny_llama):
    outcome = command("verify", damaged, "--source", tiny_llama, "--hashes-only")
    assert outcome.code == 0
    assert "the packed tensors were not compared" in outcome.out


@pytest.mark.parametrize("same", [True, False])
def test_json_is_one_document(command, packed_llama, damaged, tiny_llama, same):
    outcome = command("verify", packed_llama if same else damaged, "--source", tiny_llama, "--json")
    document = json.loads(outcome.out)
    assert outcome.code == (0 if same else 1)
    assert list(document) == [
        *("same", "same_files", "packed", "source", "spec", "files", "summary", "tensors", "notes"),
    ]
    assert (document["same"], len(document["tensors"])) == (same, 21)
    assert set(document["tensors"][0]) == {"name", "kind", "status", "parts", "reason"}
    assert set(document["files"][0]) == {"file", "recorded", "found", "same"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{packed}"], "--source"),
        (["{packed}", "--source", "nowhere"], "nowhere: no such model folder"),
        (["nowhere", "--source", "{source}"], "nowhere: no such model folder"),
        (["{source}", "--source", "{source}"], "is not quantized; verify checks a folder that qlora-rs packed"),
        (["{packed}", "--source", "{packed}"], "give the 16-bit model"),
        (["{packed}", "--source", "{source}", "--requantize", "--hashes-only"], "exclude each other"),
    ],
)
def test_wrong_use_is_exit_code_2(command, packed_llama, tiny_llama, arguments, message):
    outcome = command("verify", *(each.format(packed=packed_llama, source=tiny_llama) for each in arguments))
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err_words


def test_a_truncated_file_is_exit_code_2_with_its_name(command, damaged, tiny_llama):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    outcome = command("verify", damaged, "--source", tiny_llama)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"error: {path}: " in outcome.err_words


def test_ctrl_c_is_exit_code_130(command, packed_llama, tiny_llama, monkeypatch):
    @contextmanager
    def interrupting(label):
        yield lambda done, total: signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("qlora_rs.cli.output.progress_bytes", interrupting)
    outcome = command("verify", packed_llama, "--source", tiny_llama)
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "interrupted\n")


def test_a_bitsandbytes_folder_that_only_rounds_otherwise_is_no_difference(command, repository):
    golden = repository / "tests" / "golden" / "bitsandbytes"
    outcome = command("verify", golden / "nf4-double", "--source", golden / "source")
    assert outcome.code == 0
    assert "absmax 12 of 384 (12 of them at a border)" in outcome.out
    assert command("verify", golden / "nf4", "--source", golden / "nf4-as-f16").code == 2
