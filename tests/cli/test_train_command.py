"""``qlora-rs train``: results, messages and exit codes."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_rs


@pytest.fixture
def run(
    command: Callable[..., Any],
    packed_llama: Path,
    write_chats: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Any]]:
    """Run the command in tmp_path, where `model`, `chats.jsonl` and `adapter` lie."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(packed_llama)
    write_chats()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small only wait for each other on more
    files = ("--model", "model", "--data", "chats.jsonl", "--output", "adapter")
    yield lambda *arguments: command("train", *files, *arguments)
    torch.set_num_threads(threads)


def test_results_go_to_stdout_and_messages_to_stderr(run, tmp_path):
    outcome = run("--steps", 3, "--eval-fraction", 0.2)
    assert outcome.code == 0, outcome.err
    for part in ("trained 3 steps", "held-out loss", "in adapter: adapter_config.json, adapter_model.safetensors"):
        assert part in outcome.out_words
    for part in ("24 samples (24 as messages)", "LoRA on 14 layers", "step 1/3 loss", "step 3/3 loss"):
        assert part in outcome.err_words
    assert sorted(os.listdir(tmp_path)) == ["adapter", "chats.jsonl", "model"]


def test_json_is_one_document_with_everything_in_it(run):
    outcome = run("--steps", 2, "--json")
    report = json.loads(outcome.out)
    assert (report["steps"], report["layers"], report["data"]["lines"]) == (2, 14, 24)
    assert report["settings"]["--lr"] == 2e-4
    assert report["eval_loss_before"] is None
    assert report["tokens_per_second"] > 0


def test_options_reach_the_adapter(run, tmp_path):
    patterns = ("--target-modules", "q_proj", "--target-modules", "*.mlp.up_proj")
    assert run("--steps", 1, "--r", 3, "--lora-alpha", 5, "--lora-dropout", 0.25, "--use-rslora", *patterns).code == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["use_rslora"]) == (3, 5, 0.25, True)
    assert config["target_modules"] == ["q_proj", "up_proj"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 3, "--epochs", 1], "--steps 3 and --epochs 1 exclude each other"),
        (["--resume", "--overwrite"], "--resume goes on with what --overwrite would replace"),
        (["--resume"], "no saved state, so there is nothing to resume: run without --resume"),
        (["--steps", 0], "--steps"),
        (["--lr", "fast"], "--lr"),
        (["--lr", 0], "--lr is positive"),
        (["--dtype", "float16"], "auto, float32, bfloat16"),
        (["--eval-every", 2], "give --eval-fraction too"),
        (["--eval-fraction", 0.99], "leaves none to train on"),
        (["--steps", 2, "--warmup", 3], "--warmup 3 is longer than the run of 2 steps"),
        (["--max-length", 9999], "--max-length 9999 is more than the 512 tokens"),
        (["--target-modules", "q_porj"], "q_proj"),
        (["--output", "model"], "choose another"),
        (["--output", "model/adapter"], "choose another"),
        (["--output", "taken"], "taken: exists and is not empty: choose another, or --overwrite"),
        (["--output", "chats.jsonl"], "chats.jsonl: is no folder"),
        (["--model", "absent"], "absent: no such model folder"),
        (["--data", "absent.jsonl"], "absent.jsonl: no such file; --data takes a JSONL file"),
        (["--data", "taken"], "taken: is a folder; --data takes one JSONL file"),
        (["--data", "empty.jsonl"], "empty.jsonl: holds no samples"),
        (["--data", "bad.jsonl"], "bad.jsonl, line 2: messages[0] has the role 'bot'"),
    ],
)
def test_wrong_use_and_bad_input_are_exit_code_2_with_a_message_that_helps(run, tmp_path, arguments, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"messages": [{"role": "bot", "content": "a"}]}\n')
    before = sorted(os.listdir(tmp_path))
    outcome = run(*arguments)
    assert outcome.code == 2, outcome.err
    assert message in outcome.err_words
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert sorted(os.listdir(tmp_path)) == before
    assert os.listdir(tmp_path / "taken") == ["notes.txt"]


def test_overwrite_replaces_a_run_and_leaves_other_files(run, tmp_path, losses):
    assert run("--steps", 2, "--seed", 1).code == 0
    (tmp_path / "adapter" / "notes.txt").touch()
    first = losses(tmp_path / "adapter")
    assert run("--steps", 2).code == 2
    assert losses(tmp_path / "adapter") == first
    assert run("--steps", 2, "--overwrite").code == 0
    assert losses(tmp_path / "adapter") != first
    assert (tmp_path / "adapter" / "notes.txt").exists()


def test_resuming_another_run_names_the_differences(run):
    assert run("--steps", 2).code == 0
    outcome = run("--steps", 2, "--lr", 0.5, "--seed", 3, "--resume")
    assert outcome.code == 2
    assert "--lr was 0.0002, now 0.5; --seed was 0, now 3" in outcome.err_words
    finished = run("--steps", 2, "--resume")
    assert finished.code == 2
    assert "nothing left to do: 2 of 2 steps are done" in finished.err_words


