"""The main job on a real model: quantize, measure, fine-tune, measure again (`make demo` runs this).

Everything it makes goes into `demo-output/`. The commands that it prints can be typed as they stand.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
# Beside other work, OpenMP's waiting threads would take the time that the working ones need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import prepare_demo

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "demo-output"
BROWN = ROOT / "tests" / "data" / "brown_eval.txt"
TOKENS, WINDOW = 4096, 512  # of the perplexity
HELD_OUT_CHATS, MAX_LENGTH = 40, 128
PROMPT = "Hi! What did you do last weekend?"


def main() -> None:
    """Run every step; stop at the first that fails."""
    started = time.monotonic()
    if OUTPUT.exists():
        shutil.rmtree(OUTPUT)
    OUTPUT.mkdir()
    source, chats = prepare_demo.prepare_model(), prepare_demo.prepare_chats()
    nf4, nested, adapter = OUTPUT / "smollm2-nf4", OUTPUT / "smollm2-nf4-dq", OUTPUT / "adapter"

    heading("1. Quantize SmolLM2-135M-Instruct: 16 bits to 4, files to files")
    command("quantize", shown(source), shown(nested))
    say("The same without double quantization, to compare:\n")
    command("quantize", shown(source), shown(nf4), "--no-double-quant", show_output=False)
    command("inspect", shown(nested))

    heading("2. What that costs: size, and perplexity on edited English prose")
    model = measure(source, nf4, nested)

    heading("3. Fine-tune it on human chats, through LoRA adapters over the frozen 4-bit base")
    from qlora_rs.train import held_out_loss

    def measure_chats() -> float:
        heldout = chats / "heldout.jsonl"
        return held_out_loss(model, nested, heldout, max_samples=HELD_OUT_CHATS, max_length=MAX_LENGTH)

    before = measure_chats()
    command(
        *(
            "train",
            "--model",
            shown(nested),
            "--data",
            shown(chats / "train.jsonl"),
            "--output",
            shown(adapter),
        ),
        *("--steps", "60", "--batch-size", "4", "--max-length", str(MAX_LENGTH)),
        *("--r", "8", "--lr", "1e-3", "--warmup", "5", "--seed", "0"),
    )

    heading("4. What it learned")
    import qlora_rs

    qlora_rs.load_adapter(model, adapter)
    after = measure_chats()
    say(f"loss on {HELD_OUT_CHATS} chats that it never saw (nats a token, the answers only):")
    say(f"    before {before:.3f}\n    after  {after:.3f}\n")
    command("generate", shown(nested), "--prompt", PROMPT)
    command("generate", shown(nested), "--prompt", PROMPT, "--adapter", shown(adapter))
    if after >= before:
        raise SystemExit("the loss on held-out chats did not fall: something is wrong")
    closing(nf4, nested, adapter, time.monotonic() - started)


def measure(source: Path, nf4: Path, nested: Path) -> Any:
    """Print the table; return the doubly quantized model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import qlora_rs
    from qlora_rs.eval.perplexity import perplexity

    logging.disable_progress_bar()  # it would break the table
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = BROWN.read_text(encoding="utf-8")[: 8 * TOKENS]
    tokens = torch.tensor(tokenizer(text).input_ids[:TOKENS])
    say(f"{'':24}{'weights on disk':>17}{'perplexity':>13}")
    for label, folder in (("16 bit", source), ("NF4", nf4), ("NF4 + double quant.", nested)):
        load = AutoModelForCausalLM if folder == source else qlora_rs
        model = load.from_pretrained(folder, dtype=torch.float32)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        say(f"{label:24}{size / 1e6:14.1f} MB{perplexity(model, tokens, window=WINDOW).ppl:13.2f}")
    say(
        f"\nFirst {TOKENS:,} tokens of the text in windows of {WINDOW}. Of each size 57 MB is the\n"
        "embedding, which stays in 16 bits; in a large model it hardly counts. Small models lose most to\n"
        "4 bits, and this one came from 4-bit weights already: its 16-bit values were made from them."
    )
    return model


def closing(nf4: Path, nested: Path, adapter: Path, seconds: float) -> None:
    """Say where everything is and what to try."""
    heading(f"Done in {seconds / 60:.1f} minutes. What there is now")
    say(f"{shown(nested) + '/':48}the packed model")
    say(f"{shown(nf4) + '/':48}the same without double quantization")
    for file in sorted(adapter.iterdir()):
        note = {
            "adapter_config.json": "the adapter, in PEFT's two files",
            "adapter_model.safetensors": "... with its weights",
            "training_state.safetensors": "what `train --resume` goes on from",
        }.get(file.name, {".jsonl": "a line per step", ".png": "the loss curve"}.get(file.suffix, ""))
        say(f"{shown(file) + ('/' if file.is_dir() else ''):48}{note}")
    say(
        f"""
Those were two commands:

  qlora-rs quantize SRC DST
  qlora-rs train --model DST --data CHATS --output ADAPTER

To go on, `source .venv/bin/activate`, and:

  qlora-rs generate {shown(nested)} --adapter {shown(adapter)} --prompt "Do you like music?"
  qlora-rs merge {shown(nested)} {shown(adapter)} demo-output/merged   # a plain 16-bit model again
  qlora-rs quantize --help                                       # other types, block sizes, layers to leave
  python examples/train_loop.py                                  # a loop of your own, in forty lines"""
    )


def command(*arguments: str, show_output: bool = True) -> None:
    """Print a qlora-rs command as one would type it, and run it."""
    say("$ qlora-rs " + shlex.join(arguments))
    program = Path(sys.executable).with_name("qlora-rs")
    stdout = None if show_output else subprocess.DEVNULL
    run = subprocess.run([str(program), *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stdout)
    if run.returncode != 0:
        raise SystemExit(f"qlora-rs {arguments[0]} ended with exit code {run.returncode}; its message is above")
    say()


def heading(text: str) -> None:
    """A line that stands out."""
    say(f"\n\033[1m{text}\033[0m\n" if sys.stdout.isatty() else f"\n{text}\n{'-' * len(text)}\n")


def say(text: str = "") -> None:
    """Print at once, so that lines of the commands come in between."""
    print(text, flush=True)


def shown(path: Path) -> str:
    """A path as one would type it from the root of the checkout."""
    return str(path.relative_to(ROOT))


if __name__ == "__main__":
    try:
        main()
    except prepare_demo.PrepareError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
