"""``qlora-rs inspect``: a table that stays readable, and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_rs import checkpoint


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """30 layers of one odd weight, and one that stays."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "unknown"}')
    tensors = {f"layers.{layer}.up_proj.weight": torch.ones(5, 67) for layer in range(30)}
    save_file({**tensors, "norm.weight": torch.ones(7)}, source / "model.safetensors")
    checkpoint.quantize(source, tmp_path / "packed", include=["up_proj"])
    return tmp_path / "packed"


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_repeated_layers_are_folded_into_one_row(command, packed):
    code, out, _ = command("inspect", packed)
    assert code == 0
    row = next(line for line in out.splitlines() if "layers.0-29.up_proj.weight" in line)
    for cell in ("packed", "nf4", "5 x 67", "30"):
        assert cell in row
    assert "nf4, block_size=64, double_quant=True" in out
    assert "model.safetensors sha256" in out


def test_all_shows_every_tensor(command, packed):
    _, out, _ = command("inspect", packed, "--all")
    assert "layers.17.up_proj.weight" in out


def test_json_is_one_document(command, packed):
    code, out, _ = command("inspect", packed, "--json")
    document = json.loads(out)
    assert (code, document["format"], len(document["tensors"])) == (0, "qlora_rs", 31)


def test_a_float_folder_and_a_single_file_work_too(command, packed):
    code, out, _ = command("inspect", packed.parent / "source")
    assert code == 0
    assert "32.000 bits per weight" in " ".join(out.split())
    assert command("inspect", packed / "model.safetensors")[0] == 0


def test_what_is_no_checkpoint_is_exit_code_2(command, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"PK\x03\x04 not")
    for path, message in ((tmp_path / "absent", "absent"), (tmp_path / "x.safetensors", "zip archive")):
        code, out, err = command("inspect", path)
        assert (code, out) == (2, "")
        assert message in " ".join(err.split())


def test_help_teaches_with_an_example(command):
    code, out, _ = command("inspect", "--help")
    assert code == 0
    assert "qlora-rs inspect Llama-3.2-1B-nf4" in out


def test_a_source_measures_errors(command, packed):
    code, out, _ = command("inspect", packed, "--source", packed.parent / "source")
    assert code == 0
    words = {line.split()[0]: line for line in out.splitlines() if line}
    assert words["error"].split()[1] == "0.0000"  # weights of ones are packed without an error
    assert "bits are information" in words["codes"]


def test_a_report_is_written_and_its_figures_are_in_the_json(command, packed, tmp_path):
    for name in ("report.html", "report.png"):
        outcome = command("inspect", packed, "--report", tmp_path / name, "--json")
        assert outcome.code == 0, outcome.err
        document = json.loads(outcome.out)
        assert document["analysis"]["source"] is None
        assert len(document["analysis"]["weights"]) == 30
        assert (tmp_path / name).stat().st_size > 10_000
        assert f"report written to {tmp_path / name}" in outcome.err_words
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("path", "name", "message"),
    [
        ("packed", "report.pdf", ".html page or a .png picture"),
        ("packed", "absent/report.html", "no such folder"),
        ("source", "report.html", "is not packed"),
        ("packed", "folder.png", "is a folder"),
    ],
)
def test_reports_that_cannot_be_made_are_exit_code_2(command, packed, tmp_path, path, name, message):
    (tmp_path / "folder.png").mkdir()
    code, out, err = command("inspect", packed.parent / path, "--report", tmp_path / name)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert not (tmp_path / name).is_file()
