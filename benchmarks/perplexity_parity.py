"""Perplexity of a real model, quantized by us and by bitsandbytes: they have to agree to three digits.

    python benchmarks/perplexity_parity.py

Text: the first 4,096 tokens of tests/data/brown_eval.txt in windows of 512, the first token of each unscored;
float32 arithmetic. The model is SmolLM2-135M-Instruct (`make demo` makes it), whose weights have
been through one 4-bit quantization before: the step from 16 bit is not that of a model fresh from training.
"""

from __future__ import annotations

import argparse
import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import harness

MODEL = harness.ROOT / ".cache" / "models" / "smollm2-135m-instruct"
TEXT = harness.ROOT / "tests" / "data" / "brown_eval.txt"
TOKENS = 4096


def load(path: Path):  # type: ignore[no-untyped-def]
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def quantize_by_peer(model, names: tuple[str, ...], quant_type: str, nested: bool) -> None:  # type: ignore[no-untyped-def]
    """Replace each weight by what bitsandbytes' CPU path makes of it."""
    import bitsandbytes.functional as peer

    for name in names:
        weight = model.get_submodule(name).weight
        # One row: its CPU dequantize is wrong where the last dimension is no multiple of the block.
        flat = weight.data.reshape(1, -1)
        codes, state = peer.quantize_4bit(flat, blocksize=64, quant_type=quant_type, compress_statistics=nested)
        weight.data = peer.dequantize_4bit(codes, state).reshape(weight.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    options = parser.parse_args()

    from transformers import AutoTokenizer

    import qlora_rs
    from qlora_rs.eval.perplexity import perplexity
    from qlora_rs.selection import select_linear

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0, :TOKENS]
    print(harness.machine(("torch", "transformers", "bitsandbytes")), flush=True)
    plain = load(options.model)
    base = perplexity(plain, tokens).ppl
    names = select_linear(plain).packed
    del plain
    rows = []
    for quant_type, nested in (("nf4", False), ("nf4", True), ("fp4", False)):
        model = load(options.model)
        spec = qlora_rs.QuantSpec(quant_type, double_quant=nested)
        qlora_rs.quantize_model(model, spec)
        ours = perplexity(model, tokens).ppl
        model = load(options.model)
        quantize_by_peer(model, names, quant_type, nested)
        theirs = perplexity(model, tokens).ppl
        same = f"{ours:.3g}" == f"{theirs:.3g}"
        label = f"{quant_type.upper()}{' + double quantization' if nested else ''}"
        rows.append((label, f"{ours:.4f}", f"{theirs:.4f}", "yes" if same else "NO"))
    print(f"\n16 bit: {base:.4f}\n")
    print(harness.table(("", "ours", "bitsandbytes", "equal to 3 digits"), rows))


if __name__ == "__main__":
    main()
