"""``qlora-rs diff``: what it says, and its exit code."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from qlora_rs import QuantSpec, checkpoint

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def changed(packed_llama: Path, tmp_path: Path, flip_bit) -> Path:
    """The packed tiny Llama with one bit flipped in its codes."""
    shutil.copytree(packed_llama, tmp_path / "changed")
    flip_bit(tmp_path / "changed" / "model.safetensors", UP, bit=0x80)
    return tmp_path / "changed"


def test_a_copy_is_exit_code_0(command, packed_llama):
    outcome = command("diff", packed_llama, packed_llama)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[-1] == "21 tensors: 21 same; A and B hold the same tensors in the same bytes"


def test_a_changed_code_is_exit_code_1_with_its_tensor_alone(command, packed_llama, changed):
    outcome = command("diff", packed_llama, changed)
    assert (outcome.code, outcome.err) == (1, "")
    assert f"B  {changed} (qlora_rs: nf4, block_size=64, double_quant=True)" in outcome.out
    (row,) = [line for line in outcome.out.splitlines() if line.startswith("model.")]
    assert row.split()[0] == UP
    assert "codes 1 of 9,432" in row
    assert "21 tensors: 20 same, 1 different; where they differ: largest absolute difference " in outcome.out


def test_layers_are_folded_and_all_unfolds_them(command, packed_llama, tiny_llama):
    outcome = command("diff", tiny_llama, packed_llama)
    assert outcome.code == 1
    (row,) = [line for line in outcome.out.splitlines() if "q_proj" in line]
    assert row.split()[:5] == ["model.layers.0-1.self_attn.q_proj.weight", "2", "BF16", "/", "nf4"]
    assert 0.05 < float(row.split()[-1]) < 0.2
    rows = [line for line in command("diff", tiny_llama, packed_llama, "--all").out.splitlines() if "weight " in line]
    assert len(rows) == 21
    assert sum(" same" in row for row in rows) == 7


def test_tensors_of_one_side_are_named(command, packed_llama, tiny_llama, make_tiny_llama, tmp_path):
    deeper = make_tiny_llama(tmp_path / "deeper", num_hidden_layers=3)
    outcome = command("diff", tiny_llama, deeper)
    assert outcome.code == 1
    assert "9 only in B" in outcome.out
    assert "only in B" in next(line for line in outcome.out.splitlines() if "layers.2.mlp.up_proj" in line)


def test_json_is_one_document_and_infinities_become_null(command, packed_llama, tiny_llama, changed, tmp_path):
    for a, b, code in ((packed_llama, packed_llama, 0), (packed_llama, changed, 1), (tiny_llama, changed, 1)):
        outcome = command("diff", a, b, "--json")
        document = json.loads(outcome.out)
        assert (outcome.code, document["same"]) == (code, code == 0)
        assert set(document["summary"]) == {
            *("same", "different", "only_in_a", "only_in_b", "max_abs_difference", "relative_error"),
        }
        assert len(document["tensors"]) == 21
    checkpoint.quantize(tiny_llama, tmp_path / "plain", QuantSpec(double_quant=False))
    document = json.loads(command("diff", packed_llama, tmp_path / "plain", "--json").out)
    up = next(tensor for tensor in document["tensors"] if tensor["name"] == UP)
    assert up["parts"] == [{"part": "codes", "differing": 0, "total": 131 * 72}]
    assert up["a"]["shape"] == [131, 72]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{packed}"], "B"),
        (["{packed}", "nowhere"], "nowhere: no such model folder"),
        (["{packed}/model.safetensors", "{packed}"], "not a model folder"),
    ],
)
def test_wrong_use_is_exit_code_2(command, packed_llama, arguments, message):
    outcome = command("diff", *(each.format(packed=packed_llama) for each in arguments))
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err_words


def test_a_truncated_file_is_exit_code_2_with_its_name(command, packed_llama, changed):
    path = changed / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    outcome = command("diff", packed_llama, changed)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"error: {path}: " in outcome.err_words


def test_ctrl_c_is_exit_code_130(command, packed_llama, changed, monkeypatch):
    @contextmanager
    def interrupting(label):
        yield lambda done, total: signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("qlora_rs.cli.output.progress_bytes", interrupting)
    outcome = command("diff", packed_llama, changed)
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "interrupted\n")
