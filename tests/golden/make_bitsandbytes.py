"""Make the folders beside this file with transformers and bitsandbytes, on the CPU: what theirs looks like.

    make .venv/bench.stamp && .venv/bin/python tests/golden/make_bitsandbytes.py

Made with bitsandbytes 0.50.2, transformers 5.24.0, torch 2.15.0. `source` is the 16-bit model of all but
`nf4-crossing` and `nf4-crossing-double`, whose rows are no whole blocks. The second has weights of an odd number of
elements; the SHA-256 of the values that bitsandbytes makes of each, in bfloat16, is in `nf4-crossing-double.json`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent / "bitsandbytes"

FOLDERS: dict[str, dict[str, object]] = {
    "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "fp4-double": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "nf4-as-bf16": {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "nf4-as-f16": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.float16},
    "nf4-as-f32": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.float32},
    "nf4-skipping": {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head", "mlp.up_proj"]},
}


def write_source(folder: Path, hidden_size: int, intermediate_size: int, **others: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=1,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=False,
        **{"num_attention_heads": 4, "num_key_value_heads": 2, **others},
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_packed(source: Path, name: str, options: dict[str, object], max_shard_size: str = "5GB") -> torch.nn.Module:
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **options)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=asked, device_map="cpu")
    model.save_pretrained(HERE / name, max_shard_size=max_shard_size)
    return model


def write_values(model: torch.nn.Module, path: Path) -> None:
    """The SHA-256 of what bitsandbytes dequantizes."""
    values = {
        name: dequantize_4bit(parameter.data, parameter.quant_state)
        for name, parameter in model.named_parameters()
        if getattr(parameter, "quant_state", None) is not None
    }
    hashes = {
        name: hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, value in values.items()
    }
    path.write_text(json.dumps(hashes, indent=2) + "\n")


def write_crossing_double() -> None:
    """Rows of 35 and 129 elements, and a weight of 4515."""
    name = "nf4-crossing-double"
    with tempfile.TemporaryDirectory() as other:
        source = write_source(Path(other), 35, 129, num_attention_heads=5, num_key_value_heads=5, head_dim=8)
        write_values(write_packed(source, name, FOLDERS["nf4-double"]), HERE / f"{name}.json")


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    source = write_source(HERE / "source", 64, 384)
    for name, options in FOLDERS.items():
        write_packed(source, name, options)
    write_packed(source, "nf4-double-sharded", FOLDERS["nf4-double"], "20KB")
    with tempfile.TemporaryDirectory() as other:
        write_packed(write_source(Path(other), 72, 130), "nf4-crossing", FOLDERS["nf4"])
    write_crossing_double()
    for path in HERE.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


if __name__ == "__main__":
    main()