def test_a_damaged_state_is_exit_code_2(run, tmp_path):
    assert run("--steps", 2).code == 0
    state = tmp_path / "adapter" / "training_state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    outcome = run("--steps", 2, "--resume")
    assert outcome.code == 2
    assert "training_state.safetensors: not a whole safetensors file" in outcome.err_words
    assert "--overwrite" in outcome.err


def test_divergence_is_exit_code_2_and_names_the_step(run):
    outcome = run("--steps", 9, "--lr", 1e30)
    assert outcome.code == 2
    assert "of 9: " in outcome.err_words
    assert "Lower --lr" in outcome.err_words


@pytest.mark.parametrize(
    ("limit", "file"),
    [(0, "log.jsonl"), (1000, "adapter_model.safetensors"), (100_000, "training_state.safetensors")],
)
def test_a_full_disk_is_exit_code_3_and_names_the_file_and_the_last_good_ones_stay(run, tmp_path, limit, file):
    """A limit on the size of files, as a test cannot fill a disk."""
    settings = ("--steps", 2, "--r", 8)
    assert run(*settings).code == 0
    output = tmp_path / "adapter"
    weights = output / "adapter_model.safetensors"
    good = weights.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        outcome = run(*settings, "--seed", 4, "--overwrite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert outcome.code == 3, outcome.err
    assert f"error: adapter/{file}" in outcome.err_words
    assert "File too large" in outcome.err_words
    assert "Traceback" not in outcome.err
    assert not [name for name in os.listdir(output) if name.endswith(".partial")]
    qlora_rs.adapters.read_adapter(output)
    if file != "training_state.safetensors":  # the adapter is whole and new by then
        assert weights.read_bytes() == good


def test_help_teaches_with_an_example(run):
    outcome = run("--help")
    assert outcome.code == 0
    assert "qlora-rs train --model Llama-3.2-1B-nf4" in outcome.out_words
    for option in ("--lr", "--steps", "--epochs", "--grad-accum", "--eval-fraction", "--resume", "--overwrite"):
        assert option in outcome.out


def test_ctrl_c_while_the_model_is_loaded_ends_without_a_trace(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "qlora_rs.train.run.from_pretrained", lambda *args, **settings: signal.raise_signal(signal.SIGINT)
    )
    outcome = run("--steps", 2)
    assert (outcome.code, outcome.out) == (130, "")
    assert "interrupted" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "adapter").exists()


def stopped_by(number: signal.Signals, tmp_path: Path, line_start: str, *arguments: str) -> tuple[int, str, str]:
    """A process of its own that gets a signal once a line on stderr begins so; exit code, stdout and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from qlora_rs.cli import main; main()", "train", *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = ""
    try:
        assert process.stderr is not None
        for line in process.stderr:
            seen += line
            if line.startswith(line_start):
                process.send_signal(number)
                break
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, seen + err


def test_a_real_ctrl_c_saves_and_resume_gives_the_same_bits(run, tmp_path, losses):
    settings = ("--epochs", "6", "--batch-size", "2", "--lora-dropout", "0.1", "--lr", "0.01", "--r", "4")
    files = ("--model", "model", "--data", "chats.jsonl", "--output", "stopped")
    code, out, err = stopped_by(signal.SIGINT, tmp_path, "step  6/72", *files, *settings)
    assert (code, out) == (130, ""), err
    assert "Traceback" not in err
    assert "of 72, which is saved in stopped: the same command with --resume goes on" in " ".join(err.split())
    done = len(losses(tmp_path / "stopped"))
    assert 6 <= done < 72
    assert run(*settings).code == 0
    resumed = run(*settings, "--output", "stopped", "--resume", "--json")
    assert json.loads(resumed.out)["resumed_at"] == done
    assert losses(tmp_path / "stopped") == losses(tmp_path / "adapter")
    name = "adapter_model.safetensors"
    assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_a_killed_run_with_paged_weights_and_state_goes_on_with_the_same_bits(run, make_tiny_llama, tmp_path, losses):
    qlora_rs.checkpoint.quantize(make_tiny_llama(tmp_path / "float", num_hidden_layers=5), tmp_path / "deep")
    paged = ("--optimizer", "paged_adamw8bit", "--gradient-checkpointing", "--memory-budget")
    settings = ("--model", "deep", "--steps", "40", "--batch-size", "2", "--r", "16", "--save-every", "3")
    refused = run(*settings, *paged, "4096")
    assert refused.code == 2
    least = re.search(r"at least (\d+) bytes", refused.err_words)
    assert least is not None
    settings += (*paged, least[1])
    files = ("--data", "chats.jsonl", "--output", "killed")
    code, _, err = stopped_by(signal.SIGKILL, tmp_path, "step  8/40", *files, *settings)
    assert code == -signal.SIGKILL, err
    assert run(*settings).code == 0
    resumed = run(*settings, "--output", "killed", "--resume", "--json")
    at = json.loads(resumed.out)["resumed_at"]
    assert 6 <= at < 40
    assert at % 3 == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "adapter")
    name = "adapter_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
